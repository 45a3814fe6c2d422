"""Kills a command at its writes, in a process forked for each kill; tests/test_storage.py runs this file.

Arguments: "convert", "average" or "export", and an empty folder. After each kill the target has to be whole or absent,
and the same command has to succeed. Prints the number of kills.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from maxmap import __main__ as commands
from maxmap import (
    checkpoint,
    checkpoint_commands,  # noqa: F401  loaded before the processes are forked
)
from maxmap.convert import load
from maxmap.convert.adapt import LoadReport
from maxmap.convert.sources import read_source

COMMANDS = ("convert", "average", "export")  # which write a target
MOVES = {"os.rename", "os.rmdir", "shutil.rmtree"}  # a kill at each of these
OTHERS = {"os.mkdir", "os.remove", "os.truncate", "open"}  # and at every eighth of these
INFO = {"model": {"name": "tiny", "num_classes": 2}, "classes": ["a", "b"], "preprocessing": {}, "weights": "raw"}


def variables(value: int) -> dict[str, Any]:
    return {"params": {"w": np.full((3, 4), value, np.float32), "b": np.full(4, value, np.float32)}}


def target(kind: str, folder: Path) -> Path:
    return folder / ("target.safetensors" if kind == "export" else "target")


def write(kind: str, folder: Path, value: int, *options: str) -> int:
    """Runs the command whose target holds `value` everywhere; returns its code."""
    source, out = str(folder / f"source{value}"), str(target(kind, folder))
    if kind == "average":
        return commands.main(["average", source, "--out", out])
    load.create_model = lambda **fields: None
    load.to_torch, load.buffers = lambda tree, model, dialect: tree["params"], lambda *_: {}
    info = {**INFO, "source": {"kind": "", "dialect": ""}}
    load.read_foreign = lambda *_, **__: load.ConvertedModel(None, variables(value), info, LoadReport())
    return commands.main([kind, source, out, *options])


def content(kind: str, folder: Path) -> float | None:
    """Returns the value in the target, None if there is no target. Fails if the target is not whole."""
    path = target(kind, folder)
    if not path.exists():
        return None
    if kind == "export":
        values = read_source(path).tensors
    else:
        assert checkpoint.newest_step(path) is not None
        values = checkpoint.read_variables(path)[0]["params"]
    assert values["w"].shape == (3, 4) and np.unique([*values["w"].ravel(), *values["b"]]).size == 1
    return float(values["b"][0])


def kill_before(number: int, folder: Path) -> None:
    """Makes this process kill itself before one of its writes."""
    counts = {"writes": 0, "others": 0}

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in MOVES | OTHERS or str(folder) not in str(arguments[:2]):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if event in OTHERS:
            counts["others"] += 1
            if counts["others"] % 8:
                return
        counts["writes"] += 1
        if counts["writes"] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns a function's result from a forked process, "killed" if that was killed; orbax leaves threads behind."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, json.dumps(function(*arguments)).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return "killed"
    return json.loads(text)


def write_killed(number: int, kind: str, folder: Path, *options: str) -> int:
    kill_before(number, folder)
    return write(kind, folder, 2, *options)


def run(kind: str, folder: Path, timeout: float | None = None) -> None:
    """Runs this file in a process of its own, which must find nothing wrong and make some kills."""
    command = [sys.executable, "-m", "tests.kill_at_writes", kind, str(folder)]
    done = subprocess.run(
        command, cwd=Path(__file__).resolve().parent.parent, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= 4


def main(kind: str, top: Path) -> int:
    """Returns the number of kills."""
    for value in (1, 2):
        in_child(checkpoint.write_variables, top / "fresh" / f"source{value}", variables(value), {**INFO, "step": 3})
    shutil.copytree(top / "fresh", top / "there")
    assert in_child(write, kind, top / "there", 1) == 0
    kills = 0
    for start, options, old in (("fresh", (), None), ("there", ("--overwrite",), 1.0)):
        if kind == "average" and old:  # which never replaces a checkpoint
            continue
        for number in range(1, 1000):
            folder = top / f"{start}{number}"
            shutil.copytree(top / start, folder)
            result = in_child(write_killed, number, kind, folder, *options)
            found = in_child(content, kind, folder)
            assert found in (old, 2.0, None), found
            again = in_child(write, kind, folder, 2, *options)
            assert again == 0 or (again == 2 and found == 2.0), (number, again, found)
            assert in_child(content, kind, folder) == 2.0
            assert not [path for path in folder.iterdir() if path.name.startswith(".")]
            shutil.rmtree(folder)
            if result != "killed":
                assert result == 0
                break
            kills += 1
    return kills


if __name__ == "__main__":
    output, sys.stdout = sys.stdout, sys.stderr
    print(main(sys.argv[1], Path(sys.argv[2])), file=output)
