"""What watches a run: for losses that are not finite or jump, for steps that hang, for signals to stop."""

import faulthandler
import json
import math
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from maxmap import storage
from maxmap.errors import UserError, printable
from maxmap.sharding import gather_processes
from maxmap.train.report import Report

RESTART = 75  # exit code after SIGTERM (EX_TEMPFAIL): the run is saved, and the scheduler is to start it again

LOSS_DECAY = 0.98  # of the moving average of the loss, and of its variance
SPIKE_DEVIATIONS = 6.0  # standard deviations above the average from which a loss is a spike
SPIKE_WARMUP = 100  # steps after which the average and the variance are known well enough to tell a spike


class Watch:
    """Checks the loss of every step, and gives the same verdict on every process.

    It writes what it finds to `events.jsonl`: step, kind ("skipped" or "spike"), loss, gradient norm and the samples of
    the batch as indices into the training split.

    Args:
      workdir: folder of the run.
      report: prints what is found.
      max_skips: how many steps in a row may be skipped because loss or gradients are not finite.

    Attributes:
      skips: how many steps in a row were skipped up to now.
    """

    def __init__(self, workdir: str | Path, report: Report, *, max_skips: int):
        self._workdir, self._report, self._max_skips = workdir, report, max_skips
        self._mean, self._variance, self._seen = 0.0, 0.0, 0
        self.skips = 0

    def check(self, step: int, metrics: Mapping[str, Any], samples: np.ndarray) -> bool:
        """Checks a step's loss and gradient norm.

        Args:
          step: number of the step.
          metrics: of the step: 'loss', 'grad_norm' and 'skipped'.
          samples: of this process: indices into the training split.

        Returns:
          Whether the run has to stop, because too many steps in a row were skipped.
        """
        loss, norm, skipped = (float(x) for x in jax.device_get([metrics[k] for k in ("loss", "grad_norm", "skipped")]))
        if skipped:
            self.skips += 1
            self._write_event("skipped", step, loss, norm, samples)
            self._report.tell(
                f"step {step} left out: its loss is {loss}, its gradient norm {norm} ({self.skips} in a row, at most "
                f"{self._max_skips})"
            )
            return self.skips > self._max_skips
        self.skips = 0
        deviation = math.sqrt(self._variance)
        if self._seen >= SPIKE_WARMUP and loss > self._mean + SPIKE_DEVIATIONS * deviation:
            self._write_event("spike", step, loss, norm, samples)
            self._report.tell(
                f"loss spike at step {step}: {loss:.4f} after {self._mean:.4f} +- {deviation:.4f}, gradient norm "
                f"{norm:.3g}"
            )
        # The decay grows up to LOSS_DECAY, so that the first steps have equal weights in the average.
        keep = min(LOSS_DECAY, self._seen / (self._seen + 1))
        change = loss - self._mean
        self._mean += (1 - keep) * change
        self._variance = keep * (self._variance + (1 - keep) * change**2)
        self._seen += 1
        return False

    def stop(self, step: int, metrics: Mapping[str, Any], samples: np.ndarray, names: Any, layers: Any) -> UserError:
        """Writes `not_finite.json` and returns the error that ends the run.

        Args:
          step: number of the last step that was skipped.
          metrics: of this step.
          samples: of this process: indices into the training split.
          names: function from the index of a sample to its name.
          layers: what `maxmap.train.step.make_diagnosis` returns: a tree of 'largest' and 'not_finite'.

        Returns:
          The error, which names the file.
        """
        samples = gather_processes(samples)
        path = storage.resolve(self._workdir) / "not_finite.json"
        if jax.process_index() == 0:
            flat = jax.tree_util.tree_leaves_with_path(jax.device_get(layers), is_leaf=lambda x: "not_finite" in x)
            table = [
                {
                    "layer": jax.tree_util.keystr(where, simple=True, separator="/"),
                    "largest": float(numbers["largest"]),
                    "not_finite": int(numbers["not_finite"]),
                }
                for where, numbers in flat
            ]
            found = {
                "step": step,
                "metrics": {key: str(value) for key, value in jax.device_get(dict(metrics)).items()},
                "samples": [{"index": int(i), "name": printable(names(int(i)))} for i in samples],
                "layers": table,
            }
            storage.write_text(path, json.dumps(found, indent=1) + "\n")
        return UserError(
            f"loss or gradients were not finite in {self.skips} steps in a row, up to step {step}: {path} names the "
            "samples and the layers; the newest checkpoint is from before, go on from it with a lower learning rate."
        )

    def _write_event(self, kind: str, step: int, loss: float, norm: float, samples: np.ndarray) -> None:
        values = {"loss": str(loss), "grad_norm": str(norm), "samples": gather_processes(samples).tolist()}
        self._report.event(kind, step, values)


class Watchdog:
    """Reports a phase of the run that takes too long, with the stack of every thread.

    It prints one line to stderr, and adds this line and the stacks to a file.

    Args:
      path: the file, perhaps in a bucket.
      seconds: how long a phase may take.
    """

    def __init__(self, path: str | Path, seconds: float):
        self._path, self._seconds = path, seconds
        self._phase, self._since, self._reported = "starting", time.monotonic(), False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watchdog")

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def enter(self, phase: str) -> None:
        """Begins a phase; its name says what the run does, such as "step 7 waits for its data"."""
        self._phase, self._since, self._reported = phase, time.monotonic(), False

    def _run(self) -> None:
        while not self._ended.wait(min(self._seconds / 4, 10)):
            stood = time.monotonic() - self._since
            if stood > self._seconds and not self._reported:
                self._reported = True
                text = (
                    f"nothing has moved for {stood:.0f} s while {self._phase}; the threads' stacks are in {self._path}."
                )
                print(f"maxmap: {text}", file=sys.stderr, flush=True)
                with tempfile.TemporaryFile("w+") as file:
                    faulthandler.dump_traceback(file, all_threads=True)
                    file.seek(0)
                    path = storage.resolve(self._path)
                    before = path.read_bytes().decode(errors="replace") if path.exists() else ""
                    storage.write_text(path, f"{before}{text}\n{file.read()}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()


class Interrupts:
    """Holds back the first Ctrl-C or SIGTERM until the step is done; a second one ends the process at once.

    Several processes have to stop after the same step. JAX makes them agree on it when a scheduler sends SIGTERM. It
    does not do so for Ctrl-C, which therefore ends a process of several at once.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if jax.process_count() == 1:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def reached(self, step: int) -> bool:
        """Returns whether to stop after this many steps; call it once for every step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self._received = signal.SIGTERM
        return self._received is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._received = number
        signal.signal(number, self._previous[number])

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def exit_code(self) -> int:
        """Returns what the process ends with after the signal: `RESTART` for SIGTERM, 130 for Ctrl-C."""
        return RESTART if self._received == signal.SIGTERM else 128 + signal.SIGINT
