"""Batch normalisation that reads its map once in each direction for all of its sums.

For compilers of accelerators, which fuse these sums into what writes the map and the normalisation into what reads it.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from maxmap.kernels.target import Array, accumulator, upcast

Residuals = tuple[Array, Array, Array, Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def batch_norm(
    x: Array, scale: Array, bias: Array, near: Array, epsilon: float, parts: int, pixels: int = 1
) -> tuple[Array, Array, Array]:
    """Normalises each of several equal parts of a batch over all axes but the last.

    One pass sums x - `near` and its square. Their rounding errors grow with (mean - near)^2 / variance, which the
    running mean as `near` keeps small after the first steps; 0 gives Flax's one-pass form. Only `x` and values per
    channel are kept for the backward pass, which has one pass for both sums and one for the gradient of `x`.

    Args:
      x: `[B, ..., C]`; `[B, ..., pixels * C]` where several pixels lie side by side.
      scale: `[C]`, in float32 or wider.
      bias: `[C]`, in float32 or wider.
      near: an estimate of the mean, `[C]`. It has no gradient.
      epsilon: added to the variance.
      parts: number of parts, each of consecutive samples; it divides B.
      pixels: that lie side by side in the last axis.

    Returns:
      The normalised `x` in its type; mean and biased variance, both `[parts, C]` and without a gradient.
    """
    return _forward(x, scale, bias, near, epsilon, parts, pixels)[0]


def _forward(
    x: Array, scale: Array, bias: Array, near: Array, epsilon: float, parts: int, pixels: int
) -> tuple[tuple[Array, Array, Array], Residuals]:
    mean, var, inverse = statistics(x, near, epsilon, parts, pixels)
    y = normalised(x, *(jnp.tile(value, pixels) for value in (scale, bias, mean, inverse)))
    return (y.reshape(x.shape).astype(x.dtype), mean, var), (x, scale, mean, inverse)


def statistics(x: Array, near: Array, epsilon: float, parts: int, pixels: int = 1) -> tuple[Array, Array, Array]:
    """Returns mean, biased variance and 1 / its root with `epsilon`, each `[parts, C]`."""
    rows = in_parts(x, parts)
    near = near.astype(accumulator(x.dtype))
    deviation = upcast(rows) - spread(jnp.tile(near, pixels)[None], rows)
    offset, square = _means(deviation, jnp.square(deviation), pixels=pixels)
    var = jnp.maximum(square - jnp.square(offset), 0)
    return near[None] + offset, var, lax.rsqrt(var + epsilon)


def normalised(x: Array, scale: Array, bias: Array, mean: Array, inverse: Array) -> Array:
    """Returns the norm's output `[parts, B / parts, ..., C]` in float32 or wider."""
    rows, multiplier = in_parts(x, len(mean)), inverse * scale[None]
    return upcast(rows) * spread(multiplier, rows) + spread(bias[None] - mean * multiplier, rows)


def in_parts(x: Array, parts: int) -> Array:
    """Reshapes `[B, ..., C]` to `[parts, B / parts, ..., C]`."""
    return x.reshape(parts, -1, *x.shape[1:])


def _backward(
    epsilon: float, parts: int, pixels: int, residuals: Residuals, grads: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array, Array]:
    x, scale, mean, inverse = residuals
    rows, grad = (upcast(value.reshape(parts, -1, *x.shape[1:])) for value in (x, grads[0]))

    def each(value: Array) -> Array:
        return spread(jnp.tile(value, pixels), rows)

    of_bias, of_scale = _means(grad, grad * ((rows - each(mean)) * each(inverse)), pixels=pixels)
    # multiplier * (grad - of_bias - normalised * of_scale), as one factor of each map and one constant per channel
    multiplier = inverse * scale[None]
    factor = -multiplier * inverse * of_scale
    constant = -multiplier * of_bias - factor * mean
    grad_x = grad * each(multiplier) + rows * each(factor) + each(constant)
    of_scale, of_bias = (jnp.sum(mean, axis=0) * (math.prod(rows.shape[1:-1]) * pixels) for mean in (of_scale, of_bias))
    return (
        grad_x.reshape(x.shape).astype(x.dtype),
        of_scale.astype(scale.dtype),
        of_bias.astype(scale.dtype),
        jnp.zeros_like(scale),
    )


batch_norm.defvjp(_forward, _backward)


def _means(*maps: Array, pixels: int = 1) -> Array:
    """Means of maps `[parts, ..., pixels * C]` over all other axes and the pixels, `[maps, parts, C]`."""
    axes = tuple(range(1, maps[0].ndim - 1))
    sums = jnp.stack([jnp.sum(x, axis=axes) for x in maps])
    sums = jnp.sum(sums.reshape(*sums.shape[:2], pixels, -1), axis=2)
    return sums / (math.prod(maps[0].shape[1:-1]) * pixels)


def spread(x: Array, rows: Array) -> Array:
    """Gives `[parts or 1, C]` as many axes as `rows` `[parts, ..., C]`."""
    return jnp.expand_dims(x, tuple(range(1, rows.ndim - 1)))
