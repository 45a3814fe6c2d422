"""What a run leaves in its folder: checkpoints by orbax, a folder for every saved step, and files that are never half.

A step holds the items 'variables' (parameters and the model's other collections), 'ema' (the same, averaged; absent
without averaging), 'training' (what only training needs) and 'info' (JSON: the model's name and fields, its classes and
preprocessing), so that whoever only wants the model reads one item. The file SHA256SUMS, which `sha256sum -c` reads,
comes last: without it a step is unfinished and does not count, and what differs from it is damaged and is not used.

A folder may lie in a bucket (gs://bucket/run): all files go through etils.epath, all arrays through tensorstore.
"""

import concurrent.futures
import contextlib
import errno
import hashlib
import importlib.util
import itertools
import json
import mmap
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from maxmap.errors import UserError

FOLDER = "checkpoints"
SUMS = "SHA256SUMS"
BUCKETS = {"gs": ("gcs", "gcsfs"), "s3": ("s3", "s3fs")}  # by scheme: the extra of pyproject.toml, what it installs
_AT_A_TIME = 100_000_000  # bytes

# What tensorstore says, which has no error numbers: the disk is full, or nobody may write.
_DISK = re.compile(r"No space left|Disk quota|File too large|Read-only|Permission denied|Input/output error", re.I)
_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO, errno.EEXIST, errno.ENOTDIR)
_ORBAX_CHANGES = "_CHECKPOINT_METADATA"  # at its very end orbax notes the time in it
_BUCKET = re.compile(r"PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|FAILED_PRECONDITION|NOT_FOUND")  # by tensorstore
_NETWORK = {"aiohttp", "botocore", "gcsfs", "google", "requests", "s3fs"}  # whose errors say what a bucket refuses

# Also where TensorFlow is installed, which etils would rather load: seconds, a gigabyte, and rules of its own.
os.environ.setdefault("EPATH_USE_TF", "false")
for _extra, _ in BUCKETS.values():  # each is fsspec's name of the file system, too
    # What tensorstore writes into a bucket does not pass through fsspec, whose listings from before would hide it.
    fsspec.config.conf.setdefault(_extra, {})["use_listings_cache"] = False


class Checkpoints:
    """The checkpoints of a run, written in the background.

    Args:
      workdir: of the run; they lie in its folder `checkpoints`.
      keep: newest ones that are kept, beside the one with the best score.
    """

    def __init__(self, workdir: str | Path, *, keep: int = 3):
        self._workdir, self._folder, self._keep = workdir, folder(workdir), keep
        self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._scores = {step: _score(self._folder / str(step)) for step in finished_steps(workdir)}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        if jax.process_index() == 0:
            with disk_errors(self._workdir, "be written to"):
                self._folder.mkdir(parents=True, exist_ok=True)
                for unfinished in self._folder.glob("*.orbax-checkpoint-tmp*"):
                    unfinished.rmtree()

    def save(self, step: int, items: Mapping[str, Any], info: Mapping[str, Any], score: float | None = None) -> None:
        """Writes a step in the background; a step that is there and whole is kept.

        Args:
          step: its number.
          items: trees of arrays, which may be overwritten as soon as this returns.
          info: what JSON can hold.
          score: the higher, the better; None where the step was not evaluated.

        Raises:
          UserError: the checkpoint before this one could not be written.
        """
        self.wait()
        path = self._folder / str(step)
        if step in self._scores and damage(path) is None:
            return
        trees = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        with disk_errors(self._workdir, f"take step {step}"):
            record = ocp.args.JsonSave({**info, **({} if score is None else {"score": score})})
            self._writer.save(os.fspath(path), args=ocp.args.Composite(**trees, info=record), force=True)
        self._thread = threading.Thread(target=self._finish, args=(step, score), name=f"checkpoint of step {step}")
        self._thread.start()

    def restore(self, step: int, like: Mapping[str, Any]) -> dict[str, Any]:
        """Reads items of a step; `like` holds for each a tree of `jax.ShapeDtypeStruct` with shardings."""
        return _read(self._folder / str(step), {name: ocp.args.StandardRestore(tree) for name, tree in like.items()})

    def check(self) -> None:
        """Raises UserError if what was being written could not be."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Waits for what is being written, and raises UserError if it could not be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def close(self) -> None:
        """Waits for what is being written, and ends the threads."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # it would tell of the same fault again
                self._writer.close()

    def _finish(self, step: int, score: float | None) -> None:
        try:
            with disk_errors(self._workdir, f"take step {step}"):
                self._writer.wait_until_finished()
                if jax.process_index() == 0:
                    path = self._folder / str(step)
                    write_text(path / SUMS, "".join(f"{sum}  {name}\n" for name, sum in _sums(path).items()))
                self._scores[step] = score
                self._prune()
        except Exception as error:  # the thread that waits raises it
            self._error = error

    def _prune(self) -> None:
        scored = [step for step, score in self._scores.items() if score is not None]
        best = max(scored, key=lambda step: (self._scores[step], step), default=None)
        for step in sorted(self._scores)[: -self._keep]:
            if step != best:
                del self._scores[step]
                if jax.process_index() == 0:
                    (self._folder / str(step) / SUMS).unlink(missing_ok=True)  # so that what a crash leaves is no step
                    (self._folder / str(step)).rmtree(missing_ok=True)


