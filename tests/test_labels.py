"""ImageNet's relatives are counted as their authors count, by hand on a few images."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxmap import checkpoint
from maxmap.__main__ import main
from maxmap.errors import UserError
from maxmap.labels import read_real, real_labels
from maxmap.predictions import accuracies, make_rows, read_csv, to_csv
from tests.tiny import create_tiny, preprocessing, write_image

pytestmark = pytest.mark.usefixtures("tiny_models")

WORDNET = [f"n{number:08}" for number in range(1000)]


# Three images that count, two branches: the label's ranks among the averaged logits are 1, 3 and 6.
BATCH = {
    "index": np.array([7, 8, 9, -1]),
    "label": np.array([1, 2, 3, 0]),
    "mask": np.array([True, True, True, False]),
}
FOUND = {
    "best": np.array([[1, 0, 2, 3, 4], [4, 1, 2, 0, 3], [0, 1, 2, 4, 5], [0, 0, 0, 0, 0]]),
    "rank": np.array([1, 3, 6, 1]),
    "probability": np.array([0.5, 0.25, 0.123456789, 0.0]),
    "label_probability": np.array([0.5, 0.125, 1.23456789e-9, 0.0]),
    "branch": np.array([[1, 2, 0, 0], [1, 4, 3, 0]]),
    "branch_rank": np.array([[1, 1, 4, 1], [1, 2, 1, 1]]),
}
ROWS = make_rows(BATCH, FOUND, lambda index: f"image{index}")


def test_counting_by_hand():
    assert accuracies(ROWS) == {
        "images": 3,
        "top1": pytest.approx(100 / 3),
        "top5": pytest.approx(200 / 3),
        "branch_top1": [pytest.approx(200 / 3), pytest.approx(200 / 3)],
    }


def test_several_labels_or_none():
    right = {7: [], 8: [4, 9], 9: [3, 5]}
    assert accuracies(ROWS, right) == {"images": 2, "top1": 50.0, "top5": 100.0, "branch_top1": [0.0, 100.0]}
    with pytest.raises(UserError, match="none of the images"):
        accuracies(ROWS, {7: [], 8: [], 9: []})


def test_the_file_of_predictions_is_read_back():
    found = read_csv(to_csv({"ema": ROWS, "raw": ROWS[:1]}), "ema")
    assert found.name == ("image7", "image8", "image9") and found.index.tolist() == [7, 8, 9]
    for key, wanted in {"label": BATCH["label"], "best": FOUND["best"][:, 0], "rank": FOUND["rank"]}.items():
        assert getattr(found, key).tolist() == wanted[:3].tolist()
    assert found.branch.tolist() == FOUND["branch"][:, :3].tolist()
    np.testing.assert_allclose(found.probability, FOUND["probability"][:3], rtol=1e-5)
    np.testing.assert_allclose(found.label_probability, FOUND["label_probability"][:3], rtol=1e-5)
    for text in ("", "a,b\n1,2\n", to_csv({"ema": ROWS}), to_csv({"raw": ROWS}).replace("image8,2", "image8,two")):
        with pytest.raises(ValueError):
            read_csv(text, "raw")


def test_the_file_of_predictions():
    lines = to_csv({"ema": ROWS[:1], "raw": ROWS[1:2]}).splitlines()
    assert lines == [
        "weights,index,name,label,rank,top1,top2,top3,top4,top5,branch0,branch0_rank,branch1,branch1_rank,"
        "probability,label_probability",
        "ema,7,image7,1,1,1,0,2,3,4,1,1,1,1,0.5,0.5",
        "raw,8,image8,2,3,4,1,2,0,3,2,1,4,2,0.25,0.125",
    ]


def test_names_of_real(tmp_path):
    (tmp_path / "real.json").write_text("[[1, 2], [], [7]]")
    labels = read_real(tmp_path / "real.json")
    assert real_labels(labels, "val/n01/ILSVRC2012_val_00000003.JPEG") == [7]
    for name in ("ILSVRC2012_val_00000004.JPEG", "ILSVRC2012_val_00000000.JPEG", "cat.png"):
        with pytest.raises(UserError, match="none of the 3 validation images"):
            real_labels(labels, name)
    for content in ('{"a": 1}', '{"": 1}', "{}", "[1]", "[[true]]", "[[1000]]", "[[-1]]", "[" * 10_000, '[["a"]]'):
        (tmp_path / "real.json").write_text(content)
        with pytest.raises(UserError, match=r"is not ReaL's real.json"):
            read_real(tmp_path / "real.json")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of a network with ImageNet's classes."""
    workdir = tmp_path_factory.mktemp("run")
    variables = create_tiny("tiny", num_classes=1000).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    info = {
        "model": {"name": "tiny", "num_classes": 1000},
        "classes": WORDNET,
        "step": 3,
        "preprocessing": preprocessing(),
    }
    checkpoint.write_variables(workdir, variables, info)
    return workdir


def result(workdir, labels):
    return json.loads((workdir / f"eval_{labels}.json").read_text())


def test_relatives_of_imagenet(trained, tmp_path, capsys):
    for i in range(6):
        write_image(tmp_path / "v2" / str(i * 100) / f"{i}.png", i, i % 3)
        write_image(tmp_path / "a" / WORDNET[i * 100] / f"{i}.png", i, i % 3)
        write_image(tmp_path / "val" / WORDNET[i * 100] / f"ILSVRC2012_val_{i + 1:08}.png", i, i % 3)
    for labels, folder in (("v2", "v2"), ("a", "a"), ("sketch", "a")):
        assert main(["validate", str(trained), str(tmp_path / folder), f"--labels={labels}"]) == 0
        assert result(trained, labels)["images"] == 6
    capsys.readouterr()
    # Folder "500" is label 500 although it comes behind "100" and before "a" in the alphabet.
    rows = (trained / "predictions_v2.csv").read_text().splitlines()[1:]
    assert sorted(int(row.split(",")[3]) for row in rows) == [0, 100, 200, 300, 400, 500]
    # Only six classes are candidates for A, so every prediction is one of them; of Sketch, all are.
    candidates = {str(i * 100) for i in range(6)}
    for labels, inside in (("a", True), ("sketch", False)):
        rows = (trained / f"predictions_{labels}.csv").read_text().splitlines()[1:]
        assert all((row.split(",")[5] in candidates) == inside for row in rows)
    assert result(trained, "a")["top1"] >= result(trained, "sketch")["top1"]

    best = [int(row.split(",")[5]) for row in (trained / "predictions_sketch.csv").read_text().splitlines()[1:]]
    (tmp_path / "real.json").write_text(json.dumps([[best[0], 3], [], [best[2]], [0], [1], [2]]))
    argv = ["validate", str(trained), str(tmp_path / "val"), "--labels=real"]
    assert main([*argv, f"--file={tmp_path / 'real.json'}"]) == 0
    assert result(trained, "real")["images"] == 5 and result(trained, "real")["top1"] == 40.0
    assert "\nreal * Acc@1 40.000 (60.000) Acc@5" in capsys.readouterr().out
    assert main(argv) == 2
    assert "--labels=real needs --file=real.json" in capsys.readouterr().err
