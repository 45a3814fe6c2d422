"""What a run reports: lines on the terminal, `metrics.jsonl`, TensorBoard's file, trackers and `curves.png`."""

import contextlib
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from etils import epath
from tqdm import tqdm

from maxmap import storage
from maxmap.errors import printable
from maxmap.progress import clock
from maxmap.tasks import SINGLE_LABEL, TASKS
from maxmap.tasks.task import Task
from maxmap.train.goodput import Goodput
from maxmap.train.trackers import EVENT, About, Tracker, close, known_before

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LARGEST_DRAWN = 1e30  # matplotlib computes differences and squares of what it draws
LOGS = ("metrics.jsonl", "events.jsonl")  # a run that goes on adds lines to them
INPUT_BOUND = 0.1  # share of the time that steps wait for data, above which the report says so


class Report:
    """Reports the metrics of a run; only the first process writes files and prints.

    An object in a bucket cannot grow, only be written as a whole. If the workdir is in a bucket, `metrics.jsonl`,
    `events.jsonl` and TensorBoard's file grow in a temporary folder, and `upload` copies them to the bucket: after
    every evaluation, before every checkpoint, and at the end. So the bucket has every line up to the newest checkpoint.
    When a run is killed, it loses only lines of later steps, which the next run takes again.

    Args:
      workdir: folder of the run, perhaps in a bucket.
      step: that the run starts or goes on from. Lines of later steps are dropped, because the run takes these steps
        again. An evaluation at this step is printed but not written, because the log has it already.
      total_steps: number of steps of the whole run.
      batch_size: images per step.
      goodput: counts where the time goes; None to begin now.
      trackers: names of those that get the same numbers; see `maxmap.train.trackers`.
      config: what they get, too: values by their paths.
      check_ownership: called before anything is copied to a bucket; see `maxmap.train.resume.only_run`.

    Attributes:
      folder: where the first process writes its files: the workdir, or the temporary folder for one in a bucket.
      goodput: whoever runs the steps tells it what phase begins; see `maxmap.train.goodput`.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        step: int,
        total_steps: int,
        batch_size: int,
        goodput: Goodput | None = None,
        trackers: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
        check_ownership: Callable[[], None] = lambda: None,
    ):
        self._main = jax.process_index() == 0
        self._workdir, self._check_ownership = workdir, check_ownership
        self._batch_size = batch_size
        self._first, self._total = step, total_steps
        self.goodput = goodput or Goodput()
        self._step, self._before = step, self._step_seconds()
        self._told_input_bound = False
        if not self._main:
            return
        self.folder = Path(storage.expand(workdir))
        self._copied: dict[Path, int] = {}
        self._temporary = contextlib.ExitStack()
        if storage.in_bucket(workdir):
            self.folder = Path(self._temporary.enter_context(tempfile.TemporaryDirectory(prefix="maxmap-")))
            for name in LOGS:
                if (storage.resolve(workdir) / name).exists():
                    (self.folder / name).write_bytes((storage.resolve(workdir) / name).read_bytes())
        self._path, self._events = (self.folder / name for name in LOGS)
        # A run that begins anew is a new one for the trackers, too.
        logs = [_rows(path) if trackers and step else [] for path in (self._events, self._path)]
        drop_after(self._path, step)
        drop_after(self._events, step)
        self._file = self._path.open("ab", buffering=0)
        from maxmap.train.board import Board  # it imports PyTorch if that is installed, which takes a second

        self._board = Board(self.folder / "tensorboard", step + 1)
        self._trackers: list[Tracker] = []
        if trackers:
            known = known_before(*logs)
            self.event(EVENT, step, known)
            about = About(Path(workdir).name, config=config or {}, folder=self.folder, **known)
            self._temporary.enter_context(contextlib.redirect_stdout(sys.stderr))  # trackers greet; the result is alone
            self._trackers = [Tracker(name, about, self.warn) for name in trackers]
        self._bar = tqdm(
            total=total_steps, initial=step, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True
        )

    def _step_seconds(self) -> tuple[float, float]:
        """Returns the seconds that steps have taken, all of them and those of waiting for data."""
        waiting = self.goodput.seconds("waiting for data")
        return self.goodput.seconds("computing") + waiting, waiting

    def advanced(self) -> None:
        """Counts a step on the progress bar."""
        if self._main:
            self._bar.update()

    def compiled(self) -> None:
        """Tells how long the step took to compile."""
        self.tell(f"compiling, {self.goodput.seconds('compiling'):.0f} s")
        if self._main:
            self._bar.unpause()

    def time_left(self, step: int) -> None:
        """Tells the time left, from the steps since the last report."""
        seconds = self._step_seconds()[0] - self._before[0]
        self.tell(f"{clock((self._total - step) * seconds / max(step - self._step, 1))} left")

    def train(self, step: int, epoch: float, metrics: Mapping[str, Any]) -> None:
        """Reports the metrics of a training step, and the speed since the last report.

        The first step says nothing of the time left: it also fills caches and allocates memory.
        """
        now, steps = self._step_seconds(), max(step - self._step, 1)
        seconds, waited = max(now[0] - self._before[0], 1e-9), now[1] - self._before[1]
        speed = {"images_per_second": steps * self._batch_size / seconds, "waiting_for_data": waited / seconds}
        left = f"{clock((self._total - step) * seconds / steps)} left, " if step > self._first + 1 else ""
        self._step, self._before = step, now
        self._write("train", step, {"epoch": epoch, **metrics, **speed})
        text = f"loss {metrics['loss']:.4f}, {speed['images_per_second']:.0f} images/s"
        waiting = f"{100 * speed['waiting_for_data']:.0f} % waiting for data"
        if self._main and self._bar.disable:
            self.tell(f"step {step}/{self._total}, epoch {epoch:.2f}, {text}, {left}{waiting}")
        elif self._main:
            self._bar.set_postfix_str(f"{text}, {waiting}")
        if speed["waiting_for_data"] > INPUT_BOUND and step > 100 and not self._told_input_bound:
            self._told_input_bound = True
            self.tell(f"input-bound: the step waits for data {waiting.split()[0]} % of the time; raise data.workers.")

    def evaluation(self, step: int, epoch: float, result: Mapping[str, Any], task: Task = SINGLE_LABEL) -> None:
        """Reports an evaluation."""
        numbers = {key: value for key, value in result.items() if isinstance(value, int | float)}
        if step > self._first:
            self._write("eval", step, {"epoch": epoch, **numbers})
        self.tell(f"epoch {epoch:.0f}: {task.words(result)} ({result['images']} images)")

    def event(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Adds a line to `events.jsonl`, on the first process."""
        if self._main:
            with self._events.open("a") as file:
                file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")

    def ended(self, step: int) -> None:
        """Tells where the time has gone: at the end of a run, or when it is stopped."""
        shares = {phase.replace(" ", "_"): share for phase, share in self.goodput.shares().items()}
        self.event("goodput", step, {"seconds": round(self.goodput.total(), 3), **shares})
        self.tell(f"goodput in {self.goodput.words()}")

    def tell(self, text: str) -> None:
        """Prints a line above the progress bar, on the first process."""
        if self._main:
            self.warn(text)

    def warn(self, text: str) -> None:
        """Prints a line on any process, because each one reads other files."""
        tqdm.write("\n".join(map(printable, text.split("\n"))), file=sys.stderr)

    def upload(self) -> None:
        """Copies files that have grown to the bucket, if the workdir is in one."""
        if not self._main or not storage.in_bucket(self._workdir):
            return
        self._check_ownership()
        for file in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            try:
                # A file only grows, so its content is new if its size is.
                if self._copied.get(file) == (size := file.stat().st_size):
                    continue
                data = file.read_bytes()
            except FileNotFoundError:  # a tracker has removed a file of its own
                continue
            (storage.resolve(self._workdir) / file.relative_to(self.folder).as_posix()).write_bytes(data)
            self._copied[file] = size

    def close(self) -> None:
        """Closes the progress bar and the files, and draws `curves.png`."""
        if self._main:
            with self._temporary:
                self._bar.close()
                self._file.close()
                self._board.close()
                draw_curves(self._path, self._path.with_name("curves.png"))
                try:
                    self.upload()  # before trackers take their time: a scheduler may kill the run soon
                finally:
                    close(self._trackers)
                self.upload()

    def _write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if not self._main:
            return
        self._file.write((json.dumps({"kind": kind, "step": step, **values}) + "\n").encode())
        self._board.scalars(kind, values, step)
        for tracker in self._trackers:
            tracker.scalars(kind, values, step)