def folder(workdir: str | Path) -> epath.Path:
    """Returns where a run's checkpoints lie."""
    return place(workdir) / FOLDER


def in_bucket(path: str | Path) -> bool:
    """Whether a path is one in a bucket, gs://bucket/run or s3://bucket/run."""
    return os.fspath(path).startswith(tuple(f"{scheme}://" for scheme in BUCKETS))


def place(path: str | Path) -> epath.Path:
    """Returns a path as orbax takes it: absolute, or in a bucket.

    Raises:
      UserError: it is a URL of something else, or the package that talks to such buckets is not installed.
    """
    path = os.fspath(path)
    if "://" not in path:
        return epath.Path(os.path.abspath(path))
    if not in_bucket(path):
        raise UserError(f"{path} is neither a folder nor in a bucket: write a path, gs://BUCKET/FOLDER or s3://...")
    extra, package = BUCKETS[path.partition("://")[0]]
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{path} needs the package {package}: pip install {package}, or install maxmap with [{extra}].")
    return epath.Path(path)


def finished_steps(workdir: str | Path) -> list[int]:
    """Returns the steps that were written to their end, in order."""
    with _bucket_errors(workdir, "be read"):
        try:  # not is_dir(), which takes a bucket that does not answer for an empty one: the run would begin anew
            entries = list(folder(workdir).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
    return sorted(int(p.name) for p in entries if p.name.isdecimal() and (p / SUMS).exists())


def damage(path: epath.Path) -> str | None:
    """Returns what differs from the checksums in a step's folder, None if nothing does."""
    try:
        wanted = dict(reversed(line.split("  ", 1)) for line in (path / SUMS).read_text().splitlines())
        found = _sums(path)
    except (OSError, ValueError) as error:
        return f"its checksums cannot be read: {error}"
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if wanted.get(name) != found[name]:
            return f"the content of {name} is not what was written"
    return None


def newest(workdir: str | Path) -> int | None:
    """Returns the newest step that is whole, None if none was ever finished; what is damaged is named on stderr.

    Raises:
      UserError: there are finished steps, and all of them are damaged.
    """
    faults: list[str] = []
    for step in reversed(finished_steps(workdir)):
        fault = damage(folder(workdir) / str(step))
        if fault is None:
            if faults and jax.process_index() == 0:
                print(f"maxmap: {'; '.join(faults)}: using step {step} instead.", file=sys.stderr)
            return step
        faults.append(f"the checkpoint of step {step} in {workdir} is damaged ({fault})")
    if faults:
        raise UserError(f"{'; '.join(faults)}, and there is no other: bring back a copy, or give another folder.")
    return None


def read_info(workdir: str | Path, step: int | None = None) -> dict[str, Any] | None:
    """Returns the info of a step, by default the newest that is whole; None if there is none."""
    if step is None:
        step = newest(workdir)
    if step is None:
        return None
    return {**_info(folder(workdir) / str(step)), "step": step}


def read_variables(
    workdir: str | Path, *, ema: bool = True, step: int | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads the model of a checkpoint, on whatever devices it was written.

    Args:
      workdir: of a run, or a converted checkpoint.
      ema: the averaged variables where there are any, else the raw ones.
      step: which; None for the newest that is whole.

    Returns:
      The variables as NumPy arrays, and the info with 'step' and 'weights' ("ema" or "raw") added.

    Raises:
      UserError: there is no checkpoint.
    """
    info = read_info(workdir, step)
    if info is None:
        raise UserError(f"there is no checkpoint in {workdir}: give the folder of a run, the one that --workdir named.")
    path = folder(workdir) / str(info["step"])
    item = "ema" if ema and (path / "ema").exists() else "variables"
    on_one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with contextlib.closing(ocp.StandardCheckpointer()) as reader:
        metadata = reader.metadata(os.fspath(path / item)).item_metadata
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_one), dict(metadata))
    variables = _read(path, {item: ocp.args.StandardRestore(like)})[item]
    return jax.tree.map(np.asarray, variables), {
        **info,
        "weights": info.get("weights", "raw") if item != "ema" else item,
    }


def average(
    workdirs: Sequence[str | Path], *, last: int = 1, ema: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Averages checkpoints of the same model ("model soup": Wortsman et al. 2022), in float64.

    Args:
      workdirs: of runs.
      last: newest checkpoints of each.
      ema: their averaged variables where there are any, else the raw ones.

    Returns:
      The variables as NumPy arrays, and the newest info of the first run, with 'weights' ("ema" or "raw") and
      'averaged', the list of [folder, step].

    Raises:
      UserError: a run has fewer checkpoints that are whole, or holds another model.
    """
    total: Any = None
    averaged: list[list[Any]] = []
    first: dict[str, Any] = {}
    for workdir in workdirs:
        whole = [step for step in finished_steps(workdir) if damage(folder(workdir) / str(step)) is None]
        if last < 1 or len(whole) < last:
            raise UserError(f"{workdir} has {len(whole)} whole checkpoints, not {last}: give --last from 1 to that.")
        for step in reversed(whole[-last:]):
            variables, info = read_variables(workdir, ema=ema, step=step)
            first = first or info
            if info["model"] != first["model"] or info["weights"] != first["weights"]:
                raise UserError(f"{workdir} and {workdirs[0]} hold different models: only the same can be averaged.")
            wide = jax.tree.map(lambda x: np.asarray(x, np.float64), variables)
            total = wide if total is None else jax.tree.map(np.add, total, wide)
            averaged.append([os.fspath(workdir), step])
    mean = jax.tree.map(lambda sum, like: (sum / len(averaged)).astype(like.dtype), total, variables)
    return mean, {**first, "averaged": averaged}


def write_variables(workdir: str | Path, variables: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """Writes a checkpoint that holds a model alone.

    Without compression, which takes longer than the disk, and without copies: the arrays may lie in a mapped file that
    is as large as the memory.

    Args:
      workdir: to write into.
      variables: arrays.
      info: what JSON can hold, with 'step'.

    Raises:
      UserError: there is a checkpoint in `workdir` already, or it cannot be written to.
    """
    if finished_steps(workdir):
        raise UserError(f"{workdir} holds a checkpoint already: give another folder.")
    types = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler()),
        (np.ndarray, _InTurn(deepcopy_host_arrays=False)),
    )
    handlers = {
        "variables": ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False, type_handler_registry=types),
        "info": ocp.JsonCheckpointHandler(),
    }
    trees = jax.tree.map(lambda leaf: np.asarray(leaf) if np.isscalar(leaf) else leaf, dict(variables))
    items = {"variables": ocp.args.PyTreeSave(trees), "info": ocp.args.JsonSave(dict(info))}
    path = folder(workdir) / str(info["step"])
    with disk_errors(workdir, "be written to"):
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as writer:
            writer.save(os.fspath(path), args=ocp.args.Composite(**items))
        write_text(path / SUMS, "".join(f"{sum}  {name}\n" for name, sum in _sums(path).items()))


