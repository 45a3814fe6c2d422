"""Decoding and cropping follow PIL, torchvision and timm, up to the departures that decode.py names."""

import io
import math
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from maxmap.data import decode as room
from maxmap.data import images
from maxmap.data.decode import FILTERS, check_filter, check_images, decode, eval_crop, random_box, train_crop
from maxmap.data.images import MAX_PIXELS, broken_is_oserror
from maxmap.data.sources import FolderSource
from maxmap.errors import UserError
from tests.fuzz.picture_rows import chunk, with_size
from tests.reference import import_timm

MEAN = (0.485, 0.456, 0.406)


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Returns random pixels with structure at every scale, so that a shift by one shows."""
    rng = np.random.default_rng(seed)
    waves = np.add.outer(np.arange(height) * 3.7, np.arange(width) * 2.3)[..., None]
    return (127 + 80 * np.sin(waves / 9) + rng.normal(0, 15, (height, width, channels))).clip(0, 255).astype(np.uint8)


def save(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


PHOTOS = [np.asarray(image) for image in load_sample_images().images]
IMAGES = [
    *PHOTOS,
    *(noise(*shape) for shape in [(57, 91), (300, 201), (33, 32), (8, 8), (1, 1), (225, 224), (12, 500)]),
]


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize(
    "size, crop_pct, interpolation",
    [(224, 0.875, "bicubic"), (224, 0.95, "bilinear"), (160, 1.0, "bicubic"), (33, 0.9, "lanczos"), (31, 1.2, "box")],
)
def test_eval_crop_equals_timm(mode, size, crop_pct, interpolation):
    timm = import_timm()
    transform = timm.data.create_transform(
        (3, size, size),
        is_training=False,
        use_prefetcher=True,  # uint8 out
        crop_pct=crop_pct,
        crop_mode=mode,
        interpolation=interpolation,
        mean=MEAN,
    )
    for image in IMAGES:
        wanted = transform(Image.fromarray(image)).numpy().transpose(1, 2, 0)
        crop = eval_crop(image, size=size, crop_pct=crop_pct, mode=mode, interpolation=interpolation, mean=MEAN)
        assert np.array_equal(crop, wanted), image.shape


def test_eval_crop_of_a_file_equals_timm():
    timm = import_timm()
    transform = timm.data.create_transform((3, 96, 96), use_prefetcher=True, interpolation="bicubic", crop_pct=0.875)
    for image in PHOTOS:
        file = save(Image.fromarray(image), "JPEG", quality=90)
        wanted = transform(Image.open(io.BytesIO(file)).convert("RGB")).numpy().transpose(1, 2, 0)
        crop = eval_crop(file, size=96, crop_pct=0.875, mode="center", interpolation="bicubic", mean=MEAN)
        assert np.array_equal(crop, wanted)


class Replay:
    """A torch-free stand-in for torchvision's draws: hands random_box the numbers that torchvision drew."""

    def __init__(self, uniform: list[float], integers: list[int]):
        self.uniform, self.drawn = uniform, integers

    def random(self) -> float:
        return self.uniform.pop(0)

    def integers(self, end: int) -> int:
        value = self.drawn.pop(0)
        assert 0 <= value < end
        return value


def test_random_box_is_torchvisions_for_the_same_draws(monkeypatch):
    import_timm()
    import torch
    from torchvision.transforms import RandomResizedCrop

    scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    logs = [math.log(value) for value in ratio]
    for seed in range(200):
        height, width = np.random.default_rng(seed).integers(1, 400, 2)
        uniform, integers = [], []
        draw, choose = torch.Tensor.uniform_, torch.randint

        def uniform_(self, low, high, draw=draw, uniform=uniform):
            value = draw(self, low, high)
            low, high = scale if len(uniform) % 2 == 0 else logs
            uniform.append((value.item() - low) / (high - low))
            return value

        def randint(*args, choose=choose, integers=integers, **kwargs):
            value = choose(*args, **kwargs)
            integers.append(value.item())
            return value

        torch.manual_seed(seed)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "uniform_", uniform_)
            patch.setattr(torch, "randint", randint)
            top, left, h, w = RandomResizedCrop.get_params(torch.empty(3, height, width), scale, ratio)
        replay = Replay(uniform, integers)
        assert random_box(width, height, replay, scale, ratio) == (left, top, w, h)
        assert not replay.uniform and not replay.drawn


