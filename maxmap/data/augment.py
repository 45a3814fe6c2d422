"""Augmentation on the device: flips, RandAugment, colour jitter, normalisation and random erasing of whole batches.

Everything is a pure function of a PRNG key and the batch, to be called under `jit` with static options. A batch may be
sharded along its first axis, since no image depends on another.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from maxmap.data.randaugment import OPERATIONS, fill_color, parse_rand_augment
from maxmap.data.randaugment_device import enhance, rand_augment_batch
from maxmap.errors import UserError
from maxmap.ranges import Fraction, NonNegative, Range, Share, check_arguments

ERASE_TRIES = 10  # rectangles that are drawn until one fits


def augment(
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    *,
    mean: Sequence[float],
    hflip: Share = 0.5,
    vflip: Share = 0.0,
    rand_augment: str | None = None,
    color_jitter: NonNegative | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Flips and then recolours or warps every image of a batch on its own, and flips its mask with it.

    Args:
      key: PRNG key.
      images: uint8 [B, H, W, C].
      labels: [B, ...]; [B, H, W] are masks, others stay as they are.
      mean: mean colour in 0..1, C values; it fills what a warp brings in from outside the image.
      hflip: probability of a left-right flip.
      vflip: probability of an upside-down flip.
      rand_augment: RandAugment in timm's notation, such as 'rand-m9-mstd0.5-inc1'; see `parse_rand_augment`.
      color_jitter: strength of random brightness, contrast and saturation; ignored with `rand_augment`, as in timm.

    Returns:
      Images uint8 [B, H, W, C], and labels.

    Raises:
      UserError: `rand_augment` cannot be read or is for masks, a value is out of range, or C is no number of channels
        that it takes.
    """
    check_arguments(augment, "augment", locals())
    channels, masked = images.shape[-1], labels.ndim == 3
    if channels not in (1, 3) and (rand_augment or color_jitter):
        raise UserError(
            f"augment.rand_augment and augment.color_jitter are for colours and grey, and the images have {channels} "
            "channels: set both to None."
        )
    if rand_augment and masked:
        raise UserError(
            "augment.rand_augment turns and shears images and not their masks: leave it out, or set "
            "--config.augment.color_jitter=0.4."
        )
    hflip_key, vflip_key, color_key = jax.random.split(key, 3)
    for flip_key, prob, axis in ((hflip_key, hflip, 2), (vflip_key, vflip, 1)):
        images = _flip(flip_key, images, prob, axis)
        labels = _flip(flip_key, labels, prob, axis) if masked else labels
    if not rand_augment and not color_jitter:
        return images, labels
    if channels == 1:  # a colour whose three values are equal, which every operation keeps equal
        images, mean = jnp.repeat(images, 3, axis=-1), tuple(mean) * 3
    if rand_augment:
        images = rand_augment_batch(color_key, images, parse_rand_augment(rand_augment), fill_color(mean))
    else:
        images = _color_jitter(color_key, images, color_jitter or 0)
    return images[..., :channels], labels


def normalize(
    images: jax.Array, mean: Sequence[float], std: Sequence[float], dtype: jax.typing.DTypeLike = jnp.float32
) -> jax.Array:
    """Returns (images / 255 - mean) / std, computed in float32: uint8 [B, H, W, C] to `dtype` [B, H, W, C]."""
    scale = 1 / (255 * jnp.asarray(std, jnp.float32))
    offset = 255 * jnp.asarray(mean, jnp.float32)
    images = (images.astype(jnp.float32) - offset[None, None, None]) * scale[None, None, None]
    return images.astype(dtype)


