"""What the tries share: images, the outcome of runs that nothing happened to, and how runs are started and compared."""

import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.tiny import assert_equal, write_folder
from tests.tiny_run import log_of, outcome, start

TIMEOUT = 300  # seconds, for a process that takes ten on an idle machine
GRACE = 30  # seconds between SIGTERM and the end that a scheduler grants
LONG = ("--set=epochs=8", "--set=checkpoint__every=2", "--set=log__every=1")  # 24 steps, 12 saves, 8 evaluations
Try = Callable[["Bench", Path], None]


class Bench:
    """What the tries share: images, and the outcome of runs that nothing happened to."""

    def __init__(self, root: Path, seed: int):
        self.root, self.images, self.random = root, write_folder(root / "images"), random.Random(seed)
        began = time.time()
        self.whole = self.finish(root / "whole")
        self.seconds_to_start = (root / "whole" / "config.json").stat().st_mtime - began
        self.seconds = self._seconds_of_training()

    def start(self, workdir: Path, *options: str, images: Path | None = None, umask: int = -1) -> subprocess.Popen[str]:
        return start(images or self.images, workdir, *LONG, *options, umask=umask)

    def run(self, workdir: Path, *options: str, code: int | None = 0, **given: Any) -> None:
        process = self.start(workdir, *options, **given)
        try:
            ended = process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"it hangs: {log_of(workdir)[-2000:]}") from None
        assert code is None or ended == code, f"exit code {ended}: {log_of(workdir)[-2000:]}"

    def finish(self, workdir: Path, *options: str) -> dict[str, Any]:
        self.run(workdir, *options)
        return outcome(workdir)

    def same(self, workdir: Path, *options: str) -> None:
        """Starts a run again and compares its end, bit by bit."""
        found, wanted = self.finish(workdir, *options), dict(self.whole)
        assert_equal(found.pop("state"), wanted.pop("state"))
        for key in wanted:
            assert found[key] == wanted[key], f"{key} differs"

    def _seconds_of_training(self) -> float:
        """From the first written file to the end."""
        began = (self.root / "whole" / "config.json").stat().st_mtime
        return (self.root / "whole" / "eval.json").stat().st_mtime - began

    def wait_for_training(self, workdir: Path, process: subprocess.Popen[str]) -> None:
        while not (workdir / "config.json").exists() and process.poll() is None:
            time.sleep(0.02)

    def refuses(self, workdir: Path, says: str, *options: str) -> None:
        """A run ends with one sentence and exit code 2."""
        self.run(workdir, *options, code=2)
        said = [line for line in log_of(workdir).splitlines() if line.startswith("maxmap: ")]
        assert said and says in said[-1], said or log_of(workdir)[-2000:]
