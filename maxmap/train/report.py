"""What a run tells: the terminal, `metrics.jsonl`, TensorBoard and `curves.png`."""

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from maxmap import storage

LOGS = ("metrics.jsonl", "events.jsonl")  # what a run that goes on adds to
INPUT_BOUND = 0.1  # share of the time spent waiting for data above which the log says so


class Report:
    """Writes metrics; on all processes but the first it does nothing.

    An object in a bucket is only ever written as a whole. There `metrics.jsonl`, `events.jsonl` and TensorBoard's file
    grow in a temporary folder, and `keep` copies them: after every evaluation, before every checkpoint, at the end. So
    the bucket has every line up to the newest checkpoint, and what a killed run did not copy is of steps that the next
    one takes again.

    Args:
      workdir: of the run.
      step: at which it starts or goes on; what was written of later steps is dropped, since they are taken again. What
        is evaluated at this very step was evaluated before: it is told, not written twice.
      total_steps: of the whole run.
      batch_size: images per step.
      look: is called before anything is copied to a bucket; see `maxmap.train.resume.only_run`.

    Attributes:
      folder: where the files grow, on the first process: the workdir itself unless that is in a bucket.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        step: int,
        total_steps: int,
        batch_size: int,
        look: Callable[[], None] = lambda: None,
    ):
        self._main = jax.process_index() == 0
        self._workdir, self._look = workdir, look
        self._batch_size = batch_size
        self._first, self._total = step, total_steps
        self._time, self._step, self._waited = time.perf_counter(), step, 0.0
        self._told_input_bound = False
        if not self._main:
            return
        self.folder = Path(workdir)
        self._copied: dict[Path, int] = {}
        self._temporary = contextlib.ExitStack()
        if storage.in_bucket(workdir):
            self.folder = Path(self._temporary.enter_context(tempfile.TemporaryDirectory(prefix="maxmap-")))
            for name in LOGS:
                if (storage.resolve(workdir) / name).exists():
                    (self.folder / name).write_bytes((storage.resolve(workdir) / name).read_bytes())
        self._path = self.folder / LOGS[0]
        drop_after(self._path, step)
        self._file = self._path.open("ab", buffering=0)
        from maxmap.train.board import Board  # it imports PyTorch where that is installed, which takes a second

        self._board = Board(self.folder / "tensorboard", step + 1)
        self._bar = tqdm(
            total=total_steps, initial=step, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True
        )

    def waited(self, seconds: float) -> None:
        """Adds time that a step waited for data."""
        self._waited += seconds

    def advanced(self) -> None:
        """Counts a step on the progress bar."""
        if self._main:
            self._bar.update()

    def train(self, step: int, epoch: float, metrics: Mapping[str, Any]) -> None:
        """Logs the metrics of a training step, with the speed since the last time."""
        now = time.perf_counter()
        seconds, steps = now - self._time, max(step - self._step, 1)
        speed = {"images_per_second": steps * self._batch_size / seconds, "waiting_for_data": self._waited / seconds}
        left = (self._total - step) * seconds / steps
        self._time, self._step, self._waited = now, step, 0.0
        self._write("train", step, {"epoch": epoch, **metrics, **speed})
        text = f"loss {metrics['loss']:.4f}, {speed['images_per_second']:.0f} images/s"
        waiting = f"{100 * speed['waiting_for_data']:.0f} % waiting for data"
        if self._main and self._bar.disable:
            self.tell(f"step {step}/{self._total}, epoch {epoch:.2f}, {text}, {_clock(left)} left, {waiting}")
        elif self._main:
            self._bar.set_postfix_str(f"{text}, {waiting}")
        if speed["waiting_for_data"] > INPUT_BOUND and step > 100 and not self._told_input_bound:
            self._told_input_bound = True
            self.tell(f"input-bound: the step waits for data {waiting.split()[0]} % of the time; raise data.workers")

    def evaluation(self, step: int, epoch: float, result: Mapping[str, Any]) -> None:
        """Logs an evaluation; its time does not count as training time."""
        numbers = {key: value for key, value in result.items() if isinstance(value, int | float)}
        if step > self._first:
            self._write("eval", step, {"epoch": epoch, **numbers})
        self.tell(
            f"epoch {epoch:.0f}: top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, loss {result['loss']:.4f} "
            f"({result['images']} images)"
        )

    def left_out(self, seconds: float) -> None:
        """Leaves time that was not training out of the speed: evaluation, saving."""
        self._time += seconds

    def tell(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self._main:
            self.warn(text)

    def warn(self, text: str) -> None:
        """Prints a line on this process, be it the first or not: each reads files of its own."""
        tqdm.write(text, file=sys.stderr)

    def keep(self) -> None:
        """Copies what has grown to the bucket, if the workdir is in one."""
        if not self._main or not storage.in_bucket(self._workdir):
            return
        self._look()
        for file in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            if self._copied.get(file) != (size := file.stat().st_size):  # they only grow
                data = file.read_bytes()
                (storage.resolve(self._workdir) / file.relative_to(self.folder).as_posix()).write_bytes(data)
                self._copied[file] = size

    def close(self) -> None:
        """Ends the bar and the files, and draws `curves.png`."""
        if self._main:
            with self._temporary:
                self._bar.close()
                self._file.close()
                self._board.close()
                draw_curves(self._path, self._path.with_name("curves.png"))
                self.keep()

    def _write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if not self._main:
            return
        self._file.write((json.dumps({"kind": kind, "step": step, **values}) + "\n").encode())
        for key, value in values.items():
            self._board.scalar(f"{kind}/{key}", value, step)


def drop_after(path: Path, step: int) -> None:
    """Drops the lines of later steps, and a line that was cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            continue
    storage.write_text(path, "".join(kept))


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def draw_curves(metrics: Path, picture: Path) -> None:
    """Draws loss, accuracy and learning rate of a `metrics.jsonl` into a PNG."""
    # Not pyplot: it would look for a display and keep the figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    train = [row for row in rows if row["kind"] == "train"]
    evals = [row for row in rows if row["kind"] == "eval"]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy, rate = figure.subplots(1, 3)
    loss.plot([r["epoch"] for r in train], [r["loss"] for r in train], label="training objective")
    loss.plot([r["epoch"] for r in evals], [r["loss"] for r in evals], label="evaluation, cross-entropy")
    accuracy.plot([r["epoch"] for r in evals], [r["top1"] for r in evals], marker=".", label="top-1")
    accuracy.plot([r["epoch"] for r in evals], [r["top5"] for r in evals], marker=".", label="top-5")
    rate.plot([r["epoch"] for r in train], [r["learning_rate"] for r in train])
    for axes, title in ((loss, "loss"), (accuracy, "accuracy, %"), (rate, "learning rate")):
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    for axes in (loss, accuracy):
        axes.legend()
    figure.savefig(picture, dpi=110)
