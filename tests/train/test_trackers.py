"""Trackers get the numbers of a run, go on with it, and cannot harm it. MLflow is real, the others are stand-ins.

The stand-ins take the arguments that wandb 0.31.0 and trackio 0.43.0 have; trackio wants an older Pillow than ours.
"""

import json
import sys
import threading
import time
import types
from typing import Any

import pytest

from maxmap.config import bind
from maxmap.errors import UserError
from maxmap.train import loop, trackers
from maxmap.train.report import Report
from tests.tiny import read_lines, settings_for


class Recorder:
    """A run of a tracker that keeps what it gets."""

    url = None

    def __init__(self, **given: Any):
        self.given, self.rows, self.finished = given, [], False

    def log(self, data: dict, step: int | None = None) -> None:
        self.rows.append((step, data))

    def finish(self) -> None:
        self.finished = True


def stand_in(name: str, runs: list[Recorder], patch: pytest.MonkeyPatch) -> types.ModuleType:
    """Puts a module in the place of a tracker's."""
    module = types.ModuleType(name)

    def wandb_init(*, project, name, id, resume, config, dir, settings):  # as in wandb, among others
        assert vars(settings) == {"silent": True, "console": "off"}
        runs.append(Recorder(project=project, name=name, id=id, resume=resume, config=config, dir=dir))
        return runs[-1]

    def trackio_init(project, name=None, *, config=None, resume="never", embed=True):
        runs.append(Recorder(project=project, name=name, config=config, resume=resume, embed=embed))
        print("* greetings")
        return runs[-1]

    module.Settings = types.SimpleNamespace
    module.setup = lambda settings: None
    module.init = {"wandb": wandb_init, "trackio": trackio_init}[name]
    patch.setitem(sys.modules, name, module)
    return module


def train(report: Report, *steps: int, offset: float = 0.0) -> None:
    for step in steps:
        report.train(step, step / 3, {"loss": step + offset, "learning_rate": 0.1})
        if step == 3:
            report.evaluation(3, 1.0, {"top1": 50.0, "top5": 75.0, "loss": 1.5, "images": 4, "skipped": []})


def two_starts(folder, name: str) -> None:
    """Steps 1 to 4, then again from 3, where 4 comes a second time, with another number to tell it."""
    folder.mkdir()
    options = {"total_steps": 9, "batch_size": 8, "trackers": (name,), "config": {"optim.name": "adamw", "steps": None}}
    for start, steps, offset in ((0, (1, 2, 3, 4), 0.0), (3, (4, 5), 0.25)):
        report = Report(folder, step=start, **options)
        train(report, *steps, offset=offset)
        report.close()


def test_mlflow_has_one_run_with_every_step_once(tmp_path, monkeypatch, capfd):
    for key, value in {
        "MLFLOW_TRACKING_URI": f"file:{tmp_path}/store",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }.items():
        monkeypatch.setenv(key, value)
    two_starts(tmp_path / "run", "mlflow")
    from mlflow import MlflowClient

    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("maxmap").experiment_id])
    assert run.info.run_name == "run" and run.info.status == "FINISHED"
    assert run.data.params == {"optim.name": "adamw", "steps": "None"}
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5.25)]
    assert [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "eval/top1")] == [(3, 50)]
    assert f"experiment maxmap, run {run.info.run_id}" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_others_get_the_same(name, tmp_path, monkeypatch, capfd):
    runs: list[Recorder] = []
    stand_in(name, runs, monkeypatch)
    two_starts(tmp_path / "run", name)
    assert [[(step, row["train/loss"]) for step, row in run.rows if "train/loss" in row] for run in runs] == [
        [(1, 1), (2, 2), (3, 3), (4, 4)],
        [(5, 5.25)],
    ]
    assert (3, 50.0) in [(step, row.get("eval/top1")) for step, row in runs[0].rows]
    first, second = (run.given for run in runs)
    assert first == second and first["resume"] == "allow" and first["project"] == "maxmap"
    assert first["config"] == {"optim.name": "adamw", "steps": None} and all(run.finished for run in runs)
    if name == "trackio":
        assert capfd.readouterr().out == "", "the result alone goes to stdout"
    starts = [row for row in read_lines(tmp_path / "run" / "events.jsonl") if row["kind"] == "trackers"]
    assert [row["logged"] for row in starts] == [{}, {"train": 4, "eval": 3}]
    assert first["id" if name == "wandb" else "name"] == ("" if name == "wandb" else "run-") + starts[0]["id"]
    # Begun anew, it is another run.
    Report(tmp_path / "run", step=0, total_steps=9, batch_size=8, trackers=(name,)).close()
    assert runs[2].given["name" if name == "trackio" else "id"] not in first.values()


