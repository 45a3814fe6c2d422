"""Folders, digits and TFDS give the right images and labels, and each mistake its own sentence."""

import io
import pickle
import shutil
import struct
import sys
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.utils.shard_utils import FileInstruction, get_file_instructions

from maxmap.data.archives import TFRecords, parse_example, record_positions
from maxmap.data.labelled import LabelledImage
from maxmap.data.pipeline import open_data
from maxmap.data.sources import SOURCES, FolderSource, open_source
from maxmap.data.tfds_folders import check_prepared
from maxmap.errors import UserError
from maxmap.validate import open_images
from tests.fuzz.archive_rows import made
from tests.fuzz.archive_rows import record as tfrecord


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


def test_what_people_have_beside_their_images_is_left_out_and_told(tree, capsys):
    dog = tree / "train" / "dog"
    for name in ("Thumbs.db", "boxes.txt", "desktop.ini", "README", "labels.json"):
        (dog / name).write_text("1 2 3")
    (dog / "deep").mkdir()
    (dog / "deep" / "c.xml").write_text("<x/>")
    assert len(open_source("folder", tree, "train")) == 5
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"maxmap: 6 entries of {tree}/train are no images and left out: "
        "dog/README, dog/Thumbs.db, dog/boxes.txt and 3 more."
    )


def test_an_image_of_a_kind_that_cannot_be_read_is_not_left_out(tree):
    (tree / "train" / "dog" / "IMG_1.HEIC").write_bytes(b"x")
    text = message("folder", tree, "train")
    assert f"{tree}/train/dog/IMG_1.HEIC is an image of a kind" in text and "convert it to one of .jpg" in text


def test_classes_without_a_split_above_them(tree):
    text = message("folder", tree / "train", "train")
    assert f"folder {tree}/train has no split 'train', but ant, cat, dog hold images" in text
    assert f"move the class folders into {tree}/train/train" in text and f"{tree}/train/val" in text


def test_links_in_a_circle_are_left_out_and_told(tree, capsys):
    cat = tree / "train" / "cat"
    (cat / "loop").symlink_to(".")
    (cat / "up").symlink_to("..")
    (tree / "elsewhere").mkdir()
    write(tree / "elsewhere" / "z.png", 9)
    (cat / "more").symlink_to(tree / "elsewhere")  # a link that is no circle
    (cat / "self.png").symlink_to("self.png")  # looks like an image, and is counted as broken when it is read
    source = open_source("folder", tree, "train")
    assert len(source) == 7
    assert "2 entries" in (told := capsys.readouterr().err) and "cat/loop, cat/up." in told
    broken = [i for i in range(7) if source.name(i).endswith("self.png")]
    with pytest.raises(OSError):
        source[broken[0]]


@pytest.mark.parametrize("target, text", [("gone", "is a link to gone, which does not exist"), (".", "lies in")])
def test_a_class_folder_that_is_a_link_to_nowhere(tree, target, text):
    (tree / "train" / "bee").symlink_to(target)
    told = message("folder", tree, "train")
    assert told.startswith(f"{tree}/train/bee is a link") and text in told


