"""Opens image files from anywhere: which formats are tried, what is refused, and how pixels become 8-bit RGB.

A file that cannot be read right is refused with an OSError that gives the reason. So a loader can leave it out, count
it and name it. No file can start another program, take memory by a size that it states, or give grey pixels for
missing ones.
"""

import contextlib
import functools
import io
import os
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import ExifTags, Image
from PIL.ImageFile import ImageFile

from maxmap.data.damage import check_pixels, check_scans, check_strips, refuse_damaged_jpeg
from maxmap.errors import reason

# Pillow's formats by the endings of their files. Pillow tries no other format, whatever the ending says, because some
# of its other formats are hostile by design: it starts Ghostscript for an EPS.
FORMATS = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG"),
    **{".png": "PNG", ".webp": "WEBP", ".avif": "AVIF", ".gif": "GIF", ".bmp": "BMP"},
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **dict.fromkeys((".ppm", ".pgm", ".pbm", ".pnm"), "PPM"),
    ".jp2": "JPEG2000",
}
NPY = b"\x93NUMPY"  # how a .npy file starts; `maxmap.data.bands` reads it
IMAGE_ENDINGS = (*FORMATS, ".npy")

MAX_PIXELS = 178_956_970  # Pillow decodes no larger image; as RGB this one takes 700 MB
_VALUES = ("1", "L", "P", "I", "I;16")  # modes of a PNG of one channel
_GREY_STEPS = {2: 85, 4: 17}  # by which Pillow multiplies the greys of so many bits
_PNG_HEADER = struct.Struct(">16sII")  # what comes first, width and height; the bits of a value follow
_MOST_PIXELS_A_BYTE = 8 * 1032  # of a PNG: deflate makes at most 1,032 bytes of one, and a pixel takes a bit
_STRIP = 1 << 22  # pixels of 16 bits that are converted at a time

# How to turn an image upright, by its EXIF orientation: the transposition, and which axes of the result, (x, y), run
# against an axis of the stored image.
TURNS = {
    2: (Image.Transpose.FLIP_LEFT_RIGHT, (True, False)),
    3: (Image.Transpose.ROTATE_180, (True, True)),
    4: (Image.Transpose.FLIP_TOP_BOTTOM, (False, True)),
    5: (Image.Transpose.TRANSPOSE, (False, False)),
    6: (Image.Transpose.ROTATE_270, (True, False)),
    7: (Image.Transpose.TRANSVERSE, (True, True)),
    8: (Image.Transpose.ROTATE_90, (False, True)),
}


class TooManyPixels(OSError):
    """An image is larger than the reader allows."""


class OpenedImage(NamedTuple):
    """An image of which only the header is read.

    Attributes:
      size: width and height as they are stored.
      orientation: EXIF orientation to apply, 1 to 8; 1 for none.
      decode: takes the largest reduction allowed, and returns the pixels as they are stored and the actual reduction:
        1, 2, 4 or 8. The pixels have mode RGB, L, which takes a quarter of the memory, or CMYK: then they are RGB and a
        fourth channel without meaning.
    """

    size: tuple[int, int]
    orientation: int
    decode: Callable[[int], tuple[Image.Image, int]]


class ImageHeader(NamedTuple):
    """What the header of an image file says.

    Attributes:
      size: width and height, upright as the EXIF orientation says.
      kind: its format and Pillow's mode of its pixels, such as "JPEG RGB" or "PNG RGBA".
    """

    size: tuple[int, int]
    kind: str


@contextlib.contextmanager
def broken_is_oserror() -> Iterator[None]:
    """Turns into OSError what else a decoder raises for broken files: SyntaxError, ValueError and others."""
    try:
        yield
    except OSError as error:
        if str(error):
            raise
        raise OSError(f"cannot decode the image: {reason(error)}") from error
    except Exception as error:
        raise OSError(f"cannot decode the image: {reason(error)}") from error


