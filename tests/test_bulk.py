"""Many images: every one has its row, a stopped command goes on, broken files are named, and mistakes are sentences."""

import os
import subprocess
import sys
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest

from maxmap import bulk, checkpoint
from maxmap.__main__ import main
from maxmap.bulk import embed_many, find_images, predict_many
from maxmap.errors import UserError
from maxmap.inference import predict
from maxmap.result_table import ENDINGS, PART, Table
from maxmap.sharding import make_mesh
from tests.test_result_table import rows_of
from tests.tiny import CLASSES, ROOT, copied, create_tiny, free_port, preprocessing, write_image

pytestmark = pytest.mark.usefixtures("tiny_models")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    model = create_tiny("tiny", num_classes=3)
    variables = copied(model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3))))
    variables = {**variables, "params": jax.tree.map(lambda x: 3 * x + 0.1, variables["params"])}
    info = {"model": {"name": "tiny", "num_classes": 3}, "classes": list(CLASSES), "preprocessing": preprocessing()}
    folder = tmp_path_factory.mktemp("bulk") / "run"
    checkpoint.write_variables(folder, variables, info | {"step": 1, "weights": "raw"})
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve images below a folder, four more in an archive; the sixth file is none."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(16):
        write_image(folder / ("packed" if i >= 12 else f"{i // 5}") / f"{i:02}.png", i, i % 3, size=8 + i % 2)
    (folder / "1" / "05.png").write_bytes(b"no image")
    (folder / "1" / "notes.txt").write_text("left out")
    with tarfile.open(folder / "more.tar", "w") as tar:
        for i in range(12, 16):
            tar.add(folder / "packed" / f"{i}.png", f"{i}.png")
            (folder / "packed" / f"{i}.png").unlink()
    return folder


def test_images_are_found(photos):
    names = [image.name for image in find_images([photos, photos / "more.tar", photos / "0" / "*3.png"])]
    inside = [str(photos / f"{i // 5}" / f"{i:02}.png") for i in range(12)]
    assert names == [*inside, *(f"{photos}/more.tar/{i}.png" for i in range(12, 16)), str(photos / "0" / "03.png")]
    with pytest.raises(UserError, match=r"there is no .*nothing: give an image, a folder"):
        find_images([photos / "nothing"])
    with pytest.raises(UserError, match="there are no images in"):
        find_images([photos / "packed"])


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_row_is_what_predict_says(ending, photos, workdir, tmp_path):
    file = tmp_path / f"table{ending}"
    counts = predict_many(workdir, [photos, photos / "more.tar"], file, top=2, batch_size=5)
    assert counts == {"images": 16, "errors": 1, "before": 0}
    rows = rows_of(file)
    assert [file.name for file in tmp_path.iterdir()] == [file.name]
    assert rows[5]["image"] == str(photos / "1" / "05.png") and "image" in rows[5]["error"]
    assert not rows[5].get("class1")
    wanted = predict(workdir, [row["image"] for i, row in enumerate(rows[:12]) if i != 5], top=2)
    for row, classes in zip([row for i, row in enumerate(rows[:12]) if i != 5], wanted, strict=True):
        assert [row["class1"], row["class2"]] == [name for name, _ in classes] and not row.get("error")
        found = [float(row["probability1"]), float(row["probability2"])]
        np.testing.assert_allclose(found, [value for _, value in classes], atol=2e-6)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_stopped_command_goes_on(ending, photos, workdir, tmp_path, monkeypatch):
    """Behind the last whole row, though the last one was cut; the table is that of one call."""
    whole, file = tmp_path / f"whole{ending}", tmp_path / f"table{ending}"
    paths = [photos, photos / "more.tar"]
    predict_many(workdir, paths, whole, batch_size=4)
    append, calls = Table.append, []

    def stop(self, rows):
        append(self, rows)
        calls.append(len(rows))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Table, "append", stop)
        predict_many(workdir, paths, file, batch_size=4)
    part = file.with_name(file.name + PART)
    assert calls == [8] and not file.exists()  # a batch is a multiple of the eight devices
    part.write_bytes(part.read_bytes()[:-3])
    with pytest.raises(UserError, match="is of another call, with other images"):
        predict_many(workdir, paths, file, batch_size=4, top=1)
    counts = predict_many(workdir, paths, file, batch_size=4)
    assert counts == {"images": 16, "errors": 1, "before": 7}
    assert file.read_bytes() == whole.read_bytes() and sorted(tmp_path.iterdir()) == [file, whole]


