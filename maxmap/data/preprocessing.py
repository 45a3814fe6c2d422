"""The preprocessing of a checkpoint: from an image file to the pixels that its network was trained to see.

It is a dict, as JSON holds it: `image_size` (side of the crop in pixels), `crop_pct`, `crop_mode` and `interpolation`
(see `maxmap.data.decode.eval_crop`), `mean` and `std` of each channel in 0..1 (so they say how many channels there
are), and `exif` (whether photos are turned as their EXIF orientation says; absent in older checkpoints and those of
others, where it is False).
"""

import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeAlias

import numpy as np
from PIL import Image

from maxmap.data.bands import open_bands
from maxmap.data.decode import CROP_MODES, check_filter
from maxmap.data.images import MAX_PIXELS
from maxmap.data.rows import preprocessed_crop
from maxmap.errors import UserError, nearest, printable, reason
from maxmap.ranges import Pixels, Range, check_arguments

_HINT = "values over 1 look like 0 to 255: divide by 255"
Mean: TypeAlias = Annotated[float, Range(at_least=0, at_most=1, hint=_HINT)]
# The smallest deviation, a quarter of a grey level, keeps the normalised values finite.
Deviation: TypeAlias = Annotated[float, Range(at_least=0.001, at_most=1, hint=_HINT)]
CropShare: TypeAlias = Annotated[float, Range(at_least=0.1, at_most=1)]


def changed(
    preprocessing: Mapping[str, Any],
    *,
    image_size: Pixels | None = None,
    crop_pct: CropShare | None = None,
    crop_mode: str | None = None,
    interpolation: str | None = None,
    mean: Sequence[Mean] | None = None,
    std: Sequence[Deviation] | None = None,
) -> dict[str, Any]:
    """Returns a preprocessing with other values for the arguments that are not None.

    Raises:
      UserError: a value is unknown or out of range.
    """
    given = {key: value for key, value in locals().items() if key != "preprocessing" and value is not None}
    check_arguments(changed, "", locals())
    if interpolation is not None:
        check_filter(interpolation, "interpolation")
    if crop_mode is not None:
        check_crop_mode(crop_mode, "crop_mode")
    for key in ("mean", "std"):
        if key in given:
            channels = len(preprocessing.get(key, given[key]))
            given[key] = of_channels(given[key], channels, key)
    return {**preprocessing, **given}


def of_channels(values: Sequence[float], channels: int, name: str) -> list[float]:
    """Returns a mean or a deviation for each channel of the images.

    Three values for other channels are those of colours: one channel gets their mean, and several get them in turn, as
    the kernels of `maxmap.convert.adapt` do.

    Raises:
      UserError: there are as many values as neither channels nor colours; `name` says of what.
    """
    values = [float(value) for value in values]
    if len(values) == channels:
        return values
    if len(values) != 3:
        raise UserError(
            f"{name} has {len(values)} values, and the images have {channels} channels: give {channels}, or three that "
            "stand for the colours."
        )
    return [sum(values) / 3] if channels == 1 else [values[channel % 3] for channel in range(channels)]


def check_crop_mode(name: str, option: str) -> None:
    """Raises UserError unless `name` is in CROP_MODES; `option` is what the user sets it with."""
    if name not in CROP_MODES:
        raise UserError(
            f"unknown crop mode {name!r} ({option}): did you mean {nearest(name, CROP_MODES, 1)!r}? "
            f"Known are {', '.join(CROP_MODES)}."
        )


def departures(used: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """Returns how a preprocessing departs from that of a checkpoint: 'crop_pct is 0.9 instead of 0.95', and so on.

    Args:
      used: the preprocessing that images get.
      stored: the checkpoint's; fields that it does not have are not compared.
    """
    stored = {"exif": False, **stored} if stored else {}
    return [
        f"{key} is {as_text(used[key])} instead of {as_text(value)}"
        for key, value in stored.items()
        if key in used and used[key] != value
    ]


def in_words(preprocessing: Mapping[str, Any]) -> str:
    """Returns a preprocessing as one line of text."""
    return ", ".join(f"{key} {as_text(value)}" for key, value in preprocessing.items())


def as_text(value: Any) -> str:
    """Returns the value of a field as text, as it is given on the command line."""
    return " ".join(f"{number:g}" for number in value) if isinstance(value, list | tuple) else str(value)


def cropped(
    image: bytes | str | os.PathLike | Image.Image | np.ndarray, preprocessing: Mapping[str, Any]
) -> np.ndarray:
    """Does to one image what `Data.eval_batches` does to a data set.

    Args:
      image: a path, the bytes of an image file, a PIL image, or a uint8 array [H, W, 1], [H, W, 3], [H, W, 4]
        or [H, W, C].
        The EXIF orientation of a PIL image counts as that of a file does.
      preprocessing: `Data.preprocessing`, as a checkpoint stores it.

    Returns:
      uint8 [image_size, image_size, C], not yet normalised; C is the number of values of the mean.

    Raises:
      UserError: the file is missing or cannot be decoded, or the array is of another type or shape.
    """
    channels = len(preprocessing["mean"])
    if isinstance(image, np.ndarray) and (
        image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3, 4, channels)
    ):
        raise UserError(
            f"the image is an array {image.dtype} {list(image.shape)}: give uint8 [height, width, {channels}], from 0 "
            "to 255; it is resized, cropped and normalised here."
        )
    where = "the image"
    try:
        if isinstance(image, str | os.PathLike):
            where = printable(image)
            with open(os.path.expanduser(image), "rb") as file:
                image = file.read()
        return preprocessed_crop(image, preprocessing, MAX_PIXELS)
    except OSError as error:
        raise UserError(
            f"cannot read {where} ({reason(error)}): give the path of an image file that is whole."
        ) from error


def stored_size(path: str | os.PathLike, preprocessing: Mapping[str, Any]) -> tuple[int, int]:
    """Returns width and height of an image file that `cropped` takes, as they are stored."""
    channels = len(preprocessing["mean"])
    with open(os.path.expanduser(path), "rb") as file:
        return open_bands(file.read(), channels=channels, exif=False, max_pixels=MAX_PIXELS).size
