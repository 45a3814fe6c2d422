"""Paths are folders or buckets; a file is never half; what a disk or bucket refuses is one sentence."""

import errno
import os
import threading

import pytest

from maxmap import checkpoint, storage
from maxmap.errors import UserError
from tests import kill_at_writes
from tests.marks import cases


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


@pytest.mark.parametrize("kind", cases(kill_at_writes.COMMANDS, long=("average", "export")))
@pytest.mark.fault("killed while it writes a target")
def test_a_command_that_is_killed_at_any_write(kind, tmp_path):
    """The target is whole or absent, the old one comes back, and the same command again succeeds."""
    kill_at_writes.run(kind, tmp_path)


def write_folder(target, text, **options):
    with storage.atomic_target(target, **options) as unfinished:
        unfinished.mkdir()
        (unfinished / "text").write_text(text)


@pytest.mark.fault("killed between the two renames of a folder")
def test_an_old_folder_comes_back(tmp_path):
    target = tmp_path / "target"
    aside = tmp_path / ".target.abcd1234.unfinished" / "old" / "target"  # what such a kill leaves
    aside.mkdir(parents=True)
    (aside / "text").write_text("old")
    with pytest.raises(UserError, match="is there already"):  # it is brought back before anything else
        write_folder(target, "new")
    assert (target / "text").read_text() == "old" and list(tmp_path.iterdir()) == [target]
    with pytest.raises(RuntimeError), storage.atomic_target(target, overwrite=True):
        raise RuntimeError("the new one cannot be made")
    assert (target / "text").read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_names_that_begin_alike_are_other_targets(tmp_path):
    for name in ("run.1", "run"):
        (tmp_path / f".{name}.abcd1234.unfinished" / "old" / name).mkdir(parents=True)
    storage.recover(tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".run.1.abcd1234.unfinished", "run"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_writers_of_one_target(overwrite, tmp_path):
    """Both take part in time; the target is of one of them, and the loser gets a sentence."""
    barrier, results = threading.Barrier(2), []

    def write(text):
        try:
            with storage.atomic_target(tmp_path / "target", overwrite=overwrite) as unfinished:
                unfinished.mkdir()
                (unfinished / "text").write_text(text)
                barrier.wait()
            results.append(text)
        except UserError as error:
            assert "target is there already" in str(error) or "cannot write" in str(error)

    writers = [threading.Thread(target=write, args=(text,)) for text in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(results) == (2 if overwrite else 1)
    assert (tmp_path / "target" / "text").read_text() in results
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
