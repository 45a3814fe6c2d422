"""A whole run: what it writes, that it goes on where it was stopped, and what it says to bad input."""

import csv
import gzip
import hashlib
import json
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from maxmap import checkpoint, evaluate
from maxmap.config import bind, complete
from maxmap.convert.torch import abstract_variables
from maxmap.data.pipeline import Data
from maxmap.errors import UserError
from maxmap.predictions import accuracies
from maxmap.sharding import to_devices
from maxmap.train import loop
from tests.tiny import (
    assert_equal,
    copied,
    create_tiny,
    files,
    preprocessing,
    read_lines,
    settings_for,
    use_models,
    without_timings,
    write_folder,
    write_image,
)

pytestmark = pytest.mark.usefixtures("tiny_models")


def run(settings: dict, workdir: Path) -> tuple[dict, dict]:
    """Trains; returns the result and a copy of everything that was saved, by step."""
    saved = {}
    save = checkpoint.Checkpoints.save

    def remember(self, step, items, info, score=None):
        saved[step] = copied(items)
        save(self, step, items, info, score)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", remember)
        result = loop.run(bind(settings), workdir)
    return result, saved


def interrupt(number: int, settings: dict, workdir: Path, *, step: int) -> int:
    """Trains until a signal comes while batch `step` is on its way to the devices; returns the exit code."""
    calls = []

    def send(batch, mesh):
        if "mask" not in batch:  # not of an evaluation
            calls.append(1)
            if len(calls) == step:
                os.kill(os.getpid(), number)
        return to_devices(batch, mesh)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(loop, "to_devices", send)
        loop.run(bind(settings), workdir)
    assert len(calls) == step
    return stopped.value.code


