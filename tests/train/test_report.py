"""What a run tells: the lines of metrics.jsonl, the terminal, TensorBoard and the picture."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from maxmap.train import report as module
from maxmap.train.goodput import Goodput
from maxmap.train.report import Report, draw_curves, drop_after
from tests.tiny import read_lines

RESULT = {"top1": 50.0, "top5": 75.0, "loss": 1.5, "images": 4, "skipped": [], "branch_top1": [50.0, 25.0]}


class Clock:
    """A clock that is set by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """Here curves are drawn; conftest.py leaves them blank."""
    monkeypatch.setattr(module, "draw_curves", draw_curves)


def spend(report: Report, clock: Clock, **seconds: float) -> None:
    """Lets seconds of phases go by, one after another."""
    for phase, count in seconds.items():
        report.goodput.enter(phase.replace("_", " "))
        clock.now += count


def metrics(loss: float = 2.0) -> dict:
    return {"loss": loss, "learning_rate": 0.1}


def test_speed_leaves_out_evaluations_and_says_what_waiting_took(clock, tmp_path, capfd):
    report = Report(tmp_path, step=10, total_steps=30, batch_size=32, goodput=Goodput(clock))
    # Ten steps in 8 seconds, with an evaluation of 5 between them.
    spend(report, clock, waiting_for_data=1.5, computing=1.5, evaluating=5)
    spend(report, clock, waiting_for_data=0.5, computing=4.5)
    report.train(20, 2.0, metrics())
    report.close()
    (row,) = read_lines(tmp_path / "metrics.jsonl")
    assert row == {
        "kind": "train",
        "step": 20,
        "epoch": 2.0,
        "loss": 2.0,
        "learning_rate": 0.1,
        "images_per_second": 10 * 32 / 8,
        "waiting_for_data": 2 / 8,
    }
    line = capfd.readouterr().err
    assert "step 20/30, epoch 2.00, loss 2.0000, 40 images/s, 0:00:08 left, 25 % waiting for data" in line


def test_compiling_is_told_and_counts_for_nothing(clock, tmp_path, capfd):
    """18 steps of a second each, and a first one that compiles for 41 seconds before."""
    report = Report(tmp_path, step=0, total_steps=18, batch_size=8, goodput=Goodput(clock))
    spend(report, clock, compiling=41.4)
    report.compiled()
    spend(report, clock, computing=1)
    report.train(1, 0.0, metrics())
    clock.now += 1
    report.time_left(2)
    clock.now += 3
    report.train(5, 0.0, metrics())
    report.close()
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "compiling, 41 s"
    assert lines[1] == "step 1/18, epoch 0.00, loss 2.0000, 8 images/s, 0 % waiting for data"
    assert lines[2] == "0:00:16 left"
    assert "8 images/s, 0:00:13 left" in lines[3]
    assert [row["images_per_second"] for row in read_lines(tmp_path / "metrics.jsonl")] == [8, 8]


def test_where_the_time_of_a_run_went(clock, tmp_path, capfd):
    """Of 999 seconds; a share is rounded so that all of them add up to 1."""
    report = Report(tmp_path, step=0, total_steps=18, batch_size=8, goodput=Goodput(clock))
    clock.now += 1 / 3
    spend(report, clock, compiling=2 / 3, computing=300, evaluating=98, waiting_for_data=200, saving=200)
    spend(report, clock, computing=200)
    report.ended(18)
    report.close()
    (row,) = read_lines(tmp_path / "events.jsonl")
    assert (row.pop("kind"), row.pop("step"), row.pop("seconds")) == ("goodput", 18, 999)
    assert row == {
        **{"computing": 0.501, "waiting_for_data": 0.2, "saving": 0.2},
        **{"evaluating": 0.098, "compiling": 0.001, "starting": 0.0},
    }
    assert sum(1000 * share for share in row.values()) == 1000
    said = "50.1 % computing, 20.0 % waiting for data, 20.0 % saving, 9.8 % evaluating, 0.1 % compiling"
    assert f"goodput in 0:16:39: {said}\n" in capfd.readouterr().err


def test_the_clock_starts_anew_with_every_line(clock, tmp_path):
    report = Report(tmp_path, step=0, total_steps=30, batch_size=8, goodput=Goodput(clock))
    for step, seconds in ((1, 20.0), (5, 2.0)):
        spend(report, clock, computing=seconds)
        report.train(step, 0.0, metrics())
    report.close()
    assert [row["images_per_second"] for row in read_lines(tmp_path / "metrics.jsonl")] == [8 / 20, 4 * 8 / 2]
    assert [row["waiting_for_data"] for row in read_lines(tmp_path / "metrics.jsonl")] == [0.0, 0.0]


def test_going_on_drops_what_is_done_again_and_a_line_that_was_cut_off(tmp_path):
    report = Report(tmp_path, step=0, total_steps=9, batch_size=8)
    for step in (1, 2, 3):
        report.train(step, step / 3, metrics(step))
    report.evaluation(3, 1.0, RESULT)
    report.train(4, 4 / 3, metrics(4))
    report.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 2, "lo')
    report = Report(tmp_path, step=3, total_steps=9, batch_size=8)
    report.evaluation(3, 1.0, RESULT)  # of a run that has nothing left to train: it is there already
    report.train(4, 4 / 3, metrics(5))
    report.close()
    assert [(row["kind"], row["step"], row["loss"]) for row in read_lines(tmp_path / "metrics.jsonl")] == [
        ("train", 1, 1),
        ("train", 2, 2),
        ("train", 3, 3),
        ("eval", 3, 1.5),
        ("train", 4, 5),
    ]


