"""Watching a run: signals, numbers that are not finite, losses that jump, steps that hang."""

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
from maxmap.errors import UserError
from maxmap.train.report import Report, drop_after

RESTART = 75  # exit code after SIGTERM (EX_TEMPFAIL): the run is saved and wants to be started again

MEMORY = 0.98  # share of the old mean and variance of the loss that a step keeps
SPIKE = 6.0  # standard deviations above the mean
CALM = 100  # steps before a spike can be told from the noise


class Watch:
    """Looks at the loss of every step, a step late, on every process alike.

    What it finds goes to `events.jsonl`: step, kind ("skipped" or "spike"), loss, gradient norm and the samples of the
    batch, which are indices into the training split.

    Args:
      workdir: of the run.
      report: where it is told.
      step: at which the run starts or goes on.
      max_skips: steps in a row that may be left out because loss or gradients are not finite.
    """

    def __init__(self, workdir: str | Path, report: Report, *, step: int, max_skips: int):
        self._workdir, self._report, self._max = workdir, report, max_skips
        self._mean, self._variance, self._seen = 0.0, 0.0, 0
        self.skips = 0  # in a row
        if jax.process_index() == 0:
            drop_after(report.folder / "events.jsonl", step)

    def look(self, step: int, metrics: Mapping[str, Any], samples: np.ndarray) -> bool:
        """Looks at the metrics of step number `step`; returns whether the run has to stop."""
        loss, norm, skipped = (float(x) for x in jax.device_get([metrics[k] for k in ("loss", "grad_norm", "skipped")]))
        if skipped:
            self.skips += 1
            self._note("skipped", step, loss, norm, samples)
            self._report.tell(
                f"step {step} left out: its loss is {loss}, its gradient norm {norm} ({self.skips} in a row, at most "
                f"{self._max})"
            )
            return self.skips > self._max
        self.skips = 0
        deviation = math.sqrt(self._variance)
        if self._seen >= CALM and loss > self._mean + SPIKE * deviation:
            self._note("spike", step, loss, norm, samples)
            self._report.tell(
                f"loss spike at step {step}: {loss:.4f} after {self._mean:.4f} +- {deviation:.4f}, gradient norm "
                f"{norm:.3g}"
            )
        # Of the mean of all steps first, of the newest later.
        keep = min(MEMORY, self._seen / (self._seen + 1))
        change = loss - self._mean
        self._mean += (1 - keep) * change
        self._variance = keep * (self._variance + (1 - keep) * change**2)
        self._seen += 1
        return False

    def stop(self, step: int, metrics: Mapping[str, Any], samples: np.ndarray, names: Any, layers: Any) -> UserError:
        """Writes `not_finite.json` and returns the error that ends the run.

        Args:
          step: the last that was left out.
          metrics: of it.
          samples: of this process.
          names: function from the index of a sample to its name.
          layers: tree of the numbers that `maxmap.train.step.make_diagnosis` returns.
        """
        samples = _of_all_processes(samples)
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
                "samples": [{"index": int(i), "name": names(int(i))} for i in samples],
                "layers": table,
            }
            storage.write_text(path, json.dumps(found, indent=1) + "\n")
        return UserError(
            f"loss or gradients were not finite in {self.skips} steps in a row, up to step {step}: {path} names the "
            "samples and every layer's numbers; the newest checkpoint is from before, go on from it with a lower rate."
        )

    def _note(self, kind: str, step: int, loss: float, norm: float, samples: np.ndarray) -> None:
        samples = _of_all_processes(samples)
        if jax.process_index() == 0:
            row = {"kind": kind, "step": step, "loss": str(loss), "grad_norm": str(norm), "samples": samples.tolist()}
            with (self._report.folder / "events.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")


def _of_all_processes(samples: np.ndarray) -> np.ndarray:
    if jax.process_count() == 1:
        return samples
    return np.asarray(multihost_utils.process_allgather(samples.astype(np.int32), tiled=True))


class Watchdog:
    """Says where the run stands, and prints the stack of every thread, when nothing has moved for too long.

    Args:
      path: file that it adds to, beside stderr; it may be in a bucket.
      seconds: that a phase may take.
    """

    def __init__(self, path: str | Path, seconds: float):
        self._path, self._seconds = path, seconds
        self._phase, self._since, self._told = "starting", time.monotonic(), False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watchdog")

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def enter(self, phase: str) -> None:
        """Notes what is being done from now on."""
        self._phase, self._since, self._told = phase, time.monotonic(), False

    def _run(self) -> None:
        while not self._ended.wait(min(self._seconds / 4, 10)):
            stood = time.monotonic() - self._since
            if stood > self._seconds and not self._told:
                self._told = True
                text = (
                    f"nothing has moved for {stood:.0f} s while {self._phase}; where every thread stands: {self._path}"
                )
                print(f"maxmap: {text}", file=sys.stderr, flush=True)
                with tempfile.TemporaryFile("w+") as file:
                    faulthandler.dump_traceback(file, all_threads=True)
                    file.seek(0)
                    path = storage.resolve(self._path)
                    before = path.read_text() if path.exists() else ""
                    storage.write_text(path, f"{before}{text}\n{file.read()}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()


class Interrupts:
    """Turns the first Ctrl-C or SIGTERM into a wish to stop after this step; a second one is not held up.

    Several processes have to stop after the same step. JAX agrees on it for SIGTERM, which is what a scheduler sends;
    Ctrl-C has no such meaning there and ends the process at once.
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
        """Whether to stop after this many steps; to be asked once for every one."""
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
        return RESTART if self._received == signal.SIGTERM else 128 + signal.SIGINT
