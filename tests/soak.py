"""Runs that are killed, starved and lied to, at random moments: what survives? `make soak`, or python -m tests.soak.

Every try trains the tests' network in processes of its own, injects a fault, starts the run again, and compares all
that it ends with (parameters, optimizer state, averages, batch statistics, metrics, evaluation, the samples of every
step) with the run that nothing happened to: bit for bit, unless another number of devices is the point.

  --only REGEX   the faults whose names match          --jobs N   tries at a time
  --seed N       of the random moments                 --tries N  kills at random moments
"""

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from absl import logging

from maxmap import checkpoint
from tests.tiny import assert_equal, free_port, write_folder
from tests.tiny_run import PLACES, log_of, outcome, start

TIMEOUT = 300  # seconds, for a process that takes ten on an idle machine
GRACE = 30  # seconds between SIGTERM and the end that a scheduler grants
LONG = ("--set=epochs=8", "--set=checkpoint__every=2", "--set=log__every=1")  # 24 steps, 12 saves, 8 evaluations
Try = Callable[["Bench", Path], None]


class Bench:
    """What the tries share: images, and the outcome of runs that nothing happened to."""

    def __init__(self, root: Path, seed: int):
        self.root, self.images, self.random = root, write_folder(root / "images"), random.Random(seed)
        self.whole = self.finish(root / "whole")
        self.seconds = self._seconds_of_training()

    def start(self, workdir: Path, *options: str, images: Path | None = None) -> subprocess.Popen[str]:
        return start(images or self.images, workdir, *LONG, *options)

    def run(self, workdir: Path, *options: str, code: int | None = 0, images: Path | None = None) -> None:
        process = self.start(workdir, *options, images=images)
        try:
            ended = process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"it hangs: {log_of(workdir)[-2000:]}") from None
        assert code is None or ended == code, f"exit code {ended}: {log_of(workdir)[-2000:]}"

    def finish(self, workdir: Path, *options: str) -> dict[str, Any]:
        self.run(workdir, *options)
        return outcome(workdir)

    def same(self, workdir: Path, *options: str, wanted: dict[str, Any] | None = None) -> None:
        """Starts a run again and compares its end, bit by bit."""
        found, wanted = self.finish(workdir, *options), dict(wanted or self.whole)
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


def kill_somewhen(bench: Bench, workdir: Path) -> None:
    process = bench.start(workdir)
    bench.wait_for_training(workdir, process)
    time.sleep(bench.random.uniform(0, bench.seconds))
    process.kill()
    process.wait()
    bench.same(workdir)


def kill_at(place: str, count: int) -> Try:
    def kill(bench: Bench, workdir: Path) -> None:
        bench.run(workdir, f"--at={place}:{count}:die", code=-signal.SIGKILL)
        bench.same(workdir)

    return kill


def kill_again_and_again(bench: Bench, workdir: Path) -> None:
    for place in ("step", "sums", "evaluation", "prune", "text"):
        bench.run(workdir, f"--at={place}:3:die", code=-signal.SIGKILL)
    bench.same(workdir)


def terminate(bench: Bench, workdir: Path) -> None:
    process = bench.start(workdir)
    bench.wait_for_training(workdir, process)
    time.sleep(bench.random.uniform(0, bench.seconds) * 0.7)
    process.terminate()
    began = time.monotonic()
    code = process.wait(TIMEOUT)
    assert time.monotonic() - began < GRACE, "the grace period is over"
    assert code in (75, 0, -signal.SIGTERM), code  # -15: before it had installed its handler; 0: it was through
    bench.same(workdir)


def start_two(bench: Bench, workdir: Path, *options: str, at: str | None = None) -> list[subprocess.Popen[str]]:
    """Two processes of four devices; `at` happens in the second one."""
    address = f"--coordinator=127.0.0.1:{free_port()}"
    given = [(address, "--devices=4", "--num_processes=2", f"--process_id={i}", *options) for i in range(2)]
    return [bench.start(workdir, *given[0]), bench.start(workdir, *given[1], *([f"--at={at}"] if at else []))]


def two(bench: Bench, workdir: Path, *options: str, at: str | None = None) -> list[int]:
    processes = start_two(bench, workdir, *options, at=at)
    try:
        return [process.wait(TIMEOUT) for process in processes]
    except subprocess.TimeoutExpired:
        raise AssertionError(f"a process hangs: {log_of(workdir)[-2000:]}") from None
    finally:
        for process in processes:
            process.kill()


