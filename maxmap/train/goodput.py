"""Where the wall time of a run goes: to computing, or to what computing has to wait for."""

import itertools
import time
from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

from maxmap.progress import clock as as_clock

Phase: TypeAlias = Literal["starting", "compiling", "waiting for data", "computing", "evaluating", "saving"]


class Goodput:
    """Counts the seconds of each phase of a run, in this process; every moment belongs to one phase.

    "starting" is all before the first step: opening the data, building the model, reading a checkpoint. "compiling" is
    that of the training step; that of the evaluation belongs to "evaluating". "computing" is what remains of a step
    beside "waiting for data". What is written in the background while steps compute is no "saving".

    Args:
      clock: Returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._phase: Phase = "starting"
        self._since = clock()
        self._seconds: dict[Phase, float] = dict.fromkeys(get_args(Phase), 0.0)

    def enter(self, phase: Phase) -> None:
        """Ends the phase before, and begins another one."""
        now = self._clock()
        self._seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now

    def seconds(self, phase: Phase) -> float:
        """Returns the seconds of a phase up to now."""
        return self._seconds[phase] + (self._clock() - self._since if phase == self._phase else 0.0)

    def total(self) -> float:
        """Returns the seconds of all phases up to now."""
        return sum(map(self.seconds, self._seconds))

    def shares(self) -> dict[Phase, float]:
        """Returns the part of the time that each phase took, the largest first: thousandths, which add up to 1."""
        upto = list(itertools.accumulate(map(self.seconds, self._seconds), initial=0.0))
        # Sums are rounded and not the parts, so that these add up.
        rounded = [round(1000 * part / (upto[-1] or 1.0)) for part in upto]
        parts = [(b - a) / 1000 for a, b in itertools.pairwise(rounded)]
        return dict(sorted(zip(self._seconds, parts, strict=True), key=lambda item: -item[1]))

    def words(self) -> str:
        """Returns the time and its shares in words."""
        shares = ", ".join(f"{100 * share:.1f} % {phase}" for phase, share in self.shares().items() if share)
        return f"{as_clock(self.total())}: {shares}"
