"""Decodes an image file and crops it as torchvision and timm do: from bytes to the uint8 image that a network sees.

Evaluation gives exactly PIL's pixels. Training decodes JPEGs with simplejpeg, which gives PIL's pixels in less time.
It resizes with cykooz.resizer, which has PIL's filters in SIMD and rounds some values to the next grey level. PIL does
the rest.
"""

import concurrent.futures
import contextlib
import io
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import simplejpeg
from PIL import Image

from maxmap.data.sources import ImageSource
from maxmap.errors import UserError, nearest, printable

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
CROP_MODES = ("center", "squash", "border")

# Of ImageNet's colours in 0..1, per channel: most published networks were trained with these.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

try:
    import cykooz_resizer as simd
except ImportError:  # no wheel for Linux on ARM: PIL resizes
    SIMD_FILTERS = {}
else:
    SIMD_FILTERS = {
        FILTERS["bilinear"]: simd.ResizeAlg.convolution(simd.FilterType.bilinear),
        FILTERS["bicubic"]: simd.ResizeAlg.convolution(simd.FilterType.catmull_rom),
        FILTERS["lanczos"]: simd.ResizeAlg.convolution(simd.FilterType.lanczos3),
    }
_THREAD = threading.local()  # each thread has a resizer of its own, because a resizer locks itself while it works


def decode(image: bytes | np.ndarray) -> Image.Image:
    """Decodes an image file, or wraps an array, as an 8-bit RGB image.

    It does what torchvision and timm do with PIL. CMYK, palette, grey and transparent images are converted to RGB
    without their transparency. The first frame of an animation counts. The EXIF orientation is *not* applied, because
    the published networks were trained and tested without it.

    16-bit grey images are an exception: PIL clips their values to 255, which leaves them nearly white. Here they keep
    their high byte, as PIL itself does for 16-bit RGB.

    Args:
      image: the bytes of a file, or uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].

    Returns:
      The image in mode RGB.

    Raises:
      OSError: the image is truncated, broken, of unknown format, or so large that PIL takes it for an attack.
    """
    with _broken_is_oserror():
        return _rgb(_open(image))


