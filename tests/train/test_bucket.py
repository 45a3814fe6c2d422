"""A run in a bucket, of a server on this machine (tests/gcs.py): killed, resumed, evaluated, used."""

import json
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from maxmap import checkpoint, evaluate, storage
from maxmap.__main__ import main
from maxmap.config import bind
from maxmap.convert import hub
from maxmap.convert.sources import read_source
from maxmap.errors import UserError
from maxmap.inference import load, predict
from maxmap.train import loop
from maxmap.train.report import Report
from maxmap.train.resume import only_run
from maxmap.train.watch import Watchdog
from tests.tiny import ROOT, assert_equal, free_port, settings_for
from tests.tiny_run import outcome, run_here, start

pytestmark = pytest.mark.usefixtures("tiny_models")

TIMEOUT = 240  # seconds, for a process that takes ten on an idle machine


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """An empty bucket; etils (by gcsfs) and tensorstore find its server by the environment."""
    port = free_port()
    server = subprocess.Popen([sys.executable, "-m", "tests.gcs", str(port)], cwd=ROOT)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{url}/storage/v1/b/bucket").close()
                break
            except urllib.error.URLError:
                assert server.poll() is None, "the server ended"
                time.sleep(0.1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("STORAGE_EMULATOR_HOST", url)
            patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
            patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # which would ask Google what bucket this is
            yield "gs://bucket"
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def runs(bucket, images, tmp_path_factory) -> tuple[str, Path]:
    """The workdirs of a run in the bucket, which was killed twice, and of one in a folder, which was not."""
    logs = tmp_path_factory.mktemp("runs")
    workdir, local = f"{bucket}/runs/one", logs / "local"
    # Before the line of step 4; while step 8 is being looked through, after its log was copied.
    options = ("--killed=log:4:die", "--killed=sums:2:die", "--set=mesh__data=1")
    process = start(images, workdir, *options, log=logs / "bucket.log")
    run_here(images, local)
    assert process.wait(TIMEOUT) == 0, (logs / "bucket.log").read_text()[-3000:]
    return workdir, local


@pytest.mark.long
def test_a_killed_run_in_a_bucket_ends_as_one_in_a_folder(runs):
    found, wanted = outcome(runs[0]), outcome(runs[1])
    assert_equal(found.pop("state"), wanted.pop("state"))
    del wanted["order"], found["order"]
    assert found == wanted and found["step"] == 9


@pytest.mark.long
def test_what_a_run_leaves_in_a_bucket(runs):
    remote, local = storage.resolve(runs[0]), runs[1]
    names = {path.name for path in remote.iterdir()}
    assert names == {path.name for path in local.iterdir() if not path.name.startswith("order")}
    assert json.loads((remote / "config.json").read_text()) == json.loads((local / "config.json").read_text())
    assert (remote / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (remote / "checkpoints").iterdir()} == {"8", "9"}
    # A board of every start: each lived to its first evaluation.
    assert len(list((remote / "tensorboard").iterdir())) == 3


@pytest.mark.long
def test_what_is_used_from_a_bucket(runs, images, tmp_path, capsys):
    workdir, local = runs
    settings = settings_for(images, mesh__data=1)
    (tmp_path / "checkpoints").symlink_to(local / "checkpoints")
    assert evaluate.run(bind(settings), workdir) == evaluate.run(bind(settings), tmp_path)
    for name in ("eval.json", "predictions.csv"):
        assert (storage.resolve(workdir) / name).read_text() == (tmp_path / name).read_text()
    image = str(next((images / "val").rglob("*.png")))
    assert predict(workdir, [image]) == predict(local, [image])
    assert main(["predict", workdir, image]) == 0 and image in capsys.readouterr().out
    assert_equal(load(workdir)[1], load(local)[1])
    assert main(["average", workdir, "--last=2", f"--out={workdir}-mean"]) == 0
    assert_equal(load(f"{workdir}-mean")[1], checkpoint.average_checkpoints([local], last=2)[0])
    result = loop.run(bind(settings_for(images, init_from=workdir, steps=1)), tmp_path / "next")
    assert result["step"] == 1


@pytest.mark.long
def test_a_checkpoint_in_a_bucket_that_is_damaged(runs, bucket, capsys):
    workdir, copy = storage.resolve(runs[0]), storage.resolve(f"{bucket}/copy")
    for file in storage.walk(workdir / "checkpoints"):
        (copy / file.relative_to(workdir)).write_bytes(file.read_bytes())
    part = next(f for f in storage.walk(copy / "checkpoints" / "9") if f.stat().length > 1000)
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    assert checkpoint.newest_step(copy) == 8
    assert "step 9 in gs://bucket/copy is damaged" in capsys.readouterr().err


def test_foreign_checkpoints_are_read_from_a_bucket(bucket, goldens, tmp_path, monkeypatch):
    """A folder of TensorFlow's, the prefix of its files, and a file; logs stay where they are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with tarfile.open(goldens / "maxvit_mini.tar.xz") as tar:
        tar.extractall(tmp_path)
    local, remote = tmp_path / "maxvit_mini", storage.resolve(f"{bucket}/maxvit_mini")
    for file in local.iterdir():
        (remote / file.name).write_bytes(file.read_bytes())
    (remote / "events.out.tfevents.1").write_bytes(b"a log")
    save_file({"head.fc.bias": np.arange(3.0)}, local / "one.safetensors")
    (remote / "one.safetensors").write_bytes((local / "one.safetensors").read_bytes())
    prefix = next(local.glob("*.index")).stem
    wanted = read_source(local / prefix).tensors
    for address in (f"{bucket}/maxvit_mini", f"{bucket}/maxvit_mini/{prefix}"):
        copy = hub.download_bucket(address)
        assert_equal(dict(read_source(copy).tensors), dict(wanted))
    assert not list((tmp_path / "cache").rglob("*tfevents*"))
    assert list(read_source(hub.download_bucket(f"{bucket}/maxvit_mini/one.safetensors")).tensors) == ["head.fc.bias"]
    with pytest.raises(UserError, match=r"there is no checkpoint gs://bucket/maxvit_maxi: look at the address"):
        hub.download_bucket(f"{bucket}/maxvit_maxi")
    assert main(["convert", f"{bucket}/maxvit_maxi", str(tmp_path / "new"), "--model=test_maxvit"]) == 2


def test_the_newer_of_two_runs_in_a_bucket_goes_on(bucket):
    with only_run(f"{bucket}/two") as first:
        first()
        with only_run(f"{bucket}/two") as second:
            with pytest.raises(UserError, match=r"another run \(process .*\) has taken over gs://bucket/two: this one"):
                first()
            second()


def test_the_older_run_copies_nothing_any_more(bucket, tmp_path):
    workdir = f"{bucket}/older"
    metrics = storage.resolve(workdir) / "metrics.jsonl"
    with only_run(workdir) as check_ownership:
        report = Report(workdir, step=0, total_steps=9, batch_size=8, check_ownership=check_ownership)
        report.train(1, 0.1, {"loss": 2.0, "learning_rate": 0.1})
        report.upload()
        written = metrics.read_text()
        report.train(2, 0.2, {"loss": 2.0, "learning_rate": 0.1})
        folder = report.folder
        with only_run(workdir), pytest.raises(UserError, match="has taken over"):
            report.close()
    assert written.count("\n") == 1 and metrics.read_text() == written
    assert not folder.exists()


def test_a_hang_is_told_in_the_bucket(bucket):
    path = storage.resolve(bucket) / "hang.txt"
    path.write_text("before\n")
    with Watchdog(path, 0.1) as dog:
        dog.enter("step 7 waits for its data")
        for _ in range(200):
            if path.read_text() != "before\n":
                break
            time.sleep(0.05)
    assert path.read_text().startswith("before\nnothing has moved for") and "step 7 waits" in path.read_text()


def test_a_bucket_that_is_not_there(bucket, images):
    with pytest.raises(UserError, match=r"gs://nowhere/run cannot be written to \(.*\): look at the bucket's name"):
        loop.run(bind(settings_for(images)), "gs://nowhere/run")
    with pytest.raises(UserError, match="there is no checkpoint in gs://nowhere/run"):
        evaluate.run(bind(settings_for(images)), "gs://nowhere/run")


def test_buckets_need_a_package(monkeypatch):
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"gs://bucket/run needs the package gcsfs: pip install gcsfs, or .*\[gcs\]"):
        load("gs://bucket/run")
