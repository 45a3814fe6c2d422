"""For pooling heads alone: resizing of feature maps, and second-order statistics of a map."""

import functools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax

from maxmap.operations import Array, upcast


def adaptive_average(x: Array, size: Sequence[int]) -> Array:
    """Resizes maps `[B, H, W, C]` to `size`; output i is the mean of inputs floor(i n / m) .. ceil((i+1) n / m) - 1."""

    def weights(n_in: int, n_out: int) -> np.ndarray:
        matrix = np.zeros((n_out, n_in))
        for i in range(n_out):
            start, stop = i * n_in // n_out, -(-(i + 1) * n_in // n_out)
            matrix[i, start:stop] = 1 / (stop - start)
        return matrix

    return _resample(x, size, weights)


def bilinear(x: Array, size: Sequence[int]) -> Array:
    """Resizes maps `[B, H, W, C]` to `size` by linear interpolation, half-pixel centres and no antialiasing."""

    def weights(n_in: int, n_out: int) -> np.ndarray:
        position = np.maximum((np.arange(n_out) + 0.5) * n_in / n_out - 0.5, 0)
        low = np.floor(position).astype(int)
        matrix = np.zeros((n_out, n_in))
        np.add.at(matrix, (np.arange(n_out), low), 1 - (position - low))
        np.add.at(matrix, (np.arange(n_out), np.minimum(low + 1, n_in - 1)), position - low)
        return matrix

    return _resample(x, size, weights)


def _resample(x: Array, size: Sequence[int], weights: Callable[[int, int], np.ndarray]) -> Array:
    """Applies the matrices `weights(n_in, n_out)` along height and width."""
    for axis, n_out in zip((1, 2), size, strict=True):
        n_in = x.shape[axis]
        matrix = weights(n_in, n_out)
        stride = n_in // n_out
        filters = {int(i): matrix[0, i].astype(x.dtype) for i in np.flatnonzero(matrix[0])}  # weight by offset
        same = all(np.array_equal(row, np.roll(matrix[0], i * stride)) for i, row in enumerate(matrix))
        if stride > 1 and same and len(filters) <= 4:
            # All outputs have the same few weights: a sum of strided slices is cheaper than a product with a matrix
            # that is mostly zero.
            last = stride * (n_out - 1) + 1
            slices = (lax.slice_in_dim(x, i, i + last, stride, axis) * weight for i, weight in filters.items())
            x = functools.reduce(jnp.add, slices)
        else:
            x = jnp.einsum("oh,bhwc->bowc" if axis == 1 else "pw,bowc->bopc", jnp.asarray(matrix, x.dtype), x)
    return x


def gram_values(x: Array) -> Array:
    """Second-order statistics of maps `[B, H, W, P]`: the Gram matrix's upper triangle, L2-normalised, `[B, P(P+1)/2]`.

    The triangle is read row by row, with the diagonal. Second moments cancel and span many magnitudes, so they are
    computed in float32 at full precision, whatever the type of `x`.
    """
    z = rearrange(upcast(x), "b h w p -> b (h w) p")
    z = z / z.shape[1]
    gram = jnp.einsum("bnp,bnq->bpq", z, z, precision=lax.Precision.HIGHEST)
    rows, columns = np.triu_indices(x.shape[-1])
    v = gram[:, rows, columns]
    norm = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(v), axis=-1, keepdims=True), 1e-24))
    return (v / norm).astype(x.dtype)
