"""RandAugment for whole batches in JAX, to be called under `jit`; `randaugment` says how strong the operations are.

Each kind of operation is one batched function, which leaves the images that drew another kind as they are. A batch may
be sharded along its first axis, since no image depends on another.

Tables and blends give exactly Pillow's results, except that one value in 200 of AutoContrast differs by a grey level:
its scale is exact here and rounded in Pillow. Warps are within one grey level, because their coordinates are float32
here and float64 in Pillow.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange

from maxmap.data.randaugment import BLENDS, OPERATIONS, TABLES, WARPS, RandAugment, operation_argument

IDENTITY = len(OPERATIONS)  # the index that stands for "leave this image alone"


def rand_augment_batch(key: jax.Array, images: jax.Array, policy: RandAugment, fill: Sequence[int]) -> jax.Array:
    """Applies `policy.layers` operations to every image, each drawn and skipped on its own.

    Args:
      key: PRNG key.
      images: uint8 [B, H, W, 3].
      policy: how operations are drawn and how strong they are.
      fill: colour of what comes from outside the image, three values in 0..255.

    Returns:
      uint8 [B, H, W, 3].
    """

    def layer(images, layer_key):
        return apply_operations(images, *draw_operations(layer_key, policy, images.shape[0]), fill), None

    return jax.lax.scan(layer, images, jax.random.split(key, policy.layers))[0]


def draw_operations(key: jax.Array, policy: RandAugment, batch: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws one RandAugment layer: an operation for every image, uniformly and with replacement.

    Returns:
      operations: int32 [B], indices into OPERATIONS, or IDENTITY where none is applied.
      arguments: float32 [B], see `operation_argument`.
      bicubic: bool [B], whether a warp is bicubic or else bilinear.
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
    """Returns the arguments of operations at magnitudes from 0 to 10, see `operation_argument`.

    Args:
      operations: int32 [B], indices into OPERATIONS.
      magnitudes: float32 [B].
      negative: bool [B].
      increasing: whether every operation gets stronger with the magnitude.

    Returns:
      float32 [B].
    """
    arguments = jnp.zeros_like(magnitudes)
    for name in OPERATIONS:
        argument = operation_argument(name, magnitudes, negative, increasing=increasing, xp=jnp)
        arguments = jnp.where(_is_drawn(operations, name), argument, arguments)
    return arguments


def apply_operations(
    images: jax.Array, operations: jax.Array, arguments: jax.Array, bicubic: jax.Array, fill: Sequence[int]
) -> jax.Array:
    """Applies to every image the operation given for it, as Pillow and timm do.

    Args:
      images: uint8 [B, H, W, 3].
      operations: int32 [B], indices into OPERATIONS, or IDENTITY.
      arguments: float32 [B], see `operation_argument`.
      bicubic: bool [B], whether a warp is bicubic or else bilinear.
      fill: colour of what comes from outside the image, three values in 0..255.

    Returns:
      uint8 [B, H, W, 3].
    """
    # An accelerator runs each kind once over the whole batch, which may stay sharded. A CPU is many times as fast with
    # a loop over the images, because it runs only the kind that was drawn: on average one image in six is warped.
    return jax.lax.platform_dependent(
        images,
        operations,
        arguments,
        bicubic,
        cpu=partial(_apply_per_image, fill=tuple(fill)),
        default=partial(_apply_batched, fill=tuple(fill)),
    )


def _apply_batched(images, operations, arguments, bicubic, *, fill: Sequence[int]) -> jax.Array:
    # Without the barriers XLA fuses a kind into every use of its result and so computes it several times.
    images = jax.lax.optimization_barrier(_apply_warps(images, operations, arguments, bicubic, fill))
    images = jax.lax.optimization_barrier(_apply_tables(images, operations, arguments))
    return _apply_blends(images, operations, arguments)


def _apply_per_image(images, operations, arguments, bicubic, *, fill: Sequence[int]) -> jax.Array:
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


def _is_drawn(operations: jax.Array, *names: str) -> jax.Array:
    return jnp.isin(operations, jnp.array([OPERATIONS.index(name) for name in names]))


# ------------------------------------------------------------------------------------------------------------- warps


def _apply_warps(images, operations, arguments, bicubic, fill: Sequence[int]) -> jax.Array:
    _, height, width, _ = images.shape
    return warp(images, _warp_matrices(operations, arguments, height, width), bicubic, fill)


def warp(images: jax.Array, matrices: jax.Array, bicubic: jax.Array, fill: Sequence[int]) -> jax.Array:
    """Resamples images under affine maps, as Pillow's `Image.transform`.

    The map takes the centre (x + 0.5, y + 0.5) of each output pixel to a point of the input. A point outside the image
    gets the colour `fill`; filter taps beyond the edge repeat the edge. The cubic filter has the parameter a = -1
    (Keys, 1981), unlike that of `Image.resize`. Results are truncated, not rounded.

    Args:
      images: uint8 [B, H, W, 3].
      matrices: float32 [B, 2, 3], from output to input coordinates, x first.
      bicubic: bool [B], whether the filter is bicubic or else bilinear.
      fill: three values in 0..255.

    Returns:
      uint8 [B, H, W, 3].
    """
    batch, height, width, _ = images.shape
    center = jnp.stack(jnp.meshgrid(jnp.arange(width) + 0.5, jnp.arange(height) + 0.5), axis=0)  # [2, H, W]
    source = jnp.einsum("bij,jhw->ibhw", matrices[:, :, :2], center, precision="highest")
    x, y = source + rearrange(matrices[:, :, 2], "b i -> i b 1 1")  # [B, H, W] each
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    left, top = jnp.floor(x - 0.5), jnp.floor(y - 0.5)
    x_taps = _filter_taps(x - 0.5 - left, bicubic[:, None, None])
    y_taps = _filter_taps(y - 0.5 - top, bicubic[:, None, None])

    # One 32-bit word holds a pixel, so that a tap is one gather instead of three. Padded by two pixels, the image holds
    # all taps of a point inside it; for a point outside, the index only has to be valid.
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
    # The taps may sum to 1 - 1e-7, and truncation would turn a plain area of 255 into 254. The added offset is far
    # above the rounding of float32 and far below a grey level.
    warped = jnp.stack([_to_uint8(channel + 2**-10) for channel in channels], axis=-1)
    return jnp.where(inside[..., None], warped, jnp.asarray(fill, jnp.uint8)[None, None, None])


def _warp_matrices(operations: jax.Array, arguments: jax.Array, height: int, width: int) -> jax.Array:
    """Returns the maps from output to input coordinates, float32 [B, 2, 3]; the identity where no warp is drawn."""

    def argument(name):
        return jnp.where(_is_drawn(operations, name), arguments, 0.0)

    angle = jnp.deg2rad(argument("Rotate"))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x_center, y_center = width / 2, height / 2
    x_shift = x_center - cos * x_center + sin * y_center + width * argument("TranslateXRel")
    y_shift = y_center - sin * x_center - cos * y_center + height * argument("TranslateYRel")
    rows = [[cos, argument("ShearX") - sin, x_shift], [argument("ShearY") + sin, cos, y_shift]]
    return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=1)


def _filter_taps(t: jax.Array, bicubic: jax.Array) -> list[jax.Array]:
    """Returns the weights of the pixels at -1, 0, 1 and 2 for a point at `t` in 0..1: cubic (a = -1) or linear."""
    cubic = (t * (-1 + t * (2 - t)), 1 + t * t * (t - 2), t * (1 + t * (1 - t)), t * t * (t - 1))
    linear = (jnp.zeros_like(t), 1 - t, t, jnp.zeros_like(t))
    return [jnp.where(bicubic, *taps) for taps in zip(cubic, linear, strict=True)]


def _pack(images: jax.Array) -> jax.Array:
    """Puts the channels of a pixel into one word: uint8 [..., 3] to uint32 [...]."""
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
    """Returns the new value of every value in every image and channel, uint8 [B, 256, 3]."""
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
        tables = jnp.where(_is_drawn(operations, name)[:, None, None], table, tables)
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
    """Makes the cumulative histogram linear; as in Pillow, the highest value that occurs does not widen the steps."""
    last = jnp.max(jnp.where(histogram > 0, values, 0), axis=1, keepdims=True)
    below = jnp.cumsum(histogram, axis=1) - histogram
    step = jnp.take_along_axis(below, last, axis=1) // 255  # [B, 1, C]
    equalized = jnp.minimum(255, (below + step // 2) // jnp.maximum(step, 1))
    return jnp.where(step > 0, equalized, values)


# ------------------------------------------------------------------------------------------------------------ blends


def _apply_blends(images: jax.Array, operations: jax.Array, arguments: jax.Array) -> jax.Array:
    return enhance(images, operations, jnp.where(_is_drawn(operations, *BLENDS), arguments, 1.0))


def enhance(images: jax.Array, operations: jax.Array, factors: jax.Array) -> jax.Array:
    """Blends every image with a degenerate form of it, as Pillow's `ImageEnhance`.

    The form depends on the operation: black (Brightness), grey of the mean lightness (Contrast), the grey image (Color)
    or the smoothed image (Sharpness). Any other operation needs a factor of 1.

    Args:
      images: uint8 [B, H, W, 3].
      operations: int32 [B], indices into OPERATIONS.
      factors: float32 [B], weight of the image: 1 keeps it, 0 gives the degenerate form, more leads away from it.

    Returns:
      uint8 [B, H, W, 3].
    """
    values = images.astype(jnp.int32)
    gray = _gray(values)
    by_name = {"Contrast": _mean_gray(gray), "Color": gray, "Sharpness": _smooth(values)}
    degenerate = jnp.zeros_like(values)
    for name, form in by_name.items():
        degenerate = jnp.where(_is_drawn(operations, name)[:, None, None, None], form, degenerate)
    difference = (values - degenerate).astype(jnp.float32)
    return _to_uint8(degenerate.astype(jnp.float32) + factors[:, None, None, None] * difference)


def _gray(values: jax.Array) -> jax.Array:
    """Lightness by ITU-R 601-2 in 16-bit fixed point: int32 [B, H, W, 3] to int32 [B, H, W, 1]."""
    red, green, blue = jnp.split(values, 3, axis=-1)
    return (19595 * red + 38470 * green + 7471 * blue + (1 << 15)) >> 16


def _mean_gray(gray: jax.Array) -> jax.Array:
    """Returns the mean, rounded half up: int32 [B, 1, 1, 1]. Its sums fit 32 bits up to 2000 x 2000 pixels."""
    count = gray.shape[1] * gray.shape[2]
    return (2 * jnp.sum(gray, axis=(1, 2, 3), keepdims=True) + count) // (2 * count)


def _smooth(values: jax.Array) -> jax.Array:
    """Returns the rounded mean over 3x3 pixels, with weight 5 for the middle one; the outermost pixels stay."""
    _, height, width, _ = values.shape
    if height < 3 or width < 3:
        return values
    rows = values[:, :-2] + values[:, 1:-1] + values[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * values[:, 1:-1, 1:-1]
    return values.at[:, 1:-1, 1:-1].set((2 * total + 13) // 26)
