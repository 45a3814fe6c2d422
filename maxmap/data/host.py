"""RandAugment on the host's threads, with Pillow: for accelerators on which warps are slow, where CPU cores are idle.

The operations, their arguments and their chances are those of `maxmap.data.augment`; only the draws are others, since
they are made image by image. It knows nothing of JAX, so that worker processes start without it.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

LEVELS = 10


def rand_augment(
    image: Image.Image,
    rng: np.random.Generator,
    *,
    magnitude: float,
    layers: int,
    prob: float,
    magnitude_std: float,
    magnitude_max: float,
    increasing: bool,
    fill: tuple[int, int, int],
) -> Image.Image:
    """Applies `layers` operations, each drawn with replacement and applied with probability `prob`.

    Args:
      image: RGB.
      rng: where all randomness comes from.
      magnitude, layers, prob, magnitude_std, magnitude_max, increasing: see `augment.parse_rand_augment`.
      fill: colour of what comes from outside of the image.
    """
    for name in rng.choice(tuple(OPERATIONS), layers):
        if rng.random() >= prob:
            continue
        if magnitude_std > 100:
            level = rng.uniform(0, magnitude)
        else:
            level = rng.normal(magnitude, magnitude_std) if magnitude_std else magnitude
        level = min(max(level, 0.0), magnitude_max)
        value = argument(name, level, negative=rng.random() < 0.5, increasing=increasing)
        resample = Image.Resampling.BICUBIC if rng.random() < 0.5 else Image.Resampling.BILINEAR
        image = apply(image, name, value, resample, fill)
    return image


def argument(name: str, magnitude: float, *, negative: bool, increasing: bool) -> float:
    """The argument of one operation, in the units of `augment.operation_arguments`."""
    signed = -magnitude if negative else magnitude
    if name in ENHANCERS:
        return max(0.1, 1 + 0.9 * signed / LEVELS) if increasing else 0.1 + 1.8 * magnitude / LEVELS
    bits, threshold = int(4 * magnitude / LEVELS), min(256, int(256 * magnitude / LEVELS))
    return {
        "Rotate": 30 * signed / LEVELS,
        "ShearX": 0.3 * signed / LEVELS,
        "ShearY": 0.3 * signed / LEVELS,
        "TranslateXRel": 0.45 * signed / LEVELS,
        "TranslateYRel": 0.45 * signed / LEVELS,
        "Posterize": max(0, 4 - bits) if increasing else bits,
        "Solarize": 256 - threshold if increasing else threshold,
        "SolarizeAdd": min(128, int(110 * magnitude / LEVELS)),
    }.get(name, 0.0)


def apply(
    image: Image.Image, name: str, value: float, resample: Image.Resampling, fill: tuple[int, int, int]
) -> Image.Image:
    """Applies one of the `OPERATIONS`."""
    return OPERATIONS[name](image, value, resample, fill)


def _affine(image: Image.Image, matrix: Sequence[float], resample: Image.Resampling, fill) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=resample, fillcolor=fill)


def _table(image: Image.Image, table: np.ndarray) -> Image.Image:
    return image.point(list(np.tile(table.clip(0, 255), 3).astype(int)))


def _posterize(image: Image.Image, bits: float) -> Image.Image:
    return _table(image, np.arange(256) & -(1 << (8 - min(int(bits), 8))))


def _solarize_add(image: Image.Image, add: float) -> Image.Image:
    levels = np.arange(256)
    return _table(image, np.where(levels < 128, levels + int(add), levels))


ENHANCERS: dict[str, type] = {
    "Color": ImageEnhance.Color,
    "Contrast": ImageEnhance.Contrast,
    "Brightness": ImageEnhance.Brightness,
    "Sharpness": ImageEnhance.Sharpness,
}


def _enhance(kind: type, image: Image.Image, value: float, *_) -> Image.Image:
    return kind(image).enhance(value)


OPERATIONS: dict[str, Callable[..., Image.Image]] = {
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
    **{name: partial(_enhance, kind) for name, kind in ENHANCERS.items()},
}
