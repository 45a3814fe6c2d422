"""Progress of work on many images: a bar on a terminal, a few lines where there is none."""

import sys
import time

import jax
from tqdm import tqdm

_LINES = 10  # that are printed where there is no terminal


class Progress:
    """Shows an evaluation while it runs: images done, images per second, accuracies so far and the time left.

    It writes to stderr, on the first process alone.

    Args:
      total: Number of images.
    """

    def __init__(self, total: int):
        self._total, self._done = total, 0
        self._main = jax.process_index() == 0
        self._began: float | None = None  # when the first batch was done, which also compiles
        self._first = 0
        self._bar = tqdm(
            total=total, unit="image", disable=not (self._main and sys.stderr.isatty()), dynamic_ncols=True, leave=False
        )

    def update(self, done: int, top1: float, top5: float) -> None:
        """Shows that `done` images are done, with the accuracies so far in percent."""
        accuracies = f"top-1 {top1:.2f} %, top-5 {top5:.2f} %"
        crossed = self._done * _LINES // self._total < done * _LINES // self._total
        self._bar.set_postfix_str(accuracies, refresh=False)
        self._bar.update(done - self._done)
        now, self._done = time.perf_counter(), done
        if self._began is None:
            self._began, self._first = now, done
        elif self._main and self._bar.disable and crossed:
            speed = (done - self._first) / max(now - self._began, 1e-9)
            left = clock((self._total - done) / speed)
            print(
                f"{done}/{self._total} images, {speed:.1f} images/s, {accuracies}, {left} left",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """Removes the bar."""
        self._bar.close()


def clock(seconds: float) -> str:
    """Returns a time as hours, minutes and seconds, such as '0:02:05'."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