def test_a_folder_that_cannot_be_listed(tree, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.scandir", refuse)
    assert "cannot be listed (Permission denied)" in message("folder", tree, "train")


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


def test_validation_opens_tfds_by_name(prepared):
    data = open_images(prepared, None, "maxmap_tiny", 0)
    assert data.train is None and data.val.name(0).startswith("maxmap_tiny/")
    assert len(open_images(prepared, "train[:50%]", "maxmap_tiny", 0).val) == 3


def test_tfds_without_prepared_data_names_the_command(tmp_path):
    text = message("tfds", tmp_path, name="maxmap_tiny")
    assert f"`tfds build maxmap_tiny --file_format=array_record --data_dir={tmp_path}`" in text


def test_no_class_that_a_tfds_folder_names_is_imported(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "copy")
    (file,) = (tmp_path / "copy").rglob("features.json")
    whole = file.read_text()
    for name in ("antigravity.Image", "tensorflow_datasets.scripts.cli.main.Image"):
        file.write_text(whole.replace("tensorflow_datasets.core.features.image_feature.Image", name))
        assert f"TFDS would import {name}" in message("tfds", tmp_path / "copy", name="maxmap_tiny")
        assert "TFDS would import" in message("tfds", tmp_path / "copy", name="MaxmapTiny")
    file.write_text("[" * 10_000)
    assert "features.json is damaged" in message("tfds", tmp_path / "copy", name="maxmap_tiny")
    file.write_text(whole)
    (file.parent / "dataset_info.json").write_text("{")
    assert "'maxmap_tiny' are damaged" in message("tfds", tmp_path / "copy", name="maxmap_tiny")


def test_tfds_prepared_in_a_format_that_cannot_be_read(tmp_path):
    class Elsewhere:
        info = type("Info", (), {"splits": {"train": 1}, "file_format": tfds.core.FileFormat.RIEGELI})
        data_dir = str(tmp_path)

    with pytest.raises(UserError, match=r"as riegeli, which cannot be read by index.*--file_format=array_record"):
        check_prepared(Elsewhere, "maxmap_tiny", None)


@pytest.fixture(scope="module")
def as_tfrecord(prepared, tmp_path_factory):
    return rewritten_as_tfrecord(prepared, tmp_path_factory.mktemp("tfrecord"))


def rewritten_as_tfrecord(prepared, folder):
    """Writes the prepared set with its records in TFRecord files, which only TensorFlow would write."""
    builder = MaxmapTiny(data_dir=str(prepared), file_format="array_record")
    target = folder / builder.data_path.relative_to(prepared)
    target.mkdir(parents=True)
    for file in builder.data_path.iterdir():
        if file.suffix == ".json":
            (target / file.name).write_text(file.read_text().replace("array_record", "tfrecord"))
    for split, info in builder.info.splits.items():
        for file in info.filepaths:
            from array_record.python.array_record_module import ArrayRecordReader

            records = ArrayRecordReader(str(file)).read_all()
            data = b"".join(map(tfrecord, records))
            (target / file.name.replace("array_record", "tfrecord")).write_bytes(data)
        assert split in ("train", "test")
    return folder


def test_tfds_as_tfrecord_is_read_by_index_without_tensorflow(prepared, as_tfrecord):
    one = open_source("tfds", prepared, "train", name="maxmap_tiny")
    other = open_source("tfds", as_tfrecord, "train", name="maxmap_tiny")
    assert [other[i] for i in range(len(other))] == [one[i] for i in range(6)] and other.classes == one.classes
    assert pickle.loads(pickle.dumps(other))[4] == one[4]
    part = open_source("tfds", as_tfrecord, "train[50%:]", name="maxmap_tiny")
    assert [part[i] for i in range(len(part))] == [one[i] for i in range(3, 6)]
    assert len(open_source("tfds", as_tfrecord, "val", name="maxmap_tiny")) == 3
    assert "tensorflow" not in sys.modules


def test_a_slice_without_images(prepared, as_tfrecord):
    for folder in (prepared, as_tfrecord):
        assert "'train[2:2]' of TFDS" in message("tfds", folder, "train[2:2]", name="maxmap_tiny")


def test_a_tfrecord_file_that_is_cut_off(as_tfrecord, tmp_path):
    shutil.copytree(as_tfrecord, tmp_path / "cut")
    (file,) = (tmp_path / "cut").rglob("*-train.tfrecord-*")
    data = file.read_bytes()
    file.write_bytes(data[:-3])
    assert "ends inside a record" in message("tfds", tmp_path / "cut", name="maxmap_tiny")
    length = struct.unpack("<Q", data[:8])[0]
    file.write_bytes(data[: 16 + length])
    assert "has 1 records" in message("tfds", tmp_path / "cut", name="maxmap_tiny")


def test_a_damaged_tfrecord_file_is_told(as_tfrecord, tmp_path):
    shutil.copytree(as_tfrecord, tmp_path / "damaged")
    (file,) = (tmp_path / "damaged").rglob("*-train.tfrecord-*")
    whole = file.read_bytes()
    (start, length), (second, _) = record_positions(str(file))[:2]

    def damage(position: int) -> None:
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])

    for position in (0, second - 12, start - 2):
        damage(position)
        assert "is damaged: its checksum is another" in message("tfds", tmp_path / "damaged", name="maxmap_tiny")
    for position in (start + length // 2, start + length + 1):
        damage(position)
        source = open_source("tfds", tmp_path / "damaged", name="maxmap_tiny")
        with pytest.raises(OSError, match=rf"record at byte {start} of {file} is damaged: its checksum is another"):
            source[0]
        assert source[1] == open_source("tfds", as_tfrecord, name="maxmap_tiny")[1]
        unchecked = open_source("tfds", tmp_path / "damaged", name="maxmap_tiny", verify=False)
        assert isinstance(unchecked[0], LabelledImage)


def feature(name: bytes, kind: int, value: bytes) -> bytes:
    def field(number, data):
        return bytes([number << 3 | 2, len(data)]) + data

    return field(1, field(1, name) + field(2, field(kind, field(1, value))))


@pytest.mark.parametrize(
    "features",
    [
        feature(b"label", 3, b"\1"),
        feature(b"image", 1, b"abc"),
        feature(b"image", 3, b"\1") + feature(b"label", 3, b"\1"),
        feature(b"image", 1, b"abc") + feature(b"label", 1, b"ant"),
    ],
)
def test_a_record_that_lacks_a_feature_is_a_broken_image(as_tfrecord, tmp_path, features):
    shutil.copytree(as_tfrecord, tmp_path / "odd")
    (file,) = (tmp_path / "odd").rglob("*-train.tfrecord-*")
    (start, length), *_ = record_positions(str(file))
    example = b"\x0a" + bytes([len(features)]) + features
    file.write_bytes(tfrecord(example) + file.read_bytes()[start + length + 4 :])
    data = open_data("tfds", tmp_path / "odd", name="maxmap_tiny", image_size=4, check=0, threads=1, val_split=None)
    with pytest.raises(OSError, match="lacks an image or its label"):
        data.train[0]
    batches = list(data.train_batches(6, seed=0, num_steps=1))
    assert sorted(batches[0]["skipped"].tolist()) == [-1] * 5 + [0]


@pytest.mark.parametrize("format", ["array_record", "tfrecord"])
def test_a_split_without_labels(tmp_path, format, monkeypatch):
    monkeypatch.setattr(MaxmapTiny, "_generate_examples", unlabelled)
    MaxmapTiny(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    folder = rewritten_as_tfrecord(tmp_path, tmp_path / "rewritten") if format == "tfrecord" else tmp_path
    text = message("tfds", folder, "train", name="maxmap_tiny")
    assert "split 'train' of TFDS data set 'maxmap_tiny' has no labels" in text and "train_split" in text


def unlabelled(self, num):
    for i in range(num):
        yield i, {"image": io.BytesIO(encoded(20 * i)), "label": -1}


def test_a_damaged_array_record_is_a_broken_image(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "damaged")
    (file,) = (tmp_path / "damaged").rglob("*-train.array_record-*")
    data = file.read_bytes()
    file.write_bytes(data[: len(data) * 4 // 5])
    source = open_source("tfds", tmp_path / "damaged", name="maxmap_tiny")
    with pytest.raises(OSError, match=r"maxmap_tiny/train\[2\] cannot be read: .*hash mismatch"):
        source[2]


def test_a_tfrecord_file_of_another_data_set(as_tfrecord, tmp_path):
    """One record more than the data set's own description says: an index would name another image."""
    shutil.copytree(as_tfrecord, tmp_path / "other")
    (file,) = (tmp_path / "other").rglob("*-train.tfrecord-*")
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    file.write_bytes(data[: 16 + length] + data)
    for split in ("train", "train[:2]", "train[50%:]"):
        text = message("tfds", tmp_path / "other", split, name="maxmap_tiny")
        assert "has 7 records" in text and "says 6" in text and str(file) in text


def test_slices_across_shards_are_read_where_they_lie(as_tfrecord, tmp_path):
    (file,) = as_tfrecord.rglob("*-train.tfrecord-*")
    records = [file.read_bytes()[start - 12 : start + length + 4] for start, length in record_positions(str(file))]
    shards = [tmp_path / str(number) for number in range(3)]
    for number, shard in enumerate(shards):
        shard.write_bytes(b"".join(records[2 * number : 2 * number + 2]))
    whole = TFRecords([FileInstruction(str(file), skip=0, take=6, examples_in_shard=6)])
    for start, stop in ((0, 6), (1, 6), (1, 2), (2, 4), (3, 6), (0, 3)):
        instructions = get_file_instructions(start, stop, list(map(str, shards)), [2, 2, 2])
        part = TFRecords(instructions)
        assert [part[i] for i in range(len(part))] == [whole[i] for i in range(start, stop)]


def test_examples_are_parsed_by_the_wire_format():
    # An Example by hand: bytes, a packed list of integers, one that is not packed, floats.
    def field(number, data):
        return bytes([number << 3 | 2, len(data)]) + data

    def feature(name, kind, values):
        return field(1, field(1, name) + field(2, field(kind, values)))

    packed, single = field(1, bytes([5, 0x96, 0x01])), bytes([1 << 3, 7])
    floats = field(1, struct.pack("<2f", 1, 2))
    record = field(
        1,
        feature(b"image", 1, field(1, b"abc"))
        + feature(b"label", 3, packed)
        + feature(b"one", 3, single)
        + feature(b"box", 2, floats),
    )
    assert parse_example(record) == {"image": [b"abc"], "label": [5, 150], "one": [7]}
    for end in range(1, len(record)):
        with pytest.raises(OSError, match="cannot be parsed: the data are cut off"):
            parse_example(record[:end])
    with pytest.raises(OSError, match="integer where bytes"):
        parse_example(bytes([1 << 3, 7]))
    with pytest.raises(OSError, match="utf-8"):
        parse_example(field(1, feature(b"\xff", 1, field(1, b"abc"))))


def pack(file, members: dict[str, bytes], mode: str = "w") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_a_plain_tar_is_the_folder_it_was_made_of(tree):
    folder = open_source("folder", tree, "train")
    files = {f"./train/{f.relative_to(tree / 'train')}": f.read_bytes() for f in (tree / "train").rglob("*.*")}
    files = {name.replace("deep/er/", ""): data for name, data in files.items()}
    first, second = dict(list(files.items())[:2]), dict(list(files.items())[2:])
    pack(tree / "train-0.tar", first | {"./train/ant/.hidden.png": b"", "LICENSE": b"text"})
    pack(tree / "train-1.tar", second)
    source = open_source("tar", tree, "train")
    assert source.classes == folder.classes and len(source) == len(folder)
    assert {(r.image, r.label) for r in source} == {(r.image, r.label) for r in folder}
    for i in range(len(source)):
        tar, _, name = source.name(i).partition(".tar/")
        assert tar.endswith(("train-0", "train-1")) and f"./{name}" in files
    assert pickle.loads(pickle.dumps(source))[3] == source[3]
    pack(tree / "val.tar", {"dog/x.png": encoded(10)})
    assert open_source("tar", tree, "val", classes=("dog", "ant", "cat"))[0].label == 0
    assert "'cow'" in message_of_tar(tree, {"cow/x.png": encoded(1)}, classes=("dog",))


def message_of_tar(folder, members, classes=None) -> str:
    pack(folder / "odd.tar", members)
    return message("tar", folder, "odd", classes=classes)


def test_web_dataset_shards(tmp_path):
    for shard in range(2):
        members = {}
        for i in range(3):
            members |= {f"{i:03}.png": encoded(10 * shard + i), f"{i:03}.cls": f"{i}\n".encode(), f"{i:03}.json": b"{}"}
        pack(tmp_path / f"set-train-{shard:06}.tar", members)
    source = open_source("tar", tmp_path, "train")
    assert [(pixel(r.image), r.label) for r in source] == [(0, 0), (1, 1), (2, 2), (10, 0), (11, 1), (12, 2)]
    assert source.classes == ("0", "1", "2")
    (tmp_path / "classes.txt").write_text("ant\ncat\ndog\ncow\n")
    assert open_source("tar", tmp_path, "train").classes == ("ant", "cat", "dog", "cow")
    (tmp_path / "classes.txt").write_text("ant\ncat\n")
    assert "002.png" in (text := message("tar", tmp_path, "train")) and "label 2" in text and "2 classes" in text


@pytest.fixture
def archive(tmp_path):
    """A tar of two images; the name of the second is so long that it has a header of its own."""
    pack(tmp_path / "train.tar", {"a/x.png": bytes(700), f"a/{'y' * 150}.png": bytes(600)})
    return tmp_path / "train.tar"


def test_a_damaged_or_cut_tar_is_told_wherever(archive):
    """No image is missing without a word, whatever the cut and the byte of a header that changed."""
    whole = archive.read_bytes()
    assert len(open_source("tar", archive.parent, "train")) == 2
    blocks = len(whole.rstrip(b"\0")) // 512 + 3
    for end in range(1, blocks * 512, 256):
        archive.write_bytes(whole[:end])
        if end < 512 * (blocks - 1):
            assert "cannot be read as an uncompressed tar" in message("tar", archive.parent, "train"), end
    headers = [block for block in range(blocks) if whole[512 * block + 257 : 512 * block + 262] == b"ustar"]
    assert len(headers) == 3 and whole[512 * headers[1] + 156 : 512 * headers[1] + 157] in b"xL"
    for position in (512 * block + byte for block in headers for byte in (0, 100, 124, 150, 156)):
        archive.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        assert "cannot be read as an uncompressed tar" in message("tar", archive.parent, "train"), position


def test_joined_tars_are_told(archive):
    archive.write_bytes(2 * archive.read_bytes())
    assert "more follows: unpack archives that were joined" in message("tar", archive.parent, "train")


def odd_tar(file, *infos: tarfile.TarInfo) -> None:
    with tarfile.open(file, "w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(made("a/x.png", size=9), io.BytesIO(bytes(9)))
        for info in infos:
            tar.addfile(info)


def test_links_and_lies_in_a_tar(tmp_path):
    file = tmp_path / "train.tar"
    odd_tar(file, made("a/again.png", type=tarfile.LNKTYPE, linkname="a/x.png"))
    source = open_source("tar", tmp_path, "train")
    assert len(source) == 2 and source[1] == source[0] and source.name(1).endswith("train.tar/a/again.png")
    for info, text in [
        (made("b/y.png", type=tarfile.LNKTYPE, linkname="b/x.png"), "'b/x.png', which does not stand before it"),
        (made("b/y.png", type=tarfile.SYMTYPE, linkname="../a/x.png"), "'b/y.png' is a symbolic link"),
        (made("b/y.png", type=tarfile.GNUTYPE_SPARSE, size=10**12), "train.tar cannot be read"),
        (made("b/y.png", size=10**12), "unexpected end of data"),
        (made("b/y.png", type=tarfile.XHDTYPE, size=10**12), "train.tar cannot be read"),
        (made("b/y.png", type=tarfile.GNUTYPE_LONGNAME, size=10**12), "train.tar cannot be read"),
        (made("b/y.png", size=-512), "train.tar cannot be read"),
    ]:
        odd_tar(file, info)
        assert text in message("tar", tmp_path, "train")


def test_a_sparse_map_without_end_is_no_endless_loop(tmp_path):
    records = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "b/y.png"}
    with tarfile.open(tmp_path / "train.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = made("b/y.png", size=512, pax_headers={**records, "GNU.sparse.realsize": str(10**12)})
        tar.addfile(info, io.BytesIO(b"999999999\n".ljust(512, b"1")))
    assert "train.tar cannot be read" in message("tar", tmp_path, "train")


@pytest.mark.parametrize("label", [b"100000000", b"9" * 5000, b"-1", b"1.5"])
def test_a_label_file_is_read_before_anything_is_made_of_its_number(tmp_path, label, monkeypatch):
    monkeypatch.setattr("maxmap.data.sources._read_class_names", None)
    text = message_of_tar(tmp_path, {"0.png": b"", "0.cls": label})
    assert "0.cls in" in text and "which is no class number from 0 to 999999" in text and len(text) < 300


def test_mistakes_in_tar_archives(tmp_path):
    assert "there are none" in message("tar", tmp_path, "train")
    pack(tmp_path / "train.tar.gz", {"a/x.png": encoded(1)}, "w:gz")
    assert "train.tar.gz lie there" in message("tar", tmp_path, "train")
    (tmp_path / "train.tar.gz").rename(tmp_path / "train.tar")
    assert "unpack a .gz" in message("tar", tmp_path, "train")
    pack(tmp_path / "train.tar", {"a/x.png": encoded(1), "a/y.png": bytes(2000)})
    (tmp_path / "train.tar").write_bytes((tmp_path / "train.tar").read_bytes()[:2500])
    assert "unexpected end of data" in message("tar", tmp_path, "train")
    assert "holds no images" in message_of_tar(tmp_path, {"a/x.txt": b""})
    assert "lies in no folder" in message_of_tar(tmp_path, {"x.png": b""})
    assert "1.png in" in message_of_tar(tmp_path, {"0.png": b"", "0.cls": b"0", "1.png": b""})
    assert "no class number" in message_of_tar(tmp_path, {"0.png": b"", "0.cls": b"ant"})
    assert "no path" in message("tar", None)


def test_tfds_mistakes(prepared):
    assert "--config.data.name" in message("tfds", prepared)
    assert "maxmap_tiny" in message("tfds", prepared, name="maxmap_tiney")
    assert "it has train, test" in message("tfds", prepared, "holdout", name="maxmap_tiny")
