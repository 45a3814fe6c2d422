"""What a run leaves in its folder: checkpoints, which orbax writes, with a folder for every saved step.

A step holds four items, so that whoever wants only the model reads one of them:

- 'variables': the parameters and the model's other collections.
- 'ema': their averages; absent without averaging.
- 'training': what only training needs, such as the state of the optimizer.
- 'info': JSON with the model's name and fields, its classes and its preprocessing.

The file SHA256SUMS, which `sha256sum -c` reads, is written last. A step without it is unfinished and does not count. A
step whose files differ from it is damaged and is not used.
"""

import concurrent.futures
import contextlib
import itertools
import json
import mmap
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from maxmap import storage
from maxmap.classes import stored_names
from maxmap.errors import UserError, printable, shortened
from maxmap.ranges import Count, check_arguments

FOLDER = "checkpoints"
SUMS = "SHA256SUMS"
_BYTES_AT_A_TIME = 100_000_000  # that `write_variables` lays out in memory
_ORBAX_CHANGES = "_CHECKPOINT_METADATA"  # orbax adds the time to this file after the checksums are taken


class Checkpoints:
    """The checkpoints of a run, written in the background.

    Args:
      workdir: folder of the run; the checkpoints go to its folder `checkpoints`.
      keep: how many of the newest checkpoints stay, beside the one with the best score.
    """

    def __init__(self, workdir: str | Path, *, keep: int = 3):
        self._workdir, self._folder, self._keep = workdir, folder(workdir), keep
        self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._scores = {step: _score(self._folder / str(step)) for step in finished_steps(workdir)}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        if jax.process_index() == 0:
            with write_errors(self._workdir, "be written to"):
                self._folder.mkdir(parents=True, exist_ok=True)
                for unfinished in self._folder.glob("*.orbax-checkpoint-tmp*"):
                    unfinished.rmtree()

    def save(self, step: int, items: Mapping[str, Any], info: Mapping[str, Any], score: float | None = None) -> None:
        """Writes a step in the background, unless a whole checkpoint of this step exists.

        Args:
          step: number of the step.
          items: trees of arrays by the name of the item; the caller may overwrite the arrays when this returns.
          info: values that JSON can hold.
          score: of the model, higher is better; None if the step was not evaluated.

        Raises:
          UserError: the checkpoint before this one could not be written.
        """
        self.wait()
        path = self._folder / str(step)
        if step in self._scores and damage(path) is None:
            return
        trees = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        with write_errors(self._workdir, f"take step {step}"):
            record = ocp.args.JsonSave({**info, **({} if score is None else {"score": score})})
            self._writer.save(os.fspath(path), args=ocp.args.Composite(**trees, info=record), force=True)
        self._thread = threading.Thread(target=self._finish, args=(step, score), name=f"checkpoint of step {step}")
        self._thread.start()

    def restore(self, step: int, like: Mapping[str, Any]) -> dict[str, Any]:
        """Reads items of a step.

        Args:
          step: number of the step.
          like: for each item a tree of `jax.ShapeDtypeStruct` with shardings.

        Returns:
          The items as trees of arrays.
        """
        return _read(self._folder / str(step), {name: ocp.args.StandardRestore(tree) for name, tree in like.items()})

    def check(self) -> None:
        """Raises UserError if the last checkpoint could not be written."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Waits until the last checkpoint is written; raises UserError if it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def close(self) -> None:
        """Waits until the last checkpoint is written, and ends the threads."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # it would raise the same error again
                self._writer.close()

    def _finish(self, step: int, score: float | None) -> None:
        try:
            with write_errors(self._workdir, f"take step {step}"):
                self._writer.wait_until_finished()
                if jax.process_index() == 0:
                    _write_checksums(self._folder / str(step))
                self._scores[step] = score
                self._prune()
        except Exception as error:  # `check` raises it in the thread of the run
            self._error = error

    def _prune(self) -> None:
        scored = [step for step, score in self._scores.items() if score is not None]
        best = max(scored, key=lambda step: (self._scores[step], step), default=None)
        for step in sorted(self._scores)[: -self._keep]:
            if step != best:
                del self._scores[step]
                if jax.process_index() == 0:
                    # First the checksums: what a crash leaves is then an unfinished step, which does not count.
                    (self._folder / str(step) / SUMS).unlink(missing_ok=True)
                    (self._folder / str(step)).rmtree(missing_ok=True)


