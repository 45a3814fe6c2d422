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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def batch_norm(
    x: Array, scale: Array, bias: Array, near: Array, epsilon: float, parts: int
) -> tuple[Array, Array, Array]:
    """Normalises each of several equal parts of a batch over all axes but the last.

    One pass sums x - `near` and its square. Their rounding errors grow with (mean - near)^2 / variance, which the
    running mean as `near` keeps small after the first steps; 0 gives Flax's one-pass form. Only `x` and values per
    channel are kept for the backward pass, which has one pass for both sums and one for the gradient of `x`.

    Args:
      x: `[B, ..., C]`.
      scale: `[C]`, in float32 or wider.
      bias: `[C]`, in float32 or wider.
      near: an estimate of the mean, `[C]`. It has no gradient.
      epsilon: added to the variance.
      parts: number of parts, each of consecutive samples; it divides B.

    Returns:
      The normalised `x` in its type; mean and biased variance, both `[parts, C]` and without a gradient.
    """
    return _forward(x, scale, bias, near, epsilon, parts)[0]


def _forward(
    x: Array, scale: Array, bias: Array, near: Array, epsilon: float, parts: int
) -> tuple[tuple[Array, Array, Array], Residuals]:
    rows = x.reshape(parts, -1, *x.shape[1:])  # [parts, B / parts, ..., C]
    near = near.astype(accumulator(x.dtype))
    offset, square = _means((deviation := upcast(rows) - _spread(near[None], rows)), jnp.square(deviation))
    var = jnp.maximum(square - jnp.square(offset), 0)
    mean = near[None] + offset
    inverse = lax.rsqrt(var + epsilon)
    multiplier = inverse * scale[None]
    y = upcast(rows) * _spread(multiplier, rows) + _spread(bias[None] - mean * multiplier, rows)
    return (y.reshape(x.shape).astype(x.dtype), mean, var), (x, scale, mean, inverse)


def _backward(
    epsilon: float, parts: int, residuals: Residuals, grads: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array, Array]:
    x, scale, mean, inverse = residuals
    rows, grad = (upcast(value.reshape(parts, -1, *x.shape[1:])) for value in (x, grads[0]))
    of_bias, of_scale = _means(grad, grad * ((rows - _spread(mean, rows)) * _spread(inverse, rows)))
    # multiplier * (grad - of_bias - normalised * of_scale), as one factor of each map and one constant per channel
    multiplier = inverse * scale[None]
    factor = -multiplier * inverse * of_scale
    constant = -multiplier * of_bias - factor * mean
    grad_x = grad * _spread(multiplier, rows) + rows * _spread(factor, rows) + _spread(constant, rows)
    of_scale, of_bias = (jnp.sum(mean, axis=0) * math.prod(rows.shape[1:-1]) for mean in (of_scale, of_bias))
    return (
        grad_x.reshape(x.shape).astype(x.dtype),
        of_scale.astype(scale.dtype),
        of_bias.astype(scale.dtype),
        jnp.zeros_like(scale),
    )


batch_norm.defvjp(_forward, _backward)


def _means(*maps: Array) -> Array:
    """Means of maps `[parts, ..., C]` over all other axes, `[maps, parts, C]`."""
    axes = tuple(range(1, maps[0].ndim - 1))
    return jnp.stack([jnp.sum(x, axis=axes) for x in maps]) / math.prod(maps[0].shape[1:-1])


def _spread(x: Array, rows: Array) -> Array:
    """Gives `[parts or 1, C]` as many axes as `rows` `[parts, ..., C]`."""
    return jnp.expand_dims(x, tuple(range(1, rows.ndim - 1)))
