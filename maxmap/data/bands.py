"""Images of other channels than red, green and blue: grey, RGBA, and any number from .npy and TIFF files.

An image becomes a list of grey images of Pillow's, one for each channel, so that each is resized and cropped on its
own. Three channels stay one image.
"""

import codecs
import functools
import io
import logging
import math
import zlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from maxmap.data.images import NPY, TURNS, TooManyPixels, check_size, open_file, open_image, plain_rgb

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_SAMPLES = 277  # the tag of a TIFF with the number of its channels
_INFLATED, _PLAIN = (8, 32946), 1  # compressions of a TIFF that are read


class OpenedBands(NamedTuple):
    """An image of which only the header is read, or an array.

    Attributes:
      size: width and height as they are stored.
      orientation: EXIF orientation to apply, 1 to 8; 1 for none.
      decode: takes the largest reduction allowed, and returns the pixels and the actual reduction, as
        `maxmap.data.images.OpenedImage.decode` does: the pixels are its image for three channels, else an image of mode
        L for each channel.
    """

    size: tuple[int, int]
    orientation: int
    decode: Callable[[int], tuple[list[Image.Image], int]]


def open_bands(image: bytes | np.ndarray | Image.Image, *, channels: int, exif: bool, max_pixels: int) -> OpenedBands:
    """Opens an image that a network of so many channels is to see.

    One channel is the grey image, four are RGBA with an opaque image where nothing is transparent. Other numbers, and
    four channels that are no RGBA, come from arrays, .npy and TIFF files that have as many.

    Args:
      image: see `maxmap.data.images.open_image`; also the bytes of a .npy file, and arrays uint8 [H, W, channels].
      channels: that the network takes.
      exif: whether to read the EXIF orientation.
      max_pixels: an image with more pixels is refused.

    Raises:
      OSError: the image is broken, of no known format, of other channels or not of 8 bits; `TooManyPixels` if it is
        too large.
    """
    array, orientation = _array(image, channels, max_pixels)
    if array is None:
        opened = open_image(image, exif=exif, max_pixels=max_pixels, alpha=channels == 4)
        return OpenedBands(opened.size, opened.orientation, functools.partial(_decode, opened.decode, channels))
    if array.shape[2] != channels:
        raise OSError(f"it has {array.shape[2]} channels, and {channels} are wanted")
    several = [array] if channels == 3 else [np.ascontiguousarray(array[..., c]) for c in range(channels)]
    planes = [Image.fromarray(plane) for plane in several]
    return OpenedBands(planes[0].size, orientation, lambda most: (planes, 1))


def _decode(
    decode: Callable[[int], tuple[Image.Image, int]], channels: int, most: int
) -> tuple[list[Image.Image], int]:
    """Decodes a picture to the channels of a network."""
    pixels, shrink = decode(most)
    if channels == 3:
        return [pixels], shrink
    if pixels.mode == "CMYK":
        pixels = plain_rgb(pixels)
    return [pixels.convert("L")] if channels == 1 else list(pixels.convert("RGBA").split()), shrink


def _array(image: Any, channels: int, max_pixels: int) -> tuple[np.ndarray | None, int]:
    """Returns an image that is an array, uint8 [H, W, C], and its orientation; None for a picture."""
    if isinstance(image, np.ndarray):
        image = image[..., None] if image.ndim == 2 else image
        several = image.ndim == 3 and image.shape[2] not in (1, 3, 4)
        return (image if several or channels not in (1, 3, 4) else None), 1
    if isinstance(image, bytes) and image.startswith(NPY):
        return _read_npy(image, max_pixels), 1
    if isinstance(image, bytes) and image.startswith(_TIFF) and channels not in (1, 3):
        if channels != 4 or not _is_picture(image, max_pixels):
            return _read_tiff(image, max_pixels)
    elif channels not in (1, 3, 4):
        raise OSError(f"it is a picture, and {channels} channels are wanted: save it as .npy or TIFF with as many")
    return None, 1


def _is_picture(tiff: bytes, max_pixels: int) -> bool:
    """Whether Pillow reads all channels of a TIFF: it leaves out a fourth that is not marked as alpha, and planes."""
    try:
        opened = open_file(tiff, max_pixels)
    except OSError:
        return False
    return getattr(opened, "tag_v2", {}).get(_SAMPLES, 1) <= len(opened.getbands())