def test_lines_that_are_none_are_dropped(tmp_path):
    log = tmp_path / "metrics.jsonl"
    row = b'{"kind": "train", "step": 1, "epoch": 0.5, "loss": 2.0, "learning_rate": 0.1}'
    late = b'{"kind": "train", "step": 3}'
    odd = [b"5", b"[1]", b'"step"', b"null", b'{"kind": "train"}', b'{"step": "1"}', b'{"step": null}', b"\xff\xe9"]
    odd += [b"[" * 100_000, b"", b"\x00" * 99, row[:20]]
    log.write_bytes(b"\n".join([*odd, row, *odd, late, *odd]))
    draw_curves(log, tmp_path / "before.png")
    drop_after(log, 2)
    assert log.read_bytes() == row + b"\n"
    draw_curves(log, tmp_path / "after.png")
    with Image.open(tmp_path / "before.png") as before, Image.open(tmp_path / "after.png") as after:
        assert np.array_equal(np.asarray(before), np.asarray(after))
    report = Report(tmp_path, step=2, total_steps=9, batch_size=8)
    report.train(3, 1.0, metrics())
    report.close()
    assert [line["step"] for line in read_lines(log)] == [1, 3]


def test_names_in_a_report_are_printed(tmp_path, capfd):
    report = Report(tmp_path, step=0, total_steps=9, batch_size=8)
    report.tell("loaded\ncaf\udce9 \x1b[1m")
    report.close()
    assert capfd.readouterr().err == "loaded\ncaf\\xe9 \\x1b[1m\n"


def test_a_new_run_starts_with_an_empty_log(tmp_path):
    # Metrics without a checkpoint: the run died before its first one.
    for loss in (1.0, 2.0):
        report = Report(tmp_path, step=0, total_steps=9, batch_size=8)
        report.train(1, 0.1, metrics(loss))
        report.close()
    assert [row["loss"] for row in read_lines(tmp_path / "metrics.jsonl")] == [2.0]


def test_evaluations_go_to_the_log_with_their_numbers_only(tmp_path, capfd):
    report = Report(tmp_path, step=0, total_steps=9, batch_size=8)
    report.evaluation(3, 1.0, RESULT)
    report.close()
    (row,) = read_lines(tmp_path / "metrics.jsonl")
    assert row == {"kind": "eval", "step": 3, "epoch": 1.0, "top1": 50.0, "top5": 75.0, "loss": 1.5, "images": 4}
    assert "epoch 1: top-1 50.00 %, top-5 75.00 %, loss 1.5000 (4 images)" in capfd.readouterr().err


def test_a_run_that_waits_for_data_says_so_once(clock, tmp_path, capfd):
    report = Report(tmp_path, step=0, total_steps=900, batch_size=8, goodput=Goodput(clock))
    for step in (50, 150, 250):
        spend(report, clock, waiting_for_data=2, computing=8)
        report.train(step, 0.0, metrics())
    report.close()
    log = capfd.readouterr().err
    assert log.count("input-bound: the step waits for data 20 % of the time") == 1
    assert log.index("step 150/900") < log.index("input-bound")


def test_a_terminal_gets_a_progress_bar(clock, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(module.sys, "stderr", Terminal())
    report = Report(tmp_path, step=2, total_steps=4, batch_size=10, goodput=Goodput(clock))
    spend(report, clock, computing=1)
    report.advanced()
    report.train(3, 1.5, metrics())
    report.tell("something happened")
    report.close()
    text = module.sys.stderr.getvalue()
    assert "3/4" in text and "loss 2.0000, 10 images/s, 0 % waiting for data" in text
    assert "something happened\n" in text and "step 3/4" not in text


def test_tensorboard_has_the_same_values(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    report = Report(tmp_path, step=0, total_steps=9, batch_size=8)
    report.train(2, 0.5, metrics(2.5))
    report.evaluation(3, 1.0, RESULT)
    report.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, values = path.read_bytes(), {}
    while data:  # a record: length, its checksum, the event, its checksum
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        values |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        data = data[16 + length :]
    assert values[("train/loss", 2)] == 2.5 and values[("train/learning_rate", 2)] == pytest.approx(0.1)
    assert values[("eval/top1", 3)] == 50.0 and ("eval/branch_top1", 3) not in values


def test_curves_are_drawn_from_the_log(tmp_path):
    def draw(values):
        lines = [{"kind": "train", "step": i, "epoch": i / 4, **metrics(value)} for i, value in enumerate(values)]
        lines.append({"kind": "eval", "step": 4, "epoch": 1.0, "top1": 20.0, "top5": 60.0, "loss": 1.0})
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
        return np.asarray(Image.open(tmp_path / "curves.png").convert("L"), int)

    falling, rising = draw([4, 3, 2, 1]), draw([1, 2, 3, 4])
    assert falling.shape == rising.shape and falling.shape[1] > 2 * falling.shape[0]  # three plots side by side
    left, right = np.split(falling != rising, [falling.shape[1] // 3], axis=1)
    assert left.any() and not right.any()  # only the losses differ


def test_the_plots_of_a_run_without_steps_are_empty(tmp_path):
    def has_a_rate() -> bool:
        """Whether the plot on the right, which has no legend, shows anything coloured: its curve."""
        picture = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB"), int)
        right = picture[:, 2 * picture.shape[1] // 3 :]
        assert right.min() < 50, "there is no plot"
        return (right.max(axis=2) - right.min(axis=2)).max() > 50

    Report(tmp_path, step=0, total_steps=9, batch_size=8).close()
    assert not has_a_rate()
    report = Report(tmp_path, step=0, total_steps=9, batch_size=8)
    for step in (1, 2):
        report.train(step, step / 3, metrics())
    report.close()
    assert has_a_rate()
