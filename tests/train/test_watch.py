"""Numbers that are not finite cost a step, not the run; hangs are named; spikes are told."""

import json
import time

import jax.numpy as jnp
import numpy as np
import pytest

from maxmap.config import bind
from maxmap.errors import UserError
from maxmap.train import build, loop
from maxmap.train.report import Report
from maxmap.train.watch import SPIKE_WARMUP as WARMUP
from maxmap.train.watch import Watch, Watchdog
from tests.tiny import assert_equal, copied, read_lines, settings_for

pytestmark = pytest.mark.usefixtures("tiny_models")


def poisoned(*steps: int):
    """`make_train_step` with images that are infinite at some steps, counted from 0."""
    make = build.make_train_step

    def make_poisoned(model, optimizer, loss, prepare, **options):
        def bad(key, images, labels):
            images, targets = prepare(key, images, labels % 1000)
            return jnp.where(jnp.any(labels >= 1000), jnp.inf, images), targets

        step = make(model, optimizer, loss, bad, **options)

        def marked(state, batch, key):
            mark = 1000 * jnp.any(state.step == jnp.array(steps)).astype(jnp.int32)
            return step(state, {**batch, "label": batch["label"] + mark}, key)

        return marked

    return make_poisoned


@pytest.mark.fault("loss not finite")
def test_steps_that_are_not_finite_are_left_out(images, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(build, "make_train_step", poisoned(3, 4))
    result = loop.run(bind(settings_for(images, steps=6, log={"every": 2, "max_skips": 2})), tmp_path)
    assert result["step"] == 6 and np.isfinite(result["loss"])
    *events, _ = read_lines(tmp_path / "events.jsonl")  # the last one is of the end
    assert [(e["kind"], e["step"], e["loss"]) for e in events] == [("skipped", 4, "nan"), ("skipped", 5, "nan")]
    assert all(len(e["samples"]) == 8 for e in events) and events[0]["samples"] != events[1]["samples"]
    said = capfd.readouterr().err
    assert "step 4 left out" in said and "2 in a row, at most 2" in said
    rows = read_lines(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 6]


@pytest.mark.fault("loss not finite for long")
def test_too_many_of_them_end_the_run(images, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "make_train_step", poisoned(4, 5, 6))
    with pytest.raises(
        UserError, match=r"not finite in 2 steps in a row, up to step 6: .*not_finite.json names"
    ) as error:
        loop.run(bind(settings_for(images, log={"every": 2, "max_skips": 1})), tmp_path)
    assert str(error.value).rstrip(".").count(". ") == 0
    found = json.loads((tmp_path / "not_finite.json").read_text())
    assert found["step"] == 6 and len(found["samples"]) == 8
    assert all(sample["name"].startswith(str(images)) for sample in found["samples"])
    layers = {row["layer"]: row for row in found["layers"]}
    assert {"parameters/conv/kernel", "gradients/head_0/bias", "outputs/conv/__call__/0"} <= layers.keys(), (
        layers.keys()
    )
    assert all(np.isfinite(row["largest"]) for row in found["layers"])
    # The parameters are whole: what is not finite came in with the batch, which this recomputation sees as it was read.
    assert not any(row["not_finite"] for name, row in layers.items() if name.startswith("parameters"))


def test_a_step_that_is_left_out_changes_nothing(images, tmp_path, monkeypatch):
    # All of the steps after the first three are left out, so that the end is the state after three.
    saved = {}
    save = loop.Checkpoints.save

    def remember(self, step, items, info, score=None):
        saved[step] = copied(items)
        save(self, step, items, info, score)

    monkeypatch.setattr(loop.Checkpoints, "save", remember)
    monkeypatch.setattr(build, "make_train_step", poisoned(*range(3, 9)))
    loop.run(bind(settings_for(images, checkpoint__every=3)), tmp_path)
    for item in ("variables", "ema"):
        assert_equal(saved[9][item], saved[3][item])
    assert_equal(saved[9]["training"]["opt_state"], saved[3]["training"]["opt_state"])


def metrics(loss: float, *, skipped: int = 0) -> dict:
    return {"loss": jnp.float32(loss), "grad_norm": jnp.float32(1), "skipped": jnp.int32(skipped)}


def test_spikes_are_told(tmp_path, capfd):
    report = Report(tmp_path, step=0, total_steps=1000, batch_size=2)
    watch = Watch(tmp_path, report, max_skips=1)
    noise = 2 + 0.1 * np.random.default_rng(0).standard_normal(WARMUP + 50)
    for step, loss in enumerate(noise, 1):
        assert not watch.check(step, metrics(9.0 if step in (5, WARMUP + 20) else loss), np.array([step, step]))
    report.close()
    events = read_lines(tmp_path / "events.jsonl")
    # Not the first one: nothing is known of the noise so early.
    assert [(e["kind"], e["step"], e["samples"]) for e in events] == [("spike", WARMUP + 20, [WARMUP + 20] * 2)]
    assert f"loss spike at step {WARMUP + 20}: 9.0000 after" in capfd.readouterr().err
    # A run that goes on from an earlier step drops what it will meet again.
    Report(tmp_path, step=50, total_steps=1000, batch_size=2).close()
    assert (tmp_path / "events.jsonl").read_text() == ""


@pytest.mark.fault("hung step")
def test_a_hung_step_is_named(tmp_path, capfd):
    def stand_still(seconds: float) -> None:
        time.sleep(seconds)

    with Watchdog(tmp_path / "hang.txt", 0.2) as dog:
        for _ in range(5):
            dog.enter("moving")
            time.sleep(0.06)
        assert not (tmp_path / "hang.txt").exists()
        dog.enter("step 7 waits for its data")
        stand_still(1.0)
    text = (tmp_path / "hang.txt").read_text()
    assert text.count("step 7 waits for its data") == 1 and "stand_still" in text
    assert "while step 7 waits for its data" in capfd.readouterr().err