def finish_two(bench: Bench, workdir: Path, *options: str) -> None:
    """Runs two processes to the end; again, where one compiled so long that Gloo's 30 seconds to meet were over."""
    for _ in range(3):
        codes = two(bench, workdir, *options)
        if codes == [0, 0]:
            return
        assert "Gloo context initialization failed" in log_of(workdir), f"{codes}: {log_of(workdir)[-2000:]}"
    raise AssertionError("the processes did not meet in three times")


def kill_one_of_two(place: str) -> Try:
    def kill(bench: Bench, workdir: Path) -> None:
        whole = workdir.with_name(workdir.name + "_whole")
        finish_two(bench, whole)
        codes = two(bench, workdir, at=f"{place}:5:die")
        assert codes[1] == -signal.SIGKILL and codes[0] != 0, codes
        finish_two(bench, workdir)
        found, wanted = outcome(workdir), outcome(whole)
        assert_equal(found.pop("state"), wanted.pop("state"))
        assert found == wanted

    return kill


def terminate_one_of_two(bench: Bench, workdir: Path) -> None:
    whole = workdir.with_name(workdir.name + "_whole")
    finish_two(bench, whole)
    assert two(bench, workdir, at="step:5:terminate") == [75, 75], log_of(workdir)[-2000:]
    finish_two(bench, workdir)
    found, wanted = outcome(workdir), outcome(whole)
    assert_equal(found.pop("state"), wanted.pop("state"))
    assert found == wanted


def elastic(*legs: tuple[str, int]) -> Try:
    """Goes on with other devices: (topology, up to which step), topology being "data x fsdp" or "2x4 processes"."""

    def change(bench: Bench, workdir: Path) -> None:
        # Not Adam, whose first steps are signs of gradients that are nearly zero.
        sgd = ('--set=optim={"name": "sgd", "momentum": 0.9}', "--set=schedule__lr=0.005")
        whole = bench.finish(workdir.with_name(workdir.name + "_whole"), "--devices=8", *sgd)
        for topology, steps in legs:
            options = (*sgd, f"--set=steps={steps}")
            if topology == "2x4 processes":
                finish_two(bench, workdir, *options)
            else:
                data, fsdp = map(int, topology.split("x"))
                bench.run(workdir, f"--devices={data * fsdp}", f"--set=mesh__fsdp={fsdp}", *options)
        found = outcome(workdir)
        assert found["order"] == whole["order"], "the samples differ"
        losses = [[row["loss"] for row in run["metrics"] if row["kind"] == "train"] for run in (found, whole)]
        np.testing.assert_allclose(*losses, rtol=1e-6)

    return change


