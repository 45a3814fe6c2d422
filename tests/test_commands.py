"""python -m maxmap: what each command prints, and its one sentence for a mistake."""

import csv
import dataclasses
import functools
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from maxmap import __main__ as commands
from maxmap import checkpoint, model_commands, storage, tasks, training_commands
from maxmap.arguments import Number, local_path
from maxmap.config import bind, read
from maxmap.errors import UserError
from maxmap.inference import predict
from maxmap.models import create_model
from maxmap.predictions import make_rows, to_csv
from maxmap.shapes import eval_shape_of_init
from maxmap.tasks.rows import MultiLabel
from maxmap.tasks.task import caption
from tests.test_ranges import numbers as ranges_in
from tests.test_ranges import outside
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
    params = eval_shape_of_init(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    fields = lines[1].split()
    assert fields[1:4] == ["maxxvit", "linear", f"{count:,}"] and fields[5] == "32x32"
    assert len({line.index("maxxvit") for line in lines}) == 1  # in columns


def test_list_takes_shell_patterns(capsys, monkeypatch):
    @functools.wraps(create_model)  # whose annotations the parser reads
    def fast(name, head):
        return create_model("maxvit_mini_32")  # tracing all takes long

    monkeypatch.setattr(model_commands, "create_model", fast)
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
    with pytest.raises(UserError, match="top is 0: give a value of type int of at least 1"):
        predict(workdir, images[:1], top=0)


def test_predict_says_what_ids_of_wordnet_mean(capsys, tmp_path, monkeypatch):
    """On the terminal the first word, in the files all of them, and a row for an image of which nothing is said."""
    use_models(create_tiny, monkeypatch)
    model = {"name": "tiny", "num_classes": 3}
    variables = create_tiny(**model).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    info = {"model": model, "classes": ["n01440764", "n02510455", "cat"], "preprocessing": preprocessing(), "step": 1}
    checkpoint.write_variables(tmp_path / "run", copied(variables), info)
    for i in range(2):
        write_image(tmp_path / f"{i}.png", i, i)
    files = [f"--json={tmp_path}/a.json", f"--csv={tmp_path}/a.csv"]
    argv = ["predict", str(tmp_path / "run"), str(tmp_path / "0.png"), str(tmp_path / "1.png"), *files]
    assert commands.main(argv) == 0
    printed = capsys.readouterr().out
    assert len(re.findall(r"tench \(n01440764\) [\d.]+ %", printed)) == 2 and re.search(r"[ ,] cat [\d.]+ %", printed)
    rows = json.loads((tmp_path / "a.json").read_text())
    assert len(rows) == 6 and [row["rank"] for row in rows] == [1, 2, 3] * 2
    by_class = {row["class"]: row for row in rows[:3]}
    assert by_class["n01440764"]["words"] == "tench, Tinca tinca" and by_class["cat"]["words"] is None
    ((_, first), *_), _ = predict(tmp_path / "run", [tmp_path / "0.png", tmp_path / "1.png"], top=3)
    assert rows[0]["probability"] == pytest.approx(first) and rows[0]["image"] == f"{tmp_path}/0.png"
    table = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert [{**row, "words": row["words"] or None} for row in table] == [
        {key: value if value is None else str(value) for key, value in row.items()} for row in rows
    ]
    assert "cannot write" in mistake_after_output(capsys, *argv[:3], f"--json={tmp_path}/no/a.json")

    several = info | {"task": tasks.describe(MultiLabel(thresholds=1.0))}  # no image has any of the labels
    checkpoint.write_variables(tmp_path / "labels", copied(variables), several)
    assert commands.main(["predict", str(tmp_path / "labels"), *argv[2:]]) == 0
    assert capsys.readouterr().out.count(": none of the labels\n") == 2
    empty = {"rank": None, "class": None, "words": None, "probability": None}
    wanted = [{"image": f"{tmp_path}/{i}.png", **empty} for i in range(2)]
    assert json.loads((tmp_path / "a.json").read_text()) == wanted
    table = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert [{key: value or None for key, value in row.items()} for row in table] == wanted


def mistake_after_output(capsys, *argv: str) -> str:
    """As `mistake`, of a command that has printed its results when it fails."""
    assert commands.main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out and captured.err.count("\n") == 1
    return captured.err


def test_odd_names_are_printed_on_a_line_each(capsys, tmp_path, workdir):
    """Names of files and classes with a line end, or with bytes that are not UTF-8."""
    names = ["two\nlines.png", os.fsdecode(b"caf\xe9.png")]
    for name in names:
        write_image(tmp_path / name, 0, 0)
    assert commands.main(["predict", str(workdir), *(str(tmp_path / name) for name in names), "--top", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [rf"{tmp_path}/two\nlines.png", rf"{tmp_path}/caf\xe9.png"]
    assert r"cannot read no\nsuch\xe9.png (No such file" in mistake(capsys, "predict", workdir, "no\nsuch\udce9.png")
    rows = make_rows(
        {"index": np.array([0]), "label": np.array([0]), "mask": np.array([True])},
        {"best": np.array([[0]]), "branch": np.array([[0]]), "branch_rank": np.array([[1]])}
        | {key: np.array([1]) for key in ("rank", "probability", "label_probability")},
        lambda index: names[1] + names[0],
    )
    storage.write_text(tmp_path / "predictions.csv", to_csv({"raw": rows}))
    assert r"raw,0,caf\xe9.pngtwo\nlines.png,0,1" in (tmp_path / "predictions.csv").read_text("utf-8")
    assert caption(np.array([1.0, 0.0]), ["a\udce9\n", "b"]) == r"100 % a\xe9\n"


def test_every_path_may_start_at_home(capsys, tmp_path, workdir, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "a.png", 0, 0)
    assert commands.main(["predict", "~/run", "~/a.png", "--top", "1"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/a.png: ")
    assert predict("~/run", ["~/a.png"], top=1) == predict(workdir, [tmp_path / "a.png"], top=1)
    assert commands.main(["average", "~/run", "--out=~/mean"]) == 0
    assert f"{tmp_path}/mean: raw weights of {tmp_path}/run step 1" in capsys.readouterr().out
    assert (tmp_path / "mean/checkpoints").is_dir() and not (tmp_path / "~").exists()
    (tmp_path / "config.py").write_text(
        (ROOT / "configs/quickstart.py").read_text().replace("map_maxvit_mini_32", "tiny")
    )
    assert commands.main(["samples", "~/config.py", "~/out", "--count=1"]) == 0
    assert len(list((tmp_path / "out").iterdir())) == 1


def numbers() -> list[tuple[list[str], str, int, Number]]:
    """The arguments of all commands that are numbers: what has to be given beside them, their option,
    how many values it takes, their type."""
    (choices,) = (action.choices for action in commands.make_parser()._actions if action.choices)
    found = []
    for name, parser in choices.items():
        needed = [name]
        for action in parser._actions:
            if action.required:
                options = [] if not action.option_strings else [action.option_strings[0]]
                some = next(iter(action.choices)) if action.choices else "1"
                needed += [f"{options[0]}={some}"] if options else [some]
        for action in parser._actions:
            if isinstance(action.type, Number):
                values = action.nargs if isinstance(action.nargs, int) else 1  # "+" takes one as well
                found.append((needed, action.option_strings[0], values, action.type))
            else:
                # Everything else is a path, a text or one of a list.
                assert action.type in (None, storage.expand, local_path), (name, action.dest)
    return found


NUMBERS = numbers()


@pytest.mark.parametrize(
    ("needed", "option", "values", "number"), NUMBERS, ids=[f"{needed[0]} {option}" for needed, option, *_ in NUMBERS]
)
def test_every_number_of_a_command_has_a_range(needed, option, values, number, capsys):
    (kind, limits), *_ = ranges_in(number.wanted)
    texts = [str(value) for value in outside(number.wanted) if not isinstance(value, list | bool)]
    # One of several values may not begin with a minus: argparse takes it for an option.
    for text in [
        *(t for t in texts if t != "1" and (values == 1 or t[0] != "-")),
        "many",
        "",
        *["-inf"][: values == 1],
    ]:
        with pytest.raises(SystemExit) as stopped:
            commands.main([*needed, f"{option}={text}"] if values == 1 else [*needed, option, *[text] * values])
        assert stopped.value.code == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert f"argument {option}: '{text}' is out of range: give a value of type {kind.__name__} {limits}; " in said


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("show-batch", ["--config=x.py", "--count=0"]),
        ("show-batch", ["--config=x.py", "--count=-3"]),
        ("show-batch", ["--config=x.py", "--step=-1"]),
        ("show-batch", ["--config=x.py", "--step=99999999999"]),
        ("samples", ["x.py", "out", "--count=-1"]),
        ("plan", ["--config=x.py", "--devices=0"]),
        ("plan", ["--config=x.py", "--devices=8", "--utilisation=0"]),
        ("plan", ["--config=x.py", "--devices=8", "--utilisation=1.5"]),
        ("convert", ["a", "b", "--num-classes=-1"]),
        ("convert", ["a", "b", "--image-size=0"]),
        ("predict", ["run", "a.png", "--top=0"]),
        ("average", ["run", "--out=x", "--last=0"]),
        ("validate", ["run", "x", "--batch-size=0"]),
        ("verify", ["run", "--against=x", "--tolerance=nan"]),
    ],
)
def test_numbers_that_people_type(command, arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        commands.main([command, *arguments])
    assert stopped.value.code == 2 and "is out of range: give a value of type" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("export", ["run", "gs://bucket/a.safetensors"]),
        ("predict", ["run", "gs://bucket/a.png"]),
        ("explain", ["run", "a.png", "--out=s3://bucket/a"]),
        ("samples", ["quickstart", "gs://bucket/a"]),
        ("validate", ["run", "gs://bucket/photos"]),
    ],
)
def test_a_bucket_where_a_path_of_this_machine_belongs(command, arguments, capsys, tmp_path, monkeypatch):
    """As a path it would be a new folder 'gs:' in the current one."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        commands.main([command, *arguments])
    assert stopped.value.code == 2 and "is in a bucket: give a path on this machine" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_samples_of_classes_with_odd_names(capsys, tmp_path, monkeypatch):
    """WebDataset's classes are lines of a file, so that their names may hold anything."""
    names = ["black/white", "..", os.fsdecode(b"\xe9\n"), "é" * 200]
    val = type("Val", (), {"__len__": lambda self: 4, "name": lambda self, i: f"a.tar/{i}.jpg"})()
    type(val).__getitem__ = lambda self, i: (b"bytes", i)
    recipe = SimpleNamespace(data=lambda: SimpleNamespace(val=val, classes=names))
    monkeypatch.setattr(training_commands, "bind", lambda values: recipe)
    assert commands.main(["samples", "quickstart", str(tmp_path / "out"), "--count=4"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "00000_black_white.jpg",
        "00001_...jpg",
        "00002___.jpg",
        f"00003_{50 * 'é'}.jpg",
    ]
    (tmp_path / "file").write_text("")
    capsys.readouterr()
    said = mistake(capsys, "samples", "quickstart", tmp_path / "file")
    assert re.search(r"cannot write .*file/00000_black_white.jpg \(.*\): give another folder", said)


def test_an_unknown_command_is_no_stack_trace(capsys):
    with pytest.raises(SystemExit) as stopped:
        commands.main(["predikt"])
    assert stopped.value.code == 2 and "predikt" in capsys.readouterr().err


@pytest.mark.long
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
    from maxmap.pictures import CAPTION, draw_grid
    from maxmap.tasks.task import caption

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