@pytest.fixture
def pil_resizes(monkeypatch):
    """PIL resizes, as where there is no wheel of the faster resizer."""
    monkeypatch.setattr(room, "SIMD_FILTERS", {})


def test_train_crop_is_the_box_resized(pil_resizes):
    image = PHOTOS[0]
    left, top, width, height = random_box(640, 427, np.random.default_rng(5), (0.08, 1.0), (3 / 4, 4 / 3))
    box = (left, top, left + width, top + height)
    crop = train_crop(image, np.random.default_rng(5), size=48, interpolation="bilinear")
    wanted = Image.fromarray(image).resize((48, 48), Image.Resampling.BILINEAR, box=box)
    assert np.array_equal(crop, np.asarray(wanted))
    # torchvision crops first: the same but for the pixels at the edge.
    cropped = np.asarray(Image.fromarray(image).crop(box).resize((48, 48), Image.Resampling.BILINEAR), np.int32)
    assert np.array_equal(crop[4:-4, 4:-4], cropped[4:-4, 4:-4])


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("size", [31, 224, 300])
def test_the_faster_resizer_is_pils_but_for_rounding(interpolation, size, request):
    """Filters without negative weights differ by one grey level; the others clip their overshoot in another order."""
    options = {"size": size, "interpolation": interpolation, "draft": False}
    images = [*PHOTOS, *(save(Image.fromarray(image), "JPEG", quality=95) for image in PHOTOS), *IMAGES[2:6]]
    fast = [train_crop(image, np.random.default_rng(seed), **options) for seed, image in enumerate(images)]
    request.getfixturevalue("pil_resizes")
    for seed, (image, crop) in enumerate(zip(images, fast, strict=True)):
        wanted = train_crop(image, np.random.default_rng(seed), **options)
        away = np.abs(crop.astype(int) - wanted)
        if interpolation in ("bicubic", "lanczos"):
            assert (away > 1).mean() < 0.01 and away.max() <= 24, (seed, (away > 1).mean(), away.max())
        else:
            assert away.max() <= 1, (seed, away.max())


PLAIN = {"crop_pct": 1.0, "mode": "center", "interpolation": "bilinear", "mean": MEAN}

JPEGS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 3},
    "poor": {"quality": 3},
}


@pytest.mark.parametrize("kind", [*JPEGS, "grey", "rgb", "cmyk"])
def test_training_decodes_jpegs_as_pil_does(kind):
    """Pixel for pixel, at every size that libjpeg decodes to, for odd sides too."""
    for image in (*PHOTOS, *(noise(*shape) for shape in [(57, 91), (8, 9), (1, 1), (3, 200)])):
        photo = Image.fromarray(image)
        photo = {"grey": photo.convert("L"), "cmyk": photo.convert("CMYK")}.get(kind, photo)
        file = save(photo, "JPEG", **({"keep_rgb": True} if kind == "rgb" else JPEGS.get(kind, {})))
        for most in (1, 2, 3, 7, 8, 40):
            opened = images.open_image(file, exif=False, max_pixels=MAX_PIXELS)
            assert opened.size == photo.size and opened.orientation == 1
            assert (opened.decode.func is images._decode_jpeg) == (kind != "cmyk")
            pixels, shrink = opened.decode(most)
            wanted, expected = images._decode(images.open_file(file, MAX_PIXELS), False, most)
            assert shrink == expected <= most
            assert np.array_equal(np.asarray(pixels)[..., :3], np.asarray(wanted.convert("RGB")))


