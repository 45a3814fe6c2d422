"""Images in all formats that are read, cropped for evaluation and for training."""

import functools
import io
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from maxmap.check.contents import Contents
from maxmap.check.findings import examine
from maxmap.check.page import draw
from maxmap.data.decode import IMAGENET_MEAN, IMAGENET_STD, train_crop
from maxmap.data.inspection import inspect
from maxmap.data.preprocessing import cropped
from maxmap.errors import UserError, reason
from tests.fuzz.changes import spoil
from tests.fuzz.rows import Files, Made, Row

FILE = "photo.jpg"  # whatever is in it: the content decides, and not the name
SIZE = 16
PREPROCESSING = {
    "image_size": SIZE,
    "crop_pct": 0.9,
    "crop_mode": "center",
    "interpolation": "bicubic",
    "mean": IMAGENET_MEAN,
    "std": IMAGENET_STD,
    "exif": True,
}


def with_size(file: bytes, format: str, width: int, height: int) -> bytes:
    """An image whose header states another size."""
    data = bytearray(file)
    if format == "PNG":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif format == "JPEG2000":
        at = data.index(b"ihdr") + 4
        data[at : at + 8] = struct.pack(">II", height, width)
        at = data.index(b"\xff\x51") + 6
        data[at : at + 8] = struct.pack(">II", width, height)
    elif format == "JPEG":
        at = max(data.find(marker) for marker in (b"\xff\xc0", b"\xff\xc1", b"\xff\xc2")) + 5
        data[at : at + 4] = struct.pack(">HH", height & 0xFFFF, width & 0xFFFF)
    elif format == "BMP":
        data[18:26] = struct.pack("<II", width & 0xFFFFFFFF, height & 0xFFFFFFFF)
    elif format == "GIF":
        at = data.index(b",\0\0\0\0") + 5
        for place in (6, at):
            data[place : place + 4] = struct.pack("<HH", width & 0xFFFF, height & 0xFFFF)
    elif format == "PPM":
        magic, _, _, rest = bytes(data).split(None, 3)
        return b"%b\n%d %d\n%b" % (magic, width, height, rest)
    elif format == "TIFF":
        for tag, value in ((256, width), (257, height)):
            entries = [at for at in range(8, len(data) - 12) if data[at : at + 2] == struct.pack("<H", tag)]
            at = next(at for at in entries if data[at + 4 : at + 8] == struct.pack("<L", 1))
            data[at + 2 : at + 12] = struct.pack("<HLL", 4, 1, value & 0xFFFFFFFF)
    return bytes(data)


def chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, bits: int, colour: int, data: bytes, *more: bytes) -> bytes:
    """A PNG of any size and kind; `data` are its rows."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def zeros(width: int, height: int, bits: int, colour: int) -> bytes:
    """A PNG of zeros, made without its pixels ever being in memory."""
    packer, row = zlib.compressobj(), bytes(1 + width * bits // 8)
    rows = b"".join([packer.compress(row) for _ in range(height)] + [packer.flush()])
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def scans(count: int, side: int = 2000) -> bytes:
    """A progressive JPEG with the same scan again and again; each takes a pass over the image."""
    from PIL import Image

    Image.new("RGB", (side, side), "gray").save(file := io.BytesIO(), "JPEG", progressive=True)
    data = file.getvalue()
    start = data.index(b"\xff\xda")
    end = data.index(b"\xff", start + 14)
    return data[:start] + data[start:end] * count + data[start:]


@functools.cache
def pictures() -> dict[str, bytes]:
    """A small image in every format and kind; the first word of a name is Pillow's format."""
    from PIL import Image

    waves = np.add.outer(np.arange(40) * 3.7, np.arange(48) * 2.3)[..., None] + np.array([0, 40, 90])
    photo = Image.fromarray((127 + 120 * np.sin(waves / 9)).astype(np.uint8))
    exif = Image.Exif()
    exif[274] = 6  # turned by 90 degrees
    deep = Image.fromarray((np.asarray(photo)[..., 0].astype(np.uint16) << 8) + 7)
    kinds = {
        "JPEG": (photo, {"exif": exif}),
        "JPEG progressive": (photo, {"progressive": True, "restart_marker_blocks": 2}),
        "JPEG grey": (photo.convert("L"), {}),
        "JPEG CMYK": (photo.convert("CMYK"), {}),
        "PNG": (photo, {"exif": exif}),
        "PNG RGBA": (photo.convert("RGBA"), {}),
        "PNG palette": (photo.quantize(16), {"transparency": 3}),
        "PNG 16 bits": (deep, {}),
        "PNG bits": (photo.convert("1"), {}),
        "WEBP": (photo, {"exif": exif}),
        "WEBP lossless": (photo.convert("RGBA"), {"lossless": True}),
        "AVIF": (photo, {}),
        "GIF": (photo, {"save_all": True, "append_images": [photo.rotate(90)], "interlace": 1}),
        "BMP": (photo, {}),
        "BMP palette": (photo.quantize(16), {}),
        "TIFF": (photo, {}),
        "TIFF lzw": (photo, {"compression": "tiff_lzw", "exif": exif}),
        "TIFF jpeg": (photo, {"compression": "jpeg"}),
        "TIFF deflate": (deep, {"compression": "tiff_deflate"}),
        "TIFF lab": (Image.merge("LAB", photo.split()), {}),  # for which Pillow loads its library of colours
        "TIFF fax": (photo.convert("1"), {"compression": "group4"}),
        "PPM": (photo, {}),
        "PPM grey": (photo.convert("L"), {}),
        "JPEG2000": (photo, {}),
        "JPEG2000 tiles": (photo, {"tile_size": (16, 16), "irreversible": True}),
    }
    files = {}
    for name, (image, options) in kinds.items():
        image.save(file := io.BytesIO(), name.split()[0], **options)
        files[name] = file.getvalue()
    return files