def folder(workdir: str | Path) -> epath.Path:
    """Returns the folder of a run's checkpoints."""
    return storage.resolve(workdir) / FOLDER


def is_workdir(path: str | Path) -> bool:
    """Whether a path is a folder of checkpoints of ours, and not the name or the folder of a published one."""
    return storage.in_bucket(path) or os.path.isdir(os.path.join(storage.expand(path), FOLDER))


def finished_steps(workdir: str | Path) -> list[int]:
    """Returns the steps with a finished checkpoint, in order."""
    with storage.bucket_errors(workdir, "be read"):
        try:  # is_dir() would be False for a bucket that does not answer, and the run would start from the beginning
            entries = list(folder(workdir).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        except (OSError, ValueError) as error:  # for example a name that cannot be
            if storage.in_bucket(workdir):
                raise
            why = shortened(getattr(error, "strerror", None) or error)
            raise UserError(f"{printable(workdir)} cannot be read ({why}): give another folder.") from error
    return sorted(int(p.name) for p in entries if p.name.isdecimal() and (p / SUMS).exists())


@contextlib.contextmanager
def write_errors(workdir: str | Path, action: str) -> Iterator[None]:
    """Turns an error of the disk or bucket into one sentence, which names the last good checkpoint.

    Args:
      workdir: folder of the run.
      action: what it cannot do if there is an error, for example "take step 3".

    Raises:
      UserError: see `maxmap.storage.disk_errors`.
    """

    def kept() -> str:
        steps = finished_steps(workdir)
        return f"the last good checkpoint is step {steps[-1]}" if steps else "there is no checkpoint yet"

    with storage.disk_errors(workdir, action, kept):
        yield


def damage(path: epath.Path) -> str | None:
    """Returns how the files in a step's folder differ from its checksums, None if they do not."""
    try:
        wanted = dict(reversed(line.split("  ", 1)) for line in (path / SUMS).read_text().splitlines())
        found = _checksums(path)
    except (OSError, ValueError) as error:
        return f"its checksums cannot be read: {error}"
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if wanted.get(name) != found[name]:
            return f"the content of {name} is not what was written"
    return None


def newest_step(workdir: str | Path) -> int | None:
    """Returns the newest step with a whole checkpoint, None if no step was ever finished.

    It names newer checkpoints that are damaged on stderr.

    Raises:
      UserError: every finished checkpoint is damaged.
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
    """Returns the info of a step, by default of the newest whole one; None if there is no checkpoint."""
    if step is None:
        step = newest_step(workdir)
    if step is None:
        return None
    return {**_info(folder(workdir) / str(step)), "step": step}


def read_variables(
    workdir: str | Path, *, ema: bool = True, step: int | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads the model of a checkpoint; the devices need not be those that wrote it.

    Args:
      workdir: folder of a run or of a converted checkpoint.
      ema: read the averaged variables, if the checkpoint has them; otherwise the raw ones.
      step: number of the step; None for the newest whole one.

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
    weights = "ema" if item == "ema" else info.get("weights", "raw")
    return jax.tree.map(np.asarray, variables), {**info, "weights": weights}


def average_checkpoints(
    workdirs: Sequence[str | Path], *, last: Count = 1, ema: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Averages checkpoints of the same model ("model soup": Wortsman et al. 2022), in float64.

    Args:
      workdirs: folders of runs.
      last: how many of the newest checkpoints to take of each run.
      ema: average the averaged variables of checkpoints that have them; otherwise the raw ones.

    Returns:
      The variables as NumPy arrays, and the newest info of the first run with two more entries: 'weights' ("ema" or
      "raw") and 'averaged', the list of [folder, step].

    Raises:
      UserError: a run has fewer than `last` whole checkpoints, or the models differ.
    """
    check_arguments(average_checkpoints, "", locals())
    total: Any = None
    averaged: list[list[Any]] = []
    first: dict[str, Any] = {}
    for workdir in workdirs:
        whole = [step for step in finished_steps(workdir) if damage(folder(workdir) / str(step)) is None]
        if len(whole) < last:
            raise UserError(
                f"{workdir} has {len(whole)} whole checkpoints, but --last is {last}: give at most the number "
                "that it has."
            )
        for step in reversed(whole[-last:]):
            variables, info = read_variables(workdir, ema=ema, step=step)
            first = first or info
            if info["model"] != first["model"] or info["weights"] != first["weights"]:
                raise UserError(f"{workdir} and {workdirs[0]} hold different models: only the same can be averaged.")
            _require_same_classes(stored_names(first), stored_names(info), workdirs[0], workdir)
            if _scale(info) != _scale(first):
                raise UserError(
                    f"{workdir} and {workdirs[0]} were trained on numbers of other means and deviations: only "
                    "checkpoints of the same training images can be averaged."
                )
            upcast = jax.tree.map(lambda x: np.asarray(x, np.float64), variables)
            total = upcast if total is None else jax.tree.map(np.add, total, upcast)
            averaged.append([os.fspath(workdir), step])
    mean = jax.tree.map(lambda sum, like: (sum / len(averaged)).astype(like.dtype), total, variables)
    return mean, {**first, "averaged": averaged}


def _scale(info: Mapping[str, Any]) -> list[Any]:
    """Returns by what a checkpoint for numbers scales its outputs; see `maxmap.tasks.rows.Numbers`."""
    return [info.get("task", {}).get(key) for key in ("mean", "deviation")]


def _require_same_classes(
    first: Sequence[str] | None, other: Sequence[str] | None, where: str | Path, other_where: str | Path
) -> None:
    """Raises UserError if two checkpoints have other classes, or the same in another order; numbers fit any names."""
    if first is None or other is None or list(first) == list(other):
        return
    i = next((i for i, (one, two) in enumerate(zip(first, other, strict=False)) if one != two), -1)
    how = "the same classes in another order" if sorted(first) == sorted(other) else "other classes"
    raise UserError(
        f"{other_where} was trained on {how} than {where}: class {i} is {other[i]!r} there and {first[i]!r} here. Only "
        "checkpoints with the same classes in the same order can be averaged."
    )


def write_variables(
    workdir: str | Path, variables: Mapping[str, Any], info: Mapping[str, Any], *, overwrite: bool = False
) -> None:
    """Writes a checkpoint that holds only a model. It appears whole or not at all.

    The arrays may be in a memory-mapped file as large as the memory, so no second copy of all of them is made. They are
    not compressed, because compressing takes longer than writing.

    Args:
      workdir: folder to write into.
      variables: tree of arrays.
      info: values that JSON can hold; 'step' is the number of the step.
      overwrite: replace a folder that holds a checkpoint.

    Raises:
      UserError: `workdir` holds a checkpoint already, or cannot be written to.
    """
    path = folder(workdir) / str(info["step"])
    if storage.in_bucket(workdir):  # where nothing can be renamed, but where a step without checksums does not count
        _refuse_checkpoint(workdir)
        with write_errors(workdir, "be written to"):
            _write_step(path, variables, info)
        return
    whole = Path(os.path.abspath(workdir))
    storage.recover(whole)
    if not overwrite:
        _refuse_checkpoint(workdir)
    # A folder with other files, but without a checkpoint, keeps them and gets the step.
    beside = not overwrite and whole.is_dir() and any(whole.iterdir())
    with (
        write_errors(workdir, "be written to"),
        storage.atomic_target(Path(path) if beside else whole, overwrite=overwrite or beside) as unfinished,
    ):
        _write_step(epath.Path(unfinished if beside else unfinished / FOLDER / path.name), variables, info)


def _refuse_checkpoint(workdir: str | Path) -> None:
    if finished_steps(workdir):
        raise UserError(f"{workdir} holds a checkpoint already: give another folder.")


def _write_step(path: epath.Path, variables: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """Writes the model and the checksums of a step; see `write_variables`."""
    types = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler()),
        (np.ndarray, _FewAtATime(deepcopy_host_arrays=False)),
    )
    handlers = {
        "variables": ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False, type_handler_registry=types),
        "info": ocp.JsonCheckpointHandler(),
    }
    trees = jax.tree.map(lambda leaf: np.asarray(leaf) if np.isscalar(leaf) else leaf, dict(variables))
    items = {"variables": ocp.args.PyTreeSave(trees), "info": ocp.args.JsonSave(dict(info))}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as writer:
        writer.save(os.fspath(path), args=ocp.args.Composite(**items), force=True)
    _write_checksums(path)


