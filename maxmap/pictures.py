"""Pictures for people to look at: several images with captions, and maps laid over an image."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from maxmap import storage
from maxmap.errors import UserError, printable

CELL = 160  # pixels of an image in the picture, or a little more
CAPTION = 30  # and of the two lines under it
# Of a map's values from 0 to 1: dark blue, blue, green, yellow, red.
_COLOURS = np.array([[48, 18, 59], [70, 134, 251], [27, 229, 181], [250, 186, 57], [230, 30, 20]], float)


def draw_grid(images: np.ndarray, captions: Sequence[str], columns: int | None = None) -> Image.Image:
    """Draws images in rows, each with its caption of two lines below.

    Args:
      images: uint8 `[N, H, W, C]`; small ones are enlarged by whole factors.
      captions: Of the images.
      columns: Images in a row; None for as many as there are rows.
    """
    count, height, width, _ = images.shape
    times = max(1, CELL // max(height, width))
    columns = columns or math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    cell = (times * width + 6, times * height + CAPTION)
    picture = Image.new("RGB", (columns * cell[0], rows * cell[1]), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=11)
    for i, (image, text) in enumerate(zip(images, captions, strict=True)):
        left, top = (i % columns) * cell[0] + 3, (i // columns) * cell[1] + 3
        enlarged = Image.fromarray(shown(image)).resize((times * width, times * height), Image.Resampling.NEAREST)
        picture.paste(enlarged, (left, top))
        lines = "\n".join(line[: max(8, times * width // 6)] for line in text.split("\n"))
        draw.multiline_text((left, top + times * height), lines, fill="black", font=font, spacing=1)
    return picture


def shown(image: np.ndarray) -> np.ndarray:
    """Returns an image of any channels in colours: uint8 `[H, W, C]` to `[H, W, 3]`, its first three or the first."""
    return image[..., :3] if image.shape[-1] >= 3 else np.repeat(image[..., :1], 3, axis=-1)


def save_picture(picture: Image.Image, path: str | Path) -> None:
    """Writes a picture in the format that the ending of its path says.

    Raises:
      UserError: it cannot be written there.
    """
    file = Path(storage.expand(path))
    try:
        picture.save(file)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot write the picture {printable(path)} ({error}): give another place, with an ending such as .png."
        ) from error


def mask_picture(mask: np.ndarray) -> Image.Image:
    """Returns a mask, uint8 `[H, W]`, as a picture whose values are the classes, in the colours of PASCAL VOC's."""
    picture = Image.fromarray(mask)
    picture.putpalette(_class_colours().tobytes())
    return picture


def lay_mask(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Lays a mask `[H, W]` over an image uint8 `[H, W, 3]`, in the colours of `mask_picture`."""
    return np.rint((image + _class_colours()[mask].astype(np.float32)) / 2).astype(np.uint8)


def _class_colours() -> np.ndarray:
    """Returns uint8 `[256, 3]`: bits 0, 3 and 6 of a number are the highest of red, 1, 4, 7 of green, 2, 5 of blue."""
    bits = (np.arange(256)[:, None, None] >> (np.arange(3)[:, None] + 3 * np.arange(3)[None])[None]) & 1  # [256, 3, 3]
    return np.sum(bits << (7 - np.arange(3)), axis=-1).astype(np.uint8)


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Lays a map over an image in colours from blue (none) to red (its largest value).

    Args:
      image: uint8 `[H, W, C]`.
      heat: `[h, w]`; values below zero count as zero.

    Returns:
      uint8 `[H, W, 3]`.
    """
    heat = np.maximum(np.asarray(heat, np.float32), 0)
    large = Image.fromarray(heat / max(heat.max(), 1e-12)).resize(image.shape[1::-1], Image.Resampling.BILINEAR)
    places = np.linspace(0, 1, len(_COLOURS))
    colours = np.stack([np.interp(np.asarray(large), places, column) for column in _COLOURS.T], axis=-1)
    return np.rint(0.45 * shown(image) + 0.55 * colours).astype(np.uint8)
