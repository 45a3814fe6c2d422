"""What all ways of computing an operation share: the platform that a program is compiled for, and its precision."""

from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp

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