def damage(harm: Callable[[Path], object]) -> Try:
    def try_it(bench: Bench, workdir: Path) -> None:
        bench.run(workdir, "--at=step:14:die", code=-signal.SIGKILL)
        newest = checkpoint.newest_step(workdir)
        harm(Path(checkpoint.folder(workdir)) / str(newest))
        bench.same(workdir)

    return try_it


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_a_bit(folder: Path) -> None:
    data = bytearray(largest(folder).read_bytes())
    data[len(data) // 2] ^= 1
    largest(folder).write_bytes(data)


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of its own, which only root can have."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True, capture_output=True)


def refuses(bench: Bench, workdir: Path, says: str, *options: str) -> None:
    """It ends with one sentence and exit code 2."""
    bench.run(workdir, *options, code=2)
    said = [line for line in log_of(workdir).splitlines() if line.startswith("maxmap: ")]
    assert said and says in said[-1], said or log_of(workdir)[-2000:]


def full_disk(bench: Bench, workdir: Path) -> None:
    with small_disk(workdir, "400k"):
        refuses(bench, workdir, "last good checkpoint", "--set=checkpoint__keep=12")
        kept = checkpoint.finished_steps(workdir)
        assert kept and checkpoint.newest_step(workdir) == kept[-1], "a checkpoint is lost"
        remount(workdir, "size=64m")
        bench.same(workdir)


def read_only(bench: Bench, workdir: Path) -> None:
    with small_disk(workdir, "64m"):
        bench.run(workdir, "--at=step:9:die", code=-signal.SIGKILL)
        remount(workdir, "ro")
        bench.run(workdir, code=2)
        remount(workdir, "rw")
        bench.same(workdir)


def harm_data(event: str) -> Try:
    """A file of an epoch that is running is gone or broken: it is named, the next sample takes its place."""

    def harm(bench: Bench, workdir: Path) -> None:
        own = workdir.with_name(workdir.name + "_images")
        shutil.copytree(bench.images, own)
        bench.run(workdir, f"--at=step:4:{event}", "--set=data__check=0", images=own)
        assert "cannot be decoded" in log_of(workdir), "the file is not named"
        assert outcome(workdir)["step"] == 24

    return harm


def kill_worker(bench: Bench, workdir: Path) -> None:
    workers = "--set=data__workers=1"
    refuses(bench, workdir, "a worker process of the loader was killed", workers, "--at=step:5:kill_worker")
    bench.same(workdir, workers)


def clock(bench: Bench, workdir: Path) -> None:
    bench.run(workdir, "--at=step:5:clock", "--set=steps=12")
    bench.same(workdir)


def two_runs(bench: Bench, workdir: Path) -> None:
    first = bench.start(workdir, "--at=step:9:slow")
    bench.wait_for_training(workdir, first)
    time.sleep(1)
    try:
        refuses(bench, workdir, "another run")
    finally:
        first.kill()
        first.wait()
    bench.same(workdir)


def changed_config(bench: Bench, workdir: Path) -> None:
    bench.run(workdir, "--at=step:9:die", code=-signal.SIGKILL)
    refuses(bench, workdir, "optim.weight_decay: 0.05 -> 0.5", "--set=optim__weight_decay=0.5")
    bench.same(workdir, "--set=data__threads=2")


def tries(kills: int) -> list[tuple[str, Try]]:
    """Every try with the name of its fault."""
    return [
        *[("kill -9 at a random moment", kill_somewhen)] * kills,
        *[(f"kill -9 in: {place}", kill_at(place, count)) for place in PLACES for count in (1, 4)],
        ("kill -9 five times in one run", kill_again_and_again),
        *[("SIGTERM at a random moment", terminate)] * 5,
        *[("kill -9 of one of two processes", kill_one_of_two(place)) for place in ("step", "evaluation", "save")] * 2,
        ("SIGTERM to one of two processes", terminate_one_of_two),
        ("other devices: 8, 4, 1", elastic(("8x1", 8), ("4x1", 16), ("1x1", 24))),
        ("other devices: 8, 4x2 with fsdp, 1x8", elastic(("8x1", 8), ("4x2", 16), ("1x8", 24))),
        ("other devices: 1x8, 2 processes of 4, 1", elastic(("1x8", 8), ("2x4 processes", 16), ("1x1", 24))),
        ("newest checkpoint truncated", damage(lambda folder: os.truncate(largest(folder), 100))),
        ("newest checkpoint with a flipped bit", damage(flip_a_bit)),
        ("newest checkpoint lacks a file", damage(lambda folder: largest(folder).unlink())),
        ("newest checkpoint half written", damage(lambda folder: (folder / checkpoint.SUMS).unlink())),
        *([("disk full while saving", full_disk), ("disk read-only", read_only)] if os.geteuid() == 0 else []),
        *[(f"data file in mid-epoch: {event}", harm_data(event)) for event in ("vanish", "shrink", "unreadable")],
        ("worker process of the loader killed", kill_worker),
        ("clock set back by a day", clock),
        ("two runs in one workdir", two_runs),
        ("config changed between runs", changed_config),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tries", type=int, default=20)
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    logging.set_verbosity(logging.ERROR)
    if os.geteuid() != 0:
        print("not tried, since only root can mount a small disk: disk full while saving, disk read-only", flush=True)
    began = time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="soak"))
    bench = Bench(root, arguments.seed)
    chosen = [(name, attempt) for name, attempt in tries(arguments.tries) if re.search(arguments.only, name)]
    table: dict[str, list[int]] = {name: [0, 0] for name, _ in chosen}

    def attempt(number: int) -> None:
        name, what = chosen[number]
        workdir = root / f"try{number}"
        try:
            what(bench, workdir)
            table[name][0] += 1
        except Exception:
            table[name][1] += 1
            print(f"--- lost: {name} ({workdir})\n{traceback.format_exc()[-3000:]}", flush=True)
        else:
            print(f"survived: {name}", flush=True)
            for path in root.glob(f"try{number}*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(attempt, range(len(chosen))))
    print(f"\n{len(chosen)} tries in {(time.monotonic() - began) / 60:.0f} min\n")
    print("| fault | tries | survived | lost |\n|---|---|---|---|")
    for name, (survived, lost) in table.items():
        print(f"| {name} | {survived + lost} | {survived} | {lost} |")
    lost = sum(lost for _, lost in table.values())
    if not lost:
        shutil.rmtree(root)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
