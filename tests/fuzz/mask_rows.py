"""Images with masks: the folders, the masks and their pairing with the image."""

import functools
import io
import random
from pathlib import Path
from typing import Any

import numpy as np

from maxmap.data.masks import MaskFiles, MaskSource
from maxmap.data.paired import eval_pair, finest, train_pair
from maxmap.errors import UserError, reason
from tests.fuzz.changes import spoil_one
from tests.fuzz.picture_rows import PREPROCESSING, SIZE, png, spoil_chunks, with_size, zeros
from tests.fuzz.rows import Files, Made, Row

IMAGE, MASK, NAMES = "images/val/a.png", "masks/val/a.png", "classes.txt"
WHOLE = {**PREPROCESSING, "crop_pct": 1.0, "crop_mode": "border", "exif": False}
SIDES = (40, 48)  # height and width


@functools.cache
def _valid() -> list[Files]:
    from PIL import Image

    values = np.add.outer(np.arange(SIDES[0]) // 9, np.arange(SIDES[1]) // 7).astype(np.uint8) % 4
    values[5:9] = 255
    masks = [Image.fromarray(values), Image.fromarray(values.astype(np.uint16)), Image.fromarray(values == 0)]
    masks.append(Image.fromarray(values).convert("P"))
    files = []
    for picture in (Image.fromarray(np.repeat(values[..., None], 3, axis=-1)), *masks):
        picture.save(file := io.BytesIO(), "PNG")
        files.append(file.getvalue())
    image, *written = files
    return [{IMAGE: image, MASK: mask, NAMES: b"a\nb\nc\nd\n"} for mask in written]


def _spoil(files: Files, rng: random.Random) -> Files:
    how = rng.random()
    if how < 0.3:
        sides = (0, 1, 40, 48, 1000, 13_000, 2**31 - 1)
        return {**files, MASK: with_size(files[MASK], "PNG", rng.choice(sides), rng.choice(sides))}
    if how < 0.6:
        return {**files, MASK: spoil_chunks(files[MASK], rng)}
    return spoil_one(files, rng)


def _made(mask: bytes, **others: bytes) -> Files:
    return {**_valid()[0], MASK: mask, **others}


def _zeros() -> Files:
    return _made(zeros(13_000, 13_000, 8, 0))


def _hostile() -> dict[str, Made]:
    return {
        "a mask of 13,000 x 13,000": _zeros,
        "a mask of 2^31 x 2^31": _made(png(2**31 - 1, 2**31 - 1, 8, 0, bytes(100))),
        "a mask of no pixels": _made(png(0, 0, 8, 0, b"")),
        "a mask of a class that there is not": _made(png(48, 40, 8, 0, (b"\0" + bytes([77]) * 48) * 40)),
        "a mask of colours": _made(_valid()[0][IMAGE]),
        "a mask that is cut off": _made(_valid()[0][MASK][:60]),
    }


def read(folder: Path) -> Any:
    """A loader counts and names what cannot be read."""
    source = MaskSource(folder, "val", None, MaskFiles("masks"))
    finer = finest(source.mask_sizes(), WHOLE)
    try:
        image, mask = source[0]
        assert isinstance(mask, np.ndarray)
        evaluated = eval_pair(image, mask, preprocessing=WHOLE, finer=finer, max_pixels=10**8)
        trained = train_pair(image, mask, np.random.default_rng(0), size=SIZE, mean=(0.5,) * 3)
    except OSError as error:
        raise UserError(f"{source.name(0)} is left out ({reason(error)}).") from error
    return source.classes, *evaluated, *trained


ROWS = (Row("images with masks", ("maxmap.data.masks", "maxmap.data.images"), 1000, _valid, _spoil, read, _hostile),)
