"""Places that turn against a run: damaged checkpoints, disks, caches, folders; and commands that write targets."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from maxmap import checkpoint
from maxmap.train.resume import LOCK
from tests import kill_at_writes
from tests.soak.bench import TIMEOUT, Bench, Try
from tests.tiny import ROOT
from tests.tiny_run import log_of


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


def edit_a_checksum(folder: Path) -> None:
    text = (folder / checkpoint.SUMS).read_text()
    (folder / checkpoint.SUMS).write_text(("1" if text[0] == "0" else "0") + text[1:])


CORRUPT_SUMS: dict[str, Callable[[Path], object]] = {
    "edited": edit_a_checksum,
    "emptied": lambda folder: (folder / checkpoint.SUMS).write_text(""),
    "of garbage": lambda folder: (folder / checkpoint.SUMS).write_bytes(bytes(range(256))),
}


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


def full_disk(bench: Bench, workdir: Path) -> None:
    with small_disk(workdir, "400k"):
        bench.refuses(workdir, "last good checkpoint", "--set=checkpoint__keep=12")
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


@contextlib.contextmanager
def cache_on(folder: Path, size: str) -> Iterator[str]:
    """A small disk for compiled programs, as an option of the run."""
    with small_disk(folder, size):
        yield f"--cache={folder}"


def full_cache(bench: Bench, workdir: Path) -> None:
    with cache_on(workdir.with_name(workdir.name + "_cache"), "20k") as option:
        bench.same(workdir, option)


def read_only_cache(bench: Bench, workdir: Path) -> None:
    folder = workdir.with_name(workdir.name + "_cache")
    with cache_on(folder, "64m") as option:
        remount(folder, "ro")
        bench.same(workdir, option)


def corrupt_cache(bench: Bench, workdir: Path) -> None:
    """Every program that a run has cached is garbage, cut or empty for the next one."""
    folder = workdir.with_name(workdir.name + "_cache")
    bench.run(workdir, f"--cache={folder}", "--at=step:9:die", code=-signal.SIGKILL)
    programs = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 100)
    assert len(programs) > 3, "nothing is cached"
    for i, path in enumerate(programs):
        data = path.read_bytes()
        path.write_bytes((bench.random.randbytes(len(data)), data[: len(data) // 2], b"")[i % 3])
    bench.same(workdir, f"--cache={folder}")


def cut_log(bench: Bench, workdir: Path) -> None:
    bench.run(workdir, "--at=step:14:die", code=-signal.SIGKILL)
    log = workdir / "metrics.jsonl"
    os.truncate(log, log.stat().st_size - 10)
    bench.same(workdir)


def stale_lock(bench: Bench, workdir: Path) -> None:
    """The lock names a process that lives, but is another one: numbers are given again after a restart."""
    bench.run(workdir, "--at=step:9:die", code=-signal.SIGKILL)
    assert (workdir / LOCK).exists()
    (workdir / LOCK).write_text(f"process {os.getpid()} on another.machine\n")
    bench.same(workdir)


def moved(bench: Bench, workdir: Path) -> None:
    before = workdir.with_name(workdir.name + "_before")
    bench.run(before, "--at=step:14:die", code=-signal.SIGKILL)
    before.rename(workdir)
    bench.same(workdir)


def copied(bench: Bench, workdir: Path) -> None:
    """The copy has files of different moments, perhaps half a checkpoint; both runs end as one that is alone."""
    first = workdir.with_name(workdir.name + "_first")
    process = bench.start(first)
    bench.wait_for_training(first, process)
    time.sleep(bench.random.uniform(0, bench.seconds))
    copy_while_it_changes(first, workdir)
    bench.same(workdir)
    assert process.wait(TIMEOUT) == 0, log_of(first)[-2000:]
    bench.same(first)


def copy_while_it_changes(source: Path, target: Path) -> None:
    """As `cp -r` does: files that vanish in the meantime are missing in the copy."""
    target.mkdir()
    for entry in list(source.iterdir()):
        with contextlib.suppress(FileNotFoundError):
            if entry.is_dir():
                copy_while_it_changes(entry, target / entry.name)
            else:
                shutil.copy2(entry, target / entry.name)


def backup(bench: Bench, workdir: Path) -> None:
    bench.run(workdir, "--at=step:9:die", code=-signal.SIGKILL)
    kept = workdir.with_name(workdir.name + "_backup")
    shutil.copytree(workdir, kept)
    bench.run(workdir, "--at=step:7:die", code=-signal.SIGKILL)  # it goes on for a while
    shutil.rmtree(workdir)
    shutil.copytree(kept, workdir)
    bench.same(workdir)


def own_files_alone(bench: Bench, workdir: Path) -> None:
    bench.run(workdir, "--at=step:9:die", code=-signal.SIGKILL, umask=0o077)
    bench.same(workdir)
    kept = checkpoint.newest_step(workdir)
    bench.run(workdir, umask=0o077)  # there is nothing left to do
    assert checkpoint.newest_step(workdir) == kept


def kill_command(kind: str) -> Try:
    def kill(bench: Bench, workdir: Path) -> None:
        workdir.mkdir()
        kill_at_writes.run(kind, workdir, TIMEOUT)

    return kill


def two_writers(bench: Bench, workdir: Path) -> None:
    """One command writes the target, the other one too, or says that it is there; it is whole in any case."""
    command = [sys.executable, "-m", "maxmap", "average", str(bench.root / "whole"), f"--out={workdir}"]
    both = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=TIMEOUT)[1] for process in both]
    codes = sorted(process.returncode for process in both)
    assert codes in ([0, 0], [0, 2]), (codes, said)
    assert all(
        " already: give another " in text for text, process in zip(said, both, strict=True) if process.returncode
    ), said
    found, wanted = (checkpoint.read_variables(path)[0] for path in (workdir, bench.root / "whole"))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert not list(workdir.parent.glob(f".{workdir.name}.*")), "a writer has left something"