def test_a_crop_of_a_file_is_that_of_its_pixels():
    """Whatever decodes it: orientation is not applied, and colours become RGB, as `decode` has them."""
    photo = Image.fromarray(PHOTOS[0]).resize((120, 80))
    exif = Image.Exif()
    exif[0x0112] = 6
    jpeg = save(photo, "JPEG")
    surplus = jpeg[:-2] + bytes(9) + jpeg[-2:]  # bytes that no decoder needs: simplejpeg refuses them, PIL does not
    files = [
        jpeg,
        surplus,
        save(photo, "JPEG", exif=exif),
        *(save(photo.convert(mode), "JPEG") for mode in ("L", "CMYK")),
        *(save(photo.convert(mode), "PNG") for mode in ("RGB", "RGBA", "L", "1")),
        save(photo.quantize(16), "PNG"),
        save(photo, "MPO", save_all=True, append_images=[photo.rotate(180)]),
    ]
    for file in files:
        crop = train_crop(file, np.random.default_rng(3), size=16, draft=False)
        assert np.array_equal(crop, train_crop(np.asarray(decode(file)), np.random.default_rng(3), size=16))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF"])
def test_an_image_of_more_pixels_than_allowed_is_refused_before_they_are_decoded(format, monkeypatch):
    file = save(Image.new("RGB", (64, 32)), format)
    assert decode(file, max_pixels=64 * 32).size == (64, 32)
    monkeypatch.setattr(images, "_decode", None)
    monkeypatch.setattr(images, "_decode_jpeg", None)
    for crop in (
        lambda: decode(file, max_pixels=64 * 32 - 1),
        lambda: train_crop(file, np.random.default_rng(0), size=8, max_pixels=64 * 32 - 1),
        lambda: eval_crop(file, size=8, **PLAIN, max_pixels=64 * 32 - 1),
    ):
        with pytest.raises(OSError, match=r"64 x 32 pixels, more than the 2047 of --config.data.max_pixels"):
            crop()


