"""Damage to image files that Pillow does not tell, because it fills what is missing with black or grey."""

import re
import struct
import zlib

from PIL import Image
from PIL.ImageFile import ImageFile

_MOST_SCANS = (
    100  # of a JPEG, as libtiff has it; the usual progressive one has 10, and each takes a pass over the image
)
_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")  # one that starts a segment with a length, or ends all

# Warnings of libjpeg that mean that pixels are missing or wrong.
_JPEG_DAMAGE = re.compile(
    "premature end|bad Huffman|bad arithmetic|instead of RST|before marker 0xd[0-7]|Inconsistent progression", re.I
)
# First pixel and step of the seven passes of an interlaced PNG, in x and in y.
_ADAM7 = ((0, 8, 0, 8), (4, 8, 0, 8), (0, 4, 4, 8), (2, 4, 0, 4), (0, 2, 2, 4), (1, 2, 0, 2), (0, 1, 1, 2))
_JPEG_SIZE = re.compile(rb"\xff[\xc0-\xc2]..\x08..(..)", re.DOTALL)  # the width in the start of a frame
_TIFF_SIZE, _TIFF_COMPRESSION, _TIFF_STRIPS, _TIFF_TILE_WIDTH, _TIFF_TILES = (256, 257), 259, 273, 322, 324  # tags
_INFLATED = 1 << 20  # bytes of a PNG that are inflated at a time
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by the colour type


def check_scans(jpeg: bytes) -> None:
    """Raises OSError for a JPEG of so many scans that it can only be meant to take time."""
    if jpeg.count(b"\xff\xda") <= _MOST_SCANS:
        return
    scans = position = 0
    # Metadata may hold the same two bytes, so count exactly: skip each segment by the length that it states.
    while marker := _JPEG_MARKER.search(jpeg, position):
        scans += marker[1] == b"\xda"
        if marker[1] == b"\xd9" or marker.end() + 2 > len(jpeg):
            break
        position = marker.end() + max(2, struct.unpack_from(">H", jpeg, marker.end())[0])
        if scans > _MOST_SCANS:
            raise OSError(f"the JPEG has more than {_MOST_SCANS} scans")


def refuse_damaged_jpeg(error: ValueError) -> None:
    """Raises OSError if simplejpeg's error means missing pixels, which Pillow would fill with grey."""
    if _JPEG_DAMAGE.search(str(error)):
        raise OSError(f"the JPEG is damaged: {error}") from error


def check_pixels(file: bytes, image: Image.Image) -> None:
    """Raises OSError if Pillow decoded an image of which pixels are missing.

    Args:
      file: its bytes.
      image: as Pillow decoded it, before any conversion.
    """
    if image.format == "PNG":
        # Missing rows are zero. Only an image that ends in zeros takes the time to look.
        last = image.crop((0, image.height - 1, image.width, image.height))
        if (image.info.get("interlace") or not any(last.tobytes())) and not _png_is_whole(file):
            raise OSError("the PNG has fewer pixels than its header says")
    elif image.format == "JPEG2000" and not _jpeg2000_is_whole(file):
        raise OSError("the JPEG 2000 has fewer tiles than its header says")


def check_strips(file: bytes, opened: ImageFile) -> None:
    """Raises OSError if the strips or tiles of a TIFF, not yet decoded, do not cover it."""
    if opened.format != "TIFF":
        return
    boxes = [box for _, box, _, _ in opened.tile if box is not None]
    tags = getattr(opened, "tag_v2", {})
    size = [tags[tag] for tag in _TIFF_SIZE]  # as it is stored; Pillow's size is that of the upright image
    covered = all(max((box[2 + axis] for box in boxes), default=0) >= size[axis] for axis in (0, 1))
    if tags.get(_TIFF_COMPRESSION) == 7:  # JPEG, with a header of its own in every strip
        wanted = tags.get(_TIFF_TILE_WIDTH, size[0])
        for offset in tags.get(_TIFF_STRIPS, tags.get(_TIFF_TILES, ())):
            header = _JPEG_SIZE.search(file, offset)
            covered &= header is not None and int.from_bytes(header[1]) >= wanted
    if not covered:
        raise OSError("the TIFF has fewer pixels than its header says")


def _png_is_whole(file: bytes) -> bool:
    width, height, bits, color, _, _, interlaced = struct.unpack_from(">IIBBBBB", file, 16)
    bits *= _PNG_CHANNELS[color]
    passes = _ADAM7 if interlaced else ((0, 1, 0, 1),)
    needed = 0
    for left, step_x, top, step_y in passes:
        columns, rows = -(-(width - left) // step_x), -(-(height - top) // step_y)
        needed += max(0, rows) * (1 + -(-columns * bits // 8)) if columns > 0 else 0
    inflate, position, found = zlib.decompressobj(), 8, 0
    while position + 8 <= len(file) and found < needed:
        length, name = struct.unpack_from(">I4s", file, position)
        if name == b"IDAT":
            data = file[position + 8 : position + 8 + length]
            while found < needed:
                part = inflate.decompress(data, _INFLATED)
                found, data = found + len(part), inflate.unconsumed_tail
                if not data and len(part) < _INFLATED:
                    break
        position += 12 + length
    return found >= needed


def _jpeg2000_is_whole(file: bytes) -> bool:
    """Whether there is a tile part for every tile; the markers are those of ISO/IEC 15444-1, annex A."""
    start = file.find(b"\xff\x4f\xff\x51")
    width, height, _, _, tile_width, tile_height, tile_left, tile_top = struct.unpack_from(">8I", file, start + 8)
    if not (tile_width and tile_height):
        return False
    tiles = -(-(width - tile_left) // tile_width) * -(-(height - tile_top) // tile_height)
    found, position = set(), file.find(b"\xff\x90\x00\x0a", start)
    while position >= 0 and file[position : position + 4] == b"\xff\x90\x00\x0a" and position + 12 <= len(file):
        tile, length = struct.unpack_from(">HI", file, position + 4)
        found.add(tile)
        position = position + length if length else len(file)  # 0: up to the end
    return len(found) >= tiles
