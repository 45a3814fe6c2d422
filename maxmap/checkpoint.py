"""What a run leaves in its folder: checkpoints by orbax, a folder for every saved step, and files that are never half.

A step holds the items 'variables' (parameters and the model's other collections), 'ema' (the same, averaged; absent
without averaging), 'training' (what only training needs) and 'info' (JSON: the model's name and fields, its classes and
preprocessing), so that whoever only wants the model reads one item.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from maxmap.errors import UserError

FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of a run.

    Args:
      workdir: of the run; they lie in its folder `checkpoints`.
      keep: newest ones that are kept.
    """

    def __init__(self, workdir: str | Path, *, keep: int = 3):
        self._manager = _open(_folder(workdir), ocp.CheckpointManagerOptions(max_to_keep=keep, create=True))

    def latest_step(self) -> int | None:
        """Returns the newest step, None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, items: Mapping[str, Any], info: Mapping[str, Any]) -> None:
        """Writes a step in the background: the trees of `items` and the JSON of `info`. A step that exists is kept."""
        if self._manager.latest_step() == step:
            return
        trees = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        self._manager.save(step, args=ocp.args.Composite(**trees, info=ocp.args.JsonSave(dict(info))))

    def restore(self, step: int, like: Mapping[str, Any]) -> dict[str, Any]:
        """Reads items of a step; `like` holds for each a tree of `jax.ShapeDtypeStruct` with shardings."""
        args = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        return {name: restored[name] for name in like}

    def wait(self) -> None:
        """Waits for what is being written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for what is being written, and ends the threads."""
        self._manager.close()


def read_info(workdir: str | Path) -> dict[str, Any] | None:
    """Returns the info of the newest step below a folder, None if there is none."""
    folder = _folder(workdir)
    if not folder.is_dir():
        return None
    with _open(folder) as manager:
        step = manager.latest_step()
        if step is None:
            return None
        info = manager.restore(step, args=ocp.args.Composite(info=ocp.args.JsonRestore()))["info"]
    return {**info, "step": step}


def read_variables(workdir: str | Path, *, ema: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads the newest model below a folder, on whatever devices it was written.

    Args:
      workdir: of a run, or a converted checkpoint.
      ema: the averaged variables where there are any, else the raw ones.

    Returns:
      The variables as NumPy arrays, and the info with 'step' and 'weights' ("ema" or "raw") added.

    Raises:
      UserError: there is no checkpoint.
    """
    info = read_info(workdir)
    if info is None:
        raise UserError(f"there is no checkpoint in {workdir}: give the folder of a run, the one that --workdir named.")
    with _open(_folder(workdir)) as manager:
        step = info["step"]
        item = "ema" if ema and (_folder(workdir) / str(step) / "ema").exists() else "variables"
        on_one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        metadata = manager.item_metadata(step)[item]
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_one), dict(metadata))
        variables = manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(like)}))[item]
    return jax.tree.map(np.asarray, variables), {**info, "weights": "ema" if item == "ema" else "raw"}


def write_text(path: Path, text: str) -> None:
    """Writes a file so that whoever reads it, also after a crash, finds the old text or the new one, never a part."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, "utf-8")
    os.replace(unfinished, path)


def _open(folder: Path, options: ocp.CheckpointManagerOptions | None = None) -> ocp.CheckpointManager:
    handlers = {name: ocp.StandardCheckpointHandler() for name in ("variables", "ema", "training")}
    return ocp.CheckpointManager(
        folder, options=options, item_handlers={**handlers, "info": ocp.JsonCheckpointHandler()}
    )


def _folder(workdir: str | Path) -> Path:
    return Path(workdir).absolute() / FOLDER
