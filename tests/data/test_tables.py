"""CSV files: what they say of each image, and a sentence with line and column for all that is wrong in them."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maxmap.data.pipeline import Data, open_data
from maxmap.data.tables import CELLS
from maxmap.errors import UserError
from maxmap.tasks import TASKS
from tests.tiny import write_image

NAMES = [f"photos/{number}.png" for number in range(5)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    for number, name in enumerate(NAMES):
        write_image(folder / name, number, number % 3)
    return folder


def opened(folder: Path, text: str, **options: Any) -> Data:
    """Opens a file of this text, whose rows name photos by their numbers; all of it is the training split."""
    for number, name in enumerate(NAMES):
        text = text.replace(f"<{number}>", name)
    (folder / "a.csv").write_bytes(text.encode())
    given = {"path": folder / "a.csv", "train_split": "", "val_split": None, "image_size": 8, **options}
    return open_data("csv", **given)


def labels_of(data: Data) -> list[Any]:
    assert data.train is not None
    stored = data.train.labels()
    assert stored is not None
    for index, label in enumerate(stored):
        np.testing.assert_array_equal(data.train[index].label, label)
    return stored.tolist()


SCORES = "image,1,2,3\n<0>,2,1,1\n<1>,0,0,0.5\n"


def test_the_names_of_the_tasks_are_the_same_everywhere():
    assert tuple(TASKS) == (*CELLS, "segmentation")  # whose masks are no cells of a table


@pytest.mark.parametrize(
    ("text", "options", "classes", "labels"),
    [
        ("image,label\n<0>,cat\n<1>, ant\n<2>,cat\n", {}, ("ant", "cat"), [1, 0, 1]),
        ("image,label\r\n<0>,cat\r\n<1>,ant\r\n", {"classes": ("cat", "bee", "ant")}, ("cat", "bee", "ant"), [0, 2]),
        ('\ufeffname,more,kind\n<0>,1,"a, b"\n\n', {"image_column": "name", "label_columns": ["kind"]}, ("a, b",), [0]),
        (
            "image,label\n<0>,dog|cat\n<1>,\n<2>, ant |dog\n",
            {"task": "multi_label"},
            ("ant", "cat", "dog"),
            [[0, 1, 1], [0, 0, 0], [1, 0, 1]],
        ),
        (
            "image,dog,cat\n<0>,1,0\n<1>,0,0\n",
            {"task": "multi_label", "label_columns": ["cat", "dog"]},
            ("cat", "dog"),
            [[0, 1], [0, 0]],
        ),
        (
            SCORES,
            {"task": "distribution", "label_columns": ["1", "2", "3"]},
            ("1", "2", "3"),
            [[0.5, 0.25, 0.25], [0, 0, 1]],
        ),
        (
            "image,age,size\n<0>,-1.5,2e3\n<1>,.5,+7.\n",
            {"task": "numbers", "label_columns": ["size", "age"]},
            ("size", "age"),
            [[2000, -1.5], [7, 0.5]],
        ),
    ],
)
def test_what_a_file_says(photos, text, options, classes, labels):
    data = opened(photos, text, **options)
    assert data.classes == classes and labels_of(data) == labels
    assert data.train is not None and [data.train.name(i) for i in range(data.num_train)] == [
        str(photos / name) for name in NAMES[: len(labels)]
    ]
    assert len(pickle.loads(pickle.dumps(data.train))) == len(labels)


def test_one_file_with_a_column_of_splits_equals_a_file_for_each(photos, tmp_path):
    rows = {"train": ["<0>,b", "<2>,a", "<3>,b"], "val": ["<1>,b", "<4>,b"]}
    text = "split,image,label\n" + "".join(f"{split},{row}\n" for split in rows for row in rows[split])
    one = opened(photos, text, train_split="train", val_split="val")
    for split in rows:
        lines = "".join(f"{photos / NAMES[int(row[1])]}{row[3:]}\n" for row in rows[split])
        (tmp_path / f"{split}.csv").write_text("image,label\n" + lines)
    other = open_data("csv", tmp_path, image_size=8)
    for a, b in ((one.train, other.train), (one.val, other.val)):
        assert a is not None and b is not None
        np.testing.assert_array_equal(a.labels(), b.labels())
        assert a.classes == b.classes == ("a", "b")
        assert [a.name(i) for i in range(len(a))] == [b.name(i) for i in range(len(b))]


@pytest.mark.parametrize(("task", "columns"), [("single_label", ["label"]), ("numbers", ["age", "size"])])
def test_going_on_and_sharing_give_the_same_batches(photos, task, columns):
    """Of a run's order, by which a run resumes bit for bit: a step's rows depend on nothing but seed and step."""
    text = "image,label,age,size\n" + "".join(f"<{k}>,{'ab'[k % 2]},{k},{k * k}\n" for k in range(5))
    data = opened(photos, text, val_split="", task=task, label_columns=columns)
    whole = list(data.train_batches(4, seed=1, num_steps=6))
    later = list(data.train_batches(4, seed=1, num_steps=3, start_step=3))
    parts = [list(data.train_batches(4, seed=1, num_steps=6, process_index=k, process_count=2)) for k in (0, 1)]
    labels = np.asarray(labels_of(data), np.float32 if task == "numbers" else np.int32)
    for step, batch in enumerate(whole):
        assert batch["label"].dtype == labels.dtype
        np.testing.assert_array_equal(batch["label"], labels[batch["index"]])
        for key in batch:
            np.testing.assert_array_equal(np.concatenate([part[step][key] for part in parts]), batch[key])
            if step >= 3:
                np.testing.assert_array_equal(later[step - 3][key], batch[key])
    (rows,) = data.eval_batches(8)
    assert rows["mask"].tolist() == [True] * 5 + [False] * 3
    np.testing.assert_array_equal(rows["label"][:5], labels)
    assert not rows["label"][5:].any()


def test_labels_follow_the_classes_of_a_checkpoint(photos):
    data = opened(photos, "image,label\n<0>,dog|cat\n<1>,cat\n", val_split="", task="multi_label")
    other = data.with_classes(("dog", "emu", "cat"), "the checkpoint")
    assert labels_of(other) == [[1, 0, 1], [0, 0, 1]]
    (rows,) = other.eval_batches(2)
    np.testing.assert_array_equal(rows["label"], [[1, 0, 1], [0, 0, 1]])


LABEL = "image,label\n<0>,cat\n"
NUMBER = {"task": "numbers", "label_columns": ["age"]}
COUNTS = {"task": "distribution", "label_columns": ["1", "2", "3"]}
SEVERAL = {"task": "multi_label"}
EACH = {"task": "multi_label", "label_columns": ["cat", "dog"]}


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("", {}, "a.csv has no header: name the columns in its first line."),
        ("\n\n", {}, "a.csv has no header"),
        ("image,label,label\n", {}, "has two columns 'label'"),
        ("image,label\n", {}, "a.csv has no rows: add some"),
        ("image;label\n<0>;cat\n", {}, "has its columns between ';': save it with commas."),
        (
            "file,label\n<0>,cat\n",
            {},
            "no column 'image' (data.image_column); the nearest are file, label: rename one in the file, or train with",
        ),
        ("image,lable\n<0>,cat\n", {}, "no column 'label' (data.label_columns); the nearest are lable, image: "),
        (LABEL, {"label_columns": ["age", "size"]}, "no column 'age'"),
        ("image,label\n<0>,cat\n\n<1>,dog\n", {}, "line 3 of "),
        ("image,label\n,\n<1>,dog\n", {}, "a.csv is empty: remove it."),
        ("image,label\n<0>,a,b\n", {}, "line 2 of {a.csv} has 3 columns, and the header has 2: correct it"),
        ("image,label\n<0>\n", {}, "has 1 columns, and the header has 2"),
        ("image,label\n,cat\n", {}, "line 2, column 'image' of {a.csv} names no image: give the path of one"),
        ("image,label\nphotos/9.png,cat\n", {}, "line 2, column 'image' of {a.csv} names 'photos/9.png', which is no "),
        ("image,label\nnowhere/9.png,cat\n", {}, "which is no file: correct the path."),
        ("image,label\n\0,cat\n", {}, "which is no file"),
        (
            "image,label\n<0>,cat\n<1>,cat\n<0>,dog\n",
            {},
            "line 4, column 'image' of {a.csv} names 'photos/0.png' again, as ",
        ),
        ('image,label\n"<0>\n1",cat\n<1>,\n', {"label_columns": ["label"]}, "line 3, column 'image'"),
        ("image,label\n<0>,\n", {}, "line 2, column 'label' of {a.csv} is empty: name the class of the image."),
        (
            LABEL,
            {"classes": ["dog", "car"]},
            "line 2, column 'label' of {a.csv} names 'cat', which is not among the 2 ",
        ),
        (LABEL, {"classes": ["dog", "dog"]}, "the training split has 2 classes with the name 'dog'"),
        (
            "image,age\n<0>,1\n<1>,1.5 kg\n",
            NUMBER,
            "line 3, column 'age' of {a.csv} is '1.5 kg': give a number, with a ",
        ),
        ("image,age\n<0>,\n", NUMBER, "line 2, column 'age' of {a.csv} is empty: give a number, or leave the row out."),
        ("image,age\n<0>,nan\n", NUMBER, "is 'nan': give a number"),
        ("image,age\n<0>,1e39\n", NUMBER, "is '1e39': give a number"),
        ("image,age\n<0>,1_0\n", NUMBER, "is '1_0': give a number"),
        ("image,age\n<0>,٣\n", NUMBER, "is '٣': give a number"),
        ('image,age\n<0>,"1,5"\n', NUMBER, "is '1,5': give a number, with a point and no unit."),
        ("image,1,2,3\n<0>,1,-2,3\n", COUNTS, "line 2, column '2' of {a.csv} is -2: a count or a share is 0 or more."),
        ("image,1,2,3\n<0>,0,0,0\n", COUNTS, "line 2, column '1' of {a.csv} and the other scores are all 0: leave "),
        (
            SCORES,
            {**COUNTS, "label_columns": ["1"]},
            "data.label_columns names 1 column, and a distribution has one for",
        ),
        (SCORES, {"label_columns": ["1", "2"]}, "data.label_columns names 2 columns, and a class stands in one"),
        ("image,label\n<0>,a||b\n", SEVERAL, "line 2, column 'label' of {a.csv} is 'a||b': leave no label empty."),
        ("image,label\n<0>,\n", SEVERAL, "column 'label' of {a.csv} has no label at all"),
        (LABEL, {**SEVERAL, "separator": ""}, "data.separator is empty"),
        (
            "image,cat,dog\n<0>,1,2\n",
            EACH,
            "line 2, column 'dog' of {a.csv} is '2': give 1 if the image has the label, ",
        ),
        (
            "image,cat,dog\n<0>,1,0\n",
            {**EACH, "classes": ["a", "b"]},
            "data.classes is set, and data.label_columns names",
        ),
        (
            LABEL,
            {"train_split": "train"},
            "has no column 'split' (data.split_column), so it does not say which rows are",
        ),
        ("image,label,split\n<0>,a,dev\n", {"train_split": "train"}, "no rows of the split 'train', only of dev: "),
        (LABEL, {"path": None}, "no path to the labels is set"),
        (LABEL, {"path": "nowhere.csv"}, "there is no CSV file nowhere.csv: give another path"),
        ('image,label\n"<0>,cat\n', {}, "as CSV (unexpected end of data): save it as UTF-8 with commas."),
        ("image,label\n" + "x" * 200_000, {}, "as CSV (field larger than field limit (131072))"),
        (LABEL, {"balanced": True, **NUMBER, "label_columns": ["label"]}, "is 'cat': give a number"),
    ],
)
def test_what_is_wrong_is_one_sentence(photos, text, options, words):
    with pytest.raises(UserError) as caught:
        opened(photos, text, **options)
    said = str(caught.value)
    assert words.replace("{a.csv}", str(photos / "a.csv")) in said and said.endswith(".") and "\n" not in said


def test_bytes_that_are_no_utf8(photos):
    (photos / "b.csv").write_bytes(b"image,label\nphotos/0.png,caf\xe9\n")
    with pytest.raises(UserError, match=r"cannot read .*b.csv as CSV .*: save it as UTF-8 with commas"):
        open_data("csv", photos / "b.csv", train_split="", val_split=None)


def test_a_folder_without_the_file_of_a_split(photos):
    (photos / "test.csv").write_text(f"image,label\n{NAMES[0]},cat\n")
    with pytest.raises(UserError, match=r"there is no dev.csv in .*test.csv.* lies: name the splits"):
        open_data("csv", photos, train_split="dev", val_split=None)


def test_what_belongs_to_csv_files_or_classes_alone(photos):
    with pytest.raises(UserError, match=r"data source 'digits' gives each image one class, and config.data.task is"):
        open_data("digits", task="numbers")
    with pytest.raises(
        UserError, match=r"data.balanced needs one class for each image, and config.data.task is 'numbers'"
    ):
        opened(photos, "image,age\n<0>,1\n", balanced=True, **NUMBER)


def fold(photos: Path, text: str, number: int, **options: Any) -> tuple[list[str], list[str]]:
    """The names of the images that train, and of those that are evaluated."""
    data = opened(photos, text, folds=3, fold=number, val_split="val", **options)
    return tuple([each.name(i) for i in range(len(each))] for each in (data.train, data.val))


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    for number in range(14):
        write_image(folder / "train" / "aab"[number % 3] / f"{number:02}.png", number, 0)
    return folder


@pytest.mark.parametrize("task", ["single_label", "numbers"])
def test_folds_divide_the_training_split(many, task):
    rows = [f"{path.relative_to(many)},{path.parent.name},{path.stem}" for path in sorted(many.rglob("*.png"))]
    text = "image,label,age\n" + "\n".join(rows)
    options = {"task": task, "label_columns": ["label" if task == "single_label" else "age"]}
    found = [fold(many, text, number, **options) for number in range(3)]
    everything = sorted(name for _, val in found for name in val)
    assert everything == sorted(map(str, many.rglob("*.png")))
    for train, val in found:
        assert sorted(train + val) == everything and len(val) in (4, 5)
        if task == "single_label":  # 10 of a, 4 of b
            assert sum("/b/" in name for name in val) in (1, 2)
    assert fold(many, text, 1, **options) == found[1] != fold(many, text, 1, fold_seed=1, **options)


def test_folds_of_a_folder_are_those_of_its_csv_file(many):
    rows = [f"{path.relative_to(many)},{path.parent.name}" for path in sorted(many.rglob("*.png"))]
    found = fold(many, "image,label\n" + "\n".join(rows), 2)
    data = open_data("folder", many, folds=3, fold=2, image_size=8)
    for source, names in zip((data.train, data.val), found, strict=True):
        assert source is not None and [source.name(i) for i in range(len(source))] == names
        assert source.classes == ("a", "b") and source.labels().tolist() == [
            "ab".index(n.split("/")[-2]) for n in names
        ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"folds": 3, "fold": 3}, r"data.fold is 3: give one of the folds, from 0 to 2."),
        ({"folds": 99}, r"there are 14 training images for data.folds=99: give fewer folds."),
        ({"folds": 3, "train_split": None}, r"data.folds divides the training split: set --config.data.train_split."),
        ({"folds": 1}, r"data.folds is 1: give a value of type int of at least 2 or None."),
    ],
)
def test_folds_that_there_are_not(many, options, words):
    with pytest.raises(UserError, match=words):
        open_data("folder", many, image_size=8, **options)
