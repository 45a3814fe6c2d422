"""Augmentation on the device: flips, RandAugment, colour jitter, normalisation and random erasing of whole batches.

Everything is pure JAX: a function of a PRNG key and the batch, to be called under `jit` with static options. A batch
may be sharded along its first axis, since no image looks at another.

RandAugment (Cubuk et al., 2020, https://arxiv.org/abs/1909.13719) draws another operation for every image. Each of the
fifteen is one of three kinds, and each kind is one batched function that changes nothing where an image drew another:

- WARPS: an affine warp;
- TABLES: a table of 256 entries for every channel;
- BLENDS: a blend with a degenerate image.

The results are those of Pillow: equal for tables and blends, and within one grey level for warps, whose coordinates are
float32 here and float64 there, and for one value in 200 of AutoContrast, whose scale is exact here.
"""

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from maxmap.errors import UserError, nearest

WARPS = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
TABLES = ("AutoContrast", "Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd")
BLENDS = ("Color", "Contrast", "Brightness", "Sharpness")
OPERATIONS = (*WARPS, *TABLES, *BLENDS)
IDENTITY = len(OPERATIONS)  # the index that stands for "leave this image alone"
LEVELS = 10  # the magnitude at which every operation reaches its full strength
ERASE_TRIES = 10


# --------------------------------------------------------------------------------------------------------- the batch


def augment(
    key: jax.Array,
    images: jax.Array,
    *,
    mean: Sequence[float],
    hflip: float = 0.5,
    vflip: float = 0.0,
    rand_augment: str | None = None,
    color_jitter: float | None = None,
) -> jax.Array:
    """Flips and recolours or warps every image of a batch on its own.

    Args:
      key: PRNG key.
      images: uint8 [B, H, W, 3].
      mean: the mean colour in [0, 1]; rounded to uint8 it fills what a warp brings in from outside.
      hflip: probability of a left-right flip.
      vflip: probability of an upside-down flip.
      rand_augment: RandAugment as text, for example 'rand-m9-mstd0.5-inc1'; see `parse_rand_augment`.
      color_jitter: strength of random brightness, contrast and saturation; ignored with `rand_augment`, as in timm.

    Returns: uint8 [B, H, W, 3].

    Raises: UserError if `rand_augment` cannot be read.
    """
    hflip_key, vflip_key, color_key = jax.random.split(key, 3)
    images = _flip(hflip_key, images, hflip, axis=2)
    images = _flip(vflip_key, images, vflip, axis=1)
    if rand_augment:
        return _rand_augment(color_key, images, parse_rand_augment(rand_augment), mean)
    if color_jitter:
        return _color_jitter(color_key, images, color_jitter)
    return images


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
    prob: float = 0.0,
    mode: str = "pixel",
    min_area: float = 0.02,
    max_area: float = 1 / 3,
    min_aspect: float = 0.3,
    count: int = 1,
) -> jax.Array:
    """Erases random rectangles of normalised images (Zhong et al., 2017, https://arxiv.org/abs/1708.04896).

    Ten rectangles are drawn and the first that is smaller than the image on both sides is erased; an image for which
    none is stays as it is.

    Args:
      key: PRNG key.
      images: float [B, H, W, C], already normalised.
      prob: probability that an image is erased at all.
      mode: what is put in: 'pixel' is normal noise in every pixel, 'rand' one normal colour for a rectangle, 'const' 0.
      min_area: smallest erased part of the image.
      max_area: largest erased part of the image; both are divided by `count`.
      min_aspect: height / width is drawn log-uniformly between this and its reciprocal.
      count: rectangles for an image.

    Returns: float [B, H, W, C] of the dtype of `images`.

    Raises: UserError if `mode` is unknown.
    """
    if mode not in ("pixel", "rand", "const"):
        raise UserError(f"erase: mode '{mode}' is unknown; use 'pixel', 'rand' or 'const'.")
    if not prob:
        return images
    batch, height, width, channels = images.shape
    prob_key, noise_key, *box_keys = jax.random.split(key, 2 + count)
    erased = jax.random.bernoulli(prob_key, prob, (batch,))
    noise = jax.random.normal(noise_key, images.shape, images.dtype) if mode == "pixel" else jnp.zeros_like(images)
    for box_key in box_keys:
        draw_key, color_key = jax.random.split(box_key)
        areas = (min_area / count, max_area / count)
        top, left, box_height, box_width = _erase_boxes(draw_key, batch, height, width, areas, min_aspect)
        rows = _between(jnp.arange(height), top, top + box_height)
        columns = _between(jnp.arange(width), left, left + box_width)
        inside = (rows[:, :, None] & columns[:, None, :] & erased[:, None, None])[..., None]  # [B, H, W, 1]
        if mode == "rand":
            noise = jax.random.normal(color_key, (batch, 1, 1, channels), images.dtype)
        images = jnp.where(inside, noise, images)
    return images