class _InTurn(ocp.type_handlers.NumpyHandler):
    """Writes a few arrays while it lays out the next: all at once, they would be in memory a second time."""

    async def serialize(self, values: Sequence[Any], infos: Sequence[Any], args: Any = None) -> Sequence[Any]:
        args = args or [ocp.SaveArgs()] * len(values)
        parts, size = [0], 0
        for i, value in enumerate(values):
            if size and size + value.nbytes > _AT_A_TIME:
                parts.append(i)
                size = 0
            size += value.nbytes
        ranges = [slice(*ends) for ends in itertools.pairwise([*parts, len(values)])]
        with concurrent.futures.ThreadPoolExecutor(1) as other_thread:
            laid_out = other_thread.submit(_contiguous, values[ranges[0]])
            for now, then in itertools.zip_longest(ranges, ranges[1:]):
                part = laid_out.result()
                if then:
                    laid_out = other_thread.submit(_contiguous, values[then])
                for future in await super().serialize(part, infos[now], args[now]):
                    future.result()
        return []


def _contiguous(values: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Returns arrays in C order, and lets go of the pages of a mapped file that they were read from."""
    result = [_in_order(value) for value in values]
    # They would count as memory, and come back when they are read again.
    for file in {id(file): file for file in map(_mapped_file, values) if file is not None}.values():
        file.madvise(mmap.MADV_DONTNEED)
    return result


def _in_order(value: np.ndarray) -> np.ndarray:
    """Returns an array in C order; a transposed matrix in stripes that the cache holds, several times as fast."""
    matrix = value.squeeze()
    if matrix.ndim != 2 or not matrix.T.flags.c_contiguous:
        return np.array(value, order="C")
    result = np.empty(matrix.shape, value.dtype)
    for start in range(0, matrix.shape[1], 32):
        result[:, start : start + 32] = matrix[:, start : start + 32]
    return result.reshape(value.shape)


def _mapped_file(value: Any) -> mmap.mmap | None:
    while isinstance(value, np.ndarray):
        value = value.base
    return value if isinstance(value, mmap.mmap) and hasattr(value, "madvise") else None


def write_text(path: str | Path | epath.Path, text: str) -> None:
    """Writes a file so that whoever reads it, also after a crash, finds the old text or the new one, never a part."""
    if in_bucket(path):
        place(path).write_text(text)  # an object in a bucket appears as a whole
        return
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def _sums(path: epath.Path) -> dict[str, str]:
    """SHA-256 of every file of a step, by its path in the step's folder."""
    files = {os.fspath(file)[len(os.fspath(path)) + 1 :]: file for file in sorted(_files(path))}
    counted = [n for n in files if n not in (SUMS, _ORBAX_CHANGES) and not n.endswith(".unfinished")]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return dict(zip(counted, pool.map(_sum, (files[name] for name in counted)), strict=True))


def _sum(file: epath.Path) -> str:
    with file.open("rb") as opened:
        sum = hashlib.sha256()
        while block := opened.read(1 << 20):
            sum.update(block)
    return sum.hexdigest()


def _files(path: epath.Path) -> Iterator[epath.Path]:
    for entry in path.iterdir():
        if entry.is_dir():
            yield from _files(entry)
        else:
            yield entry


def _info(path: epath.Path) -> dict[str, Any]:
    return json.loads((path / "info" / "metadata").read_text())


def _score(path: epath.Path) -> float | None:
    try:
        return _info(path).get("score")
    except (OSError, ValueError):
        return None  # damaged


def _read(path: epath.Path, args: Mapping[str, Any]) -> dict[str, Any]:
    with contextlib.closing(ocp.Checkpointer(ocp.CompositeCheckpointHandler())) as reader:
        restored = reader.restore(os.fspath(path), args=ocp.args.Composite(**args))
    return {name: restored[name] for name in args}


@contextlib.contextmanager
def disk_errors(workdir: str | Path, what: str) -> Iterator[None]:
    """Turns what the disk or bucket of a workdir refuses into a sentence; other errors are bugs and stay what they are.

    Args:
      workdir: of the run.
      what: that cannot be done, such as "take step 3".

    Raises:
      UserError: the disk is full, read-only, broken, or not the user's; the bucket is not there, not open to the user,
        or cannot be reached.
    """
    try:
        with _bucket_errors(workdir, what):
            yield
    except Exception as error:
        reason = _DISK.search(str(error))
        if isinstance(error, UserError) or (reason is None and getattr(error, "errno", None) not in _REFUSALS):
            raise
        steps = finished_steps(workdir)
        last = f"the last good checkpoint is step {steps[-1]}" if steps else "there is no checkpoint yet"
        raise UserError(
            f"{workdir} cannot {what} ({reason[0] if reason else error}); {last}: make room, or the folder writable, "
            "and start again."
        ) from error


@contextlib.contextmanager
def _bucket_errors(workdir: str | Path, what: str) -> Iterator[None]:
    """Turns what a bucket refuses into a sentence."""
    try:
        yield
    except Exception as error:
        refused = (
            isinstance(error, ConnectionError | TimeoutError)
            or (isinstance(error, OSError) and error.errno is None)  # with a number it is of this machine
            or type(error).__module__.partition(".")[0] in _NETWORK
            or _BUCKET.search(str(error)) is not None
        )
        if not in_bucket(workdir) or isinstance(error, UserError) or not refused:
            raise
        raise UserError(
            f"{workdir} cannot {what} ({' '.join(str(error).split()) or type(error).__name__}): look at the bucket's "
            "name, your rights and the network, and start again."
        ) from error
