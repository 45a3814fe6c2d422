"""What kernels of whole residual branches share on TPUs and GPUs: their weights, their gradients, their devices."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from maxmap.kernels.target import Array, accumulator, over_batch

Weights = dict[str, Array]


def given(x: Array | None, shape: tuple[int, ...], value: float) -> Array:
    """Returns `x`, or an array of one value in its stead."""
    return jnp.full(shape, value, jnp.float32) if x is None else x


def norm_of(weights: Mapping[str, Any], channels: int) -> Array:
    """Returns scale and bias of a branch's norm, `[2, C]`."""
    return jnp.stack([given(weights["norm_scale"], (channels,), 1), given(weights["norm_bias"], (channels,), 0)])


def mlp_weights(weights: Mapping[str, Any], channels: int, hidden: int) -> Weights:
    """Returns the weights of an MLP and its norm as kernels take them: biases are matrices, none is None."""
    return {
        "norm": norm_of(weights, channels),
        "fc1_kernel": weights["fc1_kernel"],
        "fc1_bias": given(weights["fc1_bias"], (hidden,), 0)[None],
        "fc2_kernel": weights["fc2_kernel"],
        "fc2_bias": given(weights["fc2_bias"], (channels,), 0)[None],
    }


def in_types_of_kernels(weights: Weights, dtype: jnp.dtype) -> Weights:
    """Casts all weights but the matrices of products to float32 or wider."""
    wide = accumulator(dtype)
    return {name: w if name.endswith("kernel") else w.astype(wide) for name, w in weights.items()}


def keep_of(weights: Mapping[str, Any], batch: int, channels: int, dtype: jnp.dtype) -> Array:
    """Returns the factor of a branch for every sample, `[B, channels]` in float32 or wider."""
    keep = given(weights["keep"], (batch,), 1).astype(accumulator(dtype))
    return jnp.broadcast_to(keep[:, None], (batch, channels))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def residual_branch(
    forward: Callable[..., tuple[Array]],
    backward: Callable[..., tuple[Array, Weights]],
    axis: int,
    maps: list[Array],
    weights: Weights,
    keep: Array,
) -> Array:
    """Computes the last of `maps` + keep * branch(first of `maps`), on each device for its part of the batch.

    Args:
      forward: of maps, weights and `keep`, all of one device; returns a tuple with the output.
      backward: of the first map in a list, weights, `keep` and the output's gradient; returns the first map's gradient
        and those of the weights. The residual path's gradient is in the first map's unless it has a map of its own.
      axis: of the batch in maps.
      maps: what the branch reads, and what the residual path reads if that is something else.
      weights: of the branch.
      keep: the factor of the branch for every sample, which is the first axis; without a gradient.

    Returns:
      Like the maps.
    """
    (out,) = over_batch(forward, (maps, weights, keep), (axis, None, 0), (axis,))
    return out


def _forward(
    forward: Callable[..., tuple[Array]],
    backward: Callable[..., tuple[Array, Weights]],
    axis: int,
    maps: list[Array],
    weights: Weights,
    keep: Array,
) -> tuple[Array, tuple]:
    out = residual_branch(forward, backward, axis, maps, weights, keep)
    return out, (maps[:1], [None] * len(maps[1:]), weights, keep)


def _backward(
    forward: Callable[..., tuple[Array]],
    backward: Callable[..., tuple[Array, Weights]],
    axis: int,
    residuals: tuple,
    grad: Array,
) -> tuple[list[Array], Weights, Array]:
    first, others, weights, keep = residuals
    of_x, of_weights = over_batch(backward, (first, weights, keep, grad), (axis, None, 0, axis), (axis, None))
    of_weights = {name: g.astype(weights[name].dtype) for name, g in of_weights.items()}
    return [of_x, *(grad for _ in others)], of_weights, jnp.zeros_like(keep)


residual_branch.defvjp(_forward, _backward)