def metrics(workdir: Path) -> list[dict]:
    return read_lines(workdir / "metrics.jsonl")


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory) -> SimpleNamespace:
    """A run from beginning to end."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    settings = settings_for(images)
    result, saved = run(settings, workdir)
    return SimpleNamespace(workdir=workdir, config=settings, result=result, saved=saved)


def test_eval_json_says_what_the_figures_belong_to(finished):
    result = json.loads((finished.workdir / "eval.json").read_text())
    assert result == finished.result
    fields = {key: result[key] for key in result.keys() - {"top1", "top5", "branch_top1", "loss"}}
    assert fields == {
        "model": "tiny",
        "step": 9,
        "weights": "ema",
        "task": "single_label",
        "images": 11,
        "skipped": [],
        # convolution, norm, mlp, two heads
        "param_count": 27 * 8 + 16 + (64 + 8) + 2 * (24 + 3),
        "image_size": 8,
        "crop_pct": 1.0,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "exif": False,
        "top1_err": pytest.approx(100 - result["top1"], abs=1e-6),
        "top5_err": 0.0,
    }
    assert result["top5"] == 100.0 and len(result["branch_top1"]) == 2
    assert result["top1"] * 11 / 100 == pytest.approx(round(result["top1"] * 11 / 100), abs=1e-9)


def test_the_log_has_every_step_that_it_should(finished):
    rows = metrics(finished.workdir)
    steps = [(row["kind"], row["step"]) for row in rows]
    assert [step for kind, step in steps if kind == "train"] == [1, 2, 4, 6, 8, 9]
    assert [step for kind, step in steps if kind == "eval"] == [3, 6, 9]
    assert rows[-1]["top1"] == finished.result["top1"] and rows[-1]["loss"] == finished.result["loss"]
    schedule = bind(finished.config).schedule(steps_per_epoch=3, epochs=3)
    for row in rows:
        assert row["epoch"] == row["step"] / 3
        if row["kind"] == "train":
            assert row["learning_rate"] == float(schedule(row["step"] - 1))  # the rate that the step took
            assert row["loss"] == pytest.approx(row["base"] + row["distillation"] + row["decorrelation"], rel=1e-5)
            assert row.keys() >= {"grad_norm", "images_per_second", "waiting_for_data"}


def test_what_a_run_leaves_in_its_folder(finished):
    names = set(files(finished.workdir))
    assert names >= {"config.json", "metrics.jsonl", "curves.png", "eval.json"}
    (row,) = read_lines(finished.workdir / "events.jsonl")
    assert (row.pop("kind"), row.pop("step")) == ("goodput", 9) and row.pop("seconds") > 0
    assert sum(row.values()) == pytest.approx(1) and min(row.values()) >= 0
    assert any(name.startswith("tensorboard/events.out.tfevents") for name in names)
    assert {name.split("/")[1] for name in names if name.startswith("checkpoints/")} == {"8", "9"}  # keep = 2
    assert finished.saved.keys() == {4, 8, 9}
    assert (finished.workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((finished.workdir / "config.json").read_text())
    assert written == json.loads(json.dumps(complete(finished.config)))
    assert not [name for name in names if "unfinished" in name]


def test_the_checkpoint_is_the_state_when_it_was_saved(finished):
    # Steps donate their state, so what is written in the background must be a copy of it.
    averaged, info = checkpoint.read_variables(finished.workdir)
    raw, _ = checkpoint.read_variables(finished.workdir, ema=False)
    assert_equal(averaged, finished.saved[9]["ema"])
    assert_equal(raw, finished.saved[9]["variables"])
    assert (info["step"], info["weights"], info["classes"]) == (9, "ema", ["blue", "green", "red"])
    assert info["model"] == {"name": "tiny", "num_classes": 3, "drop_path": 0.25, "dropout": 0.125}


def test_the_average_is_what_is_evaluated(finished):
    results = []
    for item in ("ema", "variables"):
        recipe = bind(finished.config)
        data, mesh = recipe.data(), recipe.mesh()
        model = create_tiny("tiny", num_classes=3)
        step = evaluate.make_eval_step(model, data.preprocessing, mesh, np.dtype("float32"))
        results.append(evaluate.evaluate(step, finished.saved[9][item], data, 4, mesh)["loss"])
    assert finished.result["loss"] == pytest.approx(results[0], rel=1e-6)
    assert abs(results[1] - results[0]) > 1e-4


@pytest.mark.parametrize(
    ("number", "code", "step"), [(signal.SIGINT, 130, 5), (signal.SIGTERM, 75, 6)], ids=["ctrl-c", "sigterm"]
)
def test_a_resumed_run_equals_an_uninterrupted_one(finished, tmp_path, capfd, number, code, step):
    # Step 5 has neither a checkpoint nor a line in the log, step 6 has an evaluation and a line but no checkpoint.
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert interrupt(number, finished.config, tmp_path / "run", step=step) == code
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert re.search(
        rf"^goodput in .* % computing.*\nstopped after step {step}, which is saved", capfd.readouterr().err, re.M
    )
    assert checkpoint.read_info(tmp_path / "run")["step"] == step

    result, saved = run(finished.config, tmp_path / "run")
    assert result == finished.result
    assert saved.keys() == {8, 9}
    for at in saved:
        assert_equal(saved[at], finished.saved[at])
    rows, expected = metrics(tmp_path / "run"), metrics(finished.workdir)
    assert [without_timings(row) for row in rows] == [without_timings(row) for row in expected]


def test_a_run_that_died_goes_on_from_its_last_checkpoint(finished, tmp_path, monkeypatch):
    class Died(Exception):
        pass

    calls = []

    def die(batch, mesh):
        calls.append("mask" not in batch)
        if sum(calls) == 8:
            raise Died
        return to_devices(batch, mesh)

    with monkeypatch.context() as patch, pytest.raises(Died):
        patch.setattr(loop, "to_devices", die)
        loop.run(bind(finished.config), tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # the line that the crash cut off
    assert checkpoint.read_info(tmp_path)["step"] == 4 and metrics_steps(tmp_path)[-1] > 4
    result, saved = run(finished.config, tmp_path)
    assert result == finished.result
    assert_equal(saved[9], finished.saved[9])
    assert [without_timings(row) for row in metrics(tmp_path)] == [
        without_timings(row) for row in metrics(finished.workdir)
    ]


def metrics_steps(workdir: Path) -> list[int]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def test_a_finished_run_is_only_evaluated(finished, monkeypatch):
    before = files(finished.workdir)
    monkeypatch.setattr(Data, "train_batches", lambda *args, **kwargs: pytest.fail("it trains"))
    assert loop.run(bind(finished.config), finished.workdir) == finished.result
    after = files(finished.workdir)
    # No second line for an evaluation that is there already, no other checkpoint.
    for name in before:
        if name != "curves.png" and not name.startswith("tensorboard/"):
            assert after[name] == before[name], name


def test_steps_end_a_run_early_on_another_mesh(finished, tmp_path):
    settings = settings_for(finished.config["data"]["path"], steps=2)
    assert run(settings, tmp_path)[0]["step"] == 2
    # The same run goes on, on two devices instead of one.
    result, saved = run({**settings, "steps": 4, "mesh": {"data": 2}}, tmp_path)
    assert result["step"] == 4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), saved[4], finished.saved[4])


def test_batch_norms_of_each_device_stay_on_as_many_devices(finished, tmp_path):
    settings = settings_for(finished.config["data"]["path"], steps=1, batch_norm="averaged", mesh={"data": 2})
    run(settings, tmp_path)
    settings = {**settings, "steps": 2, "mesh": {"data": 4}}
    assert "devices: 2 -> 4" in sentence(settings, tmp_path)
    assert loop.run(bind(settings), tmp_path, allow_changes=True)["step"] == 2


def test_mode_eval_repeats_the_last_evaluation(finished, tmp_path):
    (finished.workdir / "eval.json").unlink()
    result = evaluate.run(bind(finished.config), finished.workdir)
    assert json.loads((finished.workdir / "eval.json").read_text()) == result
    raw = result.pop("raw")
    assert result == finished.result and raw["loss"] != result["loss"]
    # Anyone can count again.
    with (finished.workdir / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 11
    for weights, wanted in {"ema": result, "raw": raw}.items():
        counted = accuracies(row for row in rows if row["weights"] == weights)
        assert counted == {key: {**result, **wanted}[key] for key in ("images", "top1", "top5", "branch_top1")}
    assert rows[0]["name"].endswith("val/blue/000.png") and rows[0]["label"] == "0"


def test_init_from_starts_with_the_average_of_another_run(finished, tmp_path):
    settings = settings_for(
        finished.config["data"]["path"],
        steps=1,
        init_from=str(finished.workdir),
        optim={"name": "sgd"},
        schedule={"name": "constant", "lr": 1e-30},  # which moves nothing
    )
    assert evaluate.run(bind(settings), tmp_path / "none")["loss"] == finished.result["loss"]
    result, saved = run(settings, tmp_path / "run")
    assert result["step"] == 1
    start, _ = checkpoint.read_variables(finished.workdir)
    assert_equal(saved[1]["variables"]["params"], start["params"])
    assert_equal(saved[1]["ema"]["params"], start["params"])
    statistics = jax.tree.map(np.array_equal, saved[1]["variables"]["batch_stats"], start["batch_stats"])
    assert not any(jax.tree.leaves(statistics))  # a step of training has moved them
    # The run's own checkpoint now counts, not the one that it started from.
    again = evaluate.run(bind(settings), tmp_path / "run")
    del again["raw"]
    assert again == result


def sentence(settings: dict, workdir: Path) -> str:
    """Trains on bad input: one sentence, and every file is as it was before."""
    before, existed = files(workdir), workdir.exists()
    with pytest.raises(UserError) as error:
        loop.run(bind(settings), workdir)
    assert files(workdir) == before and workdir.exists() == existed
    return str(error.value)


REAL = {"name": "convnext_tiny", "image_size": 32, "embed_dim": (16, 16), "depths": (1, 1)}


def test_init_from_that_does_not_fit(images, tmp_path, monkeypatch):
    from tests.tiny import create_model

    use_models(create_model, monkeypatch)
    other = create_model(**{**REAL, "embed_dim": (16, 32)}, num_classes=3)
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract_variables(other))
    checkpoint.write_variables(tmp_path / "other", variables, {"model": {}, "step": 0})
    settings = settings_for(images, model=REAL, data__image_size=32, init_from=str(tmp_path / "other"))
    message = sentence(settings, tmp_path / "run")
    assert str(tmp_path / "other") in message and "does not fit the model" in message
    assert "misshapen: stages.1." in message and "is (128,), the model has (64,)" in message
    message = sentence({**settings, "init_from": str(tmp_path / "nothing")}, tmp_path / "run")
    assert f"no checkpoint in {tmp_path / 'nothing'}" in message


def test_init_from_fits_a_model_to_new_classes(tmp_path, monkeypatch, capfd):
    """Everything but the classifier is the other model's; the log says so."""
    from tests.tiny import create_model

    use_models(create_model, monkeypatch)
    model = create_model(**REAL, num_classes=5)
    shapes = abstract_variables(model)
    variables = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, np.float32), shapes)
    info = {"model": {**REAL, "num_classes": 5}, "step": 0, "preprocessing": {**preprocessing(), "mean": [0.1] * 3}}
    checkpoint.write_variables(tmp_path / "other", variables, info)
    settings = settings_for(
        write_folder(tmp_path / "images", classes=("blue", "green")),
        model=REAL,
        data__image_size=32,
        init_from=str(tmp_path / "other"),
        optim={"name": "sgd"},
        schedule={"name": "constant", "lr": 1e-30},
        steps=1,
    )
    _, saved = run(settings, tmp_path / "run")
    params = saved[1]["variables"]["params"]
    assert_equal(params["backbone"], variables["params"]["backbone"])
    assert params["head"]["fc"]["kernel"].shape == (16, 2)
    assert 0 < np.abs(params["head"]["fc"]["kernel"]).max() < 0.5
    log = capfd.readouterr().err
    assert (
        "its preprocessing is not that of config.data: image_size is 32 instead of 8; mean is 0.5 0.5 0.5 instead of "
        "0.1 0.1 0.1\n"
    ) in log
    assert "dropped 2: head.fc.bias, head.fc.weight" in log and "initialised 2: head.fc.bias, head.fc.weight" in log


