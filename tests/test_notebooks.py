"""The notebooks run in small; one of them goes the whole way, from a folder of pictures to an answer over HTTP.

Their code cells run here in order, in an empty folder. The first one holds the parameters, some of which a test sets. A
line `!maxmap ...` is the command, which has to succeed.
"""

import csv
import functools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest

import maxmap
from maxmap.__main__ import main
from maxmap.serve.limits import Limits
from maxmap.serve.network import Network
from tests.serve.test_serve import ask, serving
from tests.tiny import ROOT, files

NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
COMMAND = re.compile(r"^!maxmap (.*)$", re.MULTILINE)
# One block of 8 channels on one device, and nothing that compiles long.
START = (
    "--config.model.name=convnext_tiny --config.model.depths=(1,) --config.model.embed_dim=(8,)"
    " --config.data.image_size=32 --config.dtype=float32 --config.batch_size=8 --config.mesh.data=1"
    " --config.augment.rand_augment=None"
)


def cells_of(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text("utf-8"))["cells"]


def execute(name: str, **parameters: Any) -> dict[str, Any]:
    """Runs a notebook with other parameters, and returns its variables."""

    def command(line: str) -> None:
        assert main(shlex.split(line)) == 0, line

    path = ROOT / "notebooks" / f"{name}.ipynb"
    first, *others = ["".join(cell["source"]) for cell in cells_of(path) if cell["cell_type"] == "code"]
    session: dict[str, Any] = {"command": command}
    exec(first, session)
    assert parameters.keys() <= session.keys()
    session |= parameters
    for text in others:
        exec(compile(COMMAND.sub(r'command(f"\1")', text), path.name, "exec"), session)
    return session


@pytest.mark.long
def test_the_whole_way(tmp_path, monkeypatch, quick_compilation):
    """Check, split, train, report, explain, export, embed by the notebook; then serve, and ask."""
    monkeypatch.chdir(tmp_path)
    session = execute("finetune_your_photos", PER_CLASS=12, EPOCHS=1, START=START)
    photos, train, val = (files(Path("runs") / name) for name in ("photos", "split/train", "split/val"))
    assert train | val == photos and len(train) + len(val) == len(photos) == 36
    assert 3 <= len(val) <= 9  # a fifth, or less where there are copies

    assert session["result"]["images"] == len(val)
    page = Path("runs/mine/report.html").read_text()
    assert all(name in page for name in ("circle", "square", "triangle"))
    (explained,) = json.loads(Path("runs/explained/explain.json").read_text())
    assert explained["image"] == str(session["image"])

    logits = session["logits"]
    for name in ("ONNX", "StableHLO"):  # float32, other programs
        np.testing.assert_allclose(logits[name], logits["checkpoint"], rtol=1e-4, atol=1e-5)
    with Path("runs/embeddings.csv").open() as file:
        rows = {
            row["image"]: [row[name] for name in row if re.fullmatch(r"e\d+", name)] for row in csv.DictReader(file)
        }
    assert rows.keys() == {f"runs/split/val/{name}" for name in val}
    embed = jax.jit(functools.partial(session["model"].apply, method="embed"))
    own = embed(session["variables"], session["pixels"])[0]
    np.testing.assert_allclose(np.float32(rows[str(session["image"])]), own, rtol=1e-4, atol=1e-5)

    network = Network("runs/mine", (1,))
    network.compile(explained=False)
    with serving(network, Limits()) as port:
        status, _, content = ask(port, "/predict?top=3", session["image"].read_bytes())
    answer = {row["class"]: row["probability"] for row in json.loads(content)["classes"]}
    expected = dict(maxmap.predict("runs/mine", [session["image"]], top=3)[0])
    assert status == 200 and answer.keys() == expected.keys() == set(session["info"]["classes"])
    softmax = np.asarray(jax.nn.softmax(logits["checkpoint"][0]))
    for name, probability in zip(session["info"]["classes"], softmax, strict=True):
        assert answer[name] == pytest.approx(expected[name], rel=1e-4) == pytest.approx(probability, rel=1e-4)


@pytest.mark.long
def test_a_backbone_of_ones_own(quick_compilation):
    """Both heads learn within some steps, and what is drawn adds up to the logits."""
    session = execute("map_on_your_backbone", STEPS=20, BATCH=32, BRANCHES=1)
    assert all(accuracy > 0.2 for accuracy in session["accuracy"].values())  # chance is 0.1, with a deviation of 0.016
    found = session["found"]
    assert found.attention.shape == (6, 1, 2, 8, 8) and found.attention.min() >= 0
    np.testing.assert_allclose(found.shares.sum((1, 2)) + found.bias, found.logits, rtol=1e-4, atol=1e-4)
    assert len(session["figure"].axes) == 18
    plt.close(session["figure"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_have_no_outputs(path):
    """They would be of another run than the reader's."""
    code = [cell for cell in cells_of(path) if cell["cell_type"] == "code"]
    assert code and all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
