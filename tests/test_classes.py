"""Names of classes decide wherever the classes of a checkpoint meet those of data or of another checkpoint."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from maxmap import checkpoint, classes, evaluate, wordnet
from maxmap.checkpoint import average_checkpoints
from maxmap.config import bind
from maxmap.data.pipeline import open_data
from maxmap.errors import UserError
from maxmap.train import loop
from maxmap.train.start import _fit_classes, find_checkpoint
from tests.tiny import create_tiny, preprocessing, settings_for, write_image

TINY = {"name": "tiny", "norm": False, "constant": False}


def write_classes(root: Path, *names: str, colors: tuple[int, ...] = (0, 1, 2)) -> Path:
    """Writes images of a colour for each class name, four for each split."""
    for split in ("train", "val"):
        for name, color in zip(names, colors, strict=False):
            for i in range(4):
                write_image(root / split / name / f"{i}.png", 10 * color + i, color)
    return root


def save(workdir: Path, names: list[str], source: str | None = "folder", value: float = 0.0) -> Path:
    """Writes a checkpoint with these classes; None for a source that is not one of ours."""
    model = create_tiny(**TINY, num_classes=len(names))
    variables = jax.tree.map(np.array, dict(jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))))
    info = {
        "model": {**TINY, "num_classes": len(names)},
        "classes": names,
        "preprocessing": preprocessing(),
        "step": 1,
    }
    config = {} if source is None else {"config": {"data": {"source": source}}}
    checkpoint.write_variables(workdir, jax.tree.map(lambda x: x + value, variables), {**info, **config})
    return workdir


@pytest.mark.parametrize("own, wanted", [(("a", "b", "c"), [0, 1, 2]), (("c", "a"), [2, 0]), ((), [])])
def test_classes_are_found_by_their_names(own, wanted):
    assert classes.match(own, ("a", "b", "c"), "the data", "the run").tolist() == wanted


@pytest.mark.parametrize(
    "own, known, says",
    [
        (("b", "dogs"), ("b", "cat", "dog"), r"class 'dogs' of the data \(1 such\) is not among the 3 .*nearest: dog"),
        (("b", "b"), ("a", "b"), r"the data has 2 classes with the name 'b' \(numbers 0, 1\)"),
        (("b",), ("b", "a", "a"), r"the run has 2 classes with the name 'a' \(numbers 1, 2\)"),
        (("b", " "), ("b",), "class 1 of the data has no name"),
    ],
)
def test_names_that_match_nothing_or_twice_are_one_sentence(own, known, says):
    with pytest.raises(UserError, match=says) as error:
        classes.match(own, known, "the data", "the run")
    assert str(error.value).endswith(".")


@pytest.mark.parametrize(
    "content, wanted",
    [
        (b"\xef\xbb\xbfant\ncat\n", ["ant", "cat"]),
        (b"ant\r\ncat\r\n\r\n", ["ant", "cat"]),
        ("ant\u2028bee\ncät".encode(), ["ant\u2028bee", "cät"]),
    ],
    ids=["byte-order mark", "blank at the end", "separators inside of a name"],
)
def test_a_file_names_a_class_in_every_line(tmp_path, content, wanted):
    (tmp_path / "classes.txt").write_bytes(content)
    assert classes.read_names(tmp_path / "classes.txt") == wanted


@pytest.mark.parametrize(
    "content, says",
    [
        (b"ant\n\ncat", "line 2 of .*classes.txt is blank"),
        (b"\nant\ncat", "line 1 of .*classes.txt is blank"),
        (b"", "line 1 of .*classes.txt is blank"),
        (b"ant\ncat\nant", r"classes.txt has 2 classes with the name 'ant' \(numbers 0, 2\)"),
        ("ant\ncät".encode("utf-16"), "cannot read .*classes.txt .*UTF-8"),
    ],
)
def test_a_file_that_would_shift_names_is_refused(tmp_path, content, says):
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(UserError, match=says):
        classes.read_names(tmp_path / "classes.txt")


@pytest.mark.parametrize("given", [("0", "1", "1"), tuple("0123456788")])
def test_names_given_twice_in_python_are_refused(given):
    with pytest.raises(UserError, match="2 classes with the name"):
        open_data("digits", image_size=8, classes=given)


def test_a_class_folder_that_leads_nowhere_is_named(tmp_path):
    write_classes(tmp_path, "a", "b")
    (tmp_path / "train" / "c").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=f"{tmp_path}/train/c is a link to {tmp_path}/gone, which does not"):
        open_data("folder", tmp_path, image_size=8)


@pytest.mark.usefixtures("tiny_models")
def test_one_class_alone_is_told(tmp_path):
    write_classes(tmp_path / "images", "a")
    with pytest.raises(UserError, match="the training data has one class alone, 'a'"):
        loop.run(bind(settings_for(tmp_path / "images")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def evaluated(tmp_path: Path, workdir: Path) -> dict:
    return evaluate.run(bind(settings_for(tmp_path, model=TINY)), workdir)


@pytest.mark.usefixtures("tiny_models")
def test_evaluation_matches_names(tmp_path, capfd):
    """The same images under the same names give the same figures, whatever stands beside them in the folder."""
    workdir = save(tmp_path / "run", ["c", "a", "b"])
    whole = evaluated(write_classes(tmp_path / "whole", "a", "b", "c"), workdir)
    rows = (workdir / "predictions.csv").read_text().splitlines()[1:]
    assert [line.split(",")[3] for line in rows] == 4 * ["1"] + 4 * ["2"] + 4 * ["0"]  # a, b, c
    part = evaluated(write_classes(tmp_path / "part", "b", "c", colors=(1, 2)), workdir)
    assert "classes" not in whole and part["classes"] == "2 of 3" and part["images"] == 8
    assert json.loads((workdir / "eval.json").read_text()) == part
    assert "the data has 2 of the 3 classes of" in capfd.readouterr().err
    assert (workdir / "predictions.csv").read_text().splitlines()[1].split(",")[3] == "2"  # b
    before = (workdir / "eval.json").read_bytes()
    with pytest.raises(
        UserError, match=r"class 'z' of the data \(1 such\) is not among the 3 classes of the checkpoint"
    ):
        evaluated(write_classes(tmp_path / "other", "b", "c", "z"), workdir)
    assert (workdir / "eval.json").read_bytes() == before


@pytest.mark.usefixtures("tiny_models")
def test_where_only_numbers_are_known_they_decide_and_this_is_said(tmp_path, capfd):
    images = write_classes(tmp_path / "images", "a", "b", "c")
    assert evaluated(images, save(tmp_path / "converted", ["0", "1", "2"], source=None))["images"] == 12
    assert "has numbers in place of class names: 'a' of the data is taken for '0'" in capfd.readouterr().err
    with pytest.raises(UserError, match="num_classes is 4 there and 3 here"):
        evaluated(images, save(tmp_path / "four", ["0", "1", "2", "3"], source=None))
    with pytest.raises(UserError, match="class 'a' of the data"):  # folders named 0, 1, 2 have names
        evaluated(images, save(tmp_path / "folders", ["0", "1", "2"]))


@pytest.mark.usefixtures("tiny_models")
def test_a_run_goes_on_with_its_own_classes_only(tmp_path):
    images = write_classes(tmp_path / "images", "a", "b", "c")
    settings = settings_for(images, steps=1, model={"name": "tiny"})
    loop.run(bind(settings), tmp_path / "run")
    (images / "train" / "a").rename(images / "train" / "z")
    (images / "val" / "a").rename(images / "val" / "z")
    for allow in (False, True):
        with pytest.raises(UserError, match=r"other classes: .*lacks 'a', has 'z' \(nearest: .*init_from="):
            loop.run(bind({**settings, "steps": 2}), tmp_path / "run", allow_changes=allow)
    shutil.rmtree(images / "train" / "z")
    shutil.rmtree(images / "val" / "z")
    with pytest.raises(UserError, match="lacks 'a'"):
        loop.run(bind({**settings, "steps": 2}), tmp_path / "run")


@pytest.mark.usefixtures("tiny_models")
def test_a_run_keeps_the_order_of_its_checkpoint(tmp_path):
    """Class names in another order are the same classes: labels follow the checkpoint."""
    workdir = save(tmp_path / "run", ["c", "a", "b"])
    recipe = bind(settings_for(write_classes(tmp_path / "images", "a", "b", "c"), model=TINY))
    data = recipe.data()
    _, changes, moved = find_checkpoint(recipe, workdir, data, recipe.mesh(), allow_changes=True)
    assert "the order of the classes" in changes[-1]
    assert moved.classes == ("c", "a", "b") and moved.train.classes == moved.val.classes
    assert [moved.train[i].label for i in (0, 4, 8)] == [1, 2, 0] and moved.train.name(0) == data.train.name(0)


def test_a_start_fits_the_classifier_to_the_names(tmp_path):
    data = open_data("folder", write_classes(tmp_path, "a", "b", "c"), image_size=8)
    config = {"config": {"data": {"source": "folder"}}}
    assert _fit_classes({"classes": ["a", "b", "c"], **config}, data) == ({}, "")
    assert _fit_classes({"classes": ["a", "b"], **config}, data) == ({}, "")  # another number: initialised as ever
    options, said = _fit_classes({"classes": ["c", "a", "b"], **config}, data)
    assert options == {"class_map": [1, 2, 0]} and "order" in said
    options, said = _fit_classes({"classes": ["b", "c", "z"], **config}, data)
    assert options == {"other_classes": True} and "its classes (b, c, z) are not those of the data (a, b, c)" in said
    options, said = _fit_classes({"classes": ["0", "1", "2"]}, data)
    assert options == {} and "numbers decide" in said


def test_a_start_finds_classes_of_imagenet_by_their_ids(tmp_path):
    """A checkpoint of 21k for data of three classes, one of which it lacks."""
    names = ("n01440764", "n02510455", "n04399382")
    data = open_data("folder", write_classes(tmp_path, *names), image_size=8)
    large = wordnet.classes(21841)
    options, said = _fit_classes({"classes": large}, data)
    assert options == {"class_map": [large.index(names[0]), large.index(names[1]), -1]}
    assert said == "\n2 of the 3 classes get their weights by WordNet id, the other 1 the mean of all"
    options, said = _fit_classes({"classes": [str(i) for i in range(21841)]}, data)
    assert options == {} and said == ""


def test_averages_need_the_same_classes(tmp_path):
    first = save(tmp_path / "first", ["a", "b", "c"])
    same = average_checkpoints([first, save(tmp_path / "same", ["a", "b", "c"], value=1.0)])
    assert same[1]["classes"] == ["a", "b", "c"]
    for names, says in ((["b", "c", "z"], "other classes"), (["b", "a", "c"], "the same classes in another order")):
        other = save(tmp_path / "".join(names), names)
        with pytest.raises(UserError, match=rf"was trained on {says} than .*first: class 0 is 'b' there"):
            average_checkpoints([first, other])
