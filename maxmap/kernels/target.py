"""What all ways of computing an operation share: the platform that a program is compiled for, and its precision."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

Array = jax.Array

# Part of the key of JAX's caches: a function that was traced for one platform is traced again for another.
_platform = jax.make_user_context(None)


def compiled_for(platform: str) -> AbstractContextManager[None]:
    """Traces programs for a platform that need not be here, for example to compile for a TPU on a CPU.

    `with compiled_for("tpu"): jax.jit(step).trace(state)` gives the program that a TPU would run. Without this context
    programs are traced for JAX's default backend.

    Args:
      platform: "cpu", "gpu" or "tpu".

    Returns:
      The context.
    """
    return _platform(platform)


def platform() -> str:
    """Returns the platform that programs are traced for: "cpu", "gpu" or "tpu"."""
    return _platform.value or jax.default_backend()


def upcast(x: Array) -> Array:
    """Casts to float32, or leaves float64: the precision of statistics, softmax and Gram matrices."""
    return x.astype(accumulator(x.dtype))


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the type in which values of `dtype` are summed: float32 or wider."""
    return jnp.promote_types(dtype, jnp.float32)


def devices() -> int:
    """Returns the number of devices over which a program's batch is split: those of the mesh that is set, or one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


def over_batch(
    function: Callable[..., Sequence[Array]],
    operands: Sequence[Array],
    axes: Sequence[int | None],
    out_axes: Sequence[int | None],
) -> Sequence[Array]:
    """Calls a function on each device's part of the batch, where a mesh is set (`jax.sharding.use_abstract_mesh`).

    The compiler cannot split a Pallas kernel by itself.

    Args:
      function: of the operands; it returns a sequence of arrays.
      operands: the arrays.
      axes: the batch's axis in each operand, which all axes of the mesh split together; None for operands that every
        device gets whole. What is left over is not read.
      out_axes: the same for the results. Results without a batch are summed over the devices.

    Returns:
      The results.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(*operands)

    def spec(axis: int | None) -> PartitionSpec:
        return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, mesh.axis_names)

    def local(*operands: Array) -> tuple[Array, ...]:
        results = zip(function(*operands), out_axes, strict=False)
        return tuple(result[None] if axis is None else result for result, axis in results)

    in_specs = tuple(map(spec, axes[: len(operands)]))
    count = len(jax.eval_shape(function, *operands))
    out_specs = tuple(spec(axis or 0) for axis in out_axes[:count])
    results = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*operands)
    return [
        jnp.sum(result, axis=0) if axis is None else result for result, axis in zip(results, out_axes, strict=False)
    ]
