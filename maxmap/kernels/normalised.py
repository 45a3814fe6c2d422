"""An inverted bottleneck's front in Pallas for TPUs: the input's moments, what they fold to, and the shortcut.

Norm, 1x1 convolution and norm are one linear map of the input, which follows from its moments: their statistics need no
pass over the map between them. All gradients of the input, the shortcut's included, are added up in one pass.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from maxmap.kernels import depthwise
from maxmap.kernels.mosaic import IMAGES, Ref, call, product, whole
from maxmap.kernels.target import Array, accumulator, over_batch


@dataclasses.dataclass(frozen=True)
class Front:
    """What is done to a map.

    Attributes:
      window: the depthwise convolution.
      fold: gives weights `[I, C]` and bias `[C]` of the 1x1 convolution, from the map's mean `[I]` and covariance
        `[I, I]` and from other arrays.
      shortcut: "same" for the map itself, "mean" for its 2x2 means, or "none".
    """

    window: depthwise.Window
    fold: Callable[..., tuple[Array, Array]]
    shortcut: str


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def expand(
    x: Array, near: Array, folding: tuple[Array, ...], kernel: Array, front: Front
) -> tuple[Array, Array, tuple[Array, ...], Array, Array]:
    """Computes an `expand_depthwise` behind norms whose statistics follow from the moments of `x`.

    Args:
      x: `[H, W, B, I]`.
      near: an estimate of the mean of `x`, `[I]`, from which sums are measured so that they do not cancel.
      folding: arguments of `fold` behind the moments.
      kernel: `[k, k, C]`.
      front: what is done.

    Returns:
      The map `[H', W', B, C]` and its sums `[2, C]`; the shortcut, or nothing; mean `[I]` and covariance `[I, I]` of
      `x`, in float32 or wider, by which no gradient passes.
    """
    return _forward(x, near, folding, kernel, front)[0]


def _forward(
    x: Array, near: Array, folding: tuple[Array, ...], kernel: Array, front: Front
) -> tuple[Any, tuple[Any, ...]]:
    near = near.astype(x.dtype)
    pool = front.shortcut == "mean"
    total, square, *shortcut = over_batch(
        functools.partial(_moments_call, pool=pool), (x, near), (2, None), (None, None, *[2] * pool)
    )
    count = x.size // x.shape[-1]
    offset = total / count
    mean, covariance = near.astype(offset.dtype) + offset, square / count - jnp.outer(offset, offset)
    pointwise = front.fold(mean, covariance, *folding)
    (y, sums), residuals = depthwise.forward(x, pointwise, kernel, front.window)
    shortcut = [x] if front.shortcut == "same" else shortcut
    return (y, sums, tuple(shortcut), mean, covariance), (residuals, near, offset, mean, covariance, folding)


def _backward(front: Front, residuals: tuple[Any, ...], grads: tuple[Any, ...]) -> tuple[Any, ...]:
    inner, near, offset, mean, covariance, folding = residuals
    x = inner[0]
    of_x, of_pointwise, of_kernel = depthwise.backward(front.window, inner, grads[:2])
    _, pull = jax.vjp(lambda *moments: front.fold(*moments[:2], *moments[2]), mean, covariance, folding)
    of_mean, of_covariance, of_folding = pull(tuple(of_pointwise))
    count = x.size // x.shape[-1]
    slope = (of_covariance + of_covariance.T) / count
    constant = of_mean / count - jnp.matmul(offset, slope, precision=lax.Precision.HIGHEST)
    (of_x,) = over_batch(
        functools.partial(_gradient_call, stride=2 if front.shortcut == "mean" else 1),
        (x, of_x, near, slope, constant, *grads[2]),
        (2, 2, None, None, None, *[2] * len(grads[2])),
        (2,),
    )
    return of_x, jnp.zeros_like(near), of_folding, of_kernel


expand.defvjp(_forward, _backward)


def _tile(shape: Sequence[int], rows: int, stride: int = 1) -> pl.BlockSpec:
    _, width, _, channels = shape
    return pl.BlockSpec((rows // stride, width // stride, IMAGES, channels), lambda b, t: (t, 0, b, 0))


def _rows(height: int) -> int:
    """Rows of one program: pairs, where the height is even, for pooling."""
    step = 2 - height % 2
    return max(n for n in range(step, height + 1, step) if height % n == 0 and (n == step or n <= depthwise.ROWS))


def _deviations(x: Array, near_ref: Ref) -> Array:
    """Pixels `[W, B, C]` less `near`, as a matrix."""
    wide = accumulator(x.dtype)
    return (x.astype(wide) - near_ref[...].astype(wide)[None]).astype(x.dtype).reshape(-1, x.shape[-1])


def _moments_call(x: Array, near: Array, *, pool: bool) -> Sequence[Array]:
    (height, width, batch, channels), wide = x.shape, accumulator(x.dtype)
    rows = _rows(height)

    def kernel(x_ref: Ref, near_ref: Ref, total_ref: Ref, square_ref: Ref, *pooled_ref: Ref) -> None:
        @pl.when((pl.program_id(0) == 0) & (pl.program_id(1) == 0))
        def _() -> None:
            total_ref[...] = jnp.zeros(total_ref.shape, wide)
            square_ref[...] = jnp.zeros(square_ref.shape, wide)

        def add(i: Array, _: None) -> None:
            deviations = _deviations(x_ref[i], near_ref)
            total_ref[...] += jnp.sum(deviations.astype(wide).reshape(-1, 8, channels), axis=0)
            square_ref[...] += product(deviations, deviations, 0, 0)

        lax.fori_loop(0, rows, add, None)

        def average(i: Array, _: None) -> None:
            pair = x_ref[2 * i].astype(wide) + x_ref[2 * i + 1].astype(wide)
            pair = pair.reshape(-1, 2, *pair.shape[1:])
            pooled_ref[0][i] = ((pair[:, 0] + pair[:, 1]) * 0.25).astype(x.dtype)

        if pool:
            lax.fori_loop(0, rows // 2, average, None)

    out = [jax.ShapeDtypeStruct((8, channels), wide), jax.ShapeDtypeStruct((channels, channels), wide)]
    out_specs = [*map(whole, out)]
    if pool:
        out.append(jax.ShapeDtypeStruct((height // 2, width // 2, batch, channels), x.dtype))
        out_specs.append(_tile(x.shape, rows, 2))
    total, *rest = call(
        kernel,
        f"moments_{'x'.join(map(str, x.shape))}",
        (batch // IMAGES, height // rows),
        out,
        in_specs=[_tile(x.shape, rows), pl.BlockSpec((1, channels), lambda b, t: (0, 0))],
        out_specs=out_specs,
    )(x, near[None])
    return jnp.sum(total, axis=0), *rest


def _gradient_call(
    x: Array, of_x: Array, near: Array, slope: Array, constant: Array, *of_shortcut: Array, stride: int
) -> Sequence[Array]:
    """Adds the gradient by way of the moments, and that of the shortcut, to the gradient of `x`."""
    (height, _, batch, channels), wide = x.shape, accumulator(x.dtype)
    rows = _rows(height)

    def kernel(x_ref: Ref, of_x_ref: Ref, near_ref: Ref, slope_ref: Ref, constant_ref: Ref, *refs: Ref) -> None:
        *of_shortcut_ref, total_ref = refs

        def add(i: Array, _: None) -> None:
            for phase in range(stride):
                at = i * stride + phase
                total = product(_deviations(x_ref[at], near_ref), slope_ref[...], 1, 0) + constant_ref[...]
                total = total.reshape(x_ref.shape[1:]) + of_x_ref[at].astype(wide)
                if of_shortcut_ref:
                    grad = of_shortcut_ref[0][i].astype(wide) / stride**2
                    if stride > 1:
                        grad = jnp.broadcast_to(grad[:, None], (grad.shape[0], stride, *grad.shape[1:]))
                    total += grad.reshape(total.shape)
                total_ref[at] = total.astype(total_ref.dtype)

        lax.fori_loop(0, rows // stride, add, None)

    tile = _tile(x.shape, rows)
    row = pl.BlockSpec((1, channels), lambda b, t: (0, 0))
    shortcuts = [_tile(x.shape, rows, stride)] * len(of_shortcut)
    return call(
        kernel,
        f"moments_gradient_{'x'.join(map(str, x.shape))}_stride{stride}",
        (batch // IMAGES, height // rows),
        [jax.ShapeDtypeStruct(x.shape, x.dtype)],
        in_specs=[tile, tile, row, pl.BlockSpec((channels, channels), lambda b, t: (0, 0)), row, *shortcuts],
        out_specs=[tile],
    )(x, of_x, near[None], slope.astype(x.dtype), constant.astype(wide)[None], *of_shortcut)
