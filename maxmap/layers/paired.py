"""Convolutions whose maps have two pixels of a row side by side in the channels, `[B, H, W / 2, 2 C]`.

64 channels fill half of a TPU's registers and matrix unit, and half of every tile in its memory. With pairs they fill
them: the convolution has more multiply-adds, with zeros among them, and takes less than half of the time.
"""

import jax.numpy as jnp
from flax import linen as nn

from maxmap.kernels import xla
from maxmap.kernels.xla import Pads
from maxmap.layers.primitives import Conv
from maxmap.operations import Array, broadcast, explicit_padding


def convolve_in_pairs(conv: Conv, x: Array) -> Array:
    """Computes what a layer does, as pairs of pixels.

    Args:
      conv: of stride 2, or of stride 1 with zeros around a map that keep its size.
      x: `[B, H, W, I]` for stride 2; pairs `[B, H, W / 2, 2 I]` for stride 1.

    Returns:
      `[B, H', W' / 2, 2 O]`.
    """
    channels = x.shape[-1] if conv.stride == 2 else x.shape[-1] // 2
    x, kernel, bias = nn.dtypes.promote_dtype(x, *conv.weights(channels))
    if conv.stride == 2:
        pads = explicit_padding(conv.padding, x.shape[1:3], conv.kernel_size, conv.stride)
        x = convolve_into_pairs(x, kernel, conv.stride, pads)
    else:
        x = convolve_pairs(x, kernel)
    return x if bias is None else x + broadcast(jnp.tile(bias, 2), x.shape)


def convolve_into_pairs(x: Array, kernel: Array, stride: int, pads: Pads) -> Array:
    """Convolves a map.

    Args:
      x: `[B, H, W, I]`.
      kernel: `[k, k, I, O]`.
      stride: of both axes.
      pads: zeros before and after height and width; the result's width is even with them.

    Returns:
      `[B, H', W' / 2, 2 O]`.
    """
    size, (before, after) = kernel.shape[0], pads[1]
    pairs = ((x.shape[2] + before + after - size) // stride + 1) // 2
    # The second pixel of a pair is `stride` columns to the right of the first.
    both = jnp.concatenate(
        [jnp.pad(kernel, ((0, 0), place, (0, 0), (0, 0))) for place in ((0, stride), (stride, 0))], axis=-1
    )
    after = 2 * stride * (pairs - 1) + size + stride - before - x.shape[2]
    return xla.convolution(x, both, (stride, 2 * stride), (pads[0], (before, after)))


def convolve_pairs(x: Array, kernel: Array) -> Array:
    """Convolves a map of pairs at stride 1, with zeros around it that keep its size.

    Args:
      x: `[B, H, W / 2, 2 I]`.
      kernel: `[k, k, I, O]`, k odd.

    Returns:
      `[B, H, W / 2, 2 O]`.
    """
    size, _, in_channels, out_channels = kernel.shape
    pad = size // 2
    reach = (pad + 1) // 2  # pairs on every side that a pixel of a pair meets
    both = jnp.zeros((size, 2 * reach + 1, 2, in_channels, 2, out_channels), kernel.dtype)
    for place in range(2):
        for column in range(size):
            pair, pixel = divmod(place + column - pad, 2)
            both = both.at[:, reach + pair, pixel, :, place].set(kernel[:, column])
    both = both.reshape(size, 2 * reach + 1, 2 * in_channels, 2 * out_channels)
    return xla.convolution(x, both, (1, 1), ((pad, pad), (reach, reach)))
