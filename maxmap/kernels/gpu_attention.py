"""Attention inside of the windows or grid cells of a map, for GPUs.

The kernel reads queries, keys and values where their projection writes them and writes its output where the next
projection reads it: neither windows nor heads are ever transposed, and logits never leave the chip.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from maxmap.kernels.target import Array, accumulator, over_batch, platform

Ref = Any

NEVER = -1e30  # a logit of keys that only pad a tile
LARGEST = 128  # tokens of a tile; 128 x 128 logits in float32 fill a quarter of a multiprocessor's registers
# Images of one program in the backward pass, at most: the program writes the sum of the bias's gradient over them.
IMAGES = 16
PROGRAMS = 256  # at least, so that all multiprocessors have work, where there are as many windows


class Sizes(NamedTuple):
    """What a kernel knows of its shapes: a window, its kind, heads, the order of their channels, and q's factor."""

    window: tuple[int, int]
    kind: str
    heads: int
    head_dim: int
    head_first: bool
    scale: float

    @property
    def tile(self) -> tuple[int, int, int]:
        """Height and width of a window and channels of a head, padded to powers of two."""
        height, width = (pl.next_power_of_2(n) for n in self.window)
        return height, max(width, 16 // height), max(16, pl.next_power_of_2(self.head_dim))


def fits(window: tuple[int, int]) -> bool:
    """Whether there is a kernel for a window."""
    height, width, _ = Sizes(window, "window", 1, 1, True, 1.0).tile
    return height * width <= LARGEST


def attention(
    qkv: Array,
    bias: Array | None,
    kind: str,
    window: tuple[int, int],
    heads: int,
    head_first: bool,
    scale: float,
) -> Array:
    """Computes softmax(scale q k^T + bias) v inside of windows or grid cells.

    Products take the type of `qkv` and sum in float32 or wider; bias and softmax are computed in that wider type. Only
    the inputs are kept for the backward pass.

    Arguments and result: see `maxmap.fused.map_attention`; the window divides H and W.
    """
    sizes = Sizes(window, kind, heads, qkv.shape[-1] // (3 * heads), head_first, scale)
    (p, q), (rows, columns, _) = window, sizes.tile
    wide = accumulator(qkv.dtype)
    tile = jnp.zeros((heads, p, q, p, q), wide) if bias is None else bias.astype(wide).reshape(heads, p, q, p, q)
    more = ((0, rows - p), (0, columns - q))
    tile = jnp.pad(tile, ((0, 0), *more, (0, 0), (0, 0)))
    tile = jnp.pad(tile, ((0, 0), (0, 0), (0, 0), *more), constant_values=NEVER)
    return _attention(sizes, qkv, tile.reshape(heads, rows * columns, rows * columns))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(sizes: Sizes, qkv: Array, bias: Array) -> Array:
    (out,) = over_batch(functools.partial(_run_forward, sizes), (qkv, bias), (0, None), (0,))
    return out


def _forward(sizes: Sizes, qkv: Array, bias: Array) -> tuple[Array, tuple[Array, Array]]:
    return _attention(sizes, qkv, bias), (qkv, bias)


def _backward(sizes: Sizes, residuals: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    return over_batch(functools.partial(_run_backward, sizes), (*residuals, grad), (0, None, 0), (0, None))


_attention.defvjp(_forward, _backward)


def _view(sizes: Sizes, shape: Sequence[int], parts: int) -> tuple[int, ...]:
    """The shape of a map `[B, H, W, parts * E]` with axes for windows, their pixels, heads and q, k, v."""
    batch, height, width, _ = shape
    (p, q), heads = sizes.window, sizes.heads
    if sizes.kind == "window":
        split: tuple[int, ...] = (height // p, p, width // q, q)
    else:
        split = (p, height // p, q, width // q)
    last = (heads, parts) if sizes.head_first else (parts, heads)
    return (batch, *split, *last, sizes.head_dim)


def _spec(sizes: Sizes, images: int, parts: int) -> pl.BlockSpec:
    """One window and one head in several images: a block `[images, p, q, parts, head_dim]`."""
    rows, columns, channels = sizes.tile
    window = (None, rows, None, columns) if sizes.kind == "window" else (rows, None, columns, None)
    last = (None, parts) if sizes.head_first else (parts, None)

    def index(b: Array, i: Array, j: Array, head: Array) -> tuple[Array | int, ...]:
        place = (i, 0, j, 0) if sizes.kind == "window" else (0, i, 0, j)
        return (b, *place, *((head, 0) if sizes.head_first else (0, head)), 0)

    return pl.BlockSpec((images, *window, *last, channels), index)


def _call(
    sizes: Sizes,
    kernel: Callable[..., None],
    name: str,
    maps: Sequence[Array],
    bias: Array,
    images: int,
    out: Sequence[jax.ShapeDtypeStruct],
) -> list[Array]:
    """Runs a kernel for every window, head and `images` images; `out` is a map and parts of the bias's gradient."""
    batch, height, width, _ = maps[0].shape
    p, q = sizes.window
    grid = (batch // images, height // p, width // q, sizes.heads)
    embedded = sizes.heads * sizes.head_dim

    def parts(x: Array | jax.ShapeDtypeStruct) -> int:
        return x.shape[-1] // embedded

    tile = bias.shape[1:]
    of_bias = pl.BlockSpec((None, None, None, None, *tile), lambda b, i, j, head: (b, i, j, head, 0, 0))
    viewed, specs = list(out), [of_bias] * len(out)
    viewed[0] = jax.ShapeDtypeStruct(_view(sizes, out[0].shape, parts(out[0])), out[0].dtype)
    specs[0] = _spec(sizes, images, parts(out[0]))
    results = pl.pallas_call(
        functools.partial(kernel, sizes),
        out_shape=viewed,
        grid=grid,
        in_specs=[
            *(_spec(sizes, images, parts(x)) for x in maps),
            pl.BlockSpec((None, *tile), lambda b, i, j, head: (head, 0, 0)),
        ],
        out_specs=specs,
        compiler_params=triton.CompilerParams(num_warps=4 if tile[0] <= 64 else 8),
        interpret=platform() == "cpu",
        name=name,
    )(*(x.reshape(_view(sizes, x.shape, parts(x))) for x in maps), bias)
    return [results[0].reshape(out[0].shape), *results[1:]]


def _run_forward(sizes: Sizes, qkv: Array, bias: Array) -> tuple[Array]:
    out = jax.ShapeDtypeStruct((*qkv.shape[:-1], qkv.shape[-1] // 3), qkv.dtype)
    (y,) = _call(sizes, _forward_kernel, "window_attention_forward", [qkv], bias, 1, [out])
    return (y,)


def _run_backward(sizes: Sizes, qkv: Array, bias: Array, grad: Array) -> tuple[Array, Array]:
    batch, height, width, _ = qkv.shape
    windows = batch * sizes.heads * (height * width // math.prod(sizes.window))
    allowed = [n for n in range(1, IMAGES + 1) if batch % n == 0 and windows // n >= PROGRAMS]
    images = max(allowed, default=1)
    grid = (batch // images, height // sizes.window[0], width // sizes.window[1])
    out = [
        jax.ShapeDtypeStruct(qkv.shape, qkv.dtype),
        jax.ShapeDtypeStruct((*grid, *bias.shape), bias.dtype),
    ]
    of_qkv, parts = _call(sizes, _backward_kernel, "window_attention_backward", [qkv, grad], bias, images, out)
    return of_qkv, jnp.sum(parts, axis=(0, 1, 2))


def _forward_kernel(sizes: Sizes, qkv_ref: Ref, bias_ref: Ref, out_ref: Ref) -> None:
    q, k, v = (_read(qkv_ref, 0, part, sizes) for part in range(3))
    weights, total = _weights(q, k, _whole(bias_ref), sizes)
    _write(out_ref, 0, 0, _product(weights.astype(v.dtype), v) / total, sizes)


def _backward_kernel(
    sizes: Sizes, qkv_ref: Ref, grad_ref: Ref, bias_ref: Ref, of_qkv_ref: Ref, of_bias_ref: Ref
) -> None:
    bias = _whole(bias_ref)

    def one(image: Array, of_bias: Array) -> Array:
        q, k, v = (_read(qkv_ref, image, part, sizes) for part in range(3))
        grad = _read(grad_ref, image, 0, sizes)
        weights, total = _weights(q, k, bias, sizes)
        weights = weights / total
        of_weights = _product(grad, v.T)
        of_logits = weights * (of_weights - jnp.sum(weights * of_weights, axis=1, keepdims=True))
        scaled = (of_logits * sizes.scale).astype(q.dtype)
        _write(of_qkv_ref, image, 0, _product(scaled, k), sizes)
        _write(of_qkv_ref, image, 1, _product(scaled.T, q), sizes)
        _write(of_qkv_ref, image, 2, _product(weights.T.astype(grad.dtype), grad), sizes)
        return of_bias + of_logits

    of_bias = lax.fori_loop(0, qkv_ref.shape[0], one, jnp.zeros(bias.shape, bias.dtype))
    triton.store(of_bias_ref, of_bias)


def _weights(q: Array, k: Array, bias: Array, sizes: Sizes) -> tuple[Array, Array]:
    """Returns exp(logits - maximum), which is zero for keys that pad the tile, and its sum over the keys."""
    logits = _product(q, k.T) * sizes.scale + bias
    weights = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    return weights, jnp.sum(weights, axis=1, keepdims=True)


def _product(a: Array, b: Array) -> Array:
    return jnp.dot(a, b, preferred_element_type=accumulator(a.dtype))


def _whole(ref: Ref) -> Array:
    return triton.load(ref)


def _inside(sizes: Sizes) -> Array:
    """Which entries of a block `[1, p, q, 1, head_dim]` are no padding."""
    shape = (1, *sizes.tile[:2], 1, sizes.tile[2])
    p, q, channels = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (1, 2, 4))
    return (p < sizes.window[0]) & (q < sizes.window[1]) & (channels < sizes.head_dim)


def _read(ref: Ref, image: Array | int, part: int, sizes: Sizes) -> Array:
    """Loads the tokens of an image, `[tokens, channels]`; what pads them is zero."""
    at = ref.at[pl.ds(image, 1), :, :, pl.ds(part, 1), :]
    return triton.load(at, mask=_inside(sizes), other=0).reshape(-1, sizes.tile[2])


def _write(ref: Ref, image: Array | int, part: int, x: Array, sizes: Sizes) -> None:
    at = ref.at[pl.ds(image, 1), :, :, pl.ds(part, 1), :]
    mask = _inside(sizes)
    triton.store(at, x.astype(ref.dtype).reshape(mask.shape), mask=mask)
