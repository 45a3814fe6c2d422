"""Progress of work on many images: a bar on a terminal, a few lines where there is none."""

import sys
import time

from tqdm import tqdm

_LINES = 10  # that are printed where there is no terminal


class Progress:
    """Shows work on images while it runs: images done, images per second, what the work adds, and the time left.

    It writes to stderr.

    Args:
      total: Number of images.
      shown: Whether to write at all; of several processes, one does.
    """

    def __init__(self, total: int, *, shown: bool = True):
        self._total, self._done = total, 0
        self._shown = shown
        self._began: float | None = None  # when the first batch was done, which also compiles
        self._first = 0
        self._bar = tqdm(
            total=total, unit="image", disable=not (shown and sys.stderr.isatty()), dynamic_ncols=True, leave=False
        )

    def update(self, done: int, note: str = "") -> None:
        """Shows that `done` images are done; `note` says what was found so far."""
        crossed = self._done * _LINES // self._total < done * _LINES // self._total
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(done - self._done)
        now, self._done = time.perf_counter(), done
        if self._began is None:
            self._began, self._first = now, done
        elif self._shown and self._bar.disable and crossed:
            speed = (done - self._first) / max(now - self._began, 1e-9)
            left = clock((self._total - done) / speed)
            told = [f"{done}/{self._total} images", f"{speed:.1f} images/s", *[note] * bool(note), f"{left} left"]
            print(", ".join(told), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Removes the bar."""
        self._bar.close()


def clock(seconds: float) -> str:
    """Returns a time as hours, minutes and seconds, such as '0:02:05'."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
