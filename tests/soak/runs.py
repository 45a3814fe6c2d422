"""Runs that are killed or stopped, alone and beside others, and that go on with other devices, data or settings."""

import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np

from tests.soak.bench import GRACE, TIMEOUT, Bench, Try
from tests.tiny import assert_equal, free_port
from tests.tiny_run import log_of, outcome


def kill_somewhen(bench: Bench, workdir: Path) -> None:
    process = bench.start(workdir)
    bench.wait_for_training(workdir, process)
    time.sleep(bench.random.uniform(0, bench.seconds))
    process.kill()
    process.wait()
    bench.same(workdir)


def kill_at_start(bench: Bench, workdir: Path) -> None:
    """Before there is any checkpoint."""
    process = bench.start(workdir)
    time.sleep(bench.random.uniform(0.5, 1) * bench.seconds_to_start)
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
    bench.refuses(workdir, "a worker process of the loader was killed", workers, "--at=step:5:kill_worker")
    bench.same(workdir, workers)


def clock(bench: Bench, workdir: Path) -> None:
    bench.run(workdir, "--at=step:5:clock", "--set=steps=12")
    bench.same(workdir)


def two_runs(bench: Bench, workdir: Path) -> None:
    first = bench.start(workdir, "--at=step:9:slow")
    bench.wait_for_training(workdir, first)
    time.sleep(1)
    try:
        bench.refuses(workdir, "another run")
    finally:
        first.kill()
        first.wait()
    bench.same(workdir)


def changed_config(bench: Bench, workdir: Path) -> None:
    bench.run(workdir, "--at=step:9:die", code=-signal.SIGKILL)
    bench.refuses(workdir, "optim.weight_decay: 0.05 -> 0.5", "--set=optim__weight_decay=0.5")
    bench.same(workdir, "--set=data__threads=2")
