"""Images and their masks, cropped together: for training at random, for evaluation whole.

For evaluation a mask is not resized, because its pixels are what is counted. Each of them is put at the pixel of the
network's image that shows it, and several may come to lie there.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from maxmap.data.bands import open_bands
from maxmap.data.decode import draw_filter, eval_size, offset, resized_box
from maxmap.data.images import MAX_PIXELS, broken_is_oserror, plain_rgb
from maxmap.data.randaugment import fill_color
from maxmap.data.rows import preprocessed_crop
from maxmap.errors import UserError
from maxmap.metrics import IGNORED

_TRIES = 10  # crops that are drawn until one shows several classes
_MOST_OF_ONE_CLASS = 0.75  # of the pixels of such a crop


def train_pair(
    image: bytes | np.ndarray,
    mask: np.ndarray,
    rng: np.random.Generator,
    *,
    size: int,
    zoom: tuple[float, float] = (0.5, 2.0),
    interpolation: str = "random",
    draft: bool = True,
    mean: Sequence[float],
    max_pixels: int = MAX_PIXELS,
) -> tuple[np.ndarray, np.ndarray]:
    """Resizes an image and its mask at random, and cuts the same square out of both, as mmsegmentation does.

    Up to ten squares are drawn, until one has pixels that count, and no class more than three quarters of them. Where
    the resized image is smaller than the square, it lies in the upper left corner; the rest has the mean colour, and is
    ignored in the mask.

    Args:
      image: see `maxmap.data.decode.decode`.
      mask: uint8 [H, W], of the image's size.
      rng: the source of all randomness.
      size: side of the square in pixels.
      zoom: range of the shorter side of the resized image, in sides of the square.
      interpolation: see `maxmap.data.decode.train_crop`; a mask takes the nearest pixel.
      draft: see `maxmap.data.decode.train_crop`.
      mean: mean colour in 0..1.
      max_pixels: see `maxmap.data.decode.decode`.

    Returns:
      uint8 [size, size, 3] and uint8 [size, size].

    Raises:
      OSError: see `maxmap.data.decode.decode`.
    """
    with broken_is_oserror():
        opened = open_bands(image, channels=3, exif=False, max_pixels=max_pixels)
        width, height = opened.size
        times = size * rng.uniform(*zoom) / min(width, height)
        resized = [max(1, round(side * times)) for side in (width, height)]
        resample = draw_filter(interpolation, rng)
        for _ in range(_TRIES):
            left, top = (int(rng.integers(max(side - size, 0) + 1)) for side in resized)
            columns, rows = (
                (start + np.arange(min(side, size)) + 0.5) * (full / side)
                for start, side, full in zip((left, top), resized, (width, height), strict=True)
            )
            cut = mask[np.ix_(rows.astype(int), columns.astype(int))]
            counts = np.bincount(cut.reshape(-1), minlength=IGNORED + 1)[:IGNORED]
            if 0 < counts.max() <= _MOST_OF_ONE_CLASS * counts.sum():
                break
        step_x, step_y = width / resized[0], height / resized[1]
        (pixels,), shrink = opened.decode(int(min(step_x, step_y)) if draft else 1)
        right, bottom = min((left + len(columns)) * step_x, width), min((top + len(rows)) * step_y, height)
        box = (left * step_x / shrink, top * step_y / shrink, right / shrink, bottom / shrink)
        part = resized_box(pixels, (len(columns), len(rows)), resample, box)
        square = np.empty((size, size, 3), np.uint8)
        square[:] = fill_color(mean)
        square[: len(rows), : len(columns)] = np.asarray(plain_rgb(part))
        return square, np.pad(cut, ((0, size - len(rows)), (0, size - len(columns))), constant_values=IGNORED)


def eval_pair(
    image: bytes | np.ndarray, mask: np.ndarray, *, preprocessing: Mapping[str, Any], finer: int, max_pixels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Makes of an image what the network sees, and puts every pixel of its mask where the image shows it.

    Args:
      image: see `maxmap.data.decode.decode`.
      mask: uint8 [H, W], of the image's size.
      preprocessing: of the whole image; see `check_whole`.
      finer: of `finest`.
      max_pixels: see `maxmap.data.decode.decode`.

    Returns:
      uint8 [S, S, 3], and uint8 [S, S, finer * finer]: the pixels of the mask at each of these places, filled up with
      ignored ones. Every pixel of the mask is in it once.

    Raises:
      OSError: see `maxmap.data.decode.decode`.
    """
    size, (height, width) = preprocessing["image_size"], mask.shape
    rows, columns = places((width, height), preprocessing, finer)
    if finest(np.array([[width, height]]), preprocessing) > finer:
        raise OSError(f"its mask has {width} x {height} pixels, more than it had at the start")
    grid = np.full((size * finer, size * finer), IGNORED, np.uint8)
    grid[np.ix_(rows, columns)] = mask
    placed = grid.reshape(size, finer, size, finer).swapaxes(1, 2).reshape(size, size, finer * finer)
    return preprocessed_crop(image, preprocessing, max_pixels), placed


def places(size: tuple[int, int], preprocessing: Mapping[str, Any], finer: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Returns the row of each row, and the column of each column, of an image in what the network sees of it.

    Args:
      size: width and height of the image.
      preprocessing: see `check_whole`.
      finer: into how many rows and columns each of the network's is divided.

    Returns:
      int `[height]` and `[width]`.
    """
    side = preprocessing["image_size"]
    resized = eval_size(*size, side, preprocessing["crop_mode"])

    def along(full: int, kept: int) -> np.ndarray:
        # The middle of pixel i lies at (i + 1/2) / full; in whole numbers, so that none is rounded to its neighbour.
        return -offset(kept, side) * finer + (2 * np.arange(full) + 1) * (kept * finer) // (2 * full)

    columns, rows = (along(full, kept) for full, kept in zip(size, resized, strict=True))
    return rows, columns


def finest(sizes: np.ndarray, preprocessing: Mapping[str, Any]) -> int:
    """Returns into how many rows and columns each of the network's has to be divided for all pixels of some masks.

    Args:
      sizes: width and height of the masks, int `[N, 2]`; 0 for one that does not count.
      preprocessing: see `check_whole`.
    """
    most = 1
    for width, height in np.unique(sizes[sizes[:, 0] * sizes[:, 1] > 0], axis=0).tolist():
        resized = eval_size(width, height, preprocessing["image_size"], preprocessing["crop_mode"])
        most = max(most, *(math.ceil(full / kept) for full, kept in zip((width, height), resized, strict=True)))
    return most


def check_whole(preprocessing: Mapping[str, Any]) -> None:
    """Raises UserError unless a preprocessing keeps all of an image, which masks need."""
    if preprocessing["crop_mode"] == "center" or preprocessing["crop_pct"] != 1 or preprocessing.get("exif"):
        raise UserError(
            "every pixel of a mask counts, so images are evaluated whole and as they are stored: set crop_pct to 1, "
            "crop_mode to 'border' (or 'squash') and exif to False, in config.data or as an option of the command."
        )