def drop_after(path: Path, step: int) -> None:
    """Removes the lines of later steps from a log, and those that are no lines of a log, as after a crash."""
    if path.exists():
        kept = [line for line, row in read_log(path) if row["step"] <= step]
        storage.write_text(path, "".join(f"{line}\n" for line in kept))


def _rows(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a log; none where there is no file."""
    return [row for _, row in read_log(path)] if path.exists() else []


def read_log(path: Path | epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each line of a log and its values; a line that is not JSON with a step is left out."""
    for line in path.read_bytes().split(b"\n"):
        try:
            text = line.decode()
            row = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield text, row


def draw_curves(metrics: Path, picture: Path) -> None:
    """Draws the losses, the figures of the task and the learning rates of a `metrics.jsonl` into a PNG file."""
    # Without pyplot, which would look for a display and keep the figure in memory.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    plot_curves([row for _, row in read_log(metrics)], figure.subplots(1, 3))
    figure.savefig(picture, dpi=110)


def plot_curves(rows: Sequence[Mapping[str, Any]], axes: Sequence["Axes"]) -> None:
    """Plots losses, the figures of the task and learning rates.

    Args:
      rows: of a log; see `read_log`.
      axes: matplotlib's, for each of the three.
    """
    train = [row for row in rows if has(row, "train", "epoch", "loss", "learning_rate")]
    found = {name: [row for row in rows if has(row, "eval", "epoch", "loss", *TASKS[name].curves[0])] for name in TASKS}
    task = max(found, key=lambda name: len(found[name]))  # the first one where there are none
    evals, (curves, figures_title) = found[task], TASKS[task].curves
    loss, figures, rate = axes
    loss.plot(_column(train, "epoch"), _column(train, "loss"), label="training objective")
    loss.plot(_column(evals, "epoch"), _column(evals, "loss"), label="evaluation")
    for key, name in curves.items():
        figures.plot(_column(evals, "epoch"), _column(evals, key), marker=".", label=name)
    rate.plot(_column(train, "epoch"), _column(train, "learning_rate"))
    for each, title in ((loss, "loss"), (figures, figures_title), (rate, "learning rate")):
        each.set_title(title)
        each.set_xlabel("epoch")
        each.grid(alpha=0.3)
    for each in (loss, figures):
        each.legend()


def _column(rows: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    """Returns the values of a key; what cannot be drawn is NaN, which leaves a gap."""
    return [float(row[key]) if abs(row[key]) < _LARGEST_DRAWN else math.nan for row in rows]


def has(row: Mapping[str, Any], kind: str, *numbers: str) -> bool:
    """Whether a line of the log is of a kind, and has all these numbers."""
    return row.get("kind") == kind and all(isinstance(row.get(key), int | float) for key in numbers)