def open_image(
    image: bytes | np.ndarray | Image.Image, *, exif: bool, max_pixels: int, alpha: bool = False
) -> OpenedImage:
    """Reads the header of an image file, or wraps an array or one of Pillow's images.

    Args:
      image: the bytes of a file, or uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], or an image of Pillow's.
      exif: whether to read the EXIF orientation.
      max_pixels: an image with more pixels is refused.
      alpha: whether pixels of an image that has transparency have mode RGBA.

    Raises:
      OSError: the image is broken or of no format in `FORMATS`; `TooManyPixels` if it is too large.
    """
    if isinstance(image, np.ndarray):
        grey = image.ndim == 3 and image.shape[-1] == 1
        opened = Image.fromarray(image[..., 0] if grey else image)
        return OpenedImage(opened.size, 1, functools.partial(_decode, opened, alpha))
    if isinstance(image, Image.Image):
        check_size(image.size, max_pixels)
        return OpenedImage(image.size, _orientation(image) if exif else 1, functools.partial(_decode, image, alpha))
    if image.startswith(b"\xff\xd8"):
        check_scans(image)
        with contextlib.suppress(ValueError):  # simplejpeg does not read the header, but Pillow may
            height, width, colors, _ = simplejpeg.decode_jpeg_header(image)
            if colors not in ("CMYK", "YCCK"):
                check_size((width, height), max_pixels)
                orientation = _orientation(open_file(image, max_pixels)) if exif else 1
                return OpenedImage(
                    (width, height), orientation, functools.partial(_decode_jpeg, image, (width, height))
                )
    opened = open_file(image, max_pixels)
    orientation = _orientation(opened) if exif else 1
    if opened.format in ("JPEG", "MPO"):
        return OpenedImage(opened.size, orientation, functools.partial(_decode_checked_jpeg, image, opened))
    return OpenedImage(opened.size, orientation, functools.partial(_decode_checked, image, opened, alpha))


def read_header(file: bytes, *, max_pixels: int) -> ImageHeader:
    """Reads the header of an image file.

    Raises:
      OSError: the image is too large or of no format in `FORMATS`.
    """
    opened = open_file(file, max_pixels)
    kind = f"{opened.format} {opened.mode}"  # before the EXIF data of a PNG are read, which decodes it
    return ImageHeader(opened.size[::-1] if _orientation(opened) >= 5 else opened.size, kind)


def read_values(file: bytes, size: tuple[int, int]) -> np.ndarray:
    """Reads the values of a PNG of one channel as they are stored: numbers of grey, or places in its palette.

    Args:
      file: the bytes.
      size: width and height that it has to have.

    Returns:
      uint8 or uint16 `[H, W]`.

    Raises:
      OSError: it is damaged, no PNG, of several channels or of another size.
    """
    with broken_is_oserror():
        opened = open_file(file, MAX_PIXELS)
        if opened.format != "PNG":
            raise OSError(f"it is a file of the format {opened.format}: save it as PNG, which keeps every value")
        if opened.mode not in _VALUES:
            raise OSError(f"it has colours (mode {opened.mode}) and no numbers: save it grey or with a palette")
        if opened.size != size:
            raise OSError("it has {} x {} pixels, and its image {} x {}".format(*opened.size, *size))
        opened.load()
        check_pixels(file, opened)
        values = np.asarray(opened).astype(np.uint16 if opened.mode.startswith("I") else np.uint8)
        bits = file[_PNG_HEADER.size]
        return values // _GREY_STEPS.get(bits, 1) if opened.mode == "L" else values


def stated_png_size(path: str) -> tuple[int, int]:
    """Returns the width and height that a PNG states; (0, 0) for another file, or one too small to have so many."""
    try:
        with open(path, "rb") as file:
            head = file.read(_PNG_HEADER.size)
            length = os.fstat(file.fileno()).st_size
    except OSError:
        return 0, 0
    if len(head) < _PNG_HEADER.size or not head.startswith(b"\x89PNG"):
        return 0, 0
    _, width, height = _PNG_HEADER.unpack(head)
    return (width, height) if width * height <= min(MAX_PIXELS, _MOST_PIXELS_A_BYTE * length) else (0, 0)


def open_file(file: bytes, max_pixels: int) -> ImageFile:
    """Has Pillow read the header of an image file; raises as `open_image` does."""
    try:
        opened = Image.open(io.BytesIO(file), formats=_known_formats())
    except Image.UnidentifiedImageError:
        raise OSError("the file is no image of a known format, or its header is cut off") from None
    check_size(opened.size, max_pixels)
    return opened


@functools.cache
def _known_formats() -> tuple[str, ...]:
    """Returns the formats of `FORMATS` that this build of Pillow reads."""
    Image.init()
    return tuple(sorted(set(FORMATS.values()) & Image.OPEN.keys()))


def check_size(size: tuple[int, int], max_pixels: int) -> None:
    """Raises `TooManyPixels` for an image of more pixels than are allowed."""
    if size[0] * size[1] > max_pixels:
        raise TooManyPixels(
            f"the image has {size[0]} x {size[1]} pixels, more than the {max_pixels} of --config.data.max_pixels"
        )


def _orientation(opened: Image.Image) -> int:
    """Returns the EXIF orientation that is still to be applied; Pillow applies that of a TIFF itself."""
    if opened.format == "TIFF":
        return 1
    if opened.format == "PNG":
        opened.load()  # the block may follow the pixels
    with contextlib.suppress(Exception):  # an EXIF block that cannot be read says nothing about the pixels
        orientation = opened.getexif().get(ExifTags.Base.Orientation)
        if orientation in TURNS:
            return orientation
    return 1


