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

from maxmap import checkpoint, tasks, wordnet
from maxmap.checkpoint import Checkpoints
from maxmap.classes import listed, match, stored_names
from maxmap.config import with_defaults
from maxmap.convert.adapt import adapt
from maxmap.convert.load import read_model
from maxmap.data.pipeline import Data
from maxmap.data.preprocessing import departures
from maxmap.errors import UserError, nearest
from maxmap.evaluate import check_same_model
from maxmap.recipe import Recipe
from maxmap.runtime import jit_to_run_once
from maxmap.train.build import Parts
from maxmap.train.resume import check_changes
from maxmap.train.state import TrainState
from maxmap.train.teacher import Teacher, identity


def find_checkpoint(
    recipe: Recipe, workdir: str | Path, data: Data, mesh: Mesh, teacher: Teacher | None = None, *, allow_changes: bool
) -> tuple[dict[str, Any] | None, list[str], Data]:
    """Finds the checkpoint to go on from.

    Returns:
      The info of the checkpoint, None for none; the changes since then; and the data, with labels in the order of the
      checkpoint's classes.

    Raises:
      UserError: The checkpoint holds another model or other classes, or the config changed in what it computes.
    """
    found = checkpoint.read_info(workdir)
    if found is None:
        return None, [], data
    tasks.require_same(data, found, workdir)
    matched = _match_classes(data, found, workdir)
    check_same_model(recipe.describe_model(len(data.classes)), found["model"], workdir)
    before, now = with_defaults(found.get("config", recipe.values)), dict(recipe.values)
    if recipe.batch_norm != "sync":  # statistics then depend on the number of devices
        before |= {"devices": found.get("devices", mesh.size)}
        now |= {"devices": mesh.size}
    # What teaches it is named by its weights: they may lie elsewhere, but may not be others.
    before["distill"] = {**before["distill"], "teacher": identity(found.get("teacher"))}
    now["distill"] = {**now["distill"], "teacher": identity(None if teacher is None else teacher.describe())}
    changes = check_changes(before, now, workdir, allow=allow_changes)
    return found, changes + ["the order of the classes; that of the checkpoint stays"] * (matched is not data), matched


def _match_classes(data: Data, found: Mapping[str, Any], workdir: str | Path) -> Data:
    """Returns data with labels in the order of a checkpoint's classes; UserError says which classes differ."""
    known = stored_names(found)
    if known is None:
        return data
    if set(known) == set(data.classes):
        return data.with_classes(known, f"the checkpoint in {workdir}")
    others = [f"has {name!r} (nearest: {nearest(name, known)})" for name in data.classes if name not in known]
    missing = [f"lacks {name!r}" for name in known if name not in data.classes]
    raise UserError(
        f"the run in {workdir} was trained on other classes: of its {len(known)} ({listed(known)}) the data "
        f"{', '.join([*missing[:2], *others[:2]])}, {len(missing) + len(others)} differences in all: give the data "
        f"that it was trained on, or another folder and --config.init_from={workdir}."
    )


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
    state = jit_to_run_once(parts.create_state, parts.state_sharding)(parts.keys()[0])
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
    variables, info = read_model(path)
    wanted = parts.like.variables()
    options, said = _fit_classes(info, parts.data)
    if departing := departures(parts.data.preprocessing, info.get("preprocessing", {})):
        said += f"\nits preprocessing is not that of config.data: {'; '.join(departing)}"
    if not options and jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, wanted):
        return variables, f"loaded {len(jax.tree.leaves(variables))} entries as they were{said}"
    try:
        flat = traverse_util.flatten_dict(variables)
        options |= {"in_channels": parts.data.channels, "other_head": True, "seed": parts.recipe.seed}
        leaves, changes = adapt(flat, parts.model, **options)
    except UserError as error:
        raise UserError(f"the checkpoint in {path} cannot be started from: {error}") from None
    return traverse_util.unflatten_dict(leaves), f"{changes}{said}"


def _fit_classes(info: Mapping[str, Any], data: Data) -> tuple[dict[str, Any], str]:
    """Returns what `adapt` does with a classifier for as many classes as the data has, and what to say of it.

    Args:
      info: What the checkpoint to start from says of itself.
      data: Of the run.
    """
    known, stored, here = stored_names(info), info.get("classes", ()), data.classes
    if list(stored) == list(here):
        return {}, ""
    if not data.numbered and set(stored) != set(here) and (rows := wordnet.rows(here, stored)):
        others = f", the other {rows.count(-1)} the mean of all" if -1 in rows else ""
        kept = len(rows) - rows.count(-1)
        return {"class_map": rows}, f"\n{kept} of the {len(here)} classes get their weights by WordNet id{others}"
    if len(stored) != len(here):
        return {}, ""
    if set(stored) == set(here) and not data.numbered:
        order = match(here, stored, "the data", "the checkpoint").tolist()
        return {"class_map": order}, "\nits classes get the order that they have in the data"
    if known is None or data.numbered:
        return {}, f"\nonly numbers are known of its or the data's classes, so numbers decide: 0 is {here[0]!r} now"
    return {"other_classes": True}, f"\nits classes ({listed(known)}) are not those of the data ({listed(here)})"


def _with_variables(state: TrainState, variables: Mapping[str, Any]) -> TrainState:
    """Replaces the model of a fresh state; the average gets a copy, because a step donates both."""
    ema = None if state.ema is None else jax.tree.map(np.copy, dict(variables))
    model_state = {name: values for name, values in variables.items() if name != "params"}
    return dataclasses.replace(state, params=variables["params"], model_state=model_state, ema=ema)