def test_a_workdir_of_another_run_is_left_alone(finished, images, tmp_path):
    workdir = finished.workdir
    message = sentence(settings_for(images, model__name="tiny_other"), workdir)
    assert "model.name: tiny -> tiny_other" in message and "another --workdir" in message
    assert "branches is 2 there and 3 here" in sentence(settings_for(images, model__branches=3), workdir)
    folder = write_folder(tmp_path / "two", classes=("blue", "green"))
    assert "lacks 'red', 1 differences in all" in sentence(settings_for(folder), workdir)
    assert "optim.name: adamw -> lion" in sentence(settings_for(images, optim={"name": "lion"}), workdir)


def test_a_run_without_an_average_cannot_go_on_with_one(images, tmp_path):
    settings = settings_for(images, ema_decay=None, steps=1)
    result, saved = run(settings, tmp_path)
    assert result["weights"] == "raw" and "ema" not in saved[1]
    changed = {**settings, "ema_decay": 0.5, "steps": 2}
    assert "ema_decay: None -> 0.5" in sentence(changed, tmp_path)
    with pytest.raises(UserError, match="another optimizer or averaging"):
        loop.run(bind(changed), tmp_path, allow_changes=True)


def test_a_changed_config_goes_on_when_told(finished, tmp_path, capfd):
    settings = {**finished.config, "steps": 2}
    run(settings, tmp_path)
    settings = {**settings, "steps": 4, "loss": {"name": "softmax"}, "log": {"every": 1}}
    assert "loss.decorrelation: -0.1 -> 0.0" in sentence(settings, tmp_path)
    assert loop.run(bind(settings), tmp_path, allow_changes=True)["step"] == 4
    told = capfd.readouterr().err
    assert "changed since the checkpoint: loss.decorrelation" in told
    assert "changed since the checkpoint: log.every: 2 -> 1" in told
    # From then on it is the run's own.
    assert loop.run(bind({**settings, "steps": 5}), tmp_path)["step"] == 5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"epoch": 3}, "no key 'epoch'; the nearest are epochs"),
        ({"mesh__dat": 3}, "config.mesh has no key 'dat'; the nearest are data"),
        ({"batch_size": "8"}, "config.batch_size is '8': give a value of type int"),
        ({"data__scale": 0.5}, "config.data.scale is 0.5: give a value of type list of 2 float"),
        ({"data__pth": 3}, "config.data has no key 'pth'; the nearest are path"),
        ({"augment__flip": 3}, "config.augment has no key 'flip'; the nearest are"),
        ({"mix__mixap": 3}, "config.mix has no key 'mixap'; the nearest are mixup"),
        ({"erase__probability": 3}, "config.erase has no key 'probability'; the nearest are prob"),
        ({"optim__lr": 3}, "config.optim has no key 'lr'"),
        ({"schedule__learning_rate": 3}, "config.schedule has no key 'learning_rate'"),
        ({"loss__decorelation": 3}, "config.loss has no key 'decorelation'; the nearest are decorrelation"),
        ({"evaluate__every": 3}, "config.evaluate has no key 'every'; the nearest are every_epochs"),
        ({"checkpoint__evry": 3}, "config.checkpoint has no key 'evry'; the nearest are every"),
        ({"log__evry": 3}, "config.log has no key 'evry'; the nearest are every"),
        ({"optim": {}}, "config.optim lacks the key 'name'"),
        ({"model__num_classes": 4}, "config.model.num_classes is 4, but the data has 3 classes"),
        ({"seed": -1}, "config.seed is -1: give a value of type int from 0"),
        ({"steps": 0}, "config.steps is 0: give a value of type int of at least 1"),
        ({"epochs": 0}, "epochs"),
        ({"accumulate": 0}, "config.accumulate is 0"),
        ({"accumulate": 3}, "config.accumulate is 3, which does not divide config.batch_size 8"),
        ({"batch_size": 0}, "config.batch_size is 0: give a value of type int of at least 1"),
        ({"batch_size": 25}, "batch size 25 does not fit an epoch of 24 samples"),
        ({"batch_size": 12, "mesh__data": 8}, "12 does not divide over 8 devices; the nearest that does is 16"),
        ({"accumulate": 4, "mesh__data": 8}, "2 does not divide over 8 devices; the nearest that does is 8"),
        ({"mesh__data": 9}, "config.mesh.data is 9, but JAX sees 8 devices"),
        ({"mesh__data": 0}, "config.mesh.data is 0"),
        ({"ema_decay": 1.5}, "config.ema_decay is 1.5"),
        ({"batch_norm": "synced"}, "config.batch_norm is 'synced'"),
        ({"dtype": "floot32"}, "config.dtype is 'floot32': give one of float32, bfloat16"),
        ({"evaluate__batch_size": 0}, "config.evaluate.batch_size is 0"),
        ({"evaluate__every_epochs": 0}, "config.evaluate.every_epochs is 0"),
        ({"checkpoint__every": 0}, "config.checkpoint.every is 0"),
        ({"checkpoint__keep": 0}, "config.checkpoint.keep is 0"),
        ({"log__every": 0}, "config.log.every is 0"),
        (
            {"log__profile": (6, 5)},
            "config.log.profile is (6, 5), and the run has 9 steps: give the first and the last",
        ),
        ({"data__val_split": None}, "no evaluation data: set --config.data.val_split"),
        ({"data__train_split": None}, "no training data: set --config.data.train_split"),
        ({"optim__name": "adamv"}, "adamw"),
        ({"loss__name": "sofmax"}, "softmax"),
        ({"augment__rand_augment": "rnd-m9"}, "rnd-m9"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_bad_values_are_one_sentence_before_anything_is_written(images, tmp_path, change, says):
    message = sentence(settings_for(images, **change), tmp_path / "run")
    assert says in message
    assert message.rstrip(".").count(". ") == 0 and message[-1] != "!"


def test_an_old_run_goes_on_with_its_config_as_it_was_written(images, tmp_path):
    """Configs of older versions lack the keys that were left at their defaults; this changes nothing."""
    settings = settings_for(images, steps=1)
    run(settings, tmp_path)
    info = tmp_path / "checkpoints/1/info/metadata"
    written = json.loads(info.read_text())
    written["config"] = json.loads(json.dumps({**settings, "model": {**settings["model"], "num_classes": None}}))
    assert "draft" not in written["config"]["data"] and "optim" in written["config"]
    info.write_text(json.dumps(written))
    (tmp_path / "checkpoints/1/SHA256SUMS").write_text(
        re.sub(
            r"\w+(?=  info/metadata)",
            hashlib.sha256(info.read_bytes()).hexdigest(),
            (tmp_path / "checkpoints/1/SHA256SUMS").read_text(),
        )
    )
    assert run({**settings, "steps": 2}, tmp_path)[0]["step"] == 2


def test_a_workdir_that_is_some_url(images):
    with pytest.raises(UserError, match=r"http://bucket/run is neither a folder nor in a bucket: write a path, gs://"):
        loop.run(bind(settings_for(images)), "http://bucket/run")


def test_a_workdir_that_is_a_file(images, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match=r"cannot make the folder .*run .*another --workdir"):
        loop.run(bind(settings_for(images)), tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


def test_images_that_the_windows_do_not_divide(tmp_path, images, monkeypatch):
    from tests.tiny import create_model

    use_models(create_model, monkeypatch)
    model = {"name": "maxvit_mini_32", "embed_dim": (16, 16), "depths": (1, 1), "transformer": {"head_dim": 8}}
    for changes in (
        {"data__image_size": 36},  # the data's size is not the model's
        {"data__image_size": 32, "data__eval_image_size": 36},  # found before training, not after an epoch of it
        {"data__image_size": 36, "model__image_size": 36},
    ):
        settings = settings_for(images, **{"model": model, **changes})
        message = sentence(settings, tmp_path / "run")
        assert "36" in message and "the nearest size that works is 32" in message
    assert "there is no model 'maxvit_mini_23'" in sentence(
        settings_for(images, model={"name": "maxvit_mini_23"}), tmp_path / "run"
    )
    assert "there is no head 'mapp', only linear, map" in sentence(
        settings_for(images, model={**model, "head": "mapp"}), tmp_path / "run"
    )
    assert "has no key 'windowsize'; the nearest are window_size" in sentence(
        settings_for(images, model={**model, "windowsize": 4}), tmp_path / "run"
    )


def test_files_that_cannot_be_decoded(tmp_path, capfd):
    folder = write_folder(tmp_path / "images")
    cut, text, bad = folder / "train/red/002.png", folder / "train/blue/006.png", folder / "val/green/001.png"
    cut.write_bytes(cut.read_bytes()[:90])
    text.write_text("not an image")
    bad.write_bytes(bad.read_bytes()[:90])
    # Looked at beforehand, they end the run before it begins.
    message = sentence(settings_for(folder), tmp_path / "run")
    assert "2 of the 24 images checked are broken" in message and str(cut) in message and str(text) in message
    # In the middle of training they are left out, counted and named.
    result, _ = run(settings_for(folder, data__check=0, steps=6), tmp_path / "run")
    log = capfd.readouterr().err
    for number, path in ((cut, "train/red/002.png"), (text, "train/blue/006.png")):
        assert log.count(f"cannot be decoded: {number}") == 2, path  # once in each of two epochs
    assert "skipped (4 so far)" in log and "skipped (5 so far)" not in log
    assert log.count(f"skipped, cannot be decoded: {bad}") == 2  # evaluations
    assert result["images"] == 10 and result["skipped"] == [str(bad)]


def test_where_nothing_can_be_decoded(tmp_path):
    folder = write_folder(tmp_path / "images", val=2)
    for path in (folder / "val").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no image of the evaluation split could be decoded"):
        loop.run(bind(settings_for(folder, data__check=0, steps=1)), tmp_path / "run")


def test_folders_that_are_missing_or_wrong(tmp_path):
    workdir = tmp_path / "run"
    message = sentence(settings_for(tmp_path / "nowhere"), workdir)
    assert all(text in message for text in (f"{tmp_path}/nowhere", "--config.data.path", "source=tfds", "make demo"))
    (tmp_path / "empty").mkdir()
    message = sentence(settings_for(tmp_path / "empty"), workdir)
    assert all(text in message for text in (f"{tmp_path}/empty", "--config.data.path", "source=tfds", "make demo"))
    folder = write_folder(tmp_path / "images")
    write_image(folder / "val/yellow/000.png", 0, 0)
    message = sentence(settings_for(folder), workdir)
    assert "'yellow'" in message and "training split" in message
    (tmp_path / "hollow/train").mkdir(parents=True)
    (tmp_path / "hollow/val").mkdir()
    assert "holds no class folders" in sentence(settings_for(tmp_path / "hollow"), workdir)
    assert "no path" in sentence(settings_for(None), workdir)


def test_compiling_and_the_time_left_have_lines_of_their_own(images, tmp_path, capfd):
    loop.run(bind(settings_for(images, log={"every": 50})), tmp_path)
    log = capfd.readouterr().err
    compiling, first, left = (
        re.search(text, log, re.MULTILINE) for text in (r"^compiling, \d+ s$", r"^step 1/9,.*$", r"^0:\d\d:\d\d left$")
    )
    assert compiling.start() < first.start() < left.start() and "left" not in first[0]


def test_a_trace_of_some_steps_changes_no_number(finished, tmp_path, capfd):
    assert "log.profile is (5, 10), and the run has 9 steps" in sentence(
        settings_for(finished.config["data"]["path"], log={"every": 2, "profile": (5, 10)}), tmp_path
    )
    settings = settings_for(finished.config["data"]["path"], log={"every": 2, "profile": (5, 6)})
    result, saved = run(settings, tmp_path)
    assert result == finished.result
    assert_equal(saved[9], finished.saved[9])
    assert [without_timings(row) for row in metrics(tmp_path)] == [
        without_timings(row) for row in metrics(finished.workdir)
    ]
    (trace,) = (tmp_path / "profile" / "plugins" / "profile").glob("*/*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert {event["args"]["step_num"] for event in events if event.get("name") == "train"} == {"5", "6"}
    said = capfd.readouterr().err
    assert f"trace of steps 5 to 6 in {tmp_path}/profile: pip install xprof, then xprof --logdir=" in said


def test_training_ends_early_and_stays_ended(images, tmp_path, capsys, monkeypatch):
    """After two evaluations without a better top-1, also where a run is resumed between them."""
    top1 = {3: 40.0, 6: 60.0, 9: 60.0, 12: 50.0, 15: 70.0}
    steps = []

    def scripted(self):
        steps.append(self._step)
        return {**evaluate_really(self), "top1": top1[self._step]}

    evaluate_really = loop.Loop.evaluate
    monkeypatch.setattr(loop.Loop, "evaluate", scripted)
    settings = settings_for(images, epochs=6, evaluate__patience=2)
    result, saved = run(settings, tmp_path / "whole")
    assert result["top1"] == 50.0 and max(saved) == 12 and steps == [3, 6, 9, 12]
    assert (
        "training ends early: no better top-1 in 2 evaluation(s) since step 6, which had 60\n"
        in capsys.readouterr().err
    )
    assert loop.run(bind(settings), tmp_path / "whole")["top1"] == 50.0  # evaluated once more, and not trained
    assert checkpoint.finished_steps(tmp_path / "whole")[-1] == 12

    run({**settings, "steps": 9}, tmp_path / "parts")
    _, rest = run(settings, tmp_path / "parts")
    assert max(rest) == 12
    assert_equal(rest[12], saved[12])


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (["^stem/"], r"optim.freeze holds '\^stem/', which matches no parameter; .* nearest modules are"),
        (["."], r"optim.freeze \['.'\] leaves no parameter to train: leave out a pattern"),
    ],
)
def test_what_cannot_be_frozen(images, tmp_path, freeze, message):
    with pytest.raises(UserError, match=message):
        loop.run(bind(settings_for(images, optim__freeze=freeze)), tmp_path)