def _valid() -> list[Files]:
    return [{FILE: data} for data in pictures().values()]


def _format(data: bytes) -> str:
    signatures = {b"\xff\xd8": "JPEG", b"\x89PNG": "PNG", b"GIF8": "GIF", b"BM": "BMP", b"II*\0": "TIFF"}
    signatures |= {b"\0\0\0\x0c": "JPEG2000", b"P4": "PPM", b"P5": "PPM", b"P6": "PPM"}
    return next((name for start, name in signatures.items() if data.startswith(start)), "")


def _spoil(files: Files, rng: random.Random) -> Files:
    data, kind = files[FILE], _format(files[FILE])
    how = rng.random()
    if how < 0.25 and kind:
        sides = (0, 1, 2, 47, 49, 64, 1000, 9000, 13_000, 65_535, 100_000, 2**31 - 1, 2**32 - 1)
        data = with_size(data, kind, rng.choice((48, *sides)), rng.choice((40, *sides)))
        return {FILE: data if rng.random() < 0.7 else spoil(data, rng)}
    if how < 0.45 and kind == "PNG":
        return {FILE: spoil_chunks(data, rng)}
    if how < 0.45 and kind == "TIFF":
        return {FILE: spoil_tags(data, rng)}
    return {FILE: spoil(data, rng)}


def spoil_chunks(data: bytes, rng: random.Random) -> bytes:
    """Changes, repeats, removes or moves chunks, whose checksums are made again."""
    chunks, at = [], 8
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    which = rng.randrange(len(chunks))
    name, content = chunks[which]
    change = rng.randrange(4)
    if change == 0:
        chunks[which] = name, spoil(content, rng)
    elif change == 1:
        chunks[which:which] = [(name, content)] * rng.choice((1, 50))
    elif change == 2:
        del chunks[which]
    else:
        other = rng.choice((b"tEXt", b"zTXt", b"iCCP", b"eXIf", b"acTL", b"fcTL", b"tRNS", b"PLTE"))
        chunks.insert(which, (other, rng.randbytes(40)))
    return data[:8] + b"".join(chunk(*parts) for parts in chunks)


def spoil_tags(data: bytes, rng: random.Random) -> bytes:
    """Changes the type, the count or the value of a tag of a TIFF."""
    start = int.from_bytes(data[4:8], "little")
    count = int.from_bytes(data[start : start + 2], "little")
    at = start + 2 + 12 * rng.randrange(max(1, count)) + rng.choice((2, 4, 8))
    value = rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 32773, 65535, 2**24, 2**31, 2**32 - 1, len(data), start))
    return data[:at] + value.to_bytes(4, "little")[: 2 if at % 12 == (start + 4) % 12 else 4] + data[at + 4 :]


