"""Paths are folders or buckets; a file is never half; what a disk or bucket refuses is one sentence."""

import errno
import os

import pytest

from maxmap import checkpoint, storage
from maxmap.errors import UserError


def test_paths_are_absolute_or_keep_their_scheme(tmp_path, monkeypatch):
    assert os.fspath(checkpoint.folder("gs://bucket/run")) == "gs://bucket/run/checkpoints"
    monkeypatch.chdir(tmp_path)
    assert os.fspath(checkpoint.folder("run")) == str(tmp_path / "run" / "checkpoints")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert os.fspath(storage.resolve("~/run")) == f"{tmp_path}/run"
    assert storage.expand("a/~/b") == "a/~/b" and storage.expand("gs://bucket/~") == "gs://bucket/~"
    with pytest.raises(UserError, match="https://host/run is neither a folder nor in a bucket: write a path"):
        storage.resolve("https://host/run")


def test_text_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "eval.json"
    storage.write_text(path, "old")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="crash"):
        patch.setattr(storage.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("crash")))
        storage.write_text(path, "new and longer")
    assert path.read_text() == "old"
    storage.write_text(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_errors_of_the_disk_become_a_sentence_and_bugs_do_not():
    asked = []

    def write(path: str, error: Exception) -> None:
        with storage.disk_errors(path, "take step 3", lambda: asked.append(1) or "step 2 is safe"):
            raise error

    sentence = r"^run cannot take step 3 \(.*No space left.*\); step 2 is safe: make room, .* and start again\.$"
    for full in (OSError(errno.ENOSPC, "No space left on device"), ValueError("UNKNOWN: No space left on device")):
        with pytest.raises(UserError, match=sentence):
            write("run", full)
    assert len(asked) == 2
    for error in (ValueError("a bug"), OSError("a bug"), ConnectionError("to another machine"), UserError("known")):
        with pytest.raises(type(error)) as raised:
            write("run", error)
        assert raised.value is error
    with pytest.raises(UserError, match=r"^gs://bucket cannot take step 3 \(.*\): look at the bucket's name, .*\.$"):
        write("gs://bucket", ConnectionError("no route"))
    assert len(asked) == 2