def test_what_the_trackers_know_is_the_newest_of_all_starts():
    starts = [{"kind": "trackers", "step": 0, "id": "a", "logged": {}}, {"kind": "spike", "step": 3}]
    starts.append({"kind": "trackers", "step": 4, "id": "a", "logged": {"train": 7, "eval": 6}})
    rows = [{"kind": "train", "step": 5}, {"kind": "eval", "step": 8}, {"step": 9}]
    known = trackers.known_before([*starts, {"kind": "trackers", "step": 5}], rows)
    assert known == {"id": "a", "logged": {"train": 7, "eval": 8, "None": 9}}
    assert trackers.known_before(starts[1:2], rows)["logged"] == {}


def test_a_tracker_that_fails_or_hangs_is_told_once(tmp_path, monkeypatch, capfd):
    module, ended = stand_in("wandb", [], monkeypatch), threading.Event()

    def refuse(**given):
        raise RuntimeError("No API key configured.\nUse `wandb login`.")

    def hang(**given):
        assert ended.wait(60)
        raise RuntimeError

    monkeypatch.setattr(trackers, "PATIENCE", 0.1)
    for init in (refuse, hang):
        module.init = init
        report = Report(tmp_path, step=0, total_steps=9, batch_size=8, trackers=("wandb",))
        train(report, 1, 2, 3)
        report.close()
        assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 3]
    ended.set()
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("wandb")]
    assert said == [
        "wandb gets no more of this run (No API key configured. Use `wandb login`): the other logs go on",
        "wandb gets no more of this run (it did not take the last rows in 0.1 s): the other logs go on",
    ]


def test_trackers_share_the_time_that_the_end_waits():
    waited = []

    class Slow:
        def end(self):
            waited.append("told")

        def wait(self, seconds):
            waited.append(seconds)
            time.sleep(0.05)

    trackers.close([Slow(), Slow()])
    assert waited[:2] == ["told"] * 2 and waited[2] <= trackers.PATIENCE and waited[3] <= trackers.PATIENCE - 0.05


@pytest.mark.usefixtures("tiny_models")
def test_a_run_hands_over_its_numbers_and_its_config(images, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: name == "wandb" or None)
    settings = settings_for(images, steps=1, log={"every": 1, "to": "mlflow"})
    with pytest.raises(UserError, match=r"log.to has 'mlflow', which is not installed: pip install 'maxmap\[mlflow\]'"):
        loop.run(bind(settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    runs: list[Recorder] = []
    stand_in("wandb", runs, monkeypatch)
    result = loop.run(bind({**settings, "log": {"every": 1, "to": ["wandb", "wandb"]}}), tmp_path / "run")
    ((_, train_row), (_, eval_row)) = runs[0].rows
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert train_row == {f"train/{key}": value for key, value in rows[0].items() if key not in ("kind", "step")}
    assert eval_row["eval/loss"] == result["loss"] and len(runs) == 1
    assert runs[0].given["config"]["schedule.lr"] == 2e-2
    json.dumps(runs[0].given["config"])  # as trackers keep it
