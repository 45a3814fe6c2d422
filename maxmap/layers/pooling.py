"""Resizing of feature maps, and for pooling heads second-order statistics of a map."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax

from maxmap.operations import Array, accumulator, implementation, layer_norm, upcast

Weights = tuple[Array, Array | None]  # of a norm or a linear map


def adaptive_average(x: Array, size: Sequence[int]) -> Array:
    """Resizes maps `[B, H, W, C]` to `size`; output i is the mean of inputs floor(i n / m) .. ceil((i+1) n / m) - 1."""

    def weights(n_in: int, n_out: int) -> np.ndarray:
        matrix = np.zeros((n_out, n_in))
        for i in range(n_out):
            start, stop = i * n_in // n_out, -(-(i + 1) * n_in // n_out)
            matrix[i, start:stop] = 1 / (stop - start)
        return matrix

    return _resample(x, size, weights)


def bilinear(x: Array, size: Sequence[int], *, align_corners: bool = False) -> Array:
    """Resizes maps `[B, H, W, C]` to `size` by linear interpolation without antialiasing.

    Pixels have areas, whose edges are aligned; with `align_corners` they are points, and the outermost are aligned.
    """

    def weights(n_in: int, n_out: int) -> np.ndarray:
        if align_corners:
            position = np.arange(n_out) * ((n_in - 1) / max(n_out - 1, 1))
        else:
            position = np.maximum((np.arange(n_out) + 0.5) * n_in / n_out - 0.5, 0)
        low = np.floor(position).astype(int)
        matrix = np.zeros((n_out, n_in))
        np.add.at(matrix, (np.arange(n_out), low), 1 - (position - low))
        np.add.at(matrix, (np.arange(n_out), np.minimum(low + 1, n_in - 1)), position - low)
        return matrix

    return _resample(x, size, weights)


def nearest(x: Array, size: Sequence[int]) -> Array:
    """Resizes maps `[B, H, W, C]` to `size`; output i is input floor(i n / m)."""
    return _resample(x, size, lambda n_in, n_out: np.eye(n_in)[np.arange(n_out) * n_in // n_out])


def require_levels(count: int, levels: Sequence[int], what: str) -> None:
    """Raises ValueError, one sentence, if `what` reads other feature maps by their numbers than the first `count`."""
    if max(max(levels) + 1, -min(levels)) > count:
        raise ValueError(f"{what} reads the feature maps {tuple(levels)}, and there are {count}: set levels")


def select_levels(features: Sequence[Array], levels: Sequence[int], what: str) -> list[Array]:
    """Returns some of the feature maps by their numbers; ValueError says that `what` reads more than there are."""
    require_levels(len(features), levels, what)
    return [features[level] for level in levels]


def top_down(maps: Sequence[Array], resize: Callable[[Array, Sequence[int]], Array]) -> list[Array]:
    """Adds to each map `[B, H_i, W_i, C]`, finest first, the sum of all coarser ones, resized from map to map."""
    merged = [maps[-1]]
    for x in reversed(maps[:-1]):
        merged.append(x + resize(merged[-1], x.shape[1:3]))
    return merged[::-1]


def _resample(x: Array, size: Sequence[int], weights: Callable[[int, int], np.ndarray]) -> Array:
    """Applies the matrices `weights(n_in, n_out)` along height and width."""
    images_last = implementation("resize") == "images_last"
    if images_last:
        x = jnp.transpose(x, (1, 2, 0, 3))
    for axis, n_out in enumerate(size, start=0 if images_last else 1):
        x = _resample_axis(x, axis, weights(x.shape[axis], n_out))
    return jnp.transpose(x, (2, 0, 1, 3)) if images_last else x


def _resample_axis(x: Array, axis: int, matrix: np.ndarray) -> Array:
    """Multiplies a matrix `[m, n]` with one axis of `x`, 0 to 2, of length n."""
    n_out, n_in = matrix.shape
    stride = n_in // n_out
    filters = {int(i): matrix[0, i].astype(x.dtype) for i in np.flatnonzero(matrix[0])}  # weight by offset
    same = all(np.array_equal(row, np.roll(matrix[0], i * stride)) for i, row in enumerate(matrix))
    if stride > 1 and same and len(filters) <= 4:
        # All outputs have the same few weights: a sum of strided slices is cheaper than a product with a matrix that is
        # mostly zero.
        last = stride * (n_out - 1) + 1
        slices = (lax.slice_in_dim(x, i, i + last, stride, axis) * weight for i, weight in filters.items())
        return functools.reduce(jnp.add, slices)
    if n_out % n_in == 0 and np.array_equal(matrix, np.repeat(np.eye(n_in), n_out // n_in, axis=0)):
        return jnp.repeat(x, n_out // n_in, axis=axis)
    equation = ("oh,hwbc->owbc", "oh,whbc->wobc", "oh,bwhc->bwoc")[axis]
    return jnp.einsum(equation, jnp.asarray(matrix, x.dtype), x)


def gram_projection(x: Array, kernel: Array, groups: int, tokens: int = 1) -> Array:
    """Grouped linear map of second-order statistics: the upper triangle of a map's Gram matrix, L2-normalised.

    The triangle, M = P(P+1)/2 values, is read row by row, with the diagonal; value i * T + t of it enters the linear
    map at place t * M / T + i. Second moments cancel and span many magnitudes, so they are computed in float32 or
    wider, whatever the type of `x`. They are divided by their norm after the linear map, which leaves fewer values.

    Args:
      x: maps `[B, H, W, P]`.
      kernel: `[M / groups, O]`, output channels grouped contiguously, in the type of `x`.
      groups: of the linear map.
      tokens: T.

    Returns:
      `[B, O]` in the type of `x`.
    """
    batch, height, width, _ = x.shape
    values, square = _gram_triangle(rearrange(x, "b h w p -> b (h w) p"), tokens)
    # Groups are the first axis: a batched product, of which neither operand has to be transposed as a whole.
    values = rearrange(values, "(g i) b -> g i b", g=groups)
    y = jnp.einsum(
        "gib,igo->bgo",
        values,
        rearrange(kernel, "i (g o) -> i g o", g=groups),
        preferred_element_type=accumulator(x.dtype),
    ).reshape(batch, -1)
    norm = jnp.sqrt(jnp.maximum(square, 1e-24 * (height * width) ** 4))  # the reference divides the map by its pixels
    return (y / norm[:, None]).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gram_triangle(x: Array, tokens: int) -> tuple[Array, Array]:
    """Returns the upper triangle of the Gram matrix of `[B, N, P]` in `gram_projection`'s order, and its square.

    The triangle is `[M, B]` in the type of `x`: rows of values are faster to gather than single ones. Its square is
    `[B]`, in float32 or wider.
    """
    return _gram_triangle_forward(x, tokens)[0]


def _gram_triangle_forward(x: Array, tokens: int) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    batch, _, channels = x.shape
    gram = _product("bnp,bnq->bpq", x, x)
    once = 0.5 + 0.5 * jnp.eye(channels, dtype=gram.dtype)[None]  # the diagonal counts once, the triangle half of twice
    square = jnp.sum(jnp.square(gram) * once, axis=(1, 2))
    gram = gram.astype(x.dtype)
    rows = jnp.transpose(gram, (1, 2, 0)).reshape(channels * channels, batch)
    return (_gather(rows, _triangle(channels, tokens)[0]), square), (x, gram)


def _gram_triangle_backward(tokens: int, residuals: tuple[Array, Array], grads: tuple[Array, Array]) -> tuple[Array]:
    x, gram = residuals
    channels = x.shape[-1]
    whole = _gather(grads[0], _triangle(channels, tokens)[1]).reshape(channels, channels, -1)
    # Without the barrier XLA converts to float32 first and transposes twice the bytes.
    whole = lax.optimization_barrier(jnp.transpose(whole, (2, 0, 1)))
    twice = 1 + jnp.eye(channels, dtype=grads[1].dtype)[None]
    whole = (upcast(whole) + 2 * grads[1][:, None, None] * upcast(gram)) * twice
    return (_product("bnq,bqp->bnp", x, whole.astype(x.dtype)).astype(x.dtype),)


_gram_triangle.defvjp(_gram_triangle_forward, _gram_triangle_backward)


def normalise_map(x: Array, epsilon: float) -> Array:
    """Normalises every pixel of `[B, H, W, C]` over C, `[B, H * W, C]`: a LayerNorm without scale and bias.

    Branches that each have a LayerNorm of one map share it; what is left of the norm, `behind_norm` takes in.
    """
    pixels = rearrange(x, "b h w c -> b (h w) c")
    channels = x.shape[-1]
    return layer_norm(pixels, jnp.ones(channels, x.dtype), jnp.zeros(channels, x.dtype), epsilon)


def behind_norm(norm: Weights, linear: Weights, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Returns kernel and bias of a linear map that takes in scale and bias of the norm in front of it.

    Args:
      norm: scale and bias, `[C]`.
      linear: kernel `[C, E]`, and bias `[E]` or None.
      dtype: of the results.
    """
    (scale, shift), (kernel, bias) = norm, linear
    whole = kernel * scale[:, None]
    shift = jnp.zeros(kernel.shape[1:], kernel.dtype) if shift is None else shift @ kernel
    return whole.astype(dtype), (shift if bias is None else shift + bias).astype(dtype)


