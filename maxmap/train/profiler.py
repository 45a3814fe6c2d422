"""A trace of some steps of a run, for xprof."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from maxmap.errors import UserError
from maxmap.train.report import Report

FOLDER = "profile"


def check_steps(steps: tuple[int, int] | None, total: int) -> None:
    """Raises UserError unless a run of `total` steps has all those from the first to the second."""
    if steps is not None and not steps[0] <= steps[1] <= total:
        raise UserError(
            f"config.log.profile is {tuple(steps)}, and the run has {total} steps: give the first and the last step to "
            f"trace, such as ({min(10, total)}, {min(12, total)})."
        )


class Profiler:
    """Traces steps by `jax.profiler`, on the first process, into the folder `profile` of the workdir.

    A run that goes on behind the first of these steps traces those that are left.

    Args:
      workdir: of the run.
      report: says where the trace is.
      steps: the first and the last; None for none.
    """

    def __init__(self, workdir: str | Path, report: Report, steps: tuple[int, int] | None):
        self._workdir, self._report = workdir, report
        self._steps = range(0) if steps is None or jax.process_index() > 0 else range(steps[0], steps[1] + 1)
        self._began: int | None = None  # the first step of the trace that is running
        self._newest = 0

    @contextlib.contextmanager
    def step(self, number: int, wait: Callable[[], None]) -> Iterator[None]:
        """Traces the step that is taken meanwhile, if it is one of those; `wait` returns when devices are done."""
        if number not in self._steps:
            yield
            return
        if self._began is None:
            jax.profiler.start_trace(self._report.folder / FOLDER)
            self._began = number
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield
        self._newest = number
        if number == self._steps[-1]:
            wait()
            self.close()

    def close(self) -> None:
        """Writes the trace that is running, if there is one."""
        if self._began is None:
            return
        self._report.goodput.enter("saving")
        jax.profiler.stop_trace()
        folder = f"{self._workdir}/{FOLDER}"
        self._report.tell(
            f"trace of steps {self._began} to {self._newest} in {folder}: pip install xprof, then xprof "
            f"--logdir={folder}"
        )
        self._began = None
