"""Where a run starts: from its own checkpoint, from the model that the recipe names, or from scratch."""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from maxmap import checkpoint
from maxmap.checkpoint import Checkpoints
from maxmap.config import with_defaults
from maxmap.convert.adapt import adapt
from maxmap.convert.load import read_model
from maxmap.data.pipeline import Data
from maxmap.errors import UserError
from maxmap.evaluate import check_same_model
from maxmap.recipe import Recipe
from maxmap.train.build import Parts
from maxmap.train.resume import check_changes
from maxmap.train.state import TrainState


def find_checkpoint(
    recipe: Recipe, workdir: str | Path, data: Data, mesh: Mesh, *, allow_changes: bool
) -> tuple[dict[str, Any] | None, list[str]]:
    """Returns the info of the checkpoint to go on from, None for none, and the changes of the config since then.

    Raises:
      UserError: The checkpoint holds another model, or the config changed in what it computes.
    """
    found = checkpoint.read_info(workdir)
    if found is None:
        return None, []
    check_same_model(recipe.describe_model(len(data.classes)), found["model"], workdir)
    before, now = with_defaults(found.get("config", recipe.values)), dict(recipe.values)
    if recipe.batch_norm != "sync":  # statistics then depend on the number of devices
        before |= {"devices": found.get("devices", mesh.size)}
        now |= {"devices": mesh.size}
    return found, check_changes(before, now, workdir, allow=allow_changes)


def first_state(parts: Parts, workdir: str | Path, found: Mapping[str, Any] | None) -> tuple[TrainState, str]:
    """Returns the state that a run starts from, and what was done to the model of `init_from` to fit it.

    Args:
      parts: Of the run.
      workdir: Of the run.
      found: Info of the run's own checkpoint; None for none.
    """
    if found is not None:
        return _restore(workdir, found["step"], parts.like), ""
    variables, adapted = None, ""
    if parts.recipe.init_from:
        variables, adapted = _read_variables(parts.recipe.init_from, parts)
    state = jax.jit(parts.create_state, out_shardings=parts.state_sharding)(parts.keys()[0])
    if variables is not None:
        state = jax.device_put(_with_variables(state, variables), parts.state_sharding)
    return state, adapted


def _restore(workdir: str | Path, step: int, like: TrainState) -> TrainState:
    """Reads the state of a run whose model is known to be the same."""
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        try:
            return TrainState.from_items(checkpoints.restore(step, like.items()))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"the checkpoint in {workdir} was trained with another optimizer or averaging, which config.json there "
                "names: give that config, or another folder and this one as --config.init_from."
            ) from error


def _read_variables(path: str, parts: Parts) -> tuple[dict[str, Any], str]:
    """Reads a model to start from and fits it to the run's; returns a summary of the changes, too."""
    variables, _ = read_model(path)
    wanted = parts.like.variables()
    if jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, wanted):
        return variables, f"loaded {len(jax.tree.leaves(variables))} entries as they were"
    try:
        flat = traverse_util.flatten_dict(variables)
        leaves, changes = adapt(flat, parts.model, in_channels=3, other_head=True, seed=parts.recipe.seed)
    except UserError as error:
        raise UserError(f"the checkpoint in {path} cannot be started from: {error}") from None
    return traverse_util.unflatten_dict(leaves), str(changes)


def _with_variables(state: TrainState, variables: Mapping[str, Any]) -> TrainState:
    """Replaces the model of a fresh state; the average gets a copy, because a step donates both."""
    ema = None if state.ema is None else jax.tree.map(np.copy, dict(variables))
    model_state = {name: values for name, values in variables.items() if name != "params"}
    return dataclasses.replace(state, params=variables["params"], model_state=model_state, ema=ema)
