"""RandAugment's policy: the operations, how strong each is at a magnitude, and the notation of its settings.

RandAugment (Cubuk et al., 2020, https://arxiv.org/abs/1909.13719) draws operations for every image from these fifteen:

- WARPS: an affine warp;
- TABLES: a table of 256 entries for every channel;
- BLENDS: a blend with a degenerate image.

`randaugment_device` applies them to a batch in JAX, `randaugment_host` to one image with Pillow. This file needs
neither: its formulas hold for NumPy's numbers and for JAX's arrays alike.
"""

import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

from maxmap.errors import UserError, nearest

WARPS = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
TABLES = ("AutoContrast", "Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd")
BLENDS = ("Color", "Contrast", "Brightness", "Sharpness")
OPERATIONS = (*WARPS, *TABLES, *BLENDS)

LEVELS = 10  # the magnitude at which every operation reaches its full strength

# The argument of each warp at full strength: degrees, slope, part of the side.
LARGEST_WARPS = {"Rotate": 30, "ShearX": 0.3, "ShearY": 0.3, "TranslateXRel": 0.45, "TranslateYRel": 0.45}


class RandAugment(NamedTuple):
    """The settings that a RandAugment string holds; a part that it leaves out has the default."""

    magnitude: float = 10.0  # m
    layers: int = 2  # n
    prob: float = 0.5  # p
    magnitude_std: float = 0.0  # mstd
    magnitude_max: float = float(LEVELS)  # mmax
    increasing: bool = False  # inc


# The name of each part in timm's notation.
PARTS = {
    "m": "magnitude",
    "n": "layers",
    "p": "prob",
    "mstd": "magnitude_std",
    "mmax": "magnitude_max",
    "inc": "increasing",
}


def parse_rand_augment(text: str) -> RandAugment:
    """Reads timm's RandAugment notation: 'rand' and then parts of a name and a number, joined by '-'.

    The parts are m (magnitude), n (operations for an image), p (probability that a drawn operation is applied), mstd
    (standard deviation of the magnitude; above 100: uniform between 0 and the magnitude), mmax (its upper limit), inc
    (1: every operation gets stronger with the magnitude). Magnitudes are clipped to 10 unless mmax is given, so 'm15'
    and 'm20' mean 10. inc0 means off, as in timm 1.0.31; timm 0.9.2 took it as on.

    Raises:
      UserError: a part is unknown or out of range.
    """
    start, *parts = text.split("-")
    if start != "rand":
        raise UserError(f"rand_augment '{text}' must start with 'rand', for example 'rand-m9-mstd0.5-inc1'.")
    settings: dict[str, Any] = {}
    for part in parts:
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d*)?|\.\d+)", part)
        if not match or match[1] not in PARTS:
            raise UserError(
                f"rand_augment '{text}' has the unknown part '{part}'; a part is a name and a number, the nearest "
                f"names are {nearest(re.sub(r'[^a-z]', '', part), PARTS)}."
            )
        name = PARTS[match[1]]
        value: float = float(match[2])
        if name in ("layers", "increasing"):
            if not value.is_integer():
                raise UserError(f"rand_augment '{text}' needs a whole number in its part '{part}'.")
            value = bool(value) if name == "increasing" else int(value)
        if name == "prob" and value > 1:
            raise UserError(f"rand_augment '{text}' has a probability above 1 in its part '{part}'.")
        settings[name] = value
    return RandAugment(**settings)


def fill_color(mean: Sequence[float]) -> tuple[int, ...]:
    """Returns the colour that a warp brings in from outside the image: the mean colour in 0..1, as grey levels."""
    return tuple(min(255, round(255 * value)) for value in mean)


def operation_argument(name: str, magnitude: Any, negative: Any, *, increasing: bool, xp: ModuleType) -> Any:
    """Returns the argument of one operation at magnitudes from 0 to 10.

    The argument is an angle in degrees counter-clockwise (Rotate), a slope (ShearX, ShearY), a part of the side
    (TranslateXRel, TranslateYRel), the bits kept (Posterize), the least value inverted (Solarize), the grey levels
    added (SolarizeAdd), or the weight of the image against its degenerate form (BLENDS). The other operations get 0.

    Args:
      name: of the operation.
      magnitude: a number or an array.
      negative: whether a warp has the opposite sign and, with `increasing`, a blend a weight below 1 instead of above
        1; a bool or an array of the shape of `magnitude`.
      increasing: whether every operation gets stronger with the magnitude.
      xp: the module that the arrays belong to, `numpy` or `jax.numpy`.
    """
    if name in WARPS:
        return LARGEST_WARPS[name] * xp.where(negative, -magnitude, magnitude) / LEVELS
    if name in BLENDS:
        if increasing:
            return xp.maximum(0.1, 1 + 0.9 * xp.where(negative, -magnitude, magnitude) / LEVELS)
        return 0.1 + 1.8 * magnitude / LEVELS
    if name == "Posterize":
        bits = xp.trunc(4 * magnitude / LEVELS)
        return xp.maximum(0, 4 - bits) if increasing else bits
    if name == "Solarize":
        threshold = xp.minimum(256, xp.trunc(256 * magnitude / LEVELS))
        return 256 - threshold if increasing else threshold
    if name == "SolarizeAdd":
        return xp.minimum(128, xp.trunc(110 * magnitude / LEVELS))
    return xp.zeros_like(magnitude)