def _flip(key: jax.Array, images: jax.Array, prob: float, axis: int) -> jax.Array:
    if not prob:
        return images
    flipped = jax.random.bernoulli(key, prob, images.shape[:1])
    return jnp.where(flipped[:, None, None, None], jnp.flip(images, axis), images)


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


# -------------------------------------------------------------------------------------------------------- RandAugment


class RandAugment(NamedTuple):
    """What a RandAugment string says; the defaults are what a part left out means."""

    magnitude: float = 10.0  # m
    layers: int = 2  # n
    prob: float = 0.5  # p
    magnitude_std: float = 0.0  # mstd
    magnitude_max: float = float(LEVELS)  # mmax
    increasing: bool = False  # inc


def parse_rand_augment(text: str) -> RandAugment:
    """Reads timm's RandAugment notation: 'rand' and then parts of a name and a number, joined by '-'.

    The parts are m (magnitude), n (operations for an image), p (probability that a drawn operation is applied), mstd
    (standard deviation of the magnitude; above 100: uniform between 0 and the magnitude), mmax (its upper limit), inc
    (1: every operation gets stronger with the magnitude). Magnitudes are clipped to 10 unless mmax is given, so 'm15'
    and 'm20' mean 10. inc0 means off, as in timm 1.0.31; timm 0.9.2 took it as on.

    Raises: UserError naming the part that is unknown.
    """
    names = {
        "m": "magnitude",
        "n": "layers",
        "p": "prob",
        "mstd": "magnitude_std",
        "mmax": "magnitude_max",
        "inc": "increasing",
    }
    start, *parts = text.split("-")
    if start != "rand":
        raise UserError(f"augment: rand_augment '{text}' must start with 'rand', for example 'rand-m9-mstd0.5-inc1'.")
    fields: dict[str, Any] = {}
    for part in parts:
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d*)?|\.\d+)", part)
        if not match or match[1] not in names:
            known = nearest(re.sub(r"[^a-z]", "", part), names)
            raise UserError(
                f"augment: rand_augment '{text}' has the unknown part '{part}'; a part is a name and a number, "
                f"the nearest names are {known}."
            )
        name = names[match[1]]
        value: float = float(match[2])
        if name in ("layers", "increasing"):
            if not value.is_integer():
                raise UserError(f"augment: rand_augment '{text}' needs a whole number in its part '{part}'.")
            value = bool(value) if name == "increasing" else int(value)
        if name == "prob" and value > 1:
            raise UserError(f"augment: rand_augment '{text}' has a probability above 1 in its part '{part}'.")
        fields[name] = value
    return RandAugment(**fields)


