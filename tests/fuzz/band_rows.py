"""Arrays of several channels: .npy files, and TIFFs that are no pictures."""

import functools
import io
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from maxmap.data.decode import eval_crop, train_crop
from maxmap.errors import UserError, reason
from tests.fuzz.changes import spoil
from tests.fuzz.picture_rows import FILE, look, spoil_tags, with_size
from tests.fuzz.rows import Files, Made, Row

CHANNELS = 5


def npy(shape: str, kind: str = "|u1", data: bytes = b"", version: int = 1) -> bytes:
    """A .npy file with any header."""
    text = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(2 if version == 1 else 4, "little") + text + data


@functools.cache
def arrays() -> dict[str, bytes]:
    """A small array in every kind of file."""
    import tifffile

    waves = np.add.outer(np.arange(40) * 3.7, np.arange(48) * 2.3)[..., None] + np.arange(CHANNELS) * 30
    pixels = (127 + 120 * np.sin(waves / 9)).astype(np.uint8)
    files = {}
    for name, array in (("npy", pixels), ("npy, Fortran's order", np.asfortranarray(pixels))):
        np.save(file := io.BytesIO(), array)
        files[name] = file.getvalue()
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    kinds: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
        "TIFF": (pixels, {"planarconfig": "contig"}),
        "TIFF strips": (pixels, {"planarconfig": "contig", "rowsperstrip": 7}),
        "TIFF planes": (planes, {"planarconfig": "separate"}),
        "TIFF deflate": (pixels, {"planarconfig": "contig", "compression": "zlib", "predictor": 2}),
        "TIFF tiles": (pixels, {"planarconfig": "contig", "compression": "zlib", "tile": (16, 16)}),
        "TIFF big": (pixels, {"planarconfig": "contig", "bigtiff": True}),
    }
    for name, (array, options) in kinds.items():
        tifffile.imwrite(file := io.BytesIO(), array, photometric="minisblack", metadata=None, **options)
        files[name] = file.getvalue()
    return files


def _valid() -> list[Files]:
    return [{FILE: data} for data in arrays().values()]


def _spoil(files: Files, rng: random.Random) -> Files:
    data, how = files[FILE], rng.random()
    if how < 0.3 and data.startswith(b"\x93NUMPY"):
        sides = [
            rng.choice((40, 48, CHANNELS, 0, -1, 1, 1.5, 2**31, 2**62, 10**30)) for _ in range(rng.choice((2, 3, 9)))
        ]
        kind = rng.choice(("|u1", "|u1", "|b1", "<u2", "|O", "<f8", "|V4", "|S7"))
        return {FILE: npy(str(tuple(sides)), kind, data[-40 * 48 * CHANNELS :], rng.choice((1, 1, 2)))}
    if how < 0.2 and data.startswith(b"II*"):
        return {FILE: with_size(data, "TIFF", rng.choice((0, 1, 47, 9000, 2**31)), rng.choice((0, 1, 41, 9000, 2**31)))}
    if how < 0.5 and data.startswith(b"II*"):
        return {FILE: spoil_tags(data, rng)}
    return {FILE: spoil(data, rng)}


def _bomb() -> Files:
    """A TIFF whose only strip inflates to 1 GB."""
    packer, chunk = zlib.compressobj(9), bytes(1 << 20)
    strip = b"".join([packer.compress(chunk) for _ in range(1024)] + [packer.flush()])
    tags = [(256, 4, 48), (257, 4, 40), (258, 3, 8), (259, 3, 8), (262, 3, 1), (273, 4, 8), (277, 3, CHANNELS)]
    tags += [(278, 4, 40), (279, 4, len(strip))]
    entries = b"".join(struct.pack("<HHLL", tag, kind, 1, value) for tag, kind, value in tags)
    return {
        FILE: b"II*\0" + struct.pack("<L", 8 + len(strip)) + strip + struct.pack("<H", len(tags)) + entries + bytes(4)
    }


def _hostile() -> dict[str, Made]:
    pickled = io.BytesIO()
    np.save(pickled, np.array([[{"a": 1}]], object), allow_pickle=True)
    files = {
        "an array of objects": pickled.getvalue(),
        "an array of 2^62": npy(f"({2**31}, {2**31}, 1)"),
        "an array of 10^4000": npy(f"(1{'0' * 4000}, 1, 1)"),
        "negative sides": npy("(-4, -4, 5)", data=bytes(80)),
        "no sides": npy("()", data=b"1"),
        "shape of a call": npy("__import__('os').getpid()", data=b"1"),
        "deep header": npy("(" * 9000),
        "16 bits": npy("(4, 4, 5)", "<u2", bytes(160)),
        "cut off": npy("(4, 4, 5)", data=bytes(79)),
        "unknown version": b"\x93NUMPY\x09\x00" + bytes(100),
        "nothing": b"\x93NUMPY",
    }
    for name, data in arrays().items():
        if data.startswith(b"II*"):
            files[f"{name} of 9,000 x 9,000"] = with_size(data, "TIFF", 9000, 9000)
            files[f"{name} of 60,000 x 60,000"] = with_size(data, "TIFF", 60_000, 60_000)
    return {**{name: {FILE: data} for name, data in files.items()}, "a strip of 1 GB": _bomb}


def read(folder: Path) -> Any:
    """The crops of evaluation and of training, and what `maxmap check` finds."""
    data, mean = (folder / FILE).read_bytes(), [0.5] * CHANNELS
    try:
        evaluated = eval_crop(data, size=16, crop_pct=0.9, mode="center", interpolation="bicubic", mean=mean)
        trained = train_crop(data, np.random.default_rng(0), size=16, channels=CHANNELS)
    except OSError as error:
        raise UserError(f"{FILE} is left out ({reason(error)}).") from error
    return evaluated, trained, look(folder)


ROWS = (Row("arrays of channels", ("maxmap.data.bands",), 1000, _valid, _spoil, read, _hostile),)
