"""Runs that die, runs that are not alone, runs on several processes: the result is that of the uninterrupted run.

`make soak` tries the same at random moments, and what takes longer.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from maxmap.errors import UserError
from maxmap.sharding import initialize_processes
from maxmap.train.resume import check_changes, only_run
from tests.tiny import ROOT, assert_equal, free_port, read_lines, settings_for
from tests.tiny_run import log_of, outcome, run_here, start

pytestmark = pytest.mark.usefixtures("tiny_models")

TIMEOUT = 240  # seconds, for a process that takes ten on an idle machine


def end(process, workdir: Path, code: int = 0) -> None:
    assert process.wait(TIMEOUT) == code, log_of(workdir)[-3000:]


@pytest.mark.fault("kill -9 of a run")
def test_killed_runs_end_as_one_that_was_not(images, tmp_path):
    broken = tmp_path / "broken"
    # Before the line of step 4 is in the log; while step 8 is being looked through, when step 9 is not yet begun.
    process = start(images, broken, "--killed=step:4:die", "--killed=sums:2:die")
    run_here(images, tmp_path / "whole")
    end(process, broken)
    wanted, found = outcome(tmp_path / "whole"), outcome(broken)
    assert_equal(found.pop("state"), wanted.pop("state"))
    assert found == wanted and found["step"] == 9 and sorted(found["order"]) == list(range(9))


def test_two_processes_train_as_one_does(images, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    number = free_port()
    processes = []
    for i in range(2):
        flags = (f"--coordinator=127.0.0.1:{number}", "--num_processes=2", f"--process_id={i}")
        sets = ("--set", "steps=4", "--set", "mesh__fsdp=2")
        processes.append(start(images, two, "--devices=4", *sets, *flags))
    run_here(images, one, steps=4, mesh__data=-1)
    for process in processes:
        end(process, two)
    wanted, found = outcome(one), outcome(two)
    assert found["order"] == wanted["order"]  # and each process read its half alone:
    for i in range(2):
        rows = read_lines(two / f"order{i}.jsonl")
        assert [samples for _, samples in rows] == [wanted["order"][at][4 * i : 4 * i + 4] for at, _ in rows]
    assert [row["step"] for row in found["metrics"]] == [row["step"] for row in wanted["metrics"]]  # one wrote the log
    for ours, theirs in zip(found["metrics"], wanted["metrics"], strict=True):
        assert ours.pop("kind") == theirs.pop("kind")
        assert ours == pytest.approx(theirs, rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found["state"], wanted["state"])
    assert log_of(two).count("step 4/4") == 1


def test_processes_of_open_mpi_find_each_other():
    number = free_port()
    command = (
        "import jax\nfrom maxmap.sharding import initialize_processes\ninitialize_processes()\n"
        "print(jax.process_index(), jax.process_count(), len(jax.local_devices()), len(jax.devices()))"
    )
    processes = []
    for i in range(2):
        variables = {
            "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_RANK": str(i),
            "OMPI_COMM_WORLD_LOCAL_RANK": str(i),
            "OMPI_MCA_orte_hnp_uri": f"{4096 * number}.0;tcp://127.0.0.1:34911",
        }
        given = {"cwd": ROOT, "env": {**os.environ, **variables}, "stdout": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen([sys.executable, "-c", command], **given))
    assert [process.communicate(timeout=TIMEOUT)[0] for process in processes] == ["0 2 1 2\n", "1 2 1 2\n"]


def test_processes_that_are_only_half_described(monkeypatch):
    with pytest.raises(UserError, match="all of --coordinator"):
        initialize_processes("127.0.0.1:1234")
    initialize_processes()  # alone
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    with pytest.raises(UserError, match="does not say where its first process runs: give --coordinator"):
        initialize_processes()


@pytest.mark.fault("two runs in one workdir")
def test_a_second_run_in_a_workdir_refuses(tmp_path):
    says = pytest.raises(UserError, match=r"another run \(process \d+ on .*\) is writing to .*--workdir")
    with only_run(tmp_path), says, only_run(tmp_path):
        raise AssertionError
    with only_run(tmp_path):
        pass


@pytest.mark.fault("config changed between runs")
def test_changes_of_the_config():
    before = settings_for(None)
    assert check_changes(before, settings_for(None), "run", allow=False) == []
    harmless = settings_for(None, log__every=7, mesh__data=4, steps=3, checkpoint__keep=9, data__threads=3)
    assert "log.every: 2 -> 7" in check_changes(before, harmless, "run", allow=False)
    serious = settings_for(None, optim__weight_decay=0.1, log__every=7, seed=3)
    with pytest.raises(UserError) as error:
        check_changes(before, serious, "run", allow=False)
    assert "(optim.weight_decay: 0.05 -> 0.1; seed: 0 -> 3)" in str(error.value)
    assert "--continue_with_changes" in str(error.value) and "log.every" not in str(error.value)
    assert len(check_changes(before, serious, "run", allow=True)) == 3
    # What is not set is None: a config of an older version lacks a key.
    assert check_changes({**before, "init_from": 1}, {**before, "new": None}, "run", allow=False) == [
        "init_from: 1 -> None"
    ]
