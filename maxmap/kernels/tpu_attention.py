"""Window and grid attention for TPUs: norm, projections, attention and residual path in one kernel.

Nothing but the map itself is read from memory and written to it: queries, keys, values and logits stay on the chip, and
the backward pass computes them again.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from maxmap.kernels.branch import given, in_types_of_kernels, keep_of, norm_of, residual_branch
from maxmap.kernels.mosaic import LANES, Ref, product, whole
from maxmap.kernels.target import Array, accumulator, local_batch
from maxmap.kernels.tpu import (
    accumulate,
    call,
    images_per_program,
    kept,
    normalized,
    normalized_gradient,
    round_up,
    rows,
)

NEVER = -1e30  # a logit of keys that only pad a tile
# Images whose attention a program computes in turns: their operations do not depend on each other, so that the units of
# the core do not wait for each other. More of them do not fit into the registers.
INTERLEAVED = 4


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a kernel knows of its shapes.

    Queries, keys and values of a token take `tiles` tiles of 128 lanes each, with the channels of `128 / head_dim`
    heads. Logits of several heads stand side by side in one tile: a head's keys are zero in the lanes of the others.

    Attributes:
      window: height and width of a window or grid cell.
      kind: "window" or "grid".
      images: of a program.
      heads: of the attention.
      head_dim: channels of a head; it divides 128.
      scale: factor of the queries.
      epsilon: of the norm.
      residual: the residual path has an input of its own.
    """

    window: tuple[int, int]
    kind: str
    images: int
    heads: int
    head_dim: int
    scale: float
    epsilon: float
    residual: bool

    @property
    def tokens(self) -> int:
        """Tokens of a window."""
        return self.window[0] * self.window[1]

    @property
    def queries(self) -> int:
        """Rows of a tile of logits."""
        return round_up(self.tokens, 8)

    @property
    def keys(self) -> int:
        """Keys of a head in a tile of logits, with those that pad it."""
        return next((n for n in (32, 64) if self.tokens <= n), round_up(self.tokens, LANES))

    @property
    def rows(self) -> int:
        """Tokens of a program: of one window in all of its images."""
        return self.tokens * self.images

    @property
    def tiles(self) -> int:
        """Tiles of 128 lanes for the queries of all heads."""
        return -(-self.heads * self.head_dim // LANES)

    @property
    def together(self) -> int:
        """Heads whose logits stand side by side."""
        return min(LANES // self.head_dim, max(1, LANES // self.keys))

    @property
    def groups(self) -> list[tuple[int, int]]:
        """Tile and first head inside of the tile of all heads whose logits stand side by side."""
        in_tile = LANES // self.head_dim
        return [
            (tile, first)
            for tile in range(self.tiles)
            for first in range(0, min(in_tile, self.heads - tile * in_tile), self.together)
        ]


def fits(batch: int, window: tuple[int, int], head_dim: int) -> bool:
    """Whether there is a kernel for a device's part of a batch, a window and channels of a head.

    The windows are at most 16 x 16, as in MaxViT for images of 512 pixels; larger ones do not fit into the memory.
    """
    return images_per_program(batch) > 0 and LANES % head_dim == 0 and window[0] * window[1] <= 256


def attention_block(
    x: Array,
    weights: Mapping[str, Any],
    kind: str,
    window: tuple[int, int],
    heads: int,
    scale: float,
    epsilon: float,
    residual: Array | None = None,
) -> Array:
    """Computes residual + keep * proj(attention(qkv(norm(x)))) inside of windows or grid cells.

    Arguments and result: see `maxmap.fused.attention_block`; maps are `[H, W, B, C]` here.
    """
    batch, channels = x.shape[2:]
    width = weights["proj_kernel"].shape[0]
    sizes = Sizes(
        window,
        kind,
        images_per_program(local_batch(batch)),
        heads,
        width // heads,
        scale,
        epsilon,
        residual is not None,
    )
    lanes = sizes.tiles * LANES - width
    qkv = jnp.pad(weights["qkv_kernel"], ((0, 0), (0, 0), (0, lanes))).reshape(channels, -1)
    qkv_bias = jnp.pad(given(weights["qkv_bias"], (3, width), 0), ((0, 0), (0, lanes))).reshape(1, -1)
    arranged = {
        "norm": norm_of(weights, channels),
        "qkv_kernel": qkv,
        "qkv_bias": qkv_bias,
        "bias": _arrange_bias(given(weights["bias"], (heads, sizes.tokens, sizes.tokens), 0), sizes),
        "proj_kernel": jnp.pad(weights["proj_kernel"], ((0, lanes), (0, 0))),
        "proj_bias": given(weights["proj_bias"], (channels,), 0)[None],
    }
    arranged = in_types_of_kernels(arranged, x.dtype)
    keep = keep_of(weights, batch, channels, x.dtype)
    maps = [part for part in (x, residual) if part is not None]
    run = functools.partial(_run, sizes)
    return residual_branch(functools.partial(run, grad=None), run, 2, maps, arranged, keep)


def _arrange_bias(bias: Array, sizes: Sizes) -> Array:
    """Arranges a bias `[heads, N, N]` as the tiles of logits stand: `[groups, queries, together * keys]`."""
    heads, tokens, _ = bias.shape
    missing = len(sizes.groups) * sizes.together - heads
    bias = jnp.pad(bias, ((0, missing), (0, sizes.queries - tokens), (0, 0)))
    bias = jnp.pad(bias, ((0, 0), (0, 0), (0, sizes.keys - tokens)), constant_values=NEVER)
    return rearrange(bias, "(g j) q k -> g q (j k)", j=sizes.together)


# Compiled by itself so that it is traced once for all blocks of the same shapes: tracing takes seconds.
@functools.partial(jax.jit, static_argnums=0)
def _run(sizes: Sizes, maps: list[Array], weights: dict[str, Array], keep: Array, grad: Array | None) -> tuple:
    """Runs the kernel of one pass: the output alone, or the gradients of `x` and of the weights."""
    x = maps[0]
    height, width, batch, channels = x.shape
    (p, q), images = sizes.window, sizes.images
    if sizes.kind == "window":
        view = (height // p, p, width // q, q, batch, channels)
        spec = pl.BlockSpec((None, p, None, q, images, channels), lambda i, j, b: (i, 0, j, 0, b, 0))
    else:
        view = (p, height // p, q, width // q, batch, channels)
        spec = pl.BlockSpec((p, None, q, None, images, channels), lambda i, j, b: (0, i, 0, j, b, 0))
    whole_map = jax.ShapeDtypeStruct(view, x.dtype)
    inputs = {name: (part.reshape(view), spec) for name, part in zip(("x", "residual"), maps, strict=False)}
    inputs |= {name: (w, whole(w)) for name, w in weights.items()}
    inputs["keep"] = (keep, pl.BlockSpec((images, channels), lambda i, j, b: (b, 0)))
    wide = accumulator(x.dtype)
    keys, queries = sizes.keys * images, sizes.queries * images
    scratch = [pltpu.VMEM((3 * sizes.tiles, keys, LANES), wide), pltpu.VMEM((sizes.tiles, queries, LANES), wide)]
    outputs = {"x": (whole_map, spec)}
    if grad is None:
        kernel: Callable[..., None] = _forward_kernel
        step = "forward"
    else:
        kernel, step = _backward_kernel, "backward"
        inputs["grad"] = (grad.reshape(view), spec)
        for name, w in weights.items():
            shape = jax.ShapeDtypeStruct(w.shape, wide)
            outputs[name] = (shape, whole(shape))
        scratch += [
            pltpu.VMEM((sizes.tiles, queries, LANES), wide),
            pltpu.VMEM((3 * sizes.tiles, queries, LANES), wide),
        ]
    name = f"attention_{step}_{sizes.kind}_{height}x{width}x{batch}x{channels}_{p}x{q}"
    grid = (height // p, width // q, batch // images)
    out, *rest = call(functools.partial(kernel, sizes), name, grid, inputs, outputs, scratch)
    out = out.reshape(x.shape)
    return (out,) if grad is None else (out, dict(zip(weights, rest, strict=True)))


def _fill(ref: Ref, tile: int, part: Array) -> None:
    """Writes rows to a tile; what pads it becomes zero."""
    filled, length = part.shape[0], ref.shape[1]
    ref[tile, :filled, :] = part
    if filled < length:
        ref[tile, filled:, :] = jnp.zeros((length - filled, LANES), part.dtype)


def _project(ins: Mapping[str, Ref], qkv: Ref, normal: Array, sizes: Sizes) -> Array:
    """Writes queries, scaled, keys and values of all tokens to `qkv`; returns the norm's output."""
    dtype = ins["x"].dtype
    y = (normal * ins["norm"][0:1, :] + ins["norm"][1:2, :]).astype(dtype)
    for tile in range(3 * sizes.tiles):
        lanes = slice(tile * LANES, (tile + 1) * LANES)
        part = product(y, ins["qkv_kernel"][:, lanes]) + ins["qkv_bias"][:, lanes]
        _fill(qkv, tile, part * sizes.scale if tile < sizes.tiles else part)
    return y


def _of_heads(sizes: Sizes, first: int, dtype: jnp.dtype) -> list[Array]:
    """Returns, for each of the heads side by side, `[1, 128]` with ones in its lanes."""
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    starts = [(first + j) * sizes.head_dim for j in range(sizes.together)]
    return [((lane >= start) & (lane < start + sizes.head_dim)).astype(dtype) for start in starts]


def _side_by_side(x: Array, heads: list[Array]) -> Array:
    """Repeats keys or values `[keys, 128]` for every head, `[heads * keys, 128]`, with zeros in the others' lanes."""
    return jnp.concatenate([x * head for head in heads], axis=0)


def _by_head(x: Array, sizes: Sizes, reduce: Callable[[Array], Array], neutral: float) -> Array:
    """Reduces every head's part of the logits' tile `[queries, together * keys]`; the result has the shape of `x`."""
    if sizes.together == 1:
        return jnp.broadcast_to(reduce(x), x.shape)
    lane = lax.broadcasted_iota(jnp.int32, (1, x.shape[1]), 1)
    result = x
    for j in range(sizes.together):
        inside = (lane >= j * sizes.keys) & (lane < (j + 1) * sizes.keys)
        result = jnp.where(inside, reduce(jnp.where(inside, x, neutral)), result)
    return result


def _weights(q: Array, k: Array, bias: Array, sizes: Sizes) -> Array:
    """Returns exp(logits - maximum) of the heads side by side, `[queries, together * keys]`."""
    logits = product(q, k, 1, 1) + bias
    return jnp.exp(logits - _by_head(logits, sizes, _largest, -jnp.inf))


def _largest(x: Array) -> Array:
    return jnp.max(x, axis=-1, keepdims=True)


def _sum(x: Array) -> Array:
    return jnp.sum(x, axis=-1, keepdims=True)


def _read(ref: Ref, tile: int, image: int, tokens: int, sizes: Sizes, dtype: jnp.dtype) -> Array:
    """Reads one image's tokens `[tokens, 128]` of a tile."""
    return ref.at[tile][pl.ds(image, tokens, stride=sizes.images), :].astype(dtype)


def _write(ref: Ref, tile: int, image: int, x: Array, sizes: Sizes) -> None:
    ref.at[tile][pl.ds(image, sizes.queries, stride=sizes.images), :] = x[: sizes.queries]


def _forward_kernel(sizes: Sizes, ins: Mapping[str, Ref], outs: Mapping[str, Ref], qkv: Ref, heads_out: Ref) -> None:
    x, dtype, tiles = rows(ins["x"]), ins["x"].dtype, sizes.tiles
    _project(ins, qkv, normalized(x, sizes.epsilon)[0], sizes)
    for tile in range(tiles):
        for start in range(0, sizes.images, INTERLEAVED):
            images = range(start, start + INTERLEAVED)
            q = [_read(qkv, tile, image, sizes.queries, sizes, dtype) for image in images]
            k, v = ([_read(qkv, n * tiles + tile, i, sizes.keys, sizes, dtype) for i in images] for n in (1, 2))
            for image, out in zip(images, _attend(ins["bias"], q, k, v, tile, sizes), strict=True):
                _write(heads_out, tile, image, out, sizes)
    out = _merge(heads_out, ins["proj_kernel"], sizes, dtype) + ins["proj_bias"][...]
    path = rows(ins["residual"]) if sizes.residual else x
    y = path + kept(out, ins["keep"][...])
    outs["x"][...] = y.astype(dtype).reshape(outs["x"].shape)


def _merge(heads_out: Ref, kernel: Ref, sizes: Sizes, dtype: jnp.dtype) -> Array:
    """Projects the heads' outputs `[tiles, rows, 128]` to `[rows, C]`."""
    parts = [
        product(heads_out[tile, : sizes.rows, :].astype(dtype), kernel[tile * LANES : (tile + 1) * LANES, :])
        for tile in range(sizes.tiles)
    ]
    return functools.reduce(jnp.add, parts)


def _attend(bias: Ref, q: list[Array], k: list[Array], v: list[Array], tile: int, sizes: Sizes) -> list[Array]:
    """Returns the outputs `[queries, 128]` of a tile's heads for several images.

    The softmax's sums come from a product with ones, which leaves each head's sum in all of the head's lanes.
    """
    dtype = q[0].dtype
    outs: list[list[Array]] = [[] for _ in q]
    totals: list[list[Array]] = [[] for _ in q]
    for group, (its_tile, first) in enumerate(sizes.groups):
        if its_tile != tile:
            continue
        heads = _of_heads(sizes, first, dtype)
        ones = _side_by_side(jnp.ones((sizes.keys, LANES), dtype), heads)
        wide_k, wide_v = ([_side_by_side(x, heads) for x in part] for part in (k, v))
        weights = [_weights(*qk, bias[group], sizes).astype(dtype) for qk in zip(q, wide_k, strict=True)]
        for i, (w, values) in enumerate(zip(weights, wide_v, strict=True)):
            outs[i].append(product(w, values))
            totals[i].append(product(w, ones))
    used = lax.broadcasted_iota(jnp.int32, (1, LANES), 1) < (sizes.heads * sizes.head_dim - tile * LANES)
    return [
        functools.reduce(jnp.add, out) / jnp.where(used, functools.reduce(jnp.add, total), 1)
        for out, total in zip(outs, totals, strict=True)
    ]


def _backward_kernel(
    sizes: Sizes, ins: Mapping[str, Ref], outs: Mapping[str, Ref], qkv: Ref, heads_out: Ref, grads: Ref, grad_qkv: Ref
) -> None:
    x, dtype, tiles = rows(ins["x"]), ins["x"].dtype, sizes.tiles
    normal, factor = normalized(x, sizes.epsilon)
    y = _project(ins, qkv, normal, sizes)
    grad = rows(ins["grad"])
    branch = kept(grad, ins["keep"][...])
    of_bias = branch.sum(axis=0, keepdims=True)
    branch = branch.astype(dtype)
    for tile in range(tiles):
        _fill(grads, tile, product(branch, ins["proj_kernel"][tile * LANES : (tile + 1) * LANES, :], 1, 1))
    accumulate(3, [outs["bias"]], [jnp.zeros(outs["bias"].shape, outs["bias"].dtype)])
    for tile in range(tiles):
        for start in range(0, sizes.images, INTERLEAVED):
            images = range(start, start + INTERLEAVED)
            q, grad_out = ([_read(ref, tile, i, sizes.queries, sizes, dtype) for i in images] for ref in (qkv, grads))
            k, v = ([_read(qkv, n * tiles + tile, i, sizes.keys, sizes, dtype) for i in images] for n in (1, 2))
            found = _attend_backward(ins["bias"], outs["bias"], q, k, v, grad_out, tile, sizes)
            for image, (out, *of_qkv) in zip(images, found, strict=True):
                _write(heads_out, tile, image, out, sizes)
                for n, part in enumerate(of_qkv):
                    _write(grad_qkv, n * tiles + tile, image, part, sizes)
    merged = jnp.concatenate([heads_out[tile, : sizes.rows, :].astype(dtype) for tile in range(tiles)], axis=1)
    of_qkv = [grad_qkv[tile, : sizes.rows, :] for tile in range(3 * tiles)]
    of_qkv = [part * sizes.scale if tile < tiles else part for tile, part in enumerate(of_qkv)]
    of_qkv_bias = jnp.concatenate([part.sum(axis=0, keepdims=True) for part in of_qkv], axis=1)
    wide = jnp.concatenate([part.astype(dtype) for part in of_qkv], axis=1)
    of_y = product(wide, ins["qkv_kernel"][...], 1, 1)
    of_norm = jnp.concatenate([(of_y * part).sum(axis=0, keepdims=True) for part in (normal, jnp.ones_like(of_y))])
    parts = {
        "norm": of_norm,
        "qkv_kernel": product(y, wide, 0, 0),
        "qkv_bias": of_qkv_bias,
        "proj_kernel": product(merged, branch, 0, 0),
        "proj_bias": of_bias,
    }
    accumulate(3, [outs[name] for name in parts], list(parts.values()))
    of_x = normalized_gradient(normal, factor, of_y * ins["norm"][0:1, :])
    of_x = of_x if sizes.residual else grad + of_x
    outs["x"][...] = of_x.astype(dtype).reshape(outs["x"].shape)


def _attend_backward(
    bias: Ref,
    of_bias: Ref,
    q: list[Array],
    k: list[Array],
    v: list[Array],
    grad: list[Array],
    tile: int,
    sizes: Sizes,
) -> list[list[Array]]:
    """Returns, for several images, the outputs of a tile's heads and the gradients of queries, keys and values."""
    dtype = q[0].dtype
    found: list[list[list[Array]]] = [[[], [], [], []] for _ in q]
    for group, (its_tile, first) in enumerate(sizes.groups):
        if its_tile != tile:
            continue
        heads = _of_heads(sizes, first, dtype)
        wide_k, wide_v = ([_side_by_side(x, heads) for x in part] for part in (k, v))
        weights = [_weights(*qk, bias[group], sizes) for qk in zip(q, wide_k, strict=True)]
        weights = [w / _by_head(w, sizes, _sum, 0) for w in weights]
        of_weights = [product(*gv, 1, 1) for gv in zip(grad, wide_v, strict=True)]
        slopes = [_by_head(w * g, sizes, _sum, 0) for w, g in zip(weights, of_weights, strict=True)]
        of_logits = [w * (g - s) for w, g, s in zip(weights, of_weights, slopes, strict=True)]
        of_bias[group] += functools.reduce(jnp.add, of_logits)
        for i, parts in enumerate(found):
            w, of_l = weights[i].astype(dtype), of_logits[i].astype(dtype)
            parts[0].append(product(w, wide_v[i]))
            parts[1].append(product(of_l, wide_k[i]))
            parts[2].append(_own_lanes(product(of_l, q[i], 0, 0), heads, sizes))
            parts[3].append(_own_lanes(product(w, grad[i], 0, 0), heads, sizes))
    return [[functools.reduce(jnp.add, part) for part in parts] for parts in found]


def _own_lanes(x: Array, heads: list[Array], sizes: Sizes) -> Array:
    """Undoes `_side_by_side` for gradients: adds up the heads' rows, each in the lanes of its head alone."""
    parts = [x[j * sizes.keys : (j + 1) * sizes.keys] * head.astype(x.dtype) for j, head in enumerate(heads)]
    return functools.reduce(jnp.add, parts)
