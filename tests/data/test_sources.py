"""Folders, digits and TFDS give the right images and labels, and each mistake its own sentence."""

import io
import pickle
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from maxmap.data.sources import SOURCES, FolderSource, open_source
from maxmap.errors import UserError


def encoded(value: int, size: tuple[int, int] = (9, 8), format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(file, format)
    return file.getvalue()


def write(path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(value))


@pytest.fixture
def tree(tmp_path):
    """Three classes in train, of which val has two."""
    for value, file in enumerate(["cat/a.png", "cat/b.PNG", "dog/c.png", "ant/deep/er/d.png", "ant/e.png"]):
        write(tmp_path / "train" / file, value)
    for value, file in enumerate(["dog/x.png", "ant/y.png"]):
        write(tmp_path / "val" / file, value + 10)
    return tmp_path


def pixel(image: bytes) -> int:
    return np.asarray(Image.open(io.BytesIO(image)))[0, 0, 0]


def test_folder_lists_every_image_with_the_number_of_its_sorted_class(tree):
    source = open_source("folder", tree, "train")
    assert source.classes == ("ant", "cat", "dog")
    found = {source.name(i).removeprefix(f"{tree}/train/"): (source[i].label, pixel(source[i].image)) for i in range(5)}
    assert found == {
        "ant/deep/er/d.png": (0, 3),
        "ant/e.png": (0, 4),
        "cat/a.png": (1, 0),
        "cat/b.PNG": (1, 1),
        "dog/c.png": (2, 2),
    }
    assert len(source) == 5


def test_training_classes_rule_the_labels_of_a_split_with_fewer(tree):
    classes = open_source("folder", tree, "train").classes
    val = open_source("folder", tree, "val", classes=classes)
    assert val.classes == classes
    assert [(val[i].label, pixel(val[i].image)) for i in range(2)] == [(0, 11), (2, 10)]


def test_a_name_that_is_no_utf8_is_read(tmp_path):
    folder = tmp_path / "train" / "cät"
    folder.mkdir(parents=True)
    try:
        with open(bytes(folder) + b"/\xff\xe9.png", "wb") as file:
            file.write(encoded(7))
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    source = FolderSource(tmp_path, "train")
    assert pixel(source[0].image) == 7


def test_hidden_files_and_folders_are_ignored(tree):
    write(tree / "train" / ".thumbs" / "a.png")
    (tree / "train" / "cat" / ".DS_Store").write_text("")
    assert len(open_source("folder", tree, "train")) == 5


@pytest.mark.parametrize("source", ["folder", "digits"])
def test_sources_survive_pickling(tree, source):
    before = open_source(source, tree, "train")
    after = pickle.loads(pickle.dumps(before))
    assert len(after) == len(before)
    assert np.array_equal(after[3].image, before[3].image) and after.name(3) == before.name(3)


def message(*args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        open_source(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_an_unknown_source_names_the_nearest():
    text = message("foldr")
    assert "'foldr'" in text and "did you mean 'folder'" in text and all(name in text for name in SOURCES)


@pytest.mark.parametrize("missing", ["path", "split", "unset"])
def test_missing_images_name_both_ways_to_give_them_and_the_demo(tmp_path, missing):
    path = {"path": tmp_path / "nowhere", "split": tmp_path, "unset": None}[missing]
    text = message("folder", path, "train")
    assert "<path>/train/<class>" in text and "TFDS" in text and "make demo" in text
    assert path is None or str(path) in text


def test_a_missing_split_names_those_there_are(tree):
    text = message("folder", tree, "test")
    assert "'test'" in text and "train, val" in text and "val_split" in text


def test_a_split_without_class_folders(tmp_path):
    write(tmp_path / "train" / "a.png")
    text = message("folder", tmp_path, "train")
    assert f"{tmp_path}/train holds no class folders" in text


def test_an_image_outside_the_class_folders(tree):
    write(tree / "train" / "stray.png")
    assert f"{tree}/train/stray.png lies outside the class folders" in message("folder", tree, "train")


def test_a_class_folder_without_images(tree):
    (tree / "train" / "bee" / "empty").mkdir(parents=True)
    assert f"class folder {tree}/train/bee holds no images" in message("folder", tree, "train")


def test_a_file_that_is_no_image(tree):
    (tree / "train" / "dog" / "boxes.txt").write_text("1 2 3")
    text = message("folder", tree, "train")
    assert f"{tree}/train/dog/boxes.txt" in text and ".jpeg" in text and "remove" in text


def test_a_class_that_training_does_not_have(tree):
    write(tree / "val" / "dogs" / "z.png")
    text = message("folder", tree, "val", classes=("ant", "cat", "dog"))
    assert f"'dogs' of {tree}/val" in text and "(nearest: dog" in text


def test_digits_are_split_into_four_fifths_and_one_without_overlap():
    train, val = (open_source("digits", split=split) for split in ("train", "val"))
    assert (len(train), len(val)) == (1437, 360)
    assert train.classes == tuple("0123456789") and train.name(12) == "digits/train[12]"
    from sklearn.datasets import load_digits

    digits = load_digits()
    rows = [(source[i].image[..., 0].tobytes(), source[i].label) for source in (train, val) for i in range(len(source))]
    wanted = [
        ((image * 255 / 16).round().astype(np.uint8).tobytes(), label)
        for image, label in zip(digits.images, digits.target, strict=True)
    ]
    assert sorted(rows) == sorted(wanted)
    assert val[0].image.dtype == np.uint8 and val[0].image.shape == (8, 8, 3)
    assert set(np.bincount([val[i].label for i in range(len(val))], minlength=10) > 20) == {True}


def test_digits_have_two_splits():
    assert "'test'" in message("digits", split="test")


class MaxmapTiny(tfds.core.GeneratorBasedBuilder):
    """Three classes; image i is i * 20 everywhere and (9 + i) pixels wide."""

    VERSION = tfds.core.Version("1.0.0")
    NAMES = ("ant", "cat", "dog")
    code_path = None  # a builder of no package has no folder with checksums

    def _info(self):
        features = tfds.features.FeaturesDict(
            {"image": tfds.features.Image(shape=(None, None, 3)), "label": tfds.features.ClassLabel(names=self.NAMES)}
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, download):
        return {"train": self._generate_examples(6), "test": self._generate_examples(3)}

    def _generate_examples(self, num):
        for i in range(num):
            yield i, {"image": io.BytesIO(encoded(20 * i, (9 + i, 8))), "label": i % 3}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    MaxmapTiny(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


def test_tfds_gives_encoded_images_without_tensorflow(prepared):
    source = open_source("tfds", prepared, "train", name="maxmap_tiny")
    assert len(source) == 6 and source.classes == MaxmapTiny.NAMES
    rows = sorted((Image.open(io.BytesIO(source[i].image)).width - 9, source[i].label) for i in range(6))
    assert rows == [(i, i % 3) for i in range(6)]
    assert source.name(2) == "maxmap_tiny/train[2]"
    assert pickle.loads(pickle.dumps(source))[1] == source[1]
    assert "tensorflow" not in sys.modules


def test_tfds_val_is_the_split_that_there_is_and_slices_work(prepared):
    val = open_source("tfds", prepared, "val", name="maxmap_tiny", classes=("dog", "cat", "ant"))
    assert val.name(0) == "maxmap_tiny/test[0]" and val.classes == ("dog", "cat", "ant")
    assert sorted((Image.open(io.BytesIO(val[i].image)).width - 9, val[i].label) for i in range(3)) == [
        (0, 2),
        (1, 1),
        (2, 0),
    ]
    assert len(open_source("tfds", prepared, "train[:50%]", name="maxmap_tiny")) == 3


def test_tfds_without_prepared_data_names_the_command(tmp_path):
    text = message("tfds", tmp_path, name="maxmap_tiny")
    assert f"`tfds build maxmap_tiny --file_format=array_record --data_dir={tmp_path}`" in text


def test_tfds_prepared_for_tensorflow_only(prepared, tmp_path):
    class Elsewhere:
        info = MaxmapTiny(data_dir=str(prepared), file_format="array_record").info
        data_dir = str(tmp_path)

    from maxmap.data.sources import _check_prepared

    _check_prepared(Elsewhere, "maxmap_tiny", None)
    Elsewhere.info = type("Info", (), {"splits": {"train": 1}, "file_format": tfds.core.FileFormat.TFRECORD})
    with pytest.raises(UserError, match=r"as tfrecord, which cannot be read by index.*--file_format=array_record"):
        _check_prepared(Elsewhere, "maxmap_tiny", None)


def test_tfds_mistakes(prepared):
    assert "--config.data.name" in message("tfds", prepared)
    assert "maxmap_tiny" in message("tfds", prepared, name="maxmap_tiney")
    assert "it has train, test" in message("tfds", prepared, "holdout", name="maxmap_tiny")
