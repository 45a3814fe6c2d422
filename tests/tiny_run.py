"""A training run of the tests' network in a process of its own, which can be made to die: python -m tests.tiny_run.

  --images FOLDER --workdir FOLDER [--devices N] [--set section__key=JSON ...] [--at WHERE:N:WHAT ...]
  [--killed WHERE:N:die ...]
  [--cache FOLDER] [--coordinator HOST:PORT --num_processes N --process_id I]

At the N-th time that it comes to WHERE, one of the keys of PLACES, WHAT happens, one of the keys of EVENTS. For every
`--killed` a process is forked first, which trains until it dies there: it need not import all that once more. The
samples of every step are appended to `order.jsonl` in the workdir, unless that is in a bucket.
"""

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("NPROC", "16")  # see tests/conftest.py
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from maxmap import checkpoint, evaluate, storage
from maxmap.config import bind
from maxmap.data.pipeline import Data
from maxmap.errors import UserError
from maxmap.sharding import initialize_processes
from maxmap.train import loop
from tests import tiny

# Owner and name of the functions at whose call a process can be killed.
PLACES: dict[str, tuple[Any, str]] = {
    "step": (loop, "to_devices"),
    "log": (loop.Report, "train"),
    "evaluation": (evaluate, "evaluate"),
    "save": (checkpoint.Checkpoints, "save"),
    "sums": (checkpoint, "_checksums"),
    "prune": (checkpoint.Checkpoints, "_prune"),
    "text": (storage.os, "replace"),
}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate() -> None:
    """What a scheduler sends; processes that train together hear of it from one another within seconds."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)


def kill_worker() -> None:
    """Kills the processes that the loader started."""
    children = multiprocessing.active_children()
    assert children, "the loader has no processes"
    for child in children:
        os.kill(child.pid or 0, signal.SIGKILL)


def turn_clock_back() -> None:
    """From now on it is yesterday."""
    now = time.time
    time.time = lambda: now() - 86400


# Data files are harmed while the run reads them: PATH is that of the first image.
EVENTS: dict[str, Callable[[Path], object]] = {
    "die": lambda image: die(),
    "terminate": lambda image: terminate(),
    "kill_worker": lambda image: kill_worker(),
    "clock": lambda image: turn_clock_back(),
    "vanish": lambda image: image.unlink(),
    "shrink": lambda image: os.truncate(image, 60),
    "unreadable": lambda image: (image.unlink(), image.mkdir()),
    "slow": lambda image: time.sleep(3600),
}


def happen_at(where: str, count: int, event: Callable[[], object]) -> None:
    """Has something happen at the `count`-th call."""
    owner, name = PLACES[where]
    function: Callable[..., Any] = getattr(owner, name)
    calls = []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == count:
            event()
        return function(*args, **kwargs)

    setattr(owner, name, call)


def note_order(workdir: Path) -> None:
    """Notes which samples every step takes."""
    train_batches = Data.train_batches

    def noted(self: Data, batch_size: int, *, start_step: int = 0, **kwargs: Any) -> Any:
        rows = train_batches(self, batch_size, start_step=start_step, **kwargs)
        for step, batch in enumerate(rows, start_step):
            with (workdir / f"order{jax.process_index()}.jsonl").open("a") as file:
                file.write(json.dumps([step, batch["index"].tolist()]) + "\n")
            yield batch

    Data.train_batches = noted  # type: ignore[method-assign, assignment]


def start(
    images: Path,
    workdir: str | Path,
    *options: str,
    environment: Mapping[str, str] | None = None,
    log: Path | None = None,
    umask: int = -1,
) -> subprocess.Popen[str]:
    """Starts a run; what it prints goes to `workdir.log` or `log`, where its last lines explain a failure."""
    command = [sys.executable, "-m", "tests.tiny_run", f"--images={images}", f"--workdir={workdir}", *options]
    with (log or Path(f"{workdir}.log")).open("a") as file:
        env = {**os.environ, "NPROC": "16", **(environment or {})}
        return subprocess.Popen(
            command, cwd=tiny.ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, text=True, umask=umask
        )


def run_here(images: Path, workdir: Path, **changes: Any) -> None:
    """The same run in this process, which has to use the fixture `tiny_models`: it costs no imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Data, "train_batches", Data.train_batches)  # which is so put back in the end
        note_order(workdir)
        loop.run(bind(tiny.settings_for(images, **changes)), workdir)


def log_of(workdir: Path) -> str:
    """What all runs in a workdir printed."""
    return workdir.with_name(workdir.name + ".log").read_text()


def outcome(workdir: str | Path) -> dict[str, Any]:
    """All that a finished run stands for: the whole state, the metrics, the evaluation, the samples of every step."""
    step, workdir = checkpoint.newest_step(workdir), storage.resolve(workdir)
    state, one = {}, jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with contextlib.closing(ocp.StandardCheckpointer()) as reader:
        for item in ("variables", "ema", "training"):
            path = checkpoint.folder(workdir) / str(step) / item
            like = reader.metadata(path).item_metadata
            like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), dict(like))
            state[item] = jax.tree.map(np.asarray, reader.restore(path, like))
    order: dict[int, list[int]] = {}
    for path in sorted(workdir.glob("order*.jsonl")):
        own = {}
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # cut off by the crash
                at, samples = json.loads(line)
                assert own.setdefault(at, samples) == samples, f"step {at} took other samples the second time"
        for at, samples in own.items():
            order.setdefault(at, []).extend(samples)
    rows = tiny.read_lines(workdir / "metrics.jsonl")
    return {
        "step": step,
        "state": state,
        "order": order,
        "metrics": [tiny.without_timings(row) for row in rows],
        "eval": json.loads((workdir / "eval.json").read_text()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--at", action="append", default=[])
    parser.add_argument("--killed", action="append", default=[])
    parser.add_argument("--cache")  # of its own, where every compiled program is kept
    parser.add_argument("--coordinator")
    parser.add_argument("--num_processes", type=int)
    parser.add_argument("--process_id", type=int)
    arguments = parser.parse_args()
    for planned in arguments.killed:  # before JAX has threads, which a fork would lose
        if (child := os.fork()) == 0:
            arguments.at.append(planned)
            break
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (planned, status)

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", arguments.devices)
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", arguments.cache or str(tiny.ROOT / ".cache" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0 if arguments.cache else 0.1)
    initialize_processes(arguments.coordinator, arguments.num_processes, arguments.process_id)
    tiny.use_models(tiny.create_tiny, pytest.MonkeyPatch())
    if not storage.in_bucket(arguments.workdir):
        note_order(Path(arguments.workdir))
    first_image = min((arguments.images / "train").rglob("*.png"))
    for planned in arguments.at:
        place, count, event = planned.split(":")
        happen_at(place, int(count), functools.partial(EVENTS[event], first_image))
    changes = {key: json.loads(value) for key, value in (change.split("=", 1) for change in arguments.set)}
    try:
        loop.run(bind(tiny.settings_for(arguments.images, **{"mesh__data": -1, **changes})), arguments.workdir)
    except UserError as error:
        print(f"maxmap: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
