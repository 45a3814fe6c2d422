"""XLA's own operations on NHWC maps: the ways of accelerators, and the forward passes of some ways of the CPU."""

import jax.numpy as jnp
from jax import lax

from maxmap.kernels.target import Array

Pads = tuple[tuple[int, int], ...]  # zeros before and after, for height and width


def convolution(x: Array, kernel: Array, stride: int | tuple[int, int], pads: Pads, groups: int = 1) -> Array:
    """2-d cross-correlation of `[B, H, W, C]` with `[kh, kw, C / groups, O]`, `[B, H', W', O]`."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride) if isinstance(stride, int) else stride,
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def max_pool(x: Array, size: int, stride: int, padding: int) -> Array:
    """Largest value of every window of `[B, H, W, C]`; padding never is the largest."""
    pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, size, size, 1), (1, stride, stride, 1), pads)
