"""RandAugment on the host's threads with Pillow, for machines with idle CPU cores and an accelerator that warps slowly.

The operations, their arguments and their probabilities are those of `randaugment_device`. The random draws differ,
because each image has a generator of its own here. JAX is not needed.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from maxmap.data.randaugment import OPERATIONS, RandAugment, operation_argument


def rand_augment_image(
    image: Image.Image, rng: np.random.Generator, policy: RandAugment, fill: tuple[int, ...]
) -> Image.Image:
    """Applies `policy.layers` operations, each drawn with replacement and applied with probability `policy.prob`.

    Args:
      image: RGB.
      rng: the source of all randomness.
      policy: how operations are drawn and how strong they are.
      fill: colour of what comes from outside the image, three values in 0..255.

    Returns:
      RGB of the same size.
    """
    for name in rng.choice(OPERATIONS, policy.layers):
        if rng.random() >= policy.prob:
            continue
        if policy.magnitude_std > 100:
            magnitude = rng.uniform(0, policy.magnitude)
        else:
            magnitude = rng.normal(policy.magnitude, policy.magnitude_std) if policy.magnitude_std else policy.magnitude
        magnitude = min(max(magnitude, 0.0), policy.magnitude_max)
        negative = rng.random() < 0.5
        argument = float(operation_argument(name, magnitude, negative, increasing=policy.increasing, xp=np))
        resample = Image.Resampling.BICUBIC if rng.random() < 0.5 else Image.Resampling.BILINEAR
        image = apply_operation(image, name, argument, resample, fill)
    return image


def apply_operation(
    image: Image.Image, name: str, argument: float, resample: Image.Resampling, fill: tuple[int, ...]
) -> Image.Image:
    """Applies one of OPERATIONS; `argument` has the units of `operation_argument`."""
    return _FUNCTIONS[name](image, argument, resample, fill)


def _affine(image: Image.Image, matrix: Sequence[float], resample: Image.Resampling, fill) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=resample, fillcolor=fill)


def _table(image: Image.Image, table: np.ndarray) -> Image.Image:
    return image.point(list(np.tile(table.clip(0, 255), 3).astype(int)))


def _posterize(image: Image.Image, bits: float) -> Image.Image:
    return _table(image, np.arange(256) & -(1 << (8 - min(int(bits), 8))))


def _solarize_add(image: Image.Image, add: float) -> Image.Image:
    levels = np.arange(256)
    return _table(image, np.where(levels < 128, levels + int(add), levels))


def _enhance(kind: type, image: Image.Image, value: float, *_) -> Image.Image:
    return kind(image).enhance(value)


_FUNCTIONS: dict[str, Callable[..., Image.Image]] = {
    "Rotate": lambda image, v, resample, fill: image.rotate(v, resample=resample, fillcolor=fill),
    "ShearX": lambda image, v, resample, fill: _affine(image, (1, v, 0, 0, 1, 0), resample, fill),
    "ShearY": lambda image, v, resample, fill: _affine(image, (1, 0, 0, v, 1, 0), resample, fill),
    "TranslateXRel": lambda image, v, r, fill: _affine(image, (1, 0, v * image.width, 0, 1, 0), r, fill),
    "TranslateYRel": lambda image, v, r, fill: _affine(image, (1, 0, 0, 0, 1, v * image.height), r, fill),
    "AutoContrast": lambda image, *_: ImageOps.autocontrast(image),
    "Equalize": lambda image, *_: ImageOps.equalize(image),
    "Invert": lambda image, *_: ImageOps.invert(image),
    "Posterize": lambda image, v, *_: _posterize(image, v),
    "Solarize": lambda image, v, *_: ImageOps.solarize(image, int(v)),
    "SolarizeAdd": lambda image, v, *_: _solarize_add(image, v),
    "Color": partial(_enhance, ImageEnhance.Color),
    "Contrast": partial(_enhance, ImageEnhance.Contrast),
    "Brightness": partial(_enhance, ImageEnhance.Brightness),
    "Sharpness": partial(_enhance, ImageEnhance.Sharpness),
}