def _file(make: Callable[..., bytes], *arguments: Any) -> Made:
    """What makes a large picture when it is needed."""
    return functools.partial(_made, make, arguments)


def _made(make: Callable[..., bytes], arguments: tuple[Any, ...]) -> Files:
    return {FILE: make(*arguments)}


def _hostile() -> dict[str, Made]:
    from PIL import Image

    small = Image.new("RGB", (32, 32), "red")
    files: dict[str, bytes] = {}
    for kind in ("EPS", "PDF", "ICO", "TGA", "PCX", "SGI", "ICNS", "IM", "MSP", "SPIDER", "XBM"):
        image = small.convert({"MSP": "1", "XBM": "1", "SPIDER": "F"}.get(kind, "RGB"))
        image.save(file := io.BytesIO(), kind)
        files[f"{kind} named .jpg"] = file.getvalue()
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%true) (w) file\n"
    files["a program of PostScript"] = program
    for name, data in pictures().items():
        kind = name.split()[0]
        if kind in ("PNG", "JPEG", "JPEG2000", "TIFF", "PPM"):
            files[f"{name} of 9,000 x 9,000"] = with_size(data, kind, 9000, 9000)
            files[f"{name} of 60,000 x 60,000"] = with_size(data, kind, 60_000, 60_000)
    files["a PNG of 2^31 x 2^31"] = png(2**31 - 1, 2**31 - 1, 8, 2, bytes(100))
    files["SVG"] = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    files["nothing"] = b""
    large = {"2,000 scans": _file(scans, 2000), "a PNG of 14,000 x 14,000": _file(zeros, 14_000, 14_000, 8, 0)}
    return {**{name: {FILE: data} for name, data in files.items()}, **large}


def _unpacked(name: bytes) -> bytes:
    """A PNG with a chunk that unpacks to 200 MB."""
    return png(1, 1, 8, 0, b"\0\0", chunk(name, b"a\0\0" + zlib.compress(bytes(200 << 20))))


def _odd() -> dict[str, Made]:
    return {
        "a PNG of 1 x 1,000,000": _file(zeros, 1, 1_000_000, 8, 0),
        "a PNG of 1,000,000 x 1": _file(zeros, 1_000_000, 1, 8, 0),
        "a PNG of 13,000 x 13,000 with 16 bits": _file(zeros, 13_000, 13_000, 16, 0),
        "a PNG of 13,000 x 13,000 with a palette": _file(zeros, 13_000, 13_000, 8, 3),
        "90 scans": _file(scans, 90, 1000),
        "a PNG with 200 MB of text": _file(_unpacked, b"zTXt"),
        "a PNG with 200 MB of a profile": _file(_unpacked, b"iCCP"),
    }


def read(folder: Path) -> Any:
    """The crops of evaluation and of training; a loader counts and names what `train_crop` refuses."""
    evaluated = cropped(folder / FILE, PREPROCESSING)
    try:
        trained = train_crop((folder / FILE).read_bytes(), np.random.default_rng(0), size=SIZE, exif=True)
    except OSError as error:
        raise UserError(f"{FILE} is left out ({reason(error)}).") from error
    return evaluated, trained


def look(folder: Path) -> Any:
    """What `maxmap check` finds of an image, and the page that it draws; it counts and names what it cannot read."""
    one = np.zeros(1, np.int32)
    contents = Contents(str(folder), [""], [str(folder)], ["."], [FILE], one, one, [], [])
    found = inspect(contents.path(0))
    page = draw(examine(contents, [found], distance=4, tiny=32))
    if found.fault:
        raise UserError(f"{FILE} is broken ({found.fault}).")
    assert "data:image/" in page
    return list(found)


ROWS = (
    Row(
        "images, what check says of them",
        ("maxmap.data.inspection", "maxmap.check.page"),
        1000,
        _valid,
        _spoil,
        look,
        _hostile,
        _odd,
    ),
    Row(
        "images, nine formats, evaluation and training",
        ("maxmap.data.images", "maxmap.data.damage", "maxmap.data.decode", "maxmap.data.preprocessing"),
        4000,
        _valid,
        _spoil,
        read,
        _hostile,
        _odd,
    ),
)