class _FewAtATime(ocp.type_handlers.NumpyHandler):
    """Writes a few arrays while it lays out the next ones; all at once would be a second copy of them in memory."""

    async def serialize(self, values: Sequence[Any], infos: Sequence[Any], args: Any = None) -> Sequence[Any]:
        args = args or [ocp.SaveArgs()] * len(values)
        starts, size = [0], 0
        for i, value in enumerate(values):
            if size and size + value.nbytes > _BYTES_AT_A_TIME:
                starts.append(i)
                size = 0
            size += value.nbytes
        ranges = [slice(*ends) for ends in itertools.pairwise([*starts, len(values)])]
        with concurrent.futures.ThreadPoolExecutor(1) as other_thread:
            laid_out = other_thread.submit(_lay_out, values[ranges[0]])
            for this, following in itertools.zip_longest(ranges, ranges[1:]):
                arrays = laid_out.result()
                if following:
                    laid_out = other_thread.submit(_lay_out, values[following])
                for future in await super().serialize(arrays, infos[this], args[this]):
                    future.result()
        return []


def _lay_out(values: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Returns copies of arrays in C order, and frees the pages of the memory-mapped files that hold the originals."""
    result = [_in_c_order(value) for value in values]
    # Pages that were read count as memory of the process. The system reads them again if they are needed again.
    for file in {id(file): file for file in map(_mapped_file, values) if file is not None}.values():
        file.madvise(mmap.MADV_DONTNEED)
    return result


def _in_c_order(value: np.ndarray) -> np.ndarray:
    """Returns a copy in C order; a transposed matrix is copied in stripes that fit the cache, several times as fast."""
    matrix = value.squeeze()
    if matrix.ndim != 2 or not matrix.T.flags.c_contiguous:
        return np.array(value, order="C")
    result = np.empty(matrix.shape, value.dtype)
    for start in range(0, matrix.shape[1], 32):
        result[:, start : start + 32] = matrix[:, start : start + 32]
    return result.reshape(value.shape)


def _mapped_file(value: Any) -> mmap.mmap | None:
    """Returns the memory-mapped file that holds an array, None if no file does."""
    while isinstance(value, np.ndarray):
        value = value.base
    return value if isinstance(value, mmap.mmap) and hasattr(value, "madvise") else None


def _write_checksums(path: epath.Path) -> None:
    """Writes SHA256SUMS into a step's folder, which makes the step a finished one."""
    storage.write_text(path / SUMS, "".join(f"{digest}  {name}\n" for name, digest in _checksums(path).items()))


def _checksums(path: epath.Path) -> dict[str, str]:
    """Returns the SHA-256 checksum of every file of a step, by its path in the step's folder."""
    files = {os.fspath(file)[len(os.fspath(path)) + 1 :]: file for file in sorted(storage.walk(path))}
    counted = [n for n in files if n not in (SUMS, _ORBAX_CHANGES) and not n.endswith(".unfinished")]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return dict(zip(counted, pool.map(storage.sha256, (files[name] for name in counted)), strict=True))


def _info(path: epath.Path) -> dict[str, Any]:
    return json.loads((path / "info" / "metadata").read_text())


def _score(path: epath.Path) -> float | None:
    try:
        return _info(path).get("score")
    except (OSError, ValueError):
        return None  # the checkpoint is damaged


def _read(path: epath.Path, args: Mapping[str, Any]) -> dict[str, Any]:
    with contextlib.closing(ocp.Checkpointer(ocp.CompositeCheckpointHandler())) as reader:
        restored = reader.restore(os.fspath(path), args=ocp.args.Composite(**args))
    return {name: restored[name] for name in args}
