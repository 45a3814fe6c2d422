"""Decodes an image file and crops it as torchvision and timm do: from bytes to the uint8 image that a network sees.

JPEGs are decoded with simplejpeg, which gives PIL's pixels in less time and tells where they are damaged. PIL decodes
the rest. Evaluation resizes with PIL, so it gives exactly PIL's pixels. Training resizes with cykooz.resizer, which has
PIL's filters in SIMD and rounds some values to the next grey level.
"""

import concurrent.futures
import math
import os
import threading
from collections.abc import Sequence

import numpy as np
from PIL import Image

from maxmap.data.bands import open_bands, read_array
from maxmap.data.images import MAX_PIXELS, TURNS, broken_is_oserror, open_image, plain_rgb
from maxmap.data.labelled import ImageSource
from maxmap.errors import UserError, nearest, printable, reason
from maxmap.pictures import shown

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
CROP_MODES = ("center", "squash", "border")
_MOST_RESIZED = 1 << 24  # pixels that an evaluation resize makes before it crops; only very long images exceed this

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


def decode(
    image: bytes | np.ndarray, *, exif: bool = False, max_pixels: int = MAX_PIXELS, smallest: int | None = None
) -> Image.Image:
    """Decodes an image file, or wraps an array, as an 8-bit RGB image.

    It does what torchvision and timm do with PIL. CMYK, palette, grey and transparent images are converted to RGB
    without their transparency. The first frame of an animation counts.

    16-bit grey images are an exception: PIL clips their values to 255, which leaves them nearly white. Here they keep
    their high byte, as PIL itself does for 16-bit RGB. Grey values of other types are refused, because PIL clips them
    too: 32 bits, floating point, 12 bits in a TIFF.

    An array of other channels, in a .npy file or a TIFF, gives the first three of them, or the first as grey.

    Args:
      image: the bytes of a file, or uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].
      exif: whether to turn the image as its EXIF orientation says. The published networks were trained and tested
        without that. PIL turns a TIFF in any case.
      max_pixels: an image with more pixels is refused.
      smallest: pixels of a side down to which a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size; None: full size.

    Returns:
      The image in mode RGB.

    Raises:
      OSError: the image is truncated, damaged, too large, of unknown format or of grey values of unknown range.
    """
    with broken_is_oserror():
        array = read_array(image, max_pixels) if isinstance(image, bytes) else None
        if array is not None:
            return Image.fromarray(np.ascontiguousarray(shown(array)))
        opened = open_image(image, exif=exif, max_pixels=max_pixels)
        pixels, _ = opened.decode(1 if smallest is None else min(opened.size) // smallest)
        return plain_rgb(_turned(pixels, opened.orientation))


def train_crop(
    image: bytes | np.ndarray,
    rng: np.random.Generator,
    *,
    size: int,
    channels: int = 3,
    scale: Sequence[float] = (0.08, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
    interpolation: str = "random",
    draft: bool = True,
    exif: bool = False,
    max_pixels: int = MAX_PIXELS,
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
      channels: of the output; see `maxmap.data.bands.open_bands`.
      scale: range of the crop's area as a fraction of the image's.
      ratio: range of the crop's width / height.
      interpolation: a key of `FILTERS`, or 'random': bilinear or bicubic, drawn per image as timm does.
      draft: whether large JPEGs may be decoded at a reduced size.
      exif: see `decode`; the crop is that of the turned image.
      max_pixels: see `decode`.

    Returns:
      uint8 [size, size, channels].

    Raises:
      OSError: see `decode`.
    """
    with broken_is_oserror():
        opened = open_bands(image, channels=channels, exif=exif, max_pixels=max_pixels)
        full_width, full_height = opened.size if opened.orientation < 5 else opened.size[::-1]
        left, top, width, height = random_box(full_width, full_height, rng, scale, ratio)
        resample = draw_filter(interpolation, rng)
        bands, shrink = opened.decode(min(width, height) // size if draft else 1)
        x, y = left / shrink, top / shrink
        if opened.orientation in TURNS:
            _, (x_runs_back, y_runs_back) = TURNS[opened.orientation]
            bands = [_turned(band, opened.orientation) for band in bands]
            # A reduced image has a part of a pixel at its end, which comes first where an axis is reversed.
            x += (bands[0].width - full_width / shrink) * x_runs_back
            y += (bands[0].height - full_height / shrink) * y_runs_back
        box = (x, y, x + width / shrink, y + height / shrink)
        return _stacked([resized_box(band, (size, size), resample, box) for band in bands], channels)


def draw_filter(interpolation: str, rng: np.random.Generator) -> Image.Resampling:
    """Returns a filter by its name; 'random' draws bilinear or bicubic."""
    if interpolation == "random":
        interpolation = "bicubic" if rng.random() < 0.5 else "bilinear"
    return FILTERS[interpolation]


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
    image: bytes | np.ndarray | Image.Image,
    *,
    size: int,
    crop_pct: float,
    mode: str,
    interpolation: str,
    mean: Sequence[float],
    exif: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Decodes, resizes and crops an image for evaluation, equal to timm's evaluation transform to the grey level.

    Args:
      image: see `decode`.
      size: side of the output in pixels.
      crop_pct: part of the resized side that the crop keeps; the image is resized to floor(size / crop_pct).
      mode: which side is resized to that: 'center' the shorter, 'squash' both, 'border' the longer. Then the centre is
        cropped; what lies outside the image is black or, for 'border', of the mean colour.
      interpolation: a key of `FILTERS`.
      mean: of each channel in 0..1; as many values as the output has channels, and for 'border' the colour.
      exif: see `decode`.
      max_pixels: see `decode`.

    Returns:
      uint8 [size, size, channels].

    Raises:
      OSError: see `decode`.
    """
    channels = len(mean)
    fill = tuple(round(255 * value) if mode == "border" else 0 for value in mean)
    with broken_is_oserror():
        opened = open_bands(image, channels=channels, exif=exif, max_pixels=max_pixels)
        bands = [_turned(band, opened.orientation) for band in opened.decode(1)[0]]
        resized = eval_size(bands[0].width, bands[0].height, math.floor(size / crop_pct), mode)
        fills: Sequence[float | tuple[int, ...]] = [fill] if channels == 3 else fill
        crops = [
            _resized_center(band, resized, size, FILTERS[interpolation], outside)
            for band, outside in zip(bands, fills, strict=True)
        ]
        return _stacked(crops, channels)


def check_images(source: ImageSource, limit: int, channels: int, max_pixels: int = MAX_PIXELS) -> None:
    """Decodes up to `limit` images, evenly distributed over the source, on a thread pool.

    Args:
      source: the images.
      limit: how many to decode at most.
      channels: that a network is to see.
      max_pixels: see `decode`.

    Raises:
      UserError: some are broken; the message counts them, names the first three and says what is wrong with the first.
    """
    chosen = np.unique(np.linspace(0, len(source) - 1, min(limit, len(source))).round().astype(np.int64))

    def fault(index: np.int64) -> str | None:
        try:
            with broken_is_oserror():
                opened = open_bands(source[int(index)].image, channels=channels, exif=False, max_pixels=max_pixels)
                opened.decode(8)  # still reads the whole file, but computes a 64th of the pixels of a JPEG
        except OSError as error:
            return reason(error)
        return None

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        faults = {int(index): text for index, text in zip(chosen, pool.map(fault, chosen), strict=True) if text}
    if faults:
        first, *others = list(faults)[:3]
        names = [f"{printable(source.name(first))} ({faults[first]})", *(printable(source.name(i)) for i in others)]
        named = ", ".join(names)
        raise UserError(
            f"{len(faults)} of the {len(chosen)} images checked are broken or cut off: {named}"
            f"{', ...' if len(faults) > 3 else ''}; remove or replace them, or skip this check with "
            "--config.data.check=0, or --check=0 of `validate`: broken files are then left out and counted."
        )


def check_filter(name: str, option: str, extra: Sequence[str] = ()) -> None:
    """Raises UserError unless `name` is in FILTERS or in `extra`; `option` is what the user sets it with."""
    known = (*FILTERS, *extra)
    if name not in known:
        raise UserError(
            f"unknown interpolation {name!r} ({option}): did you mean {nearest(name, known, 1)!r}? "
            f"Known are {', '.join(known)}."
        )


def resized_box(
    image: Image.Image, size: tuple[int, int], resample: Image.Resampling, box: tuple[float, float, float, float]
) -> Image.Image:
    """Resizes a box (left, top, right, bottom) of a decoded image to `size`, (width, height)."""
    if resample in SIMD_FILTERS:
        if not hasattr(_THREAD, "resizer"):
            _THREAD.resizer = simd.Resizer()
        left, top, right, bottom = box
        crop = simd.CropBox(left, top, right - left, bottom - top)
        resized = Image.new(image.mode, size, None)
        _THREAD.resizer.resize_pil(image, resized, simd.ResizeOptions(SIMD_FILTERS[resample], crop_box=crop))
    else:
        resized = image.resize(size, resample, box=box)
    return resized


def _stacked(bands: Sequence[Image.Image], channels: int) -> np.ndarray:
    """Returns the bands of an image as uint8 [H, W, channels]; see `OpenedBands.decode`."""
    if channels == 3:
        return np.asarray(plain_rgb(bands[0]))
    return np.stack([np.asarray(band) for band in bands], axis=-1)


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    """Turns an image as an EXIF orientation says."""
    return image.transpose(TURNS[orientation][0]) if orientation in TURNS else image


def eval_size(width: int, height: int, side: int, mode: str) -> tuple[int, int]:
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


def _resized_center(
    image: Image.Image, resized: tuple[int, int], size: int, resample: Image.Resampling, fill: float | tuple[int, ...]
) -> Image.Image:
    """Resizes an image of `OpenedBands.decode` to `resized`, (width, height), and crops the central square."""
    if math.prod(resized) <= _MOST_RESIZED:
        return _center_crop(image.resize(resized, resample), size, fill)
    # A very long image: resize only what the crop keeps. The pixels are the same up to the rounding of the box.
    kept = [min(side, size) for side in resized]
    scale_x, scale_y = image.width / resized[0], image.height / resized[1]
    left, top = (offset(side, size) if keep == size else 0 for side, keep in zip(resized, kept, strict=True))
    box = (left * scale_x, top * scale_y, (left + kept[0]) * scale_x, (top + kept[1]) * scale_y)
    box = (*box[:2], min(box[2], image.width), min(box[3], image.height))
    return _center_crop(image.resize((kept[0], kept[1]), resample, box=box), size, fill)


def _center_crop(image: Image.Image, size: int, fill: float | tuple[int, ...]) -> Image.Image:
    if isinstance(fill, tuple):
        image = plain_rgb(image)
    left, top = offset(image.width, size), offset(image.height, size)
    if image.width >= size and image.height >= size:
        return image.crop((left, top, left + size, top + size))
    canvas = Image.new(image.mode, (size, size), fill)
    canvas.paste(image, (-left, -top))
    return canvas


def offset(side: int, size: int) -> int:
    """Returns the first pixel of a central crop, negative where it is larger than the side.

    As in torchvision, it rounds half to even, and padding down.
    """
    return round((side - size) / 2) if side >= size else -((size - side) // 2)