def test_random_interpolation_draws_bilinear_and_bicubic_alike():
    image, whole = noise(40, 40), {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    fixed = {
        name: train_crop(image, np.random.default_rng(0), size=16, interpolation=name, **whole)
        for name in ("bilinear", "bicubic")
    }
    drawn = [train_crop(image, np.random.default_rng(i), size=16, **whole) for i in range(200)]
    counts = [sum(np.array_equal(crop, wanted) for crop in drawn) for wanted in fixed.values()]
    assert sum(counts) == 200 and min(counts) > 60


@pytest.mark.parametrize("size", [24, 50, 107, 213, 214, 300])
def test_draft_never_decodes_fewer_pixels_than_the_output(size, monkeypatch):
    file = save(Image.fromarray(PHOTOS[1]), "JPEG", quality=95)
    resized = []
    resize = room.resized_box

    def spy(image, size, resample, box):
        resized.append((image.width, box))
        return resize(image, size, resample, box)

    monkeypatch.setattr(room, "resized_box", spy)
    shrinks = []
    for seed in range(40):
        train_crop(file, np.random.default_rng(seed), size=size)
        train_crop(file, np.random.default_rng(seed), size=size, draft=False)
        (width, box), (full, wanted) = resized[-2:]
        shrink = round(full / width)
        shrinks.append(shrink)
        assert full == 640 and box == tuple(value / shrink for value in wanted)
        if shrink > 1:
            assert min(box[2] - box[0], box[3] - box[1]) >= size
        assert shrink == 8 or min(wanted[2] - wanted[0], wanted[3] - wanted[1]) < 2 * shrink * size
    assert (max(shrinks) > 1) == (size <= 213)


def test_draft_changes_less_than_a_shift_by_half_a_pixel():
    """It does change the pixels, since each crop here is decoded at a half, a quarter or an eighth of its size."""
    file = save(Image.fromarray(PHOTOS[0]), "JPEG", quality=95)
    for seed in range(10):
        fast, full = (
            train_crop(file, np.random.default_rng(seed), size=32, interpolation="bilinear", draft=draft).astype(int)
            for draft in (True, False)
        )
        half_pixel = np.abs(np.diff(full, axis=1)).mean() / 2
        assert 0 < np.abs(fast - full).mean() < half_pixel


def test_sixteen_bit_grey_keeps_its_high_byte():
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    wanted = [0, 0, 1, 128, 255]
    pgm = b"P5 5 1 65535\n" + values.astype(">u2").tobytes()
    for file in (save(Image.fromarray(values), "PNG"), save(Image.fromarray(values), "TIFF"), pgm):
        rgb = decode(file)
        assert rgb.mode == "RGB" and np.asarray(rgb)[0].tolist() == [[value] * 3 for value in wanted]
        # A large one would take four times the memory as RGB.
        assert images.open_image(file, exif=False, max_pixels=5).decode(1)[0].mode == "L"


def test_sixteen_bit_grey_is_converted_in_strips(monkeypatch):
    values = np.random.default_rng(0).integers(0, 65536, (37, 5), np.uint16)
    monkeypatch.setattr(images, "_STRIP", 20)
    assert np.array_equal(np.asarray(decode(save(Image.fromarray(values), "PNG")))[..., 1], values >> 8)


@pytest.mark.parametrize("interpolation", FILTERS)
def test_a_grey_image_has_the_crops_of_the_same_image_in_colour(interpolation):
    grey = noise(57, 91, 1)
    colour = np.repeat(grey, 3, axis=-1)
    for seed in range(5):
        options = {"size": 24, "interpolation": interpolation}
        crop = train_crop(grey, np.random.default_rng(seed), **options)
        assert np.array_equal(crop, train_crop(colour, np.random.default_rng(seed), **options))
    options = {**PLAIN, "interpolation": interpolation}
    for mode in ("center", "border"):
        crop = eval_crop(grey, size=24, **{**options, "mode": mode})
        assert np.array_equal(crop, eval_crop(colour, size=24, **{**options, "mode": mode}))


def test_palette_cmyk_transparent_and_grey_files_become_what_pil_makes_of_them():
    photo = Image.fromarray(PHOTOS[0]).resize((60, 40))
    palette = photo.quantize(32)
    rgba = photo.copy()
    rgba.putalpha(Image.fromarray(noise(40, 60, 1)[..., 0]))
    for file, wanted in [
        (save(palette, "PNG"), palette.convert("RGB")),
        (save(palette, "PNG", transparency=bytes(range(32))), palette.convert("RGB")),
        (save(rgba, "PNG"), photo),
        (save(photo.convert("L"), "PNG"), photo.convert("L").convert("RGB")),
        (save(photo.convert("LA"), "PNG"), photo.convert("LA").convert("RGB")),
        (save(photo.convert("1"), "PNG"), photo.convert("1").convert("RGB")),
    ]:
        assert np.array_equal(np.asarray(decode(file)), np.asarray(wanted))
    cmyk = save(photo.convert("CMYK"), "JPEG", quality=95)
    assert np.array_equal(np.asarray(decode(cmyk)), np.asarray(Image.open(io.BytesIO(cmyk)).convert("RGB")))
    assert np.abs(np.asarray(decode(cmyk), int) - np.asarray(photo, int)).mean() < 6


def test_exif_orientation_is_not_applied_as_in_timm():
    photo = Image.fromarray(PHOTOS[0]).resize((60, 40))
    assert decode(save(photo, "JPEG", exif=orientation(6))).size == (60, 40)


def orientation(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


FILES = {
    "JPEG": ("JPEG", {"quality": 95}),
    "progressive": ("JPEG", {"quality": 95, "progressive": True}),
    "PNG": ("PNG", {}),
    "WebP": ("WEBP", {"lossless": True, "method": 0}),
    "TIFF": ("TIFF", {}),
    "AVIF": ("AVIF", {"quality": 90, "speed": 10}),
}


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("kind", FILES)
def test_a_rotated_photo_has_the_crops_of_the_upright_one(kind, number):
    """EXIF's orientations, in every format that has them: NumPy turns the stored pixels upright."""
    format, options = FILES[kind]
    turn = {
        **{1: lambda p: p, 2: lambda p: p[:, ::-1], 3: lambda p: p[::-1, ::-1], 4: lambda p: p[::-1]},
        **{5: lambda p: p.swapaxes(0, 1), 6: lambda p: np.rot90(p, -1), 8: lambda p: np.rot90(p)},
        7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
    }[number]
    photo = Image.fromarray(PHOTOS[0][:300, :401])
    stored = np.asarray(decode(save(photo, format, **options)))
    file = save(photo, format, exif=orientation(number), **options)
    upright = np.ascontiguousarray(turn(stored))
    assert np.array_equal(np.asarray(decode(file, exif=True)), upright)
    assert kind == "TIFF" or np.array_equal(np.asarray(decode(file)), stored)  # Pillow always turns a TIFF
    for seed in range(3):
        crop = train_crop(file, np.random.default_rng(seed), size=24, exif=True, draft=False)
        assert np.array_equal(crop, train_crop(upright, np.random.default_rng(seed), size=24))
        drafted = train_crop(file, np.random.default_rng(seed), size=24, exif=True)
        away = np.abs(drafted.astype(int) - crop).mean()
        assert away < 5, away  # of the same place: a crop that is shifted by a pixel differs by more than 10
    assert np.array_equal(eval_crop(file, size=24, exif=True, **PLAIN), eval_crop(upright, size=24, **PLAIN))


def test_an_exif_block_that_cannot_be_read_says_nothing():
    file = save(Image.fromarray(PHOTOS[0]), "JPEG", exif=b"Exif\0\0" + b"no TIFF header")
    assert decode(file, exif=True).size == (640, 427)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_counts(format):
    frames = [Image.new("RGB", (9, 7), color) for color in ("red", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    file = save(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert np.asarray(decode(file)).reshape(-1, 3).tolist() == [[255, 0, 0]] * 63


@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (700, 1), (2, 3)])
def test_tiny_and_thin_images_have_crops(shape):
    for image in (noise(*shape), save(Image.fromarray(noise(*shape)), "JPEG")):
        assert train_crop(image, np.random.default_rng(0), size=8).shape == (8, 8, 3)
        for mode in ("center", "squash", "border"):
            crop = eval_crop(image, size=8, crop_pct=0.9, mode=mode, interpolation="bicubic", mean=MEAN)
            assert crop.shape == (8, 8, 3) and crop.dtype == np.uint8


def test_grey_arrays_are_taken():
    grey = noise(5, 6, 1)
    for image in (grey, grey[..., 0], np.repeat(grey, 3, axis=-1)):
        assert np.array_equal(np.asarray(decode(image)), np.repeat(grey, 3, axis=-1))


def test_what_is_broken_raises_oserror():
    whole = save(Image.fromarray(PHOTOS[0]), "JPEG")
    png = save(Image.fromarray(noise(30, 30)), "PNG")
    rotten = png[:60] + bytes(40) + png[100:]
    for file in (b"", b"not an image", whole[: len(whole) // 2], png[: len(png) // 2], rotten):
        with pytest.raises(OSError):
            decode(file)
        with pytest.raises(OSError):
            train_crop(file, np.random.default_rng(0), size=16)
        with pytest.raises(OSError):
            eval_crop(file, size=16, crop_pct=1.0, mode="center", interpolation="bilinear", mean=MEAN)
    with pytest.raises(OSError):
        decode(np.zeros((2, 3, 4, 5), np.uint8))


def test_a_jpeg_whose_pixels_are_missing_is_damaged_whatever_pillow_fills_in():
    whole = save(Image.fromarray(PHOTOS[0]), "JPEG")
    small = save(Image.fromarray(PHOTOS[0]).resize((16, 16)), "JPEG")
    size = small.index(b"\xff\xc0") + 5
    restarts = save(Image.fromarray(PHOTOS[0]), "JPEG", restart_marker_blocks=3)
    second = restarts.index(b"\xff\xd1")
    cmyk = save(Image.fromarray(PHOTOS[0]).convert("CMYK"), "JPEG")
    for file in (
        small[:size] + struct.pack(">HH", 9000, 9000) + small[size + 4 :],  # a header that lies
        whole[: len(whole) // 2] + b"\xff\xd9",  # cut, then closed
        cmyk[: len(cmyk) // 2] + b"\xff\xd9",
        restarts[:second] + restarts[second + 200 :],
    ):
        for read in (
            lambda file=file: decode(file),
            lambda file=file: train_crop(file, np.random.default_rng(0), size=16),
        ):
            with pytest.raises(OSError, match=r"the JPEG is damaged: .*[a-z0-9]$"):
                read()


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA"])
@pytest.mark.parametrize("size", [(16, 17), (16, 900), (900, 16), (900, 900)])
def test_an_image_whose_header_lies_is_refused(size, mode):
    """Pillow would fill the rest with black."""
    photo = Image.fromarray(PHOTOS[0]).resize((16, 16)).convert(mode)
    files = {"PNG": [save(photo, "PNG")]}
    if mode == "RGB":
        compressions = ({}, {"compression": "tiff_lzw"}, {"compression": "jpeg"}, {"compression": "tiff_deflate"})
        files["TIFF"] = [save(photo, "TIFF", **options) for options in compressions]
        files["JPEG2000"] = [save(photo, "JPEG2000")]
    for format, formatted in files.items():
        for file in formatted:
            assert decode(file).size == (16, 16)
            with pytest.raises(OSError, match=r"than its header says|truncated|decoder error"):
                decode(with_size(file, format, *size))
            with pytest.raises(OSError):
                train_crop(with_size(file, format, *size), np.random.default_rng(0), size=8)


def test_images_that_end_in_black_are_whole():
    """Zeros at the end make a PNG be checked, of every depth, odd width and interlaced."""
    black = np.zeros((7, 5, 3), np.uint8)
    black[0, 0] = 255
    for mode in ("RGB", "RGBA", "L", "LA", "1", "P", "I;16"):
        photo = Image.fromarray(black).convert("L" if mode == "I;16" else mode).convert(mode)
        assert np.asarray(decode(save(photo, "PNG")))[0, 0, 0] == (0 if mode == "I;16" else 255)
    assert not np.asarray(decode(save(Image.new("RGB", (3000, 2000)), "PNG"))).any()
    assert np.array_equal(decode(interlaced(black)), black)
    with pytest.raises(OSError, match="fewer pixels"):
        decode(interlaced(black, passes=6))


def interlaced(pixels: np.ndarray, passes: int = 7) -> bytes:
    """An interlaced PNG, which Pillow does not write."""
    steps = [(0, 8, 0, 8), (4, 8, 0, 8), (0, 4, 4, 8), (2, 4, 0, 4), (0, 2, 2, 4), (1, 2, 0, 2), (0, 1, 1, 2)][:passes]
    rows = [row for x, dx, y, dy in steps for row in pixels[y::dy, x::dx] if row.size]
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 2, 0, 0, 1)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("format", ["PNG", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "PPM", "JPEG2000"])
def test_a_file_that_is_cut_is_broken_in_every_format(format):
    file = save(Image.fromarray(PHOTOS[0]).resize((90, 60)), format)
    assert decode(file).size == (90, 60)
    for part in (0.3, 0.6, 0.95):
        with pytest.raises(OSError, match=r"\w"):
            decode(file[: int(len(file) * part)])


def test_grey_values_of_unknown_range_are_refused_and_not_clipped():
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    twelve = save(Image.fromarray((ramp * 4095).astype(np.uint16)), "TIFF").replace(
        struct.pack("<HHLHH", 258, 3, 1, 16, 0), struct.pack("<HHLHH", 258, 3, 1, 12, 0)
    )
    for image in (
        save(Image.fromarray(ramp.astype(np.float32)), "TIFF"),
        save(Image.fromarray((ramp * 2**30).astype(np.int32)), "TIFF"),
        save(Image.fromarray((ramp * 65535).astype(np.uint16)), "TIFF", tiffinfo={262: 0}),  # white is zero
        twelve,
        ramp.astype(np.float32),
        (ramp * 255).astype(np.int32),
        b"Pf 8 8 -1.0\n" + ramp.astype("<f4").tobytes(),
    ):
        with pytest.raises(OSError, match="save it with 8 or 16 bits"):
            decode(image)
        with pytest.raises(OSError, match="save it with 8 or 16 bits"):
            train_crop(image, np.random.default_rng(0), size=4)


@pytest.mark.parametrize("format", ["EPS", "PDF", "ICO", "TGA", "PCX", "SGI"])
def test_no_other_format_is_tried(format, monkeypatch):
    def start(*args, **kwargs):
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.check_call", start)
    file = save(Image.fromarray(PHOTOS[0]).resize((32, 32)), format)
    with pytest.raises(OSError, match="no image of a known format"):
        decode(file)


def test_a_jpeg_of_very_many_scans_is_refused():
    file = save(Image.fromarray(PHOTOS[0]), "JPEG", progressive=True)
    start = file.index(b"\xff\xda")
    (length,) = struct.unpack_from(">H", file, start + 2)
    scan = file[start : start + 2 + length] + b"\0"
    metadata = b"\xff\xed" + struct.pack(">H", 602) + b"\xff\xda\0" * 200
    assert np.array_equal(decode(file[:2] + metadata + file[2:]), decode(file))
    with pytest.raises(OSError, match="more than 100 scans"):
        decode(file[:start] + scan * 2000 + file[start:])


@pytest.mark.parametrize("shape", [(1, 1_000_000), (1_000_000, 1), (3, 400_000)])
def test_a_very_long_image_takes_no_more_memory_than_its_pixels(shape, monkeypatch):
    made = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *a, **k: made.append(size) or resize(self, size, *a, **k)
    )
    image = noise(*shape)
    for mode in ("center", "squash", "border"):
        crop = eval_crop(image, size=224, crop_pct=0.875, mode=mode, interpolation="bicubic", mean=MEAN)
        assert crop.shape == (224, 224, 3)
    assert max(width * height for width, height in made) <= 2**24
    crop = eval_crop(noise(50, 60), size=8, crop_pct=1e-6, mode="center", interpolation="bicubic", mean=MEAN)
    assert np.ptp(crop.reshape(-1, 3), axis=0).max() <= 1  # a part of a pixel


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_the_crop_of_a_long_image_is_that_of_the_whole_resized(mode, monkeypatch):
    options = {"size": 33, "crop_pct": 0.9, "mode": mode, "interpolation": "bicubic", "mean": MEAN}
    for image in IMAGES:
        wanted = eval_crop(image, **options)
        with monkeypatch.context() as patch:
            patch.setattr(room, "_MOST_RESIZED", 0)
            assert np.abs(eval_crop(image, **options).astype(int) - wanted).max() <= 1, image.shape


def test_an_error_always_has_a_reason():
    for error in (EOFError(), OSError(), ValueError("it is odd")):
        with pytest.raises(OSError, match=r"the image: (EOFError|OSError|it is odd)$"), broken_is_oserror():
            raise error


def test_check_images_counts_the_broken_and_names_the_first(tmp_path):
    whole = save(Image.fromarray(PHOTOS[0]), "JPEG")
    folder = tmp_path / "train" / "flower"
    folder.mkdir(parents=True)
    for i in range(20):
        (folder / f"{i:02}.jpg").write_bytes(whole)
    source = FolderSource(tmp_path, "train")
    check_images(source, 100, 3)
    for i in (0, 3, 7, 12, 19):
        (folder / f"{i:02}.jpg").write_bytes(whole[: -len(whole) // 3])
    with pytest.raises(UserError) as caught:
        check_images(source, 100, 3)
    text = str(caught.value)
    assert text.startswith("5 of the 20 images") and "--config.data.check=0" in text
    assert all(str(folder / f"{i:02}.jpg") in text for i in (0, 3, 7)) and "12.jpg" not in text
    with pytest.raises(UserError, match="2 of the 2 images"):  # the first and the last
        check_images(source, 2, 3)


def test_an_unknown_interpolation_names_the_nearest():
    check_filter("random", "x", extra=("random",))
    for name in FILTERS:
        check_filter(name, "x")
    with pytest.raises(UserError, match=r"'bicubik' \(--config.x\): did you mean 'bicubic'"):
        check_filter("bicubik", "--config.x")
