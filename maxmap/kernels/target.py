"""What all ways of computing an operation share: the target platform of a program, its mesh and its precision."""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec

Array = jax.Array

_inside_triton: contextvars.ContextVar[bool] = contextvars.ContextVar("inside of a Triton kernel", default=False)
# Numerator and denominator of erf(x) / x in x^2 for |x| <= 4, as in Eigen and XLA.
_ERF = (
    (
        *(-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05),
        *(-7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02),
    ),
    (
        *(-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03),
        -1.42647390514189e-02,
    ),
)

_short_erf: contextvars.ContextVar[bool] = contextvars.ContextVar("error function for bfloat16", default=False)
# tanh(x * polynomial of x^2) is the error function to 3e-6; the highest power first.
_TANH = (3.2246264e-05, -4.1515519e-04, -4.9678458e-04, 1.0293293e-01, 1.1283582)

# Part of the key of JAX's caches: a function that was traced for one platform is traced again for another.
_platform = jax.make_user_context(None)


def compiled_for(platform: str) -> AbstractContextManager[None]:
    """Traces programs for a platform that need not be here, for example to compile for a TPU on a CPU.

    `with compiled_for("tpu"): jax.jit(step).trace(state)` gives the program that a TPU would run. Without this context
    programs are traced for JAX's default backend.

    Args:
      platform: "cpu", "gpu" or "tpu"; "plain" and "onnx" are forms of a program that no platform runs, see
        `maxmap.operations.IMPLEMENTATIONS`.

    Returns:
      The context.
    """
    return _platform(platform)


def platform() -> str:
    """Returns the platform that programs are traced for: "cpu", "gpu" or "tpu"."""
    return _platform.value or jax.default_backend()


def local_batch(batch: int) -> int | None:
    """Returns how many samples of a batch each device of the current mesh has; None if the devices do not divide it."""
    return None if batch % devices() else batch // devices()


def over_batch(
    function: Callable[..., Any], arguments: Sequence[Any], axes: Sequence[int | None], out_axes: Sequence[int | None]
) -> Any:
    """Calls a function on every device's part of the batch: XLA cannot split a kernel that is written by hand.

    The mesh is the one that `jax.set_mesh` or `maxmap.sharding.traced_on` names; all of its axes split the batch.

    Args:
      function: of arrays or trees of arrays.
      arguments: of the function.
      axes: of the batch in each argument; None for an argument that all devices have.
      out_axes: the same for the results; None for a sum over the batch: the devices' parts are added up.

    Returns:
      The results.
    """
    if devices() == 1:
        return function(*arguments)
    mesh = jax.sharding.get_abstract_mesh()

    def split(axis: int | None) -> PartitionSpec:
        return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, mesh.axis_names)

    def part(*arguments: Any) -> tuple[Any, ...]:
        results = function(*arguments)
        return tuple(
            jax.tree.map(lambda x: x[None], result) if axis is None else result
            for result, axis in zip(results, out_axes, strict=True)
        )

    results = jax.shard_map(
        part,
        mesh=mesh,
        in_specs=tuple(split(axis) for axis in axes),
        out_specs=tuple(split(axis or 0) for axis in out_axes),
        check_vma=False,  # a Pallas call does not say which axes its results differ along
    )(*arguments)
    return tuple(
        jax.tree.map(lambda x: jnp.sum(x, axis=0), result) if axis is None else result
        for result, axis in zip(results, out_axes, strict=True)
    )


def devices() -> int:
    """Returns how many devices a batch is split over here: 1 without a mesh, and inside of a `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size if not mesh.empty and all(kind == AxisType.Auto for kind in mesh.axis_types) else 1


def kernel_calls(jaxpr: Any) -> Iterator[Any]:
    """Yields the equations of a traced program that call kernels written by hand, wherever in it."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
            continue
        for inner in programs_in(equation):
            yield from kernel_calls(inner)


def programs_in(equation: Any) -> list[Any]:
    """Returns the traced programs that an equation of another one calls."""
    leaves = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns"))
    return [leaf for leaf in leaves if hasattr(leaf, "eqns")]


def kernel_name(equation: Any) -> str:
    """Returns the name of a kernel, given the equation that calls it."""
    return str(equation.params.get("name") or getattr(equation.params.get("name_and_src_info"), "name", None))


@contextlib.contextmanager
def inside_triton() -> Iterator[None]:
    """Traces the inside of a kernel in operations that Triton has."""
    token = _inside_triton.set(platform() == "gpu")
    try:
        yield
    finally:
        _inside_triton.reset(token)


@contextlib.contextmanager
def short_erf() -> Iterator[None]:
    """Traces error functions to 3e-6: a third of the operations, where results are rounded to bfloat16 (to 2e-3)."""
    token = _short_erf.set(True)
    try:
        yield
    finally:
        _short_erf.reset(token)


def erf(x: Array) -> Array:
    """The error function. Pallas does not lower it for Triton: there it is a quotient of polynomials, for float32."""
    if _short_erf.get():
        return _erf_by_tanh(x)
    if not _inside_triton.get():
        return lax.erf(x)
    x = jnp.clip(x, -4, 4)
    over, under = (_horner(coefficients, x * x) for coefficients in _ERF)
    return x * over / under


@jax.custom_jvp
def _erf_by_tanh(x: Array) -> Array:
    return jnp.tanh(x * _horner(_TANH, x * x))


@_erf_by_tanh.defjvp
def _erf_by_tanh_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (tangent,) = primals, tangents
    return _erf_by_tanh(x), tangent * (2 / math.sqrt(math.pi)) * jnp.exp(-x * x)


def _horner(coefficients: Sequence[float], x: Array) -> Array:
    total = jnp.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + coefficient
    return total


def upcast(x: Array) -> Array:
    """Casts to float32, or leaves float64: the precision of statistics, softmax and Gram matrices."""
    return x.astype(accumulator(x.dtype))


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the type in which values of `dtype` are summed: float32 or wider."""
    return jnp.promote_types(dtype, jnp.float32)
