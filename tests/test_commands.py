"""python -m maxmap: what each command prints, and its one sentence for a mistake."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from maxmap import __main__ as commands
from maxmap import checkpoint
from maxmap.config import bind, read
from maxmap.inference import predict
from maxmap.models import create_model
from tests.tiny import CLASSES, ROOT, copied, create_tiny, preprocessing, use_models, write_folder, write_image


def mistake(capsys, *argv: object) -> str:
    """Runs a command that fails; returns its sentence."""
    assert commands.main([str(arg) for arg in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("maxmap: ") and captured.err.count("\n") == 1
    return captured.err


def test_list_names_parameters_and_sizes(capsys):
    assert commands.main(["list", "*maxvit_mini*"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["model", "family", "head", "parameters", "GFLOPs", "image", "parity"]
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
        "import runpy\n"
        f"def get_config(path):\n    config = runpy.run_path({str(ROOT / 'configs/cifar10.py')!r})['get_config']()\n"
        "    config.data.path = path\n    return config\n"
    )
    for _ in range(2):  # the same command twice
        assert commands.main(["samples", f"{config}:{folder}", str(tmp_path / "out"), "--count", "99"]) == 0
    originals = {path.read_bytes() for path in (folder / "val").rglob("*.png")}
    assert {path.read_bytes() for path in (tmp_path / "out").iterdir()} == originals
    capsys.readouterr()
    assert "no config file" in mistake(capsys, "samples", tmp_path / "none.py", tmp_path / "out")


@pytest.fixture
def workdir(tmp_path, monkeypatch) -> Path:
    use_models(create_tiny, monkeypatch)
    variables = create_tiny("tiny", num_classes=3).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    info = {
        "model": {"name": "tiny", "num_classes": 3},
        "classes": list(CLASSES),
        "preprocessing": preprocessing(),
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


def test_show_batch_draws_what_a_step_trains_on(capsys, tmp_path, monkeypatch):
    """The pictures are the first images that the training step itself prepares, and the captions are their targets."""
    from maxmap.train import build, preview

    use_models(create_tiny, monkeypatch)
    folder = write_folder(tmp_path / "images")
    config = f"{ROOT}/configs/cifar10.py"
    changes = [f"--config.data.path={folder}", "--config.batch_size=8", "--config.accumulate=2"]
    changes += ["--config.model.name=tiny", "--config.mesh.data=1", "--config.augment.rand_augment=rand-m9"]
    drawn, prepared = [], []
    monkeypatch.setattr(preview, "draw_grid", lambda images, captions: drawn.append((images, captions)) or PICTURE)
    PICTURE = Image.new("RGB", (4, 4))
    out = tmp_path / "batch.png"
    argv = ["show-batch", "--config", config, *changes, "--out", str(out), "--step", "3", "--count", "3"]
    assert commands.main(argv) == 0
    assert capsys.readouterr().out == f"{out}\n" and out.is_file()

    make_prepare = build.make_prepare

    def watched(*arguments):
        prepare = make_prepare(*arguments)

        def prepare_and_note(key, images, labels):
            made = prepare(key, images, labels)
            jax.debug.callback(lambda *arrays: prepared.append(arrays), *made, ordered=True)
            return made

        return prepare_and_note

    monkeypatch.setattr(build, "make_prepare", watched)
    recipe = bind(read(config, changes))
    mesh, data = recipe.mesh(), recipe.data()
    parts = build.build(recipe, mesh, data)
    init, train = parts.keys()
    state = dataclasses.replace(parts.create_state(init), step=jnp.int32(3))
    batch = list(data.train_batches(8, seed=0, num_steps=4))[3]
    parts.train_step(state, {key: batch[key] for key in ("image", "label")}, train)
    jax.effects_barrier()
    images, targets = prepared[0]  # the first micro-batch's
    mean, std = (np.asarray(data.preprocessing[name]) for name in ("mean", "std"))
    (pixels, captions), *_ = drawn
    assert len(prepared) == 2 and len(pixels) == 3
    assert np.abs(pixels - 255 * (np.asarray(images[:3]) * std + mean)).max() < 0.51
    assert captions == [f"{100 * max(t):.0f} % {CLASSES[np.argmax(t)]}" for t in np.asarray(targets[:3])]


def test_the_picture_of_a_batch_has_a_cell_for_every_image():
    from maxmap.train.preview import CAPTION, caption, draw_grid

    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.full((1, 40, 80, 3), 50, np.uint8)
    picture = np.asarray(draw_grid(images, ["90 % a\n5 % b"] * 5))
    assert picture.shape == (2 * (2 * 40 + CAPTION), 3 * (2 * 80 + 6), 3)
    for i, (row, column) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]):
        top, left = row * (80 + CAPTION) + 3, column * 166 + 3
        assert (picture[top : top + 80, left : left + 160] == 50 * i).all()
        assert (picture[top + 80 : top + 80 + CAPTION - 3, left : left + 160] < 128).any()  # the caption
    assert caption(np.array([0.05, 0.3, 0.65, 0.0]), "abcd") == "65 % c\n30 % b"
    assert caption(np.array([0.025, 0.925, 0.025, 0.025]), "abcd") == "92 % b"


def test_a_change_that_the_config_does_not_have(capsys, tmp_path):
    config = f"--config={ROOT}/configs/quickstart.py"
    assert "config.data has no key 'pth'" in mistake(capsys, "show-batch", config, "--config.data.pth=x")
    assert "config.batch_size is 'many'" in mistake(capsys, "show-batch", config, "--config.batch_size=many")
    assert "linaer" in mistake(capsys, "show-batch", f"--config={ROOT}/configs/cifar10.py:linaer")
    assert "cannot write the picture" in mistake(capsys, "show-batch", config, f"--out={tmp_path}/no/such.png")
