"""What is said of one image file."""

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from maxmap.data.inspection import inspect


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(load_sample_image("china.jpg")).resize((320, 212))


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def distance(one: int, other: int) -> int:
    return (one ^ other).bit_count()


def test_copies_have_near_hashes_and_others_have_not(photo, tmp_path):
    turned = Image.Exif()
    turned[274] = 6
    copies = {
        "small.png": saved(photo.resize((100, 66))),
        "poor.jpg": saved(photo, "JPEG", quality=25),
        "dark.png": saved(photo.point(lambda value: int(0.85 * value))),
        "grey.jpg": saved(photo.convert("L"), "JPEG"),
        "cmyk.jpg": saved(photo.convert("CMYK"), "JPEG", quality=90),
        "turned.jpg": saved(photo.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=90, exif=turned),
        "large.jpg": saved(photo.resize((1280, 848)), "JPEG"),  # decoded at a reduced size
    }
    others = {
        "mirror.png": saved(photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
        "flower.png": saved(Image.fromarray(load_sample_image("flower.jpg"))),
    }
    (tmp_path / "photo.png").write_bytes(saved(photo))
    found = {}
    for name, data in {**copies, **others}.items():
        (tmp_path / name).write_bytes(data)
        found[name] = inspect(str(tmp_path / name))
    original = inspect(str(tmp_path / "photo.png"))
    assert original[:2] == ((320, 212), "PNG RGB") and original.fault is None
    assert all(distance(found[name].hash, original.hash) <= 4 for name in copies)
    assert all(distance(found[name].hash, original.hash) > 10 for name in others)
    assert len({each.digest for each in found.values()}) == len(found)
    assert found["turned.jpg"].size == (320, 212)
    kinds = [found[name].kind for name in ("grey.jpg", "cmyk.jpg", "small.png")]
    assert kinds == ["JPEG L", "JPEG CMYK", "PNG RGB"]


def test_broken_files_have_a_reason(photo, tmp_path):
    jpeg, png = saved(photo, "JPEG"), saved(Image.fromarray(np.zeros((90, 90), np.uint8)))
    broken = {"cut.jpg": jpeg[: len(jpeg) // 2], "cut.png": png[:-40], "text.jpg": b"no image", "empty.png": b""}
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
        found = inspect(str(tmp_path / name))
        assert found.fault and "\n" not in found.fault and found.size == (0, 0), name
    (tmp_path / "large.jpg").write_bytes(saved(photo.resize((2000, 1400)), "JPEG")[:-30_000])  # read at a reduced size
    assert "Premature end" in inspect(str(tmp_path / "large.jpg")).fault
    assert inspect(str(tmp_path / "none.jpg")).fault == "No such file or directory"
