"""The check of images before any backbone reads them: type, axes and channels."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.errors import FlaxError

from maxmap.errors import UserError
from maxmap.layers.primitives import pair
from maxmap.operations import Array


def check_images(images: Array, params: Mapping[str, Any] | None) -> None:
    """Raises UserError unless images are floating point, `[B, H, W, C]` and of the channels that a backbone reads.

    Args:
      images: That the model is called with.
      params: Of the backbone; None while it is initialised, which takes any number of channels.
    """
    shape, dtype = jnp.shape(images), jnp.result_type(images)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise UserError(
            f"the images are {dtype}, and a model takes normalised ones in floating point: give "
            "(images / 255 - mean) / std, with the mean and std of the preprocessing."
        )
    if len(shape) != 4:
        hint = "; a single image is images[None]" if len(shape) == 3 else ""
        raise UserError(f"the images have the shape {shape}: give [batch, height, width, channels]{hint}.")
    if not all(isinstance(side, int) for side in shape[1:]):  # symbolic ones of jax.export
        return
    if shape[1] <= 4 < min(shape[2:]):
        raise UserError(
            f"the images have the shape {shape}, which looks like [batch, channels, height, width]: give "
            "[batch, height, width, channels], which images.transpose(0, 2, 3, 1) makes of them."
        )
    if 0 in shape[1:]:
        raise UserError(
            f"the images have the shape {shape}, which holds no pixels: give [batch, height, width, channels]."
        )
    kernels = (leaf.shape for leaf in jax.tree.leaves(params) if jnp.ndim(leaf) == 4)
    # No other kernel of a backbone has three input channels.
    if shape[3] != 3 and any(kernel[2] == 3 for kernel in kernels):
        raise _wrong_channels(shape[3], 3)


def channels_error(images: Array, error: FlaxError) -> UserError | None:
    """Returns what to raise for a kernel that reads other channels than the images have, None for other errors."""
    shapes = [re.findall(r"\d+", text) for text in re.findall(r"\(([\d, ]+)\)", str(error))[:2]]
    if len(shapes) < 2:  # a parameter that is missing has no shape
        return None
    (wanted, found), channels = shapes, str(images.shape[-1])
    if len(wanted) == len(found) == 4 and channels in (wanted[2], found[2]) and wanted[:2] == found[:2]:
        return _wrong_channels(images.shape[-1], int(wanted[2] if channels == found[2] else found[2]))
    return None


def size_error(images: Array, image_size: int | tuple[int, int]) -> UserError | None:
    """Returns what to raise for weights that are made for images of another size, None if the size is the model's."""
    height, width = images.shape[1:3]
    own = pair(image_size)
    if (height, width) == own:
        return None
    wanted = str(height) if height == width else f"({height}, {width})"
    return UserError(
        f"the images are {height} x {width} pixels, and the weights are made for {own[0]} x {own[1]}: make the model "
        f"with image_size={wanted}; `convert --image-size` and init_from fit weights to it where that can be done."
    )


def _wrong_channels(given: int, wanted: int) -> UserError:
    return UserError(
        f"the images have {given} channels, and the parameters are those of a network for {wanted}: give images with "
        f"{wanted} channels, or initialise the model with images that have {given}."
    )