def draw_operations(key: jax.Array, policy: RandAugment, batch: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws one RandAugment layer: an operation for every image, uniformly and with replacement.

    Returns: operations int32 [B], indices into OPERATIONS or IDENTITY where none is applied; arguments float32 [B] in
      the units of `operation_arguments`; bicubic bool [B], the resampling of warps.
    """
    operation_key, apply_key, magnitude_key, sign_key, bicubic_key = jax.random.split(key, 5)
    operations = jax.random.randint(operation_key, (batch,), 0, len(OPERATIONS))
    magnitudes = jnp.full((batch,), policy.magnitude)
    if policy.magnitude_std > 100:
        magnitudes *= jax.random.uniform(magnitude_key, (batch,))
    else:
        magnitudes += policy.magnitude_std * jax.random.normal(magnitude_key, (batch,))
    magnitudes = jnp.clip(magnitudes, 0, policy.magnitude_max)
    negative = jax.random.bernoulli(sign_key, 0.5, (batch,))
    arguments = operation_arguments(operations, magnitudes, negative, increasing=policy.increasing)
    applied = jax.random.bernoulli(apply_key, policy.prob, (batch,))
    bicubic = jax.random.bernoulli(bicubic_key, 0.5, (batch,))
    return jnp.where(applied, operations, IDENTITY), arguments, bicubic


def operation_arguments(
    operations: jax.Array, magnitudes: jax.Array, negative: jax.Array, *, increasing: bool
) -> jax.Array:
    """Returns the arguments of operations [B] at magnitudes [B] between 0 and 10, float32 [B].

    Units: degrees counter-clockwise (Rotate), slope (ShearX, ShearY), part of the side (TranslateXRel, TranslateYRel),
    bits kept (Posterize), the least value inverted (Solarize), grey levels added (SolarizeAdd), weight of the image
    against its degenerate form (Color, Contrast, Brightness, Sharpness), 0 for the others. `negative` bool [B] turns
    geometric arguments around and, with `increasing`, makes the four weights smaller than 1 instead of larger.
    """
    signed = jnp.where(negative, -magnitudes, magnitudes)
    bits = jnp.trunc(4 * magnitudes / LEVELS)
    threshold = jnp.minimum(256, jnp.trunc(256 * magnitudes / LEVELS))
    weight = jnp.maximum(0.1, 1 + 0.9 * signed / LEVELS) if increasing else 0.1 + 1.8 * magnitudes / LEVELS
    by_name = {
        "Rotate": 30 * signed / LEVELS,
        "Posterize": jnp.maximum(0, 4 - bits) if increasing else bits,
        "Solarize": 256 - threshold if increasing else threshold,
        "SolarizeAdd": jnp.minimum(128, jnp.trunc(110 * magnitudes / LEVELS)),
        "Color": weight,
        "Contrast": weight,
        "Brightness": weight,
        "Sharpness": weight,
        "ShearX": 0.3 * signed / LEVELS,
        "ShearY": 0.3 * signed / LEVELS,
        "TranslateXRel": 0.45 * signed / LEVELS,
        "TranslateYRel": 0.45 * signed / LEVELS,
    }
    arguments = jnp.zeros_like(magnitudes)
    for name, values in by_name.items():
        arguments = jnp.where(_drew(operations, name), values, arguments)
    return arguments


def apply_operations(
    images: jax.Array, operations: jax.Array, arguments: jax.Array, bicubic: jax.Array, fill: Sequence[int]
) -> jax.Array:
    """Applies to every image the operation given for it, as Pillow and timm do.

    Args:
      images: uint8 [B, H, W, 3].
      operations: int32 [B], indices into OPERATIONS, or IDENTITY.
      arguments: float32 [B], see `operation_arguments`.
      bicubic: bool [B], bicubic or else bilinear warps.
      fill: colour of what comes from outside the image, three values in 0..255.

    Returns: uint8 [B, H, W, 3].
    """
    # An accelerator runs each kind once over the whole batch, sharded as it is. A CPU is many times as fast with a loop
    # over the images, which runs only the kind that was drawn: on average five images of six are not warped.
    return jax.lax.platform_dependent(
        images,
        operations,
        arguments,
        bicubic,
        cpu=partial(_apply_one_by_one, fill=tuple(fill)),
        default=partial(_apply_at_once, fill=tuple(fill)),
    )


def _apply_at_once(images, operations, arguments, bicubic, *, fill: Sequence[int]) -> jax.Array:
    # Without the barriers XLA fuses a kind into every use of its result and so computes it more than once.
    images = jax.lax.optimization_barrier(_apply_warps(images, operations, arguments, bicubic, fill))
    images = jax.lax.optimization_barrier(_apply_tables(images, operations, arguments))
    return _apply_blends(images, operations, arguments)


def _apply_one_by_one(images, operations, arguments, bicubic, *, fill: Sequence[int]) -> jax.Array:
    kinds = jnp.array([0] * len(WARPS) + [1] * len(TABLES) + [2] * len(BLENDS) + [3])
    branches = (
        lambda image, operation, argument, cubic: _apply_warps(image, operation, argument, cubic, fill),
        lambda image, operation, argument, _: _apply_tables(image, operation, argument),
        lambda image, operation, argument, _: _apply_blends(image, operation, argument),
        lambda image, *_: image,
    )

    def apply(drawn):
        kind, *single = drawn
        return jax.lax.switch(kind, branches, *(value[None] for value in single))[0]

    return jax.lax.map(apply, (kinds[operations], images, operations, arguments, bicubic))


def _rand_augment(key: jax.Array, images: jax.Array, policy: RandAugment, mean: Sequence[float]) -> jax.Array:
    fill = [min(255, round(255 * value)) for value in mean]

    def layer(images, layer_key):
        return apply_operations(images, *draw_operations(layer_key, policy, images.shape[0]), fill), None

    return jax.lax.scan(layer, images, jax.random.split(key, policy.layers))[0]


def _drew(operations: jax.Array, *names: str) -> jax.Array:
    return jnp.isin(operations, jnp.array([OPERATIONS.index(name) for name in names]))


# ------------------------------------------------------------------------------------------------------------- warps


def _apply_warps(images, operations, arguments, bicubic, fill: Sequence[int]) -> jax.Array:
    _, height, width, _ = images.shape
    return warp(images, _warp_matrices(operations, arguments, height, width), bicubic, fill)


def warp(images: jax.Array, matrices: jax.Array, bicubic: jax.Array, fill: Sequence[int]) -> jax.Array:
    """Resamples images under affine maps, as Pillow's `Image.transform`.

    The pixel (x, y) of the output reads the input at the map of its centre (x + 0.5, y + 0.5); what falls outside the
    image takes the colour `fill`, and filter taps beyond the edge repeat it. The cubic filter has the parameter a = -1
    (Keys, 1981), unlike that of `Image.resize`, and results are truncated, not rounded.

    Args:
      images: uint8 [B, H, W, 3].
      matrices: float32 [B, 2, 3], from output to input coordinates, x first.
      bicubic: bool [B], bicubic or else bilinear.
      fill: three values in 0..255.

    Returns: uint8 [B, H, W, 3].
    """
    batch, height, width, _ = images.shape
    center = jnp.stack(jnp.meshgrid(jnp.arange(width) + 0.5, jnp.arange(height) + 0.5), axis=0)  # [2, H, W]
    source = jnp.einsum("bij,jhw->ibhw", matrices[:, :, :2], center, precision="highest")
    x, y = source + rearrange(matrices[:, :, 2], "b i -> i b 1 1")  # [B, H, W] each
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    left, top = jnp.floor(x - 0.5), jnp.floor(y - 0.5)
    x_taps = _filter_taps(x - 0.5 - left, bicubic[:, None, None])
    y_taps = _filter_taps(y - 0.5 - top, bicubic[:, None, None])

    # One 32-bit word holds a pixel, so that a tap is one gather instead of three. With an edge two pixels wide all taps
    # of an inside pixel exist; the index of an outside one only has to be valid.
    words = jnp.pad(_pack(images), ((0, 0), (2, 2), (2, 2)), mode="edge")
    stride = width + 4
    words = rearrange(words, "b h w -> b (h w)")
    first = jnp.clip(top.astype(jnp.int32) + 1, 0, height) * stride + jnp.clip(left.astype(jnp.int32) + 1, 0, width)
    first = rearrange(first, "b h w -> b (h w)")

    channels = [jnp.zeros((batch, height, width)) for _ in range(3)]
    for row, y_tap in enumerate(y_taps):
        for column, x_tap in enumerate(x_taps):
            index = first + (row * stride + column)
            word = jnp.take_along_axis(words, index, axis=1, mode="promise_in_bounds").reshape(x.shape)
            for channel, value in enumerate(_unpack(word)):
                channels[channel] += y_tap * x_tap * value
    # Truncation would turn a plain area of 255 into 254 where the taps sum to 1 - 1e-7: the offset is far above the
    # rounding of float32 and far below a grey level.
    warped = jnp.stack([_to_uint8(channel + 2**-10) for channel in channels], axis=-1)
    return jnp.where(inside[..., None], warped, jnp.asarray(fill, jnp.uint8)[None, None, None])


def _warp_matrices(operations: jax.Array, arguments: jax.Array, height: int, width: int) -> jax.Array:
    """Returns the maps from output to input coordinates, float32 [B, 2, 3]; the identity for other operations."""

    def argument(name):
        return jnp.where(_drew(operations, name), arguments, 0.0)

    angle = jnp.deg2rad(argument("Rotate"))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x_center, y_center = width / 2, height / 2
    x_shift = x_center - cos * x_center + sin * y_center + width * argument("TranslateXRel")
    y_shift = y_center - sin * x_center - cos * y_center + height * argument("TranslateYRel")
    rows = [[cos, argument("ShearX") - sin, x_shift], [argument("ShearY") + sin, cos, y_shift]]
    return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=1)


def _filter_taps(t: jax.Array, bicubic: jax.Array) -> list[jax.Array]:
    """Returns the weights of the pixels -1, 0, 1, 2 at a point `t` after pixel 0: cubic (a = -1) or linear."""
    cubic = (t * (-1 + t * (2 - t)), 1 + t * t * (t - 2), t * (1 + t * (1 - t)), t * t * (t - 1))
    linear = (jnp.zeros_like(t), 1 - t, t, jnp.zeros_like(t))
    return [jnp.where(bicubic, *taps) for taps in zip(cubic, linear, strict=True)]


def _pack(images: jax.Array) -> jax.Array:
    words = images.astype(jnp.uint32)
    return words[..., 0] | words[..., 1] << 8 | words[..., 2] << 16


def _unpack(words: jax.Array) -> list[jax.Array]:
    return [((words >> shift) & 255).astype(jnp.float32) for shift in (0, 8, 16)]


def _to_uint8(values: jax.Array) -> jax.Array:
    return jnp.clip(values, 0, 255).astype(jnp.uint8)  # truncates, as Pillow does


# ------------------------------------------------------------------------------------------------------------ tables


def _apply_tables(images: jax.Array, operations: jax.Array, arguments: jax.Array) -> jax.Array:
    tables = _tables(images, operations, arguments)
    values = rearrange(images, "b h w c -> b (h w) c").astype(jnp.int32)
    return jnp.take_along_axis(tables, values, axis=1, mode="promise_in_bounds").reshape(images.shape)


def _tables(images: jax.Array, operations: jax.Array, arguments: jax.Array) -> jax.Array:
    """Returns for every image and channel what each value becomes, uint8 [B, 256, 3]."""
    histogram = _histogram(images)
    values = jnp.broadcast_to(jnp.arange(256)[None, :, None], histogram.shape)
    argument = arguments.astype(jnp.int32)[:, None, None]
    by_name = {
        "AutoContrast": _auto_contrast_table(histogram, values),
        "Equalize": _equalize_table(histogram, values),
        "Invert": 255 - values,
        "Posterize": values & -(1 << (8 - jnp.clip(argument, 0, 8))),
        "Solarize": jnp.where(values < argument, values, 255 - values),
        "SolarizeAdd": jnp.where(values < 128, jnp.minimum(255, values + argument), values),
    }
    tables = values
    for name, table in by_name.items():
        tables = jnp.where(_drew(operations, name)[:, None, None], table, tables)
    return tables.astype(jnp.uint8)


def _histogram(images: jax.Array) -> jax.Array:
    """Counts the values of every image and channel: uint8 [B, H, W, C] to int32 [B, 256, C]."""
    count = jax.vmap(jax.vmap(lambda values: jnp.bincount(values, length=256), 1, 1))
    return count(rearrange(images, "b h w c -> b (h w) c").astype(jnp.int32))


def _auto_contrast_table(histogram: jax.Array, values: jax.Array) -> jax.Array:
    """Stretches the values that occur to 0..255."""
    present = histogram > 0
    low = jnp.min(jnp.where(present, values, 255), axis=1, keepdims=True)  # [B, 1, C]
    high = jnp.max(jnp.where(present, values, 0), axis=1, keepdims=True)
    stretched = jnp.clip((values - low) * 255 // jnp.maximum(high - low, 1), 0, 255)
    return jnp.where(high > low, stretched, values)


def _equalize_table(histogram: jax.Array, values: jax.Array) -> jax.Array:
    """Makes the cumulative histogram linear; the highest value that occurs does not count for the width of a step."""
    last = jnp.max(jnp.where(histogram > 0, values, 0), axis=1, keepdims=True)
    below = jnp.cumsum(histogram, axis=1) - histogram
    step = jnp.take_along_axis(below, last, axis=1) // 255  # [B, 1, C]
    equalized = jnp.minimum(255, (below + step // 2) // jnp.maximum(step, 1))
    return jnp.where(step > 0, equalized, values)


# ------------------------------------------------------------------------------------------------------------ blends


def _apply_blends(images: jax.Array, operations: jax.Array, arguments: jax.Array) -> jax.Array:
    return enhance(images, operations, jnp.where(_drew(operations, *BLENDS), arguments, 1.0))


def enhance(images: jax.Array, operations: jax.Array, factors: jax.Array) -> jax.Array:
    """Blends images with the degenerate form that their operation names, as Pillow's `ImageEnhance`.

    The forms are black (Brightness), grey of the mean lightness (Contrast), the grey image (Color) and the smoothed
    image (Sharpness); any other operation needs a factor of 1.

    Args:
      images: uint8 [B, H, W, 3].
      operations: int32 [B], indices into OPERATIONS.
      factors: float32 [B], weight of the image: 1 keeps it, 0 gives the degenerate form, above 1 leads away from it.

    Returns: uint8 [B, H, W, 3].
    """
    values = images.astype(jnp.int32)
    gray = _gray(values)
    by_name = {"Contrast": _mean_gray(gray), "Color": gray, "Sharpness": _smooth(values)}
    degenerate = jnp.zeros_like(values)
    for name, form in by_name.items():
        degenerate = jnp.where(_drew(operations, name)[:, None, None, None], form, degenerate)
    difference = (values - degenerate).astype(jnp.float32)
    return _to_uint8(degenerate.astype(jnp.float32) + factors[:, None, None, None] * difference)


def _gray(values: jax.Array) -> jax.Array:
    """Lightness by ITU-R 601-2 in 16-bit fixed point: int32 [B, H, W, 3] to int32 [B, H, W, 1]."""
    red, green, blue = jnp.split(values, 3, axis=-1)
    return (19595 * red + 38470 * green + 7471 * blue + (1 << 15)) >> 16


def _mean_gray(gray: jax.Array) -> jax.Array:
    """The mean rounded half up, int32 [B, 1, 1, 1]; the sums fit 32 bits up to 2000 x 2000 pixels."""
    count = gray.shape[1] * gray.shape[2]
    return (2 * jnp.sum(gray, axis=(1, 2, 3), keepdims=True) + count) // (2 * count)


def _smooth(values: jax.Array) -> jax.Array:
    """The mean over 3x3 pixels with a weight of 5 for the middle one, rounded; the outermost pixels stay."""
    _, height, width, _ = values.shape
    if height < 3 or width < 3:
        return values
    rows = values[:, :-2] + values[:, 1:-1] + values[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * values[:, 1:-1, 1:-1]
    return values.at[:, 1:-1, 1:-1].set((2 * total + 13) // 26)


# ----------------------------------------------------------------------------------------------------------- erasing


def erase_size(area: jax.Array, aspect: jax.Array, height: int, width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns height and width (int32) of a rectangle of `area` (part of the image) and `aspect`, and whether it fits.

    It fits if it is smaller than the image on both sides. All have the shape of `area`.
    """
    pixels = area * (height * width)
    box_height = jnp.round(jnp.sqrt(pixels * aspect)).astype(jnp.int32)
    box_width = jnp.round(jnp.sqrt(pixels / aspect)).astype(jnp.int32)
    return box_height, box_width, (box_height < height) & (box_width < width)


def _erase_boxes(
    key: jax.Array, batch: int, height: int, width: int, areas: tuple[float, float], min_aspect: float
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Draws top, left, height and width of a rectangle for every image, int32 [B]; height and width 0 if none fits."""
    size_key, place_key = jax.random.split(key)
    # One draw with two axes: XLA takes seconds to compile a small one with three on a CPU.
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


def _between(positions: jax.Array, start: jax.Array, stop: jax.Array) -> jax.Array:
    """Returns bool [B, N]: whether start [B] <= positions [N] < stop [B]."""
    return (positions[None] >= start[:, None]) & (positions[None] < stop[:, None])