def plain_rgb(image: Image.Image) -> Image.Image:
    """Returns an image of `OpenedImage.decode` in mode RGB."""
    if image.mode != "CMYK":
        return image.convert("RGB")
    return Image.frombytes("RGB", image.size, image.tobytes(), "raw", "RGBX")


def _decode(opened: Image.Image, alpha: bool, most: int) -> tuple[Image.Image, int]:
    shrink = _draft(opened, most)
    return _to_8_bits(opened, alpha), shrink


def _decode_checked(file: bytes, opened: ImageFile, alpha: bool, most: int) -> tuple[Image.Image, int]:
    """Decodes with Pillow, and refuses what Pillow takes although pixels are missing."""
    check_strips(file, opened)
    opened.load()
    check_pixels(file, opened)
    return _decode(opened, alpha, most)


def _decode_checked_jpeg(file: bytes, opened: Image.Image, most: int) -> tuple[Image.Image, int]:
    """Decodes with Pillow a JPEG whose colours or size simplejpeg does not take, after a check of its data."""
    colorspace = "CMYK" if opened.mode == "CMYK" else "RGB"
    try:
        simplejpeg.decode_jpeg(file, colorspace, min_height=1, min_width=1)
    except ValueError as error:
        refuse_damaged_jpeg(error)
    return _decode(opened, False, most)


def _decode_jpeg(file: bytes, size: tuple[int, int], most: int) -> tuple[Image.Image, int]:
    """Decodes a JPEG of `size` (width, height) to Pillow's pixels, and a fourth channel without meaning."""
    shrink = _shrink(size, most)
    width, height = (-(-side // shrink) for side in size)
    try:
        pixels = simplejpeg.decode_jpeg(file, "RGBX", min_width=width, min_height=height)
    except ValueError as error:  # Pillow decodes some files that simplejpeg refuses
        refuse_damaged_jpeg(error)
        return _decode(open_file(file, size[0] * size[1]), False, most)
    # PIL holds RGB in four bytes too, so four channels need no copy. It and the resizer treat all four alike in this
    # mode; that the pixels are not CMYK does not matter to them.
    return Image.frombuffer("CMYK", (width, height), pixels, "raw", "CMYK", 0, 1), shrink


def _draft(image: Image.Image, most: int) -> int:
    """Sets a JPEG to decode at 1/8, 1/4 or 1/2 of its size, at least 1 / `most`; returns 8, 4, 2 or 1."""
    shrink = _shrink(image.size, most)
    if shrink == 1:
        return 1
    width = image.width
    drafted = image.draft(None, (image.width // shrink, image.height // shrink))
    # PIL returns mode and box, or None where the format has no reduced size.
    return 1 if drafted is None else round(width / drafted[1][2])


def _shrink(size: tuple[int, int], most: int) -> int:
    """Returns 8, 4, 2 or 1: the reduction of a JPEG that is at most `most` and leaves at least a pixel on each side."""
    return next((power for power in (8, 4, 2) if power <= min(most, *size)), 1)


def _to_8_bits(image: Image.Image, alpha: bool) -> Image.Image:
    """Decodes an image and converts it to RGB or, if it is grey, to L; see `maxmap.data.decode.decode`.

    With `alpha`, one that has transparency becomes RGBA.
    """
    if image.mode == "F":
        raise OSError("its pixels are floating-point numbers without a stated range: save it with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;"):
        return _high_bytes(image)
    if (alpha and image.has_transparency_data) or (image.mode == "P" and "transparency" in image.info):
        image = image.convert("RGBA")  # the same colours; straight to RGB, PIL warns
    image.load()
    return image if image.mode in ("RGB", "L", *["RGBA"] * alpha) else image.convert("RGB")


def _high_bytes(image: Image.Image) -> Image.Image:
    """Returns the high bytes of a grey image of 16 bits."""
    tags = getattr(image, "tag_v2", {})
    known = image.format in ("PNG", "PPM", "JPEG2000") or image.mode.startswith("I;16")
    bits, white_is_zero, kind = tags.get(258, (16,)), tags.get(262) == 0, tags.get(339, (1,))
    if not known or bits not in (16, (16,)) or white_is_zero or kind not in (1, (1,)):
        raise OSError("its grey values are no unsigned numbers of 16 bits with 0 for black: save it with 8 or 16 bits")
    image.load()
    high = Image.new("L", image.size)
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        grey = np.asarray(strip).astype(np.int32).clip(0, 65535) >> 8
        high.paste(Image.fromarray(grey.astype(np.uint8)), (0, top))
    return high
