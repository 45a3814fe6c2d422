"""What one image file is, whether training can decode it, and two hashes that find its copies."""

import hashlib
from typing import NamedTuple

import numpy as np

from maxmap.data.bands import read_array
from maxmap.data.decode import decode
from maxmap.data.images import MAX_PIXELS, ImageHeader, broken_is_oserror, read_header
from maxmap.errors import UserError, reason

_SMALLEST = 64  # pixels of a side that the perceptual hash is computed from; it resizes to 32 itself


class Inspection(NamedTuple):
    """What one image file is.

    Attributes:
      size: Width and height in pixels, upright as its EXIF orientation says; (0, 0) for a broken file.
      kind: Format and mode, such as "JPEG RGB", or "5 channels"; "" for a broken file.
      digest: Of the bytes: equal files have equal ones.
      hash: Perceptual hash of 64 bits; copies that were resized or saved again differ in few of them.
      fault: Why the file cannot be decoded; None if it can.
    """

    size: tuple[int, int]
    kind: str
    digest: bytes
    hash: int
    fault: str | None


def inspect(path: str) -> Inspection:
    """Reads and decodes an image file, as training does.

    Its perceptual hash is that of imagehash's `phash`: which of the 64 lowest frequencies of the image's cosine
    transform are above their median (hackerfactor.com, "Looks Like It").

    Raises:
      UserError: The package imagehash is not installed.
    """
    try:
        import imagehash
    except ImportError as error:
        raise UserError("to find copies of images takes the package imagehash: pip install imagehash.") from error
    digest = b""
    try:
        with open(path, "rb") as opened:
            file = opened.read()
        digest = hashlib.blake2b(file, digest_size=16).digest()
        with broken_is_oserror():
            array = read_array(file, MAX_PIXELS)
            if array is None:
                header = read_header(file, max_pixels=MAX_PIXELS)
            else:
                header = ImageHeader((array.shape[1], array.shape[0]), f"{array.shape[2]} channels")
            pixels = decode(file, exif=True, smallest=_SMALLEST)
    except OSError as error:
        return Inspection((0, 0), "", digest, 0, reason(error))
    bits = np.packbits(imagehash.phash(pixels).hash)
    return Inspection(header.size, header.kind, digest, int.from_bytes(bits.tobytes()), None)
