"""Mixup and CutMix on the device: mixed images and their dense targets.

Both work on whole uint8 batches before normalisation. The partner of image i is image B - 1 - i. Under `jit` that is
the global batch reversed, even if it is sharded. One random draw serves the whole batch.

The rules, the rounding to uint8 and the CutMix box are those of `FastCollateMixup` in timm 0.9.2 (batch mode), with
which the published recipes were trained.
"""

from typing import Annotated

import jax
import jax.numpy as jnp

from maxmap.errors import UserError
from maxmap.ranges import Count, NonNegative, Range, Share, check_arguments


def mix(
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    *,
    num_classes: Count,
    mixup: NonNegative = 0.0,
    cutmix: NonNegative = 0.0,
    prob: Share = 1.0,
    switch_prob: Share = 0.5,
    smoothing: Annotated[float, Range(at_least=0, below=1)] = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Mixes every image with its partner, and their targets alike.

    With `mixup` and `cutmix` both 0 the images stay as they are and the targets are smoothed one-hot vectors.

    Args:
      key: PRNG key.
      images: uint8 [B, H, W, C]; the middle image of an odd batch is its own partner.
      labels: int [B]; a label outside 0..num_classes-1 gets a target without a peak. Or targets float [B, K]; or masks
        int [B, H, W], which are the targets as they are.
      num_classes: number of classes, K.
      mixup: parameter of the Beta distribution for mixup (https://arxiv.org/abs/1710.09412); 0 is off.
      cutmix: parameter of the Beta distribution for CutMix (https://arxiv.org/abs/1905.04899); 0 is off.
      prob: probability that a batch is mixed at all.
      switch_prob: probability of CutMix instead of mixup where both are on.
      smoothing: label smoothing of classes, applied to both partners before they are mixed.

    Returns:
      Images uint8 [B, H, W, C] and targets float32 [B, K], whose rows sum to 1 for classes.

    Raises:
      UserError: a value is out of range, or masks are to be mixed.
    """
    check_arguments(mix, "mix", locals())
    if labels.ndim == 3:
        if mixup or cutmix or smoothing:
            raise UserError(
                "mix is for classes of images and not of pixels: set --config.mix.mixup=0, --config.mix.cutmix=0 and "
                "--config.mix.smoothing=0."
            )
        return images, labels
    if smoothing and labels.ndim > 1:
        raise UserError(
            "mix.smoothing is for one class per image, which config.data.task does not give: set "
            "--config.mix.smoothing=0."
        )
    if not (mixup or cutmix):
        return images, mix_targets(labels, 1.0, num_classes=num_classes, smoothing=smoothing)
    _, height, width, _ = images.shape
    apply_key, switch_key, lam_key, center_key = jax.random.split(key, 4)
    use_cutmix = jax.random.bernoulli(switch_key, _cutmix_share(mixup, cutmix, switch_prob))
    lam = _draw_beta(lam_key, jnp.where(use_cutmix, cutmix, mixup))
    lam = jnp.where(jax.random.bernoulli(apply_key, prob), lam, 1.0)
    mixed = images
    if mixup:
        mixed = mixup_images(images, lam)
    if cutmix:
        center = jax.random.randint(center_key, (2,), 0, jnp.array([height, width]))
        box, clipped_lam = cutmix_box(center, lam, height, width)
        mixed = jnp.where(use_cutmix, cutmix_images(images, box), mixed)
        lam = jnp.where(use_cutmix, clipped_lam, lam)
    return mixed, mix_targets(labels, lam, num_classes=num_classes, smoothing=smoothing)


def mixup_images(images: jax.Array, lam: jax.Array) -> jax.Array:
    """Returns lam * images + (1 - lam) * partners, rounded half to even: uint8 [B, H, W, C] and a scalar to uint8."""
    values = images.astype(jnp.float32)
    return jnp.round(lam * values + (1 - lam) * values[::-1]).astype(jnp.uint8)


def cutmix_images(images: jax.Array, box: jax.Array) -> jax.Array:
    """Pastes a box of its partner into every image, uint8 [B, H, W, C].

    Args:
      images: uint8 [B, H, W, C].
      box: int32 [4]: top, bottom, left, right; the ends exclusive.

    Returns:
      uint8 [B, H, W, C].
    """
    _, height, width, _ = images.shape
    top, bottom, left, right = box
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None]
    inside = ((rows >= top) & (rows < bottom)) & ((columns >= left) & (columns < right))  # [H, W]
    return jnp.where(inside[None, :, :, None], images[::-1], images)


def cutmix_box(center: jax.Array, lam: jax.Array, height: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Returns the CutMix box around a centre, and the lam that corresponds to its area.

    A side of the box is int(side of the image * sqrt(1 - lam)), and the box reaches from center - side // 2 to
    center + side // 2. So an odd side loses a pixel, as in timm 0.9.2; timm 1.0.31 keeps it. The box is clipped to the
    image, and lam becomes the part of the image outside the box.

    Args:
      center: int32 [2], (y, x).
      lam: weight of the image itself, a float32 scalar.
      height: of the image.
      width: of the image.

    Returns:
      Box int32 [4] (top, bottom, left, right; the ends exclusive) and lam, a float32 scalar.
    """
    limit = jnp.array([height, width])
    half = (limit * jnp.sqrt(1 - lam)).astype(jnp.int32) // 2
    start, end = jnp.clip(center - half, 0, limit), jnp.clip(center + half, 0, limit)
    area = jnp.prod(end - start)
    return jnp.stack([start, end], axis=1).reshape(4), 1 - area.astype(jnp.float32) / (height * width)


def mix_targets(labels: jax.Array, lam: jax.Array | float, *, num_classes: int, smoothing: float) -> jax.Array:
    """Returns lam * targets + (1 - lam) * partners' targets, float32 [B, K], of labels int [B] or targets [B, K].

    Before mixing, the target of a label is smoothing / K everywhere, plus 1 - smoothing at the label.
    """
    targets = labels.astype(jnp.float32)
    if labels.ndim == 1:
        targets = smoothing / num_classes + (1 - smoothing) * jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    return lam * targets + (1 - lam) * targets[::-1]


def _cutmix_share(mixup: float, cutmix: float, switch_prob: float) -> float:
    if mixup and cutmix:
        return switch_prob
    return 1.0 if cutmix else 0.0


def _draw_beta(key: jax.Array, alpha: jax.Array) -> jax.Array:
    """Draws from Beta(alpha, alpha), as x / (x + y) of two draws from Gamma(alpha)."""
    # Two draws in one call compile faster than jax.random.beta's two calls.
    first, second = jax.random.loggamma(key, alpha, (2,))
    return jax.nn.sigmoid(first - second)
