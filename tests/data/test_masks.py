"""Masks: how they are read, and that image and mask stay together, pixel by pixel."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maxmap.data.images import read_values
from maxmap.data.paired import check_whole, eval_pair, finest, places, train_pair
from maxmap.data.pipeline import open_data
from maxmap.data.preprocessing import cropped, stored_size
from maxmap.errors import UserError
from maxmap.metrics import IGNORED
from tests.fuzz.picture_rows import png
from tests.shapes import draw, write_shapes

MEAN = (0.5, 0.25, 0.75)
MASK = np.array([[0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 0, 3]], np.uint8)
WHOLE = {"image_size": 24, "crop_pct": 1.0, "crop_mode": "border", "interpolation": "nearest", "mean": MEAN}
OPTIONS = {"source": "masks", "task": "segmentation", "crop_pct": 1.0, "crop_mode": "border", "threads": 1}
OPTIONS |= {"image_size": 16}


def saved(image: Image.Image) -> bytes:
    image.save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def packed(mask: np.ndarray, bits: int) -> bytes:
    """A grey PNG whose values take fewer bits than a byte, as Pillow does not write it."""
    rows = np.unpackbits(mask[..., None], axis=-1)[..., -bits:].reshape(len(mask), -1)
    data = b"".join(b"\0" + row.tobytes() for row in np.packbits(rows, axis=-1))
    return png(mask.shape[1], mask.shape[0], bits, 0, data)


def test_every_kind_of_mask_has_the_values_that_it_stores():
    palette = Image.fromarray(MASK)
    palette.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
    files = [saved(Image.fromarray(MASK)), saved(palette), saved(Image.fromarray(MASK.astype(np.uint16)))]
    for file in (*files, packed(MASK, 2), packed(MASK, 4)):
        assert np.array_equal(read_values(file, (4, 3)), MASK)
    assert np.array_equal(read_values(saved(Image.fromarray(MASK > 1)), (4, 3)), MASK > 1)


def folder(root: Path, mask: bytes, name: str = "masks", classes: str = "a\nb\nc\nd\n") -> Path:
    """A data set of one image of 4 x 3 pixels, the same for both splits."""
    for split in ("train", "val"):
        for kind, file in (("images", saved(Image.new("RGB", (4, 3)))), (name, mask)):
            (root / kind / split).mkdir(parents=True)
            (root / kind / split / "one.png").write_bytes(file)
    (root / "classes.txt").write_text(classes)
    return root


def test_what_stands_for_what(tmp_path):
    """ADE20K's folder, its zeros that are ignored, and classes in an order of one's own."""
    stored = np.where(MASK == 3, 255, MASK)
    path = folder(tmp_path / "ade", saved(Image.fromarray(stored)), "annotations", "one\ntwo\n")
    data = open_data(path=path, reduce_zero_label=True, **OPTIONS)
    assert data.classes == ("one", "two")
    wanted = np.array([255, 0, 1, 255])
    assert np.array_equal(data.train[0].label, wanted[MASK])
    turned = data.with_classes(["zero", "two", "one"], "a checkpoint")
    assert np.array_equal(turned.train[0].label, np.array([255, 2, 1, 255])[MASK])
    assert turned.val.mask_sizes().tolist() == [[4, 3]]


def wrong(root: Path, change: str) -> None:
    """Spoils a data set of `folder`."""
    mask = root / "masks" / "train" / "one.png"
    if change == "missing":
        mask.unlink()
    elif change == "no classes":
        (root / "classes.txt").unlink()
    elif change == "many classes":
        (root / "classes.txt").write_text("".join(f"class {k}\n" for k in range(256)))
    elif change == "no split":
        mask.parent.rename(mask.parent.with_name("training"))
    elif change == "cut off":
        mask.write_bytes(mask.read_bytes()[:-30])
    else:
        pictures = {
            "size": Image.fromarray(MASK[:2]),
            "value": Image.fromarray(MASK + 2),
            "deep": Image.fromarray(MASK.astype(np.uint16) * 300),
            "colours": Image.new("RGB", (4, 3)),
            "one class": Image.fromarray(np.where(MASK > 1, 255, 0).astype(np.uint8)),
        }
        if change == "JPEG":
            Image.fromarray(MASK).save(mask, "JPEG")
        else:
            pictures[change].save(mask)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("missing", r"images/train/one.png has no mask .*masks/train/one.png \(1 such\): add it"),
        ("no classes", r"there is no .*classes.txt: write the name of each class into it, a line each"),
        ("many classes", r"classes.txt or the config names 256 classes, and masks have 255 at most"),
        ("no split", r"masks has no split 'train', only training, val: rename one"),
        ("size", r"one.png: it has 4 x 2 pixels, and its image 4 x 3"),
        ("value", r"it has the value [45], and classes are 0 to 3, of classes.txt, with 255 for pixels that do not"),
        ("deep", r"it has the value [369]00, and classes are 0 to 3"),
        ("colours", r"it has colours \(mode RGB\) and no numbers: save it grey or with a palette"),
        ("JPEG", r"it is a file of the format JPEG: save it as PNG"),
        ("cut off", r"1 of the 1 images checked are broken or cut off: .*its mask .*one.png"),
        ("one class", r"show the class 'a' alone, beside ignored pixels \(value 255\): number the classes 0, 1, 2"),
    ],
)
def test_what_is_wrong_is_one_sentence(tmp_path, change, says):
    wrong(folder(tmp_path, saved(Image.fromarray(MASK))), change)
    with pytest.raises(UserError, match=says):
        open_data(path=tmp_path, **OPTIONS)


def test_evaluation_masks_without_a_class_are_one_sentence(tmp_path):
    folder(tmp_path, saved(Image.fromarray(MASK)))
    Image.fromarray(np.full_like(MASK, IGNORED)).save(tmp_path / "masks" / "val" / "one.png")
    with pytest.raises(UserError, match=r"val/one.png and other images show no class, beside ignored pixels"):
        open_data(path=tmp_path, **OPTIONS)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"crop_pct": 0.9}, "images are evaluated whole and as they are stored: set crop_pct to 1"),
        ({"exif": True}, "and exif to False"),
        ({"rand_augment": "rand-m9"}, "data.rand_augment turns images and not their masks"),
        ({"zoom": (2.0, 0.5)}, "data.zoom=.* is no range"),
        ({"balanced": True}, "data.balanced needs one class for each image"),
        ({"task": "single_label"}, "set --config.data.source=masks with --config.data.task=segmentation, or neither"),
        ({"source": "folder"}, "set --config.data.source=masks with --config.data.task=segmentation, or neither"),
        ({"path": None}, "no path to images and masks is set: give a folder with images/train/NAME.jpg"),
    ],
)
def test_options_that_do_not_fit_masks(tmp_path, options, says):
    folder(tmp_path, saved(Image.fromarray(MASK)))
    with pytest.raises(UserError, match=says):
        open_data(**{"path": tmp_path, **OPTIONS, **options})


def test_a_mask_cannot_take_memory_by_the_size_that_it_states(tmp_path):
    """Evaluation makes room for the largest mask, so a size that the file cannot hold does not count."""
    data = png(13_000, 13_000, 8, 0, bytes(100))
    path = folder(tmp_path, data)
    source = open_data(path=path, check=0, **OPTIONS).val
    assert source.mask_sizes().tolist() == [[0, 0]]
    (path / "masks" / "val" / "one.png").write_bytes(png(2000, 2000, 8, 0, bytes(2001 * 2000)))
    assert source.mask_sizes().tolist() == [[2000, 2000]]


@pytest.mark.parametrize("size", [(40, 56), (30, 30), (70, 45), (18, 90)])
def test_a_training_crop_cuts_image_and_mask_alike(size):
    """The image shows the mask. At the edges, and where two classes meet, rounding may choose either."""
    mask = draw(3, *size)[1]
    image, shown, padded = np.repeat(mask[..., None], 3, axis=-1), 0, 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        pixels, cut = train_pair(image, mask, rng, size=24, interpolation="nearest", zoom=(0.5, 2.0), mean=MEAN)
        assert pixels.shape == (24, 24, 3) and cut.shape == (24, 24) and cut.dtype == np.uint8
        filled = (pixels == np.round(255 * np.array(MEAN)).astype(np.uint8)).all(-1)
        around = np.lib.stride_tricks.sliding_window_view(np.pad(cut, 1, constant_values=99), (3, 3))
        inside = ~filled & (around.min((2, 3)) == around.max((2, 3)))
        assert np.array_equal(pixels[inside][:, 0], cut[inside])
        height, width = (~filled).any(1).sum(), (~filled).any(0).sum()
        assert (cut[filled] == IGNORED).all() and not filled[:height, :width].any()
        shown, padded = shown + (~filled).all(), padded + filled.any()
    assert shown and padded


def test_a_training_crop_seldom_shows_one_class_alone():
    """A fifth of the image is the class 1: whole crops of the class 0 are drawn again."""
    image, mask = np.zeros((64, 320, 3), np.uint8), np.zeros((64, 320), np.uint8)
    mask[:, 128:192] = 1
    drawn = [
        train_pair(image, mask, np.random.default_rng(i), size=64, zoom=(1.0, 1.0), mean=MEAN)[1] for i in range(60)
    ]
    assert np.mean([0.25 <= cut.mean() <= 0.75 for cut in drawn]) > 0.9


def test_a_training_crop_seldom_shows_nothing_that_counts():
    image, mask = np.zeros((64, 320, 3), np.uint8), np.full((64, 320), IGNORED, np.uint8)
    mask[:, 128:160], mask[:, 160:192] = 0, 1
    drawn = [
        train_pair(image, mask, np.random.default_rng(i), size=64, zoom=(1.0, 1.0), mean=MEAN)[1] for i in range(60)
    ]
    assert np.mean([(cut != IGNORED).any() for cut in drawn]) > 0.9


def test_an_array_is_cut_as_the_picture_that_it_is(tmp_path):
    image, mask = draw(5)
    batches = []
    for name in ("pictures", "arrays"):
        for kind, pixels in (("images", image), ("masks", mask)):
            (tmp_path / name / kind / "train").mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / name / kind / "train" / "one.png")
        (tmp_path / name / "classes.txt").write_text("ground\nsquare\ndisc\n")
    (tmp_path / "arrays" / "images" / "train" / "one.png").unlink()
    np.save(tmp_path / "arrays" / "images" / "train" / "one.npy", image)
    for name in ("pictures", "arrays"):
        data = open_data(path=tmp_path / name, val_split="train", **OPTIONS)
        batches.append([next(data.train_batches(1, seed=0, num_steps=1)), next(data.eval_batches(1))])
    for picture, array in zip(*batches, strict=True):
        assert all(np.array_equal(picture[key], array[key]) for key in ("image", "label", "skipped"))
    file = tmp_path / "arrays" / "images" / "train" / "one.npy"
    assert stored_size(file, WHOLE) == (48, 40)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="1 of the 1 images checked are broken"):
        open_data(path=tmp_path / "arrays", val_split=None, **OPTIONS)


@pytest.mark.parametrize("mode", ["border", "squash"])
@pytest.mark.parametrize("size", [(24, 24), (7, 9), (40, 56), (97, 31), (24, 100), (1, 200)])
def test_evaluation_has_every_pixel_of_a_mask_once(size, mode):
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 4, size).astype(np.uint8)
    image = np.repeat(mask[..., None], 3, axis=-1)
    preprocessing = {**WHOLE, "crop_mode": mode}
    finer = finest(np.array([size[::-1], (0, 0)]), preprocessing)
    pixels, placed = eval_pair(image, mask, preprocessing=preprocessing, finer=finer, max_pixels=10**6)
    assert np.array_equal(pixels, cropped(image, preprocessing)) and placed.shape == (24, 24, finer**2)
    assert np.bincount(placed.reshape(-1), minlength=256)[:4].tolist() == np.bincount(mask.reshape(-1)).tolist()
    rows, columns = places(size[::-1], preprocessing)
    answer = rng.integers(0, 4, (24, 24))
    right = np.sum(placed == answer[..., None])  # counted where the network answers
    assert right == np.sum(mask == answer[np.ix_(rows, columns)])  # and where the mask asks
    if max(size) <= 24:  # enlarged: the network's image shows each pixel where it is looked for
        assert np.array_equal(pixels[np.ix_(rows, columns)][..., 0], mask)
    with pytest.raises(OSError, match="pixels, more than it had at the start"):
        eval_pair(image, np.zeros((999, 999), np.uint8), preprocessing=preprocessing, finer=1, max_pixels=10**6)


def test_a_preprocessing_that_leaves_pixels_out():
    check_whole(WHOLE)
    for change in ({"crop_mode": "center"}, {"crop_pct": 0.95}, {"exif": True}):
        with pytest.raises(UserError, match="every pixel of a mask counts"):
            check_whole(WHOLE | change)


def test_batches_are_a_function_of_seed_and_step(tmp_path):
    data = open_data(path=write_shapes(tmp_path, 6, 5), **OPTIONS)
    whole = list(data.train_batches(2, seed=1, num_steps=4))
    later = list(data.train_batches(2, seed=1, num_steps=2, start_step=2))
    for one, other in zip(whole[2:], later, strict=True):
        assert one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)
    assert whole[0]["label"].shape == (2, 16, 16) and whole[0]["label"].dtype == np.uint8
    rows = [batch for batch in data.eval_batches(4)]
    assert {batch["label"].shape for batch in rows} == {(4, 16, 16, 49)}  # 80 rows in 13 are 7 in one, or fewer
    counted = sum(np.sum(batch["label"][batch["mask"]] != IGNORED) for batch in rows)
    assert counted == sum(np.sum(data.val[i].label != IGNORED) for i in range(5))
