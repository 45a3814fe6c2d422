"""Norm, activation, squeeze-excitation, 1x1 convolution and residual path in Pallas for TPUs, in one operation.

Only the map before the norm and the result are in memory. The backward pass reads the map twice: once for sums per
image and channel, on which everything that is shared depends, and once for its gradient. Maps are `[P, B, C]` with P
pixels; see maxmap/kernels/depthwise.py.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from maxmap.kernels.mosaic import IMAGES, Ref, call, lanes_of, part, product, whole
from maxmap.kernels.target import Array, accumulator, over_batch, upcast

PIXELS = 56  # at most, that are computed at a time
TILE = 448  # pixels of one program, at most


@dataclasses.dataclass(frozen=True)
class Block:
    """What stands between a map and its projection.

    Attributes:
      activation: of single values.
      gate: a function of the mean of the activations, `[B, C]`, and of arrays; it returns factors `[B, C]`.
    """

    activation: Callable[[Array], Array]
    gate: Callable[..., Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(8,))
def squeeze_project(
    x: Array,
    factor: Array,
    summand: Array,
    gating: tuple[Array, ...],
    weights: Array,
    bias: Array,
    keep: Array,
    residual: Array,
    block: Block,
) -> Array:
    """Computes `residual + keep * (z * gate(mean of z over the pixels) @ weights + bias)`.

    Here z is `activation(x * factor + summand)`.

    Products have the type of `x` and sum in float32 or wider; all else is computed in that wider type.

    Args:
      x: `[P, B, C]`.
      factor: `[C]`.
      summand: `[C]`.
      gating: arguments of the gate behind the mean.
      weights: `[C, O]`.
      bias: `[O]`.
      keep: `[B]`, in float32 or wider. It has no gradient.
      residual: `[P, B, O]`.
      block: activation and gate.

    Returns:
      `[P, B, O]` in the type of `x`.
    """
    return _forward(x, factor, summand, gating, weights, bias, keep, residual, block)[0]


def _affine(factor: Array, summand: Array) -> Array:
    return jnp.stack([upcast(factor), upcast(summand)])  # [2, C]


def _forward(
    x: Array,
    factor: Array,
    summand: Array,
    gating: tuple[Array, ...],
    weights: Array,
    bias: Array,
    keep: Array,
    residual: Array,
    block: Block,
) -> tuple[Array, tuple[Any, ...]]:
    affine = _affine(factor, summand)
    (total,) = over_batch(functools.partial(_squeeze_call, block=block), (x, affine), (1, None), (0,))
    mean = total / x.shape[0]
    gate = block.gate(mean, *gating).astype(mean.dtype)
    kept, bias_rows = gate * keep[:, None], upcast(bias)[None] * keep[:, None]
    project = functools.partial(_project_call, block=block)
    (y,) = over_batch(project, (x, residual, affine, kept, bias_rows, weights), (1, 1, None, 0, 0, None), (1,))
    return y, (x, factor, summand, gating, weights, bias, keep, mean, gate)


def _backward(block: Block, residuals: tuple[Any, ...], grad: Array) -> tuple[Any, ...]:
    x, factor, summand, gating, weights, bias, keep, mean, gate = residuals
    affine, kept = _affine(factor, summand), gate * keep[:, None]
    sums, of_bias_rows, of_weights = over_batch(
        functools.partial(_sums_call, block=block),
        (x, grad, affine, kept, weights),
        (1, 1, None, 0, None),
        (1, 0, None),
    )
    of_gate, gated_slope, slope, gated_slope_x, slope_x = sums
    _, pull = jax.vjp(lambda mean, gating: block.gate(mean, *gating).astype(mean.dtype), mean, gating)
    of_mean, of_gating = pull(of_gate * keep[:, None])
    of_mean = of_mean / x.shape[0]
    of_summand = jnp.sum(kept * gated_slope + of_mean * slope, axis=0)
    of_factor = jnp.sum(kept * gated_slope_x + of_mean * slope_x, axis=0)
    of_bias = jnp.sum(of_bias_rows * keep[:, None], axis=0)
    (of_x,) = over_batch(
        functools.partial(_gradient_call, block=block),
        (x, grad, affine, kept, of_mean, weights),
        (1, 1, None, 0, 0, None),
        (1,),
    )
    return (
        of_x,
        of_factor.astype(factor.dtype),
        of_summand.astype(summand.dtype),
        of_gating,
        of_weights.astype(weights.dtype),
        of_bias.astype(bias.dtype),
        jnp.zeros_like(keep),
        grad,
    )


squeeze_project.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """How a map `[P, B, C]` is cut, for a grid whose axes `order` names: images "b", pixels "p", channels "c"."""

    pixels: int
    lanes: int
    order: str
    grid: tuple[int, ...]

    @classmethod
    def of(cls, x: Array, order: str) -> "_Tiles":
        pixels, batch, channels = x.shape
        tile = max(n for n in range(1, min(TILE, pixels) + 1) if pixels % n == 0)
        lanes = lanes_of(channels)
        sizes = {"b": batch // IMAGES, "p": pixels // tile, "c": channels // lanes}
        return cls(tile, lanes, order, tuple(sizes[axis] for axis in order))

    def spec(self, shape: tuple[int | None, ...], axes: str) -> pl.BlockSpec:
        """Blocks by the axes of the grid that `axes` names for each of their own, "-" for none."""
        return pl.BlockSpec(shape, lambda *at: tuple(at[self.order.index(a)] if a != "-" else 0 for a in axes))

    @property
    def x(self) -> pl.BlockSpec:
        return self.spec((self.pixels, IMAGES, self.lanes), "pbc")

    def y(self, channels: int) -> pl.BlockSpec:
        return self.spec((self.pixels, IMAGES, channels), "pb-")

    @property
    def affine(self) -> pl.BlockSpec:
        return self.spec((2, self.lanes), "-c")

    @property
    def images(self) -> pl.BlockSpec:
        return self.spec((IMAGES, self.lanes), "bc")

    def weights(self, weights: Array) -> pl.BlockSpec:
        return self.spec((self.lanes, weights.shape[1]), "c-")

    def at(self, axis: str) -> Array:
        return pl.program_id(self.order.index(axis))

    def pieces(self, body: Callable[[Any], None]) -> None:
        """Calls a function for some of the tile's pixels at a time."""
        step = max(n for n in range(1, PIXELS + 1) if self.pixels % n == 0)
        lax.fori_loop(0, self.pixels // step, lambda i, _: body(pl.ds(i * step, step)), None)


def _name(kind: str, x: Array, out_channels: int = 0) -> str:
    return f"squeeze_{kind}_{'x'.join(map(str, x.shape))}_{out_channels}"


def _normalised(x_ref: Ref, affine_ref: Ref, at: Any) -> tuple[Array, Array]:
    """Some pixels of the map, and behind the norm."""
    x = x_ref[at].astype(affine_ref.dtype)
    return x, x * affine_ref[0:1][None] + affine_ref[1:2][None]


def _slope(block: Block, n: Array) -> tuple[Array, Array]:
    return jax.jvp(block.activation, (n,), (jnp.ones_like(n),))


def _squeeze_call(x: Array, affine: Array, *, block: Block) -> Sequence[Array]:
    tiles = _Tiles.of(x, "bcp")

    def kernel(x_ref: Ref, affine_ref: Ref, total_ref: Ref) -> None:
        @pl.when(tiles.at("p") == 0)
        def _() -> None:
            total_ref[...] = jnp.zeros(total_ref.shape, total_ref.dtype)

        def add(at: Any) -> None:
            total_ref[...] += jnp.sum(block.activation(_normalised(x_ref, affine_ref, at)[1]), axis=0)

        tiles.pieces(add)

    out = [jax.ShapeDtypeStruct(x.shape[1:], accumulator(x.dtype))]
    specs = {"in_specs": [tiles.x, tiles.affine], "out_specs": [tiles.images]}
    return call(kernel, _name("mean", x), tiles.grid, out, **specs)(x, affine)


def _project_call(
    x: Array, residual: Array, affine: Array, gate: Array, bias: Array, weights: Array, *, block: Block
) -> Sequence[Array]:
    tiles, out_channels, wide = _Tiles.of(x, "bpc"), weights.shape[1], accumulator(x.dtype)
    last = tiles.grid[2] - 1

    def kernel(
        x_ref: Ref,
        residual_ref: Ref,
        affine_ref: Ref,
        gate_ref: Ref,
        bias_ref: Ref,
        weights_ref: Ref,
        y_ref: Ref,
        total_ref: Ref,
    ) -> None:
        c = tiles.at("c")

        @pl.when(c == 0)
        def _() -> None:
            def start(at: Any) -> None:
                total_ref[at] = residual_ref[at].astype(wide) + bias_ref[...][None]

            tiles.pieces(start)

        def add(at: Any) -> None:
            z = block.activation(_normalised(x_ref, affine_ref, at)[1]) * gate_ref[...][None]
            z = z.astype(x_ref.dtype)
            y = product(z.reshape(-1, z.shape[-1]), weights_ref[...], 1, 0)
            total_ref[at] += y.reshape(*z.shape[:2], out_channels)

        tiles.pieces(add)

        @pl.when(c == last)
        def _() -> None:
            tiles.pieces(lambda at: y_ref.__setitem__(at, total_ref[at].astype(y_ref.dtype)))

    return call(
        kernel,
        _name("project", x, out_channels),
        tiles.grid,
        [jax.ShapeDtypeStruct((*x.shape[:2], out_channels), x.dtype)],
        in_specs=[
            tiles.x,
            tiles.y(out_channels),
            tiles.affine,
            tiles.images,
            tiles.spec((IMAGES, out_channels), "b-"),
            tiles.weights(weights),
        ],
        out_specs=[tiles.y(out_channels)],
        scratch_shapes=[pltpu.VMEM((tiles.pixels, IMAGES, out_channels), wide)],
    )(x, residual, affine, gate, bias, weights.astype(x.dtype))


def _sums_call(
    x: Array, grad: Array, affine: Array, gate: Array, weights: Array, *, block: Block
) -> tuple[Array, Array, Array]:
    tiles, wide = _Tiles.of(x, "bcp"), accumulator(x.dtype)
    channels, out_channels = weights.shape

    def kernel(
        x_ref: Ref,
        grad_ref: Ref,
        affine_ref: Ref,
        gate_ref: Ref,
        weights_ref: Ref,
        sums_ref: Ref,
        of_bias_ref: Ref,
        of_weights_ref: Ref,
    ) -> None:
        b, c, p = (tiles.at(axis) for axis in "bcp")
        rows = part(c, tiles.lanes, channels)

        @pl.when(p == 0)
        def _() -> None:
            sums_ref[...] = jnp.zeros(sums_ref.shape, wide)

        @pl.when((b == 0) & (p == 0))
        def _() -> None:
            of_weights_ref[rows] = jnp.zeros((tiles.lanes, out_channels), wide)

        @pl.when((p == 0) & (c == 0))
        def _() -> None:
            of_bias_ref[...] = jnp.zeros(of_bias_ref.shape, wide)

        def add(at: Any) -> None:
            x, n = _normalised(x_ref, affine_ref, at)
            z, slope = _slope(block, n)
            grad = grad_ref[at].reshape(-1, out_channels)
            of_z = product(grad, weights_ref[...], 1, 1).reshape(z.shape)
            gated = of_z * slope
            for i, term in enumerate((of_z * z, gated, slope, gated * x, slope * x)):
                sums_ref[i] += jnp.sum(term, axis=0)
            z = (z * gate_ref[...][None]).astype(x_ref.dtype).reshape(-1, z.shape[-1])
            of_weights_ref[rows] += product(z, grad, 0, 0)

        tiles.pieces(add)

        @pl.when(c == 0)
        def _() -> None:
            def add(at: Any) -> None:
                of_bias_ref[...] += jnp.sum(grad_ref[at].astype(wide), axis=0)

            tiles.pieces(add)

    out = [
        jax.ShapeDtypeStruct((5, *x.shape[1:]), wide),
        jax.ShapeDtypeStruct((x.shape[1], out_channels), wide),
        jax.ShapeDtypeStruct(weights.shape, wide),
    ]
    sums, of_bias, of_weights = call(
        kernel,
        _name("sums", x, out_channels),
        tiles.grid,
        out,
        in_specs=[tiles.x, tiles.y(out_channels), tiles.affine, tiles.images, tiles.weights(weights)],
        out_specs=[
            tiles.spec((5, IMAGES, tiles.lanes), "-bc"),
            tiles.spec((IMAGES, out_channels), "b-"),
            whole(out[2]),
        ],
    )(x, grad, affine, gate, weights.astype(x.dtype))
    return sums, of_bias, of_weights


def _gradient_call(
    x: Array, grad: Array, affine: Array, gate: Array, of_mean: Array, weights: Array, *, block: Block
) -> Sequence[Array]:
    tiles, out_channels = _Tiles.of(x, "bpc"), weights.shape[1]

    def kernel(
        x_ref: Ref,
        grad_ref: Ref,
        affine_ref: Ref,
        gate_ref: Ref,
        of_mean_ref: Ref,
        weights_ref: Ref,
        of_x_ref: Ref,
    ) -> None:
        def write(at: Any) -> None:
            slope = _slope(block, _normalised(x_ref, affine_ref, at)[1])[1]
            grad = product(grad_ref[at].reshape(-1, out_channels), weights_ref[...], 1, 1).reshape(slope.shape)
            grad = (grad * gate_ref[...][None] + of_mean_ref[...][None]) * slope * affine_ref[0:1][None]
            of_x_ref[at] = grad.astype(of_x_ref.dtype)

        tiles.pieces(write)

    return call(
        kernel,
        _name("gradient", x, out_channels),
        tiles.grid,
        [jax.ShapeDtypeStruct(x.shape, x.dtype)],
        in_specs=[
            tiles.x,
            tiles.y(out_channels),
            tiles.affine,
            *[tiles.images] * 2,
            tiles.weights(weights),
        ],
        out_specs=[tiles.x],
    )(x, grad, affine, gate, of_mean, weights.astype(x.dtype))
