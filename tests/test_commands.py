"""python -m maxmap: what each command prints, and its one sentence for a mistake."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from maxmap import __main__ as commands
from maxmap import checkpoint
from maxmap.models import create_model
from maxmap.predict import predict
from tests.tiny import CLASSES, ROOT, copied, create_tiny, rooms, write_folder, write_image


def mistake(capsys, *argv: object) -> str:
    """Runs a command that fails; returns its sentence."""
    assert commands.main([str(arg) for arg in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("maxmap: ") and captured.err.count("\n") == 1
    return captured.err


def test_list_names_parameters_and_sizes(capsys):
    assert commands.main(["list", "*maxvit_mini*"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["model", "family", "head", "parameters", "GMACs", "image", "parity"]
    assert [line.split()[0] for line in lines] == ["map_maxvit_mini_32", "maxvit_mini_32"]
    model = create_model("maxvit_mini_32")
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    fields = lines[1].split()
    assert fields[1:4] == ["maxxvit", "linear", f"{count:,}"] and fields[5] == "32x32"
    assert len({line.index("maxxvit") for line in lines}) == 1  # in columns


def test_list_takes_shell_patterns(capsys, monkeypatch):
    monkeypatch.setattr(commands, "create_model", lambda name: create_model("maxvit_mini_32"))  # tracing all takes long
    assert commands.main(["list", "map_m*"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert "map_maxvit_tiny_tf_224" in names and all(name.startswith("map_m") for name in names)
    assert commands.main(["list", "map_*", "--family", "pit"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["map_pit_s"]
    assert re.search("the nearest names are .*map_maxvit_mini_32", mistake(capsys, "list", "map_maxvitt"))


def test_samples_writes_images_of_every_part_of_the_split(capsys, tmp_path):
    assert commands.main(["samples", str(ROOT / "configs/quickstart.py"), str(tmp_path / "out"), "--count", "4"]) == 0
    printed = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(printed) == sorted((tmp_path / "out").iterdir())
    assert [int(path.stem.split("_")[0]) for path in printed] == [0, 119, 239, 359]
    for path in printed:
        with Image.open(path) as image:
            assert path.stem.split("_")[1] in "0123456789" and image.size == (8, 8)


def test_samples_of_a_folder_are_its_files(capsys, tmp_path):
    folder = write_folder(tmp_path / "images")
    config = tmp_path / "config.py"
    config.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(path):\n    return ConfigDict({'data': {'source': 'folder', 'path': path, 'image_size': 8, "
        "'crop_pct': 1.0, 'mean': (0.5,) * 3, 'std': (0.5,) * 3}})\n"
    )
    for _ in range(2):  # the same command twice
        assert commands.main(["samples", f"{config}:{folder}", str(tmp_path / "out"), "--count", "99"]) == 0
    originals = {path.read_bytes() for path in (folder / "val").rglob("*.png")}
    assert {path.read_bytes() for path in (tmp_path / "out").iterdir()} == originals
    capsys.readouterr()
    assert "no config file" in mistake(capsys, "samples", tmp_path / "none.py", tmp_path / "out")


@pytest.fixture
def workdir(tmp_path, monkeypatch) -> Path:
    for room in rooms():
        monkeypatch.setattr(room, "create_model", create_tiny)
    variables = create_tiny("tiny", num_classes=3).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    info = {
        "model": {"name": "tiny", "num_classes": 3},
        "classes": list(CLASSES),
        "preprocessing": {
            "image_size": 8,
            "crop_pct": 1.0,
            "crop_mode": "center",
            "interpolation": "bicubic",
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
        },
    }
    checkpoints = checkpoint.Checkpoints(tmp_path / "run")
    checkpoints.save(1, {"variables": copied(variables)}, info)
    checkpoints.close()
    return tmp_path / "run"


def test_predict_prints_a_line_for_every_image(capsys, tmp_path, workdir):
    images = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(images):
        write_image(path, i, i)
    assert commands.main(["predict", str(workdir), *map(str, images), "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    wanted = predict(workdir, images, top=2)
    for path, line, classes in zip(images, lines, wanted, strict=True):
        assert line == f"{path}: " + ", ".join(f"{name} {100 * p:.1f} %" for name, p in classes)
    np.testing.assert_array_less([classes[1][1] for classes in wanted], [classes[0][1] for classes in wanted])

    (tmp_path / "text.png").write_text("not an image")
    assert "missing.png" in mistake(capsys, "predict", workdir, images[0], tmp_path / "missing.png")
    assert "text.png" in mistake(capsys, "predict", workdir, tmp_path / "text.png")
    assert "no checkpoint in" in mistake(capsys, "predict", tmp_path, images[0])
    assert "0 classes" in mistake(capsys, "predict", workdir, images[0], "--top", "0")


def test_an_unknown_command_is_no_stack_trace(capsys):
    with pytest.raises(SystemExit) as stopped:
        commands.main(["predikt"])
    assert stopped.value.code == 2 and "predikt" in capsys.readouterr().err
