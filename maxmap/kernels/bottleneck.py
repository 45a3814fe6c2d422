"""The 1x1 convolutions of a bottleneck block in Pallas for TPUs, with the norms and the residual path around them.

The 3x3 convolution between them is XLA's. `first` is all in front of it; `activated` is what the last convolution
reads, with its moments, from which the last norm's statistics and the means of squeeze-excitation follow;
`last` is the convolution behind it, with the residual path. Every map is read and written once in each direction. Maps
are `[H, W, B, C]`; see maxmap/kernels/depthwise.py.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from maxmap.kernels.mosaic import IMAGES, Ref, call, product, whole
from maxmap.kernels.target import Array, accumulator, over_batch, upcast

TILE = 2**20  # values of a program's largest map, at most
ROWS = 256  # values per channel that are computed at a time, about
STEP = 64  # of numbers of channels
WEIGHTS = 2**21  # of a convolution, at most

Activation = Callable[[Array], Array]


def fits(batch: int, channels: int, out_channels: int, devices: int) -> bool:
    """Tells whether the kernels take maps of a batch on so many devices from one number of channels to another."""
    return (
        batch % (IMAGES * devices) == 0
        and channels % STEP == out_channels % STEP == 0
        and channels * out_channels <= WEIGHTS
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def first(
    x: Array,
    weights: Array,
    scale: Array,
    bias: Array,
    near: Array,
    activation: Activation,
    derivative: Activation | None,
    epsilon: float,
) -> tuple[Array, Array, Array, Array]:
    """Convolution, batch norm and activation; XLA applies norm and activation where the result is read.

    Args:
      x: `[H, W, B, I]`.
      weights: `[I, C]`.
      scale: of the norm, `[C]`.
      bias: of the norm, `[C]`.
      near: an estimate of the mean of what is normalised, `[C]`, from which sums are measured so that they do not
        cancel. It has no gradient.
      activation: of single values.
      derivative: of the activation, in terms that both do not share; None for JAX's own.
      epsilon: of the norm.

    Returns:
      `activation(norm(x @ weights))` `[H, W, B, C]` in the type of `x`; `x`, whose gradient is added on the chip; mean
      and biased variance of what is normalised, both `[C]`, in float32 or wider and without a gradient.
    """
    return _first_forward(x, weights, scale, bias, near, activation, derivative, epsilon)[0]


def _first_forward(
    x: Array,
    weights: Array,
    scale: Array,
    bias: Array,
    near: Array,
    activation: Activation,
    derivative: Activation | None,
    epsilon: float,
) -> tuple[Any, tuple[Array, ...]]:
    del derivative
    y, sums = over_batch(_first_call, (x, weights, near), (2, None, None), (2, None))
    offset, square = sums / (y.size // y.shape[-1])
    mean, var = upcast(near) + offset, jnp.maximum(square - jnp.square(offset), 0)
    inverse = lax.rsqrt(var + epsilon)
    factor = inverse * upcast(scale)
    summand = upcast(bias) - mean * factor
    z = activation(upcast(y) * _last_axis(factor) + _last_axis(summand)).astype(x.dtype)
    return (z, x, mean, var), (x, weights, scale, bias, near, y, mean, inverse, factor, summand)


def _first_backward(
    activation: Activation,
    derivative: Activation | None,
    epsilon: float,
    residuals: tuple[Array, ...],
    grads: tuple[Array, ...],
) -> tuple[Array, ...]:
    del epsilon
    x, weights, scale, bias, near, y, mean, inverse, factor, summand = residuals
    n = upcast(y) * _last_axis(factor) + _last_axis(summand)
    slope = jax.jvp(activation, (n,), (jnp.ones_like(n),))[1] if derivative is None else derivative(n)
    of_n = upcast(grads[0]) * slope
    of_bias = jnp.sum(of_n, axis=(0, 1, 2))
    of_scale = jnp.sum(of_n * (upcast(y) - _last_axis(mean)), axis=(0, 1, 2)) * inverse
    # The gradient of y: factor * (of_n - mean of of_n - normalised y * mean of their product).
    count = y.size // y.shape[-1]
    of_y = -factor * inverse * of_scale / count
    constant = -factor * of_bias / count - of_y * mean
    of_x, of_weights = over_batch(
        functools.partial(_first_gradient_call, activation=activation),
        (x, y, grads[0], grads[1], weights, jnp.stack([factor, summand, of_y, constant])),
        (2, 2, 2, 2, None, None),
        (2, None),
    )
    return (
        of_x,
        of_weights.astype(weights.dtype),
        of_scale.astype(scale.dtype),
        of_bias.astype(bias.dtype),
        jnp.zeros_like(near),
    )


first.defvjp(_first_forward, _first_backward)


def _last_axis(values: Array) -> Array:
    return values[None, None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def activated(
    x: Array, factor: Array, summand: Array, near: Array, activation: Activation
) -> tuple[Array, Array, Array]:
    """Computes `activation(x * factor + summand) - near` and its moments.

    Args:
      x: `[H, W, B, C]`.
      factor: `[C]`.
      summand: `[C]`.
      near: an estimate of the mean of the activations, `[C]`, so that the moments do not cancel. It has no gradient.
      activation: of single values.

    Returns:
      `[H, W, B, C]` in the type of `x`; its sums over the pixels `[B, C]` and of all products of channels `[C, C]`,
      in float32 or wider.
    """
    return _activated_forward(x, factor, summand, near, activation)[0]


def _activated_forward(
    x: Array, factor: Array, summand: Array, near: Array, activation: Activation
) -> tuple[Any, tuple[Array, ...]]:
    affine = jnp.stack([upcast(factor), upcast(summand), upcast(near)])
    compute = functools.partial(_activated_call, activation=activation)
    results = over_batch(compute, (x, affine), (2, None), (2, 0, None))
    return tuple(results), (x, factor, summand, near)


def _activated_backward(activation: Activation, residuals: tuple[Array, ...], grads: tuple[Array, ...]) -> Any:
    x, factor, summand, near = residuals
    affine = jnp.stack([upcast(factor), upcast(summand), upcast(near)])
    of_y, of_total, of_square = grads
    of_x, of_affine = over_batch(
        functools.partial(_activated_gradient_call, activation=activation),
        (x, of_y, affine, of_total, of_square + of_square.T),
        (2, 2, None, 0, None),
        (2, None),
    )
    return of_x, of_affine[0].astype(factor.dtype), of_affine[1].astype(summand.dtype), jnp.zeros_like(near)


activated.defvjp(_activated_forward, _activated_backward)


@jax.custom_vjp
def last(x: Array, weights: Array, bias: Array, gate: Array, residual: Array) -> Array:
    """Computes `relu(residual + gate * (x @ weights + bias))`.

    Args:
      x: `[H, W, B, C]`.
      weights: `[C, O]`.
      bias: `[O]`.
      gate: `[B, O]`.
      residual: `[H, W, B, O]`.

    Returns:
      `[H, W, B, O]` in the type of `x`.
    """
    return _last_forward(x, weights, bias, gate, residual)[0]


def _last_forward(
    x: Array, weights: Array, bias: Array, gate: Array, residual: Array
) -> tuple[Array, tuple[Array, ...]]:
    (y,) = over_batch(_last_call, (x, residual, weights, bias, gate), (2, 2, None, None, 0), (2,))
    return y, (x, weights, bias, gate, y)


def _last_backward(residuals: tuple[Array, ...], grad: Array) -> tuple[Array, ...]:
    x, weights, bias, gate, y = residuals
    of_x, of_residual, of_gate, of_gated, of_weights = over_batch(
        _last_gradient_call, (x, y, grad, weights, bias, gate), (2, 2, 2, None, None, 0), (2, 2, 0, 0, None)
    )
    of_bias = jnp.sum(of_gated * upcast(gate), axis=0)
    return (
        of_x,
        of_weights.astype(weights.dtype),
        of_bias.astype(bias.dtype),
        of_gate.astype(gate.dtype),
        of_residual,
    )


last.defvjp(_last_forward, _last_backward)


class _Tiles:
    """Programs for images and rows of maps `[H, W, B, C]` with at most so many channels, the rows innermost."""

    def __init__(self, x: Array, channels: int) -> None:
        height, width, batch, _ = x.shape
        most = max(1, TILE // (IMAGES * channels * width))
        self.shape = (_divisor(height, most), width)
        rows = _divisor(self.shape[0], max(1, ROWS // (IMAGES * width)))
        self.piece = (rows, _divisor(width, ROWS // IMAGES))
        self.grid = (batch // IMAGES, height // self.shape[0])

    def map(self, x: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
        return pl.BlockSpec((*self.shape, IMAGES, x.shape[-1]), lambda b, t: (t, 0, b, 0))

    @staticmethod
    def images(x: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
        return pl.BlockSpec((IMAGES, x.shape[1]), lambda b, t: (b, 0))

    def pieces(self, body: Callable[[Any], None]) -> None:
        """Calls a function for some of the program's pixels at a time."""
        rows, columns = (total // size for total, size in zip(self.shape, self.piece, strict=True))

        def at(i: Array, _: None) -> None:
            place = (lax.div(i, columns), lax.rem(i, columns))
            body(tuple(pl.ds(n * size, size) for n, size in zip(place, self.piece, strict=True)))

        lax.fori_loop(0, rows * columns, at, None)

    def pixels(self, x: Array, dtype: jnp.dtype) -> Array:
        """The inverse of `_matrix`, in another type."""
        return x.astype(dtype).reshape(*self.piece, IMAGES, x.shape[-1])


def _divisor(total: int, most: int) -> int:
    return max(n for n in range(1, total + 1) if total % n == 0 and n <= most)


def _matrix(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def _zero_first(refs: Sequence[Ref], every: int = 0) -> None:
    """Sets sums to zero: in the first program of all or, for the first `every` of them, of every batch of images."""
    pixels = pl.program_id(1) == 0
    for i, ref in enumerate(refs):
        start = pixels if i < every else pixels & (pl.program_id(0) == 0)
        pl.when(start)(functools.partial(_zero, ref))


def _zero(ref: Ref) -> None:
    ref[...] = jnp.zeros(ref.shape, ref.dtype)


def _row(x: Array, like: Array) -> Array:
    """Values per channel as a matrix with one row, in the type of sums."""
    return x.astype(accumulator(like.dtype))[None]


def _name(kind: str, x: Array, channels: int) -> str:
    return f"bottleneck_{kind}_{'x'.join(map(str, x.shape))}_{channels}"


def _first_call(x: Array, weights: Array, near: Array) -> tuple[Array, Array]:
    channels, wide = weights.shape[1], accumulator(x.dtype)
    tiles = _Tiles(x, max(weights.shape))

    def kernel(x_ref: Ref, weights_ref: Ref, near_ref: Ref, y_ref: Ref, sums_ref: Ref) -> None:
        _zero_first([sums_ref])

        def add(at: Any) -> None:
            y = product(_matrix(x_ref[at]), weights_ref[...], 1, 0)
            y_ref[at] = tiles.pixels(y, y_ref.dtype)
            y = (y - near_ref[...]).reshape(-1, 8, channels)
            sums_ref[0] += jnp.sum(y, axis=0)
            sums_ref[1] += jnp.sum(jnp.square(y), axis=0)

        tiles.pieces(add)

    inputs = [x, weights.astype(x.dtype), _row(near, x)]
    out = [jax.ShapeDtypeStruct((*x.shape[:3], channels), x.dtype), jax.ShapeDtypeStruct((2, 8, channels), wide)]
    y, sums = call(
        kernel,
        _name("first", x, channels),
        tiles.grid,
        out,
        in_specs=[tiles.map(x), *map(whole, inputs[1:])],
        out_specs=[tiles.map(out[0]), whole(out[1])],
    )(*inputs)
    return y, jnp.sum(sums, axis=1)


def _first_gradient_call(
    x: Array, y: Array, of_z: Array, of_beside: Array, weights: Array, affine: Array, *, activation: Activation
) -> Sequence[Array]:
    wide = accumulator(x.dtype)
    tiles = _Tiles(x, max(weights.shape))

    def kernel(
        x_ref: Ref,
        y_ref: Ref,
        of_z_ref: Ref,
        of_beside_ref: Ref,
        weights_ref: Ref,
        affine_ref: Ref,
        of_x_ref: Ref,
        of_weights_ref: Ref,
    ) -> None:
        _zero_first([of_weights_ref])

        def add(at: Any) -> None:
            y, n = _normalised(y_ref, affine_ref, at)
            of_n = jax.jvp(activation, (n,), (_matrix(of_z_ref[at]).astype(wide),))[1]
            of_y = of_n * affine_ref[0:1] + y * affine_ref[2:3] + affine_ref[3:4]
            of_y = of_y.astype(x_ref.dtype)
            of_weights_ref[...] += product(_matrix(x_ref[at]), of_y, 0, 0)
            of_x = product(of_y, weights_ref[...], 1, 1) + _matrix(of_beside_ref[at]).astype(wide)
            of_x_ref[at] = tiles.pixels(of_x, of_x_ref.dtype)

        tiles.pieces(add)

    inputs = [x, y, of_z, of_beside, weights.astype(x.dtype), affine]
    out = [jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(weights.shape, wide)]
    return call(
        kernel,
        _name("first_gradient", x, weights.shape[1]),
        tiles.grid,
        out,
        in_specs=[*map(tiles.map, inputs[:4]), *map(whole, inputs[4:])],
        out_specs=[tiles.map(out[0]), whole(out[1])],
    )(*inputs)


def _normalised(x_ref: Ref, affine_ref: Ref, at: Any) -> tuple[Array, Array]:
    """Some pixels as a matrix, and behind the norm."""
    x = _matrix(x_ref[at]).astype(affine_ref.dtype)
    return x, x * affine_ref[0:1] + affine_ref[1:2]


def _activated_call(x: Array, affine: Array, *, activation: Activation) -> Sequence[Array]:
    (*_, batch, channels), wide = x.shape, accumulator(x.dtype)
    tiles = _Tiles(x, channels)

    def kernel(x_ref: Ref, affine_ref: Ref, y_ref: Ref, total_ref: Ref, square_ref: Ref) -> None:
        _zero_first([total_ref, square_ref], 1)

        def add(at: Any) -> None:
            y = activation(_normalised(x_ref, affine_ref, at)[1]) - affine_ref[2:3]
            y = y.astype(x_ref.dtype)
            y_ref[at] = tiles.pixels(y, y_ref.dtype)
            total_ref[...] += jnp.sum(y.astype(wide).reshape(-1, IMAGES, channels), axis=0)
            square_ref[...] += product(y, y, 0, 0)

        tiles.pieces(add)

    shapes = [(x.shape, x.dtype), ((batch, channels), wide), ((channels, channels), wide)]
    out = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    return call(
        kernel,
        _name("activated", x, channels),
        tiles.grid,
        out,
        in_specs=[tiles.map(x), whole(affine)],
        out_specs=[tiles.map(out[0]), tiles.images(out[1]), whole(out[2])],
    )(x, affine)


def _activated_gradient_call(
    x: Array, of_y: Array, affine: Array, of_total: Array, slope: Array, *, activation: Activation
) -> tuple[Array, Array]:
    channels, wide = x.shape[-1], accumulator(x.dtype)
    tiles = _Tiles(x, channels)

    def kernel(
        x_ref: Ref, of_y_ref: Ref, affine_ref: Ref, of_total_ref: Ref, slope_ref: Ref, of_x_ref: Ref, sums_ref: Ref
    ) -> None:
        _zero_first([sums_ref])

        def add(at: Any) -> None:
            x, n = _normalised(x_ref, affine_ref, at)
            y, derivative = jax.jvp(activation, (n,), (jnp.ones_like(n),))
            y = (y - affine_ref[2:3]).astype(x_ref.dtype)
            grad = tiles.pixels(product(y, slope_ref[...], 1, 0), wide) + of_y_ref[at].astype(wide)
            grad = _matrix(grad + of_total_ref[...][None, None]) * derivative
            of_x_ref[at] = tiles.pixels(grad * affine_ref[0:1], of_x_ref.dtype)
            sums_ref[0] += jnp.sum((grad * x).reshape(-1, 8, channels), axis=0)
            sums_ref[1] += jnp.sum(grad.reshape(-1, 8, channels), axis=0)

        tiles.pieces(add)

    inputs = [x, of_y, affine, of_total.astype(wide), slope.astype(x.dtype)]
    out = [jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((2, 8, channels), wide)]
    of_x, sums = call(
        kernel,
        _name("activated_gradient", x, channels),
        tiles.grid,
        out,
        in_specs=[*map(tiles.map, inputs[:2]), whole(affine), tiles.images(inputs[3]), whole(inputs[4])],
        out_specs=[tiles.map(out[0]), whole(out[1])],
    )(*inputs)
    return of_x, jnp.sum(sums, axis=1)


def _last_call(x: Array, residual: Array, weights: Array, bias: Array, gate: Array) -> Sequence[Array]:
    wide = accumulator(x.dtype)
    tiles = _Tiles(x, max(weights.shape))

    def kernel(x_ref: Ref, residual_ref: Ref, weights_ref: Ref, bias_ref: Ref, gate_ref: Ref, y_ref: Ref) -> None:
        def write(at: Any) -> None:
            y = product(_matrix(x_ref[at]), weights_ref[...], 1, 0) + bias_ref[...]
            y = tiles.pixels(y, wide) * gate_ref[...][None, None] + residual_ref[at].astype(wide)
            y_ref[at] = jnp.maximum(y, 0).astype(y_ref.dtype)

        tiles.pieces(write)

    inputs = [x, residual, weights.astype(x.dtype), _row(bias, x), gate.astype(wide)]
    return call(
        kernel,
        _name("last", x, weights.shape[1]),
        tiles.grid,
        [jax.ShapeDtypeStruct(residual.shape, x.dtype)],
        in_specs=[*map(tiles.map, inputs[:2]), *map(whole, inputs[2:4]), tiles.images(inputs[4])],
        out_specs=[tiles.map(residual)],
    )(*inputs)


def _last_gradient_call(x: Array, y: Array, grad: Array, weights: Array, bias: Array, gate: Array) -> Sequence[Array]:
    wide = accumulator(x.dtype)
    tiles = _Tiles(x, max(weights.shape))

    def kernel(
        x_ref: Ref,
        y_ref: Ref,
        grad_ref: Ref,
        weights_ref: Ref,
        bias_ref: Ref,
        gate_ref: Ref,
        of_x_ref: Ref,
        of_residual_ref: Ref,
        of_gate_ref: Ref,
        of_gated_ref: Ref,
        of_weights_ref: Ref,
    ) -> None:
        _zero_first([of_gate_ref, of_gated_ref, of_weights_ref], 2)

        def add(at: Any) -> None:
            x = _matrix(x_ref[at])
            grad = jnp.where(y_ref[at].astype(wide) > 0, grad_ref[at].astype(wide), 0)
            of_residual_ref[at] = grad.astype(of_residual_ref.dtype)
            branch = (product(x, weights_ref[...], 1, 0) + bias_ref[...]).reshape(grad.shape)
            of_gate_ref[...] += jnp.sum(grad * branch, axis=(0, 1))
            of_gated_ref[...] += jnp.sum(grad, axis=(0, 1))
            gated = _matrix((grad * gate_ref[...][None, None]).astype(x.dtype))
            of_weights_ref[...] += product(x, gated, 0, 0)
            of_x = product(gated, weights_ref[...], 1, 1)
            of_x_ref[at] = tiles.pixels(of_x, of_x_ref.dtype)

        tiles.pieces(add)

    inputs = [x, y, grad, weights.astype(x.dtype), _row(bias, x), gate.astype(wide)]
    shapes = [(x.shape, x.dtype), (y.shape, x.dtype), *[(gate.shape, wide)] * 2, (weights.shape, wide)]
    out = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    return call(
        kernel,
        _name("last_gradient", x, weights.shape[1]),
        tiles.grid,
        out,
        in_specs=[*map(tiles.map, inputs[:3]), *map(whole, inputs[3:5]), tiles.images(inputs[5])],
        out_specs=[*map(tiles.map, out[:2]), *map(tiles.images, out[2:4]), whole(out[4])],
    )(*inputs)