def train_crop(
    image: bytes | np.ndarray,
    rng: np.random.Generator,
    *,
    size: int,
    scale: Sequence[float] = (0.08, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
    interpolation: str = "random",
    draft: bool = True,
) -> np.ndarray:
    """Decodes an image and resizes a random crop of it: the Inception crop (Szegedy et al., 2015), as torchvision's.

    It differs from torchvision in three ways, none of which moves the crop:

    - The resize takes the box directly, so its filter sees the pixels next to the crop. torchvision repeats the edge.
    - The resize rounds some values to another grey level than PIL's does.
    - With `draft`, a JPEG whose crop is at least 2, 4 or 8 times as large as the output is decoded at 1/2, 1/4 or 1/8
      of its size (libjpeg's scaled decoding, PIL's `draft`). So the decoded crop is never smaller than the output.
      Without it all pixels are decoded, which takes up to twice the time for large photographs.

    Args:
      image: see `decode`.
      rng: the source of all randomness.
      size: side of the output in pixels.
      scale: range of the crop's area as a fraction of the image's.
      ratio: range of the crop's width / height.
      interpolation: a key of `FILTERS`, or 'random': bilinear or bicubic, drawn per image as timm does.
      draft: whether large JPEGs may be decoded at a reduced size.

    Returns:
      uint8 [size, size, 3].

    Raises:
      OSError: see `decode`.
    """
    with _broken_is_oserror():
        (full_width, full_height), load = _train_pixels(image)
        left, top, width, height = random_box(full_width, full_height, rng, scale, ratio)
        if interpolation == "random":
            resample = FILTERS["bicubic" if rng.random() < 0.5 else "bilinear"]
        else:
            resample = FILTERS[interpolation]
        pixels, shrink = load(min(width, height) // size if draft else 1)
        box = (left / shrink, top / shrink, (left + width) / shrink, (top + height) / shrink)
        return np.asarray(_resized(pixels, size, resample, box))


def random_box(
    width: int, height: int, rng: np.random.Generator, scale: Sequence[float], ratio: Sequence[float]
) -> tuple[int, int, int, int]:
    """Draws the box (left, top, width, height) of a random crop with the semantics of torchvision's RandomResizedCrop.

    The area is uniform in `scale`, the aspect ratio log-uniform in `ratio`. If ten boxes in a row do not fit, the
    result is the largest central box whose aspect ratio is within `ratio`.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(low + (high - low) * rng.random())
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return left, top, w, h
    w, h = width, height
    # At least one pixel: an image one pixel wide may be too long for any such box, and torchvision fails there.
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    return (width - w) // 2, (height - h) // 2, w, h


def eval_crop(
    image: bytes | np.ndarray,
    *,
    size: int,
    crop_pct: float,
    mode: str,
    interpolation: str,
    mean: Sequence[float],
) -> np.ndarray:
    """Decodes, resizes and crops an image for evaluation, equal to timm's evaluation transform to the grey level.

    Args:
      image: see `decode`.
      size: side of the output in pixels.
      crop_pct: part of the resized side that the crop keeps; the image is resized to floor(size / crop_pct).
      mode: which side is resized to that: 'center' the shorter, 'squash' both, 'border' the longer. Then the centre is
        cropped; what lies outside the image is black or, for 'border', of the mean colour.
      interpolation: a key of `FILTERS`.
      mean: the mean colour in 0..1, for 'border'.

    Returns:
      uint8 [size, size, 3].

    Raises:
      OSError: see `decode`.
    """
    rgb = decode(image)
    resized = _eval_size(rgb.width, rgb.height, math.floor(size / crop_pct), mode)
    fill = tuple(round(255 * value) for value in mean) if mode == "border" else (0, 0, 0)
    with _broken_is_oserror():
        return np.asarray(_center_crop(rgb.resize(resized, FILTERS[interpolation]), size, fill))


def check_images(source: ImageSource, limit: int) -> None:
    """Decodes up to `limit` images, evenly distributed over the source, on a thread pool.

    Args:
      source: the images.
      limit: how many to decode at most.

    Raises:
      UserError: some are broken; the message counts them and names the first.
    """
    chosen = np.unique(np.linspace(0, len(source) - 1, min(limit, len(source))).round().astype(np.int64))

    def is_broken(index: np.int64) -> bool:
        try:
            with _broken_is_oserror():
                opened = _open(source[int(index)].image)
                _draft(opened, 8)  # still reads the whole file, but computes a 64th of the pixels
                opened.load()
        except OSError:
            return True
        return False

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        broken = chosen[np.fromiter(pool.map(is_broken, chosen), bool, len(chosen))]
    if len(broken):
        named = ", ".join(printable(source.name(int(index))) for index in broken[:3])
        raise UserError(
            f"{len(broken)} of the {len(chosen)} images checked are broken or cut off: {named}"
            f"{', ...' if len(broken) > 3 else ''}; remove or replace them, or skip this check with "
            "--config.data.check=0: training then leaves out and counts broken files."
        )


def check_filter(name: str, option: str, extra: Sequence[str] = ()) -> None:
    """Raises UserError unless `name` is in FILTERS or in `extra`; `option` is what the user sets it with."""
    known = (*FILTERS, *extra)
    if name not in known:
        raise UserError(
            f"unknown interpolation {name!r} ({option}): did you mean {nearest(name, known, 1)!r}? "
            f"Known are {', '.join(known)}."
        )


@contextlib.contextmanager
def _broken_is_oserror() -> Iterator[None]:
    """Turns into OSError what else PIL raises for broken files: SyntaxError, ValueError, struct.error and others."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"cannot decode the image: {error}") from error


def _open(image: bytes | np.ndarray) -> Image.Image:
    """Reads the header only; the pixels are decoded on first use."""
    if isinstance(image, np.ndarray):
        return Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image)
    return Image.open(io.BytesIO(image))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int32).clip(0, 65535) >> 8
        image = Image.fromarray(grey.astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours; straight to RGB, PIL warns
    return image.convert("RGB")


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


# Decodes an image. It takes the largest reduction allowed, and returns the pixels and the actual reduction.
_Load = Callable[[int], tuple[Image.Image, int]]


def _train_pixels(image: bytes | np.ndarray) -> tuple[tuple[int, int], _Load]:
    """Reads the header only; returns (width, height) and the function that decodes the pixels."""
    if isinstance(image, bytes) and image.startswith(b"\xff\xd8"):
        with contextlib.suppress(ValueError):
            height, width, colors, _ = simplejpeg.decode_jpeg_header(image)
            small = Image.MAX_IMAGE_PIXELS is None or width * height <= Image.MAX_IMAGE_PIXELS
            if small and colors not in ("CMYK", "YCCK"):
                return (width, height), partial(_load_jpeg, image, (width, height))
    opened = _open(image)
    return opened.size, partial(_load, opened)


def _load(opened: Image.Image, most: int) -> tuple[Image.Image, int]:
    shrink = _draft(opened, most)
    return _rgb(opened), shrink


def _load_jpeg(file: bytes, size: tuple[int, int], most: int) -> tuple[Image.Image, int]:
    """Decodes a JPEG of `size` (width, height) to PIL's pixels, and a fourth channel that has no meaning."""
    shrink = _shrink(size, most)
    width, height = (-(-side // shrink) for side in size)
    try:
        pixels = simplejpeg.decode_jpeg(file, "RGBX", min_width=width, min_height=height)
    except ValueError:  # PIL decodes some files that simplejpeg refuses
        return _load(_open(file), most)
    # PIL holds RGB in four bytes too, so four channels need no copy. It and the resizer treat all four alike in this
    # mode; that the pixels are not CMYK does not matter to them.
    return Image.frombuffer("CMYK", (width, height), pixels, "raw", "CMYK", 0, 1), shrink


def _resized(
    image: Image.Image, size: int, resample: Image.Resampling, box: tuple[float, float, float, float]
) -> Image.Image:
    """Resizes a box (left, top, right, bottom) of an image from `_load` or `_load_jpeg` to an RGB square."""
    if resample in SIMD_FILTERS:
        if not hasattr(_THREAD, "resizer"):
            _THREAD.resizer = simd.Resizer()
        left, top, right, bottom = box
        crop = simd.CropBox(left, top, right - left, bottom - top)
        resized = Image.new(image.mode, (size, size), None)
        _THREAD.resizer.resize_pil(image, resized, simd.ResizeOptions(SIMD_FILTERS[resample], crop_box=crop))
    else:
        resized = image.resize((size, size), resample, box=box)
    if resized.mode == "RGB":
        return resized
    return Image.frombytes("RGB", (size, size), resized.tobytes(), "raw", "RGBX")


def _eval_size(width: int, height: int, side: int, mode: str) -> tuple[int, int]:
    """Returns (width, height) after the resize, rounded as in torchvision ('center') and timm ('border')."""
    if mode == "squash":
        return side, side
    if mode == "border":
        shrink = max(width / side, height / side)
        # At least one pixel: timm rounds the shorter side of a very long image to 0 and then fails.
        return max(1, round(width / shrink)), max(1, round(height / shrink))
    if width <= height:
        return side, int(side * height / width)
    return int(side * width / height), side


def _center_crop(image: Image.Image, size: int, fill: tuple[int, ...]) -> Image.Image:
    left, top = _offset(image.width, size), _offset(image.height, size)
    if image.width >= size and image.height >= size:
        return image.crop((left, top, left + size, top + size))
    canvas = Image.new("RGB", (size, size), fill)
    canvas.paste(image, (-left, -top))
    return canvas


def _offset(side: int, size: int) -> int:
    """Returns the first pixel of a central crop; as in torchvision, it rounds half to even, and padding down."""
    return round((side - size) / 2) if side >= size else -((size - side) // 2)