def erase(
    key: jax.Array,
    images: jax.Array,
    *,
    prob: Share = 0.0,
    mode: Literal["pixel", "rand", "const"] = "pixel",
    min_area: Fraction = 0.02,
    max_area: Fraction = 1 / 3,
    min_aspect: Fraction = 0.3,
    count: Annotated[int, Range(at_least=1, at_most=100)] = 1,
) -> jax.Array:
    """Erases random rectangles of normalised images (Zhong et al., 2017, https://arxiv.org/abs/1708.04896).

    Each rectangle has ten draws of its size. The first that is smaller than the image on both sides is erased. If
    none is, the image stays as it is.

    Args:
      key: PRNG key.
      images: float [B, H, W, C], already normalised.
      prob: probability that an image is erased at all.
      mode: new content: 'pixel' is normal noise in every pixel, 'rand' one normal colour for a rectangle, 'const' 0.
      min_area: smallest erased part of the image; the rectangles of an image share it.
      max_area: largest erased part of the image; the rectangles of an image share it.
      min_aspect: smallest height / width, which is drawn log-uniformly between this and its reciprocal.
      count: rectangles in an image.

    Returns:
      float [B, H, W, C] of the dtype of `images`.

    Raises:
      UserError: a value is out of range.
    """
    check_arguments(erase, "erase", locals())
    if min_area > max_area:
        raise UserError(f"erase.min_area is {min_area}, above erase.max_area {max_area}: give the smaller one first.")
    if not prob:
        return images
    batch, height, width, channels = images.shape
    prob_key, noise_key, *box_keys = jax.random.split(key, 2 + count)
    erased = jax.random.bernoulli(prob_key, prob, (batch,))
    noise = jax.random.normal(noise_key, images.shape, images.dtype) if mode == "pixel" else jnp.zeros_like(images)
    for box_key in box_keys:
        draw_key, color_key = jax.random.split(box_key)
        areas = (min_area / count, max_area / count)
        top, left, box_height, box_width = _draw_boxes(draw_key, batch, height, width, areas, min_aspect)
        rows = _is_between(jnp.arange(height), top, top + box_height)
        columns = _is_between(jnp.arange(width), left, left + box_width)
        inside = (rows[:, :, None] & columns[:, None, :] & erased[:, None, None])[..., None]  # [B, H, W, 1]
        if mode == "rand":
            noise = jax.random.normal(color_key, (batch, 1, 1, channels), images.dtype)
        images = jnp.where(inside, noise, images)
    return images


def _flip(key: jax.Array, images: jax.Array, prob: float, axis: int) -> jax.Array:
    if not prob:
        return images
    flipped = jax.random.bernoulli(key, prob, images.shape[:1])
    return jnp.where(flipped.reshape(-1, *[1] * (images.ndim - 1)), jnp.flip(images, axis), images)


def _color_jitter(key: jax.Array, images: jax.Array, strength: float) -> jax.Array:
    """Changes brightness, contrast and saturation in an order drawn for every image, as torchvision's ColorJitter."""
    batch = images.shape[0]
    factor_key, order_key = jax.random.split(key)
    operations = jnp.array([OPERATIONS.index(name) for name in ("Brightness", "Contrast", "Color")])
    factors = jax.random.uniform(factor_key, (batch, 3), minval=max(0.0, 1 - strength), maxval=1 + strength)
    orders = jax.random.permutation(order_key, jnp.tile(jnp.arange(3), (batch, 1)), axis=1, independent=True)

    # A scan, because XLA would compute an unrolled step again for every use of its result.
    def step(images, drawn):
        return enhance(images, *drawn), None

    return jax.lax.scan(step, images, (operations[orders].T, factors.T))[0]


def erase_size(area: jax.Array, aspect: jax.Array, height: int, width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes the sides of a rectangle in pixels.

    Args:
      area: part of the image that it covers, float32 of any shape.
      aspect: its height / width, float32 of the same shape.
      height: of the image.
      width: of the image.

    Returns:
      Height and width, int32, and whether both are smaller than the image's, bool; all of the shape of `area`.
    """
    pixels = area * (height * width)
    box_height = jnp.round(jnp.sqrt(pixels * aspect)).astype(jnp.int32)
    box_width = jnp.round(jnp.sqrt(pixels / aspect)).astype(jnp.int32)
    return box_height, box_width, (box_height < height) & (box_width < width)


def _draw_boxes(
    key: jax.Array, batch: int, height: int, width: int, areas: tuple[float, float], min_aspect: float
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Draws top, left, height and width of a rectangle for every image, int32 [B]; height and width 0 if none fits."""
    size_key, place_key = jax.random.split(key)
    # One draw with two axes: on a CPU, XLA takes seconds to compile a small draw with three axes.
    area, log_aspect = jnp.split(jax.random.uniform(size_key, (batch, 2 * ERASE_TRIES)), 2, axis=1)  # in 0..1
    area = areas[0] + (areas[1] - areas[0]) * area
    log_aspect = math.log(min_aspect) * (1 - 2 * log_aspect)
    box_height, box_width, fits = erase_size(area, jnp.exp(log_aspect), height, width)
    first = jnp.argmax(fits, axis=1, keepdims=True)
    found = jnp.any(fits, axis=1)
    box_height = jnp.where(found, jnp.take_along_axis(box_height, first, axis=1)[:, 0], 0)
    box_width = jnp.where(found, jnp.take_along_axis(box_width, first, axis=1)[:, 0], 0)
    top, left = jax.random.uniform(place_key, (2, batch))
    top = jnp.floor(top * (height - box_height + 1)).astype(jnp.int32)
    left = jnp.floor(left * (width - box_width + 1)).astype(jnp.int32)
    return top, left, box_height, box_width


def _is_between(positions: jax.Array, start: jax.Array, stop: jax.Array) -> jax.Array:
    """Returns bool [B, N]: whether start [B] <= positions [N] < stop [B]."""
    return (positions[None] >= start[:, None]) & (positions[None] < stop[:, None])