def map_logits(q: Array, x: Array, kernel: Array, bias: Array) -> Array:
    """Logits of few queries for keys that are a linear map of many pixels, without the keys.

    q . (K x + b) = (K' q) . x + q . b: with H * T below the channels of the keys, far fewer multiply-adds, and no other
    array of the map's size.

    Args:
      q: queries `[B, T, H, d]`.
      x: pixels `[B, N, C]`.
      kernel: of the keys, `[C, H * d]`.
      bias: of the keys, `[H * d]`.

    Returns:
      `[B, H, T, N]`.
    """
    heads = q.shape[2]
    projected = jnp.einsum("bthd,chd->bhtc", q, rearrange(kernel, "c (h d) -> c h d", h=heads))
    same = jnp.einsum("bthd,hd->bht", q, rearrange(bias, "(h d) -> h d", h=heads))
    return jnp.einsum("bhtc,bnc->bhtn", projected, x) + same[..., None]


def map_values(probabilities: Array, x: Array, kernel: Array, bias: Array) -> Array:
    """Sums of values that are a linear map of many pixels, without the values; see `map_logits`.

    Args:
      probabilities: weights of the sums, `[B, H, T, N]`.
      x: pixels `[B, N, C]`.
      kernel: of the values, `[C, H * d]`.
      bias: of the values, `[H * d]`.

    Returns:
      `[B, T, H, d]`.
    """
    heads = probabilities.shape[1]
    sums = jnp.einsum("bhtn,bnc->bhtc", probabilities, x)
    total = rearrange(jnp.sum(probabilities, axis=-1), "b h t -> b t h 1")
    values = jnp.einsum("bhtc,chd->bthd", sums, rearrange(kernel, "c (h d) -> c h d", h=heads))
    return values + total * rearrange(bias, "(h d) -> 1 1 h d", h=heads)


def _product(equation: str, x: Array, y: Array) -> Array:
    """Multiplies in full precision. Products of bfloat16 are exact in float32 as they are, and six times as fast."""
    precision = lax.Precision.HIGHEST if x.dtype == accumulator(x.dtype) else None
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=accumulator(x.dtype))


def _gather(x: Array, rows: np.ndarray) -> Array:
    return x.at[rows].get(mode="promise_in_bounds")


@functools.cache
def _triangle(channels: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the places of the triangle's values in the matrix, `[M]`, and of the matrix's in the triangle, `[P * P]`.

    The triangle has `gram_projection`'s order; both halves of the matrix have places in it.
    """
    rows, columns = np.triu_indices(channels)
    order = rearrange(np.arange(len(rows), dtype=np.int32), "(i t) -> (t i)", t=tokens)
    rows, columns = rows[order], columns[order]
    inverse = np.empty((channels, channels), np.int32)
    inverse[rows, columns] = inverse[columns, rows] = np.arange(len(rows))
    return (rows * channels + columns).astype(np.int32), inverse.reshape(-1)