def read_array(file: bytes, max_pixels: int) -> np.ndarray | None:
    """Reads a file that holds an array of any channels, uint8 [H, W, C]; None for a picture.

    Raises:
      OSError: the file is broken or holds another array.
    """
    if file.startswith(NPY):
        return _read_npy(file, max_pixels)
    if file.startswith(_TIFF):
        try:
            open_file(file, max_pixels)
        except TooManyPixels:
            raise
        except OSError:
            return _read_tiff(file, max_pixels)[0]
    return None


def _read_npy(file: bytes, max_pixels: int) -> np.ndarray:
    """Reads the bytes of a .npy file, uint8 [H, W, C] or [H, W], without a copy."""
    stream = io.BytesIO(file)
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise OSError(f"the .npy file is of the unknown version {version[0]}.{version[1]}")
    shape, fortran, dtype = readers[version](stream)
    if len(shape) == 2:
        shape = (*shape, 1)
    if dtype != np.uint8 or len(shape) != 3 or min(shape) < 1:
        raise OSError(f"the array is {dtype} {list(shape)}: save uint8 [height, width, channels], from 0 to 255")
    values = memoryview(file)[stream.tell() :]
    if len(values) != math.prod(shape):
        raise OSError(f"the .npy file holds {len(values)} numbers, and its header says another number")
    check_size((shape[1], shape[0]), max_pixels)
    array = np.frombuffer(values, np.uint8)
    return array.reshape(shape[::-1]).transpose(2, 1, 0) if fortran else array.reshape(shape)


def _read_tiff(file: bytes, max_pixels: int) -> tuple[np.ndarray, int]:
    """Reads the first page of a TIFF that is no picture, uint8 [H, W, C], and its orientation."""
    library = _tifffile()
    try:
        return _first_page(library, file, max_pixels)
    except OSError:
        raise
    except Exception as error:  # whatever a damaged tag leads tifffile to
        raise OSError("the TIFF is damaged") from error


def _first_page(tifffile: ModuleType, file: bytes, max_pixels: int) -> tuple[np.ndarray, int]:
    with tifffile.TiffFile(io.BytesIO(file)) as tiff:
        page = tiff.pages.first
        sides = dict(zip(page.axes, page.shape, strict=True))
        if sides.keys() != {"Y", "X", "S"}:
            raise OSError("the TIFF is of another kind: save height, width and channels")
        if page.dtype != np.uint8 or page.bitspersample != 8 or page.photometric not in (1, 2):
            raise OSError("the numbers of the TIFF are not of 8 bits, from 0 to 255: save them so")
        # Four channels are what a pixel of a picture takes.
        check_size((sides["X"], sides["Y"] * -(-sides["S"] // 4)), max_pixels)
        if len(page.databytecounts) != math.prod(page.chunked) or not all(page.databytecounts):
            raise OSError("the TIFF has fewer pixels than its header says")
        if page.compression in _INFLATED:
            for start, count in zip(page.dataoffsets, page.databytecounts, strict=True):
                # tifffile would inflate without a limit.
                inflate = zlib.decompressobj()
                inflate.decompress(file[start : start + count], math.prod(page.chunks) + 1)
                if inflate.unconsumed_tail:
                    raise OSError("a part of the TIFF has more pixels than its header says")
        elif page.compression != _PLAIN:
            raise OSError(f"the TIFF is compressed with {page.compression.name}: save it uncompressed, or with deflate")
        array = page.asarray(maxworkers=1)
        tag = page.tags.get("Orientation")
    return np.moveaxis(array, page.axes.index("S"), 2), tag.value if tag is not None and tag.value in TURNS else 1


@functools.cache
def _tifffile() -> ModuleType:
    try:
        import tifffile
    except ImportError:
        raise OSError(
            "a TIFF of these channels is read by the library tifffile, the extra 'tiff' (pip install 'maxmap[tiff]')"
        ) from None
    codecs.lookup("cp1252")  # which it would import for the first odd text in a file
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what is wrong with a file comes as an exception
    return tifffile