def test_embeddings(photos, workdir, tmp_path, monkeypatch):
    """The same numbers in all formats; the tests' network has no embedding, so its logits stand for it."""
    monkeypatch.setattr(type(create_tiny("tiny")), "embed", lambda self, x: self(x)["logits"][0], raising=False)
    tables = [tmp_path / f"a{ending}" for ending in ENDINGS]
    for file in tables:
        assert embed_many(workdir, [photos], file, batch_size=5) == {"images": 12, "errors": 1, "before": 0}
    of_csv, of_json, of_parquet = map(rows_of, tables)
    for i, (one, other, third) in enumerate(zip(of_csv, of_json, of_parquet, strict=True)):
        if i != 5:
            assert [float(one[f"e{k}"]) for k in range(3)] == other["embedding"]
            assert np.array_equal(np.float32(other["embedding"]), np.float32(third["embedding"]))
        else:
            assert third["embedding"] is None and third["error"] == other["error"] == one["error"]
    assert str(pyarrow.parquet.read_schema(tables[2]).field("embedding").type) == "list<element: float>"
    assert len({tuple(row["embedding"]) for row in of_json if "embedding" in row}) == 11


def test_one_device_writes_what_eight_do(photos, workdir, tmp_path, monkeypatch):
    tables = []
    for devices in (8, 1):
        monkeypatch.setattr(bulk, "make_mesh", lambda local, devices=devices: make_mesh(local[:devices]))
        predict_many(workdir, [photos], tmp_path / f"{devices}.jsonl", batch_size=5)
        tables.append(rows_of(tmp_path / f"{devices}.jsonl"))
    for one, other in zip(*tables, strict=True):
        assert one.keys() == other.keys() and (one["image"], one.get("class1")) == (other["image"], other.get("class1"))
        for key in (f"probability{rank}" for rank in (1, 2, 3) if "error" not in one):
            assert one[key] == pytest.approx(other[key], abs=2e-6)


SHARE = """
import sys, jax, pytest
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
from maxmap.__main__ import main
from tests.tiny import create_tiny, use_models
use_models(create_tiny, pytest.MonkeyPatch())
sys.exit(main(sys.argv[1:]))
"""


def test_two_processes_share_the_images(photos, workdir, tmp_path):
    one, two, address = tmp_path / "one.csv", tmp_path / "two.csv", f"--coordinator=127.0.0.1:{free_port()}"
    argv = [sys.executable, "-c", SHARE, "predict", str(workdir), str(photos), f"--to={two}", "--batch-size=3"]
    processes = [
        subprocess.Popen(
            [*argv, address, "--num_processes=2", f"--process_id={i}"],
            cwd=ROOT,
            env={**os.environ, "NPROC": "16"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    predict_many(workdir, [photos], one)
    said = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert said[0][0].endswith(f"{two}: 12 images; 1 cannot be read, see its column 'error'\n")  # after gloo's words
    assert "images" not in said[1][0]
    for row, wanted in zip(rows_of(two), rows_of(one), strict=True):
        assert (row["image"], row["class1"], row["error"]) == (wanted["image"], wanted["class1"], wanted["error"])
        assert row["error"] or float(row["probability1"]) == pytest.approx(float(wanted["probability1"]), abs=2e-6)
    assert sorted(tmp_path.iterdir()) == [one, two]


def test_the_commands(photos, workdir, tmp_path, capsys):
    file = tmp_path / "table.csv"
    argv = ["predict", str(workdir), str(photos), f"--to={file}", "--batch-size=8", "--top=1"]
    assert main(argv) == 0
    assert capsys.readouterr().out == f"{file}: 12 images; 1 cannot be read, see its column 'error'\n"
    for changed, sentence in (
        ([*argv[:3], "--num_processes=2"], "several processes write a table: give --to=FILE, too"),
        (argv, "is there already: give another name, or --overwrite"),
        ([*argv, "--json=a"], "--to is a table of its own: leave out --json, --csv, --masks"),
        ([*argv[:3], f"--to={tmp_path}/a.xlsx"], "has no known ending: give a name in .csv, .jsonl, .parquet"),
    ):
        assert main(changed) == 2
        assert sentence in capsys.readouterr().err
    assert main([*argv, "--overwrite"]) == 0
