"""What a network is asked for, and what follows from it: losses that fit, figures, and how outputs become predictions.

    single_label    the class of an image                 accuracy
    multi_label     which of several labels an image has  average precision, F1 at thresholds
    distribution    shares of ordered scores (AVA's ten)  PLCC and SRCC of the mean score
    numbers         one number or several                 MAE, RMSE, R2
    segmentation    the class of every pixel              mean IoU

A task is an object of one of five classes. Data says which one it is (`of_data`), a checkpoint keeps it (`describe`,
`of_checkpoint`), and no other room asks for its name: they all call the methods of `Task`.
"""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from maxmap.classes import listed
from maxmap.data.pipeline import Data
from maxmap.errors import UserError
from maxmap.tasks.rows import Distribution, MultiLabel, Numbers, by_name
from maxmap.tasks.segmentation import Segmentation
from maxmap.tasks.single_label import SingleLabel
from maxmap.tasks.task import Task

SINGLE_LABEL: Task = SingleLabel()
TASKS: dict[str, type[Any]] = {
    each.name: each for each in (SingleLabel, MultiLabel, Distribution, Numbers, Segmentation)
}


def of_data(data: Data) -> Task:
    """Returns the task that a data set is labelled for."""
    if data.task == "multi_label":
        task = MultiLabel(_frozen(data.thresholds))
        task.at(data.classes)  # whose sentence names a label that there is not
        return task
    if data.task == "distribution":
        return Distribution(_score_values(data.classes))
    if data.task == "numbers":
        source = data.train if data.train is not None else data.val
        labels = np.asarray(source.labels() if source is not None else None, np.float64)  # [N, K]
        deviation = np.std(labels, axis=0)
        return Numbers(tuple(np.mean(labels, axis=0).tolist()), tuple(np.where(deviation > 0, deviation, 1).tolist()))
    return TASKS[data.task]()


def unfitted(name: str, outputs: int) -> Task:
    """Returns a task by its name before any data is seen, which is enough to compile a step."""
    if name == "distribution":
        return Distribution(tuple(float(k) for k in range(1, outputs + 1)))
    if name == "numbers":
        return Numbers((0.0,) * outputs, (1.0,) * outputs)
    return TASKS[name]()


def _score_values(names: Sequence[str]) -> tuple[float, ...]:
    """Returns the numbers that the names of scores are, else 1 to K."""
    with contextlib.suppress(ValueError):
        values = tuple(float(name) for name in names)
        if np.isfinite(values).all():
            return values
    return tuple(float(k) for k in range(1, len(names) + 1))


def of_checkpoint(info: Mapping[str, Any]) -> Task:
    """Returns the task of a checkpoint, by what it says of itself; one without a word of it tells classes."""
    described = dict(info.get("task", {"name": SingleLabel.name}))
    name = described.pop("name", None)
    if name not in TASKS:
        raise UserError(
            f"the checkpoint is for the task {name!r}, which this version of maxmap does not have: update it."
        )
    return TASKS[name](**{key: _frozen(value) for key, value in described.items()})


def describe(task: Task) -> dict[str, Any]:
    """Returns a task as JSON holds it, for `of_checkpoint`."""
    return {"name": task.name, **dataclasses.asdict(task)}  # type: ignore[call-overload]


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def class_weights(data: Data, task: Task) -> tuple[float, ...] | None:
    """Returns the weights of the classes in the loss, which `data.class_weights` names; None for none.

    Raises:
      UserError: a name is no class, a class has no training image, or the labels are not known in advance.
    """
    if data.class_weights is None:
        return None
    if data.class_weights != "inverse":
        known = by_name("data.class_weights", data.class_weights, data.classes)
        return tuple(known.get(name, 1.0) for name in data.classes)
    labels = None if data.train is None else data.train.labels()
    if labels is None:
        raise UserError("data.class_weights='inverse' needs the labels of all training images in advance: give pairs.")
    with np.errstate(divide="ignore"):
        weights = task.class_weights(labels, len(data.classes))
    for name, weight in zip(data.classes, weights, strict=True):
        if not 0 < weight < np.inf:
            every = "all training images have" if weight == 0 else "no training image has"
            raise UserError(
                f"{every} {name!r}, so data.class_weights='inverse' has no weight for it: leave it out of the data, or "
                "give pairs of names and weights."
            )
    return tuple(weights.tolist())


def check_loss(task: Task, name: str) -> None:
    """Raises UserError unless a loss fits a task."""
    if name not in task.losses:
        raise UserError(
            f"config.loss.name is {name!r}, which does not fit config.data.task={task.name!r}: set "
            f"--config.loss.name={task.losses[0]}"
            f"{f' (or {task.losses[1]})' if len(task.losses) > 1 else ''}."
        )


def require_classes(info: Mapping[str, Any], what: str, where: Any) -> None:
    """Raises UserError unless a checkpoint tells one class per image, which `what` needs."""
    if (task := of_checkpoint(info)) != SINGLE_LABEL:
        raise UserError(
            f"{what} is for one class per image, and the checkpoint {where} is for the task {task.name!r}: give "
            "another one, or see what predict and validate say of it."
        )


def require_task(name: str, info: Mapping[str, Any], where: Any) -> Task:
    """Returns the task of a checkpoint; UserError unless it is the one of this name, which images are labelled for."""
    task = of_checkpoint(info)
    if name != task.name:
        raise UserError(
            f"the checkpoint in {where} was trained for the task {task.name!r}, and the images are labelled for "
            f"{name!r}: give images with labels of its kind, or another checkpoint."
        )
    return task


def require_same(data: Data, info: Mapping[str, Any], where: Any) -> Task:
    """Returns the task of a checkpoint, after a check that data is labelled for it.

    Args:
      data: with labels for the checkpoint.
      info: what the checkpoint says of itself.
      where: of the checkpoint, for messages.

    Raises:
      UserError: the data is labelled for another task, or by other columns.
    """
    task, names, stored = require_task(data.task, info, where), data.classes, info.get("classes", ())
    if task.complete and set(names) != set(stored):
        raise UserError(
            f"the checkpoint in {where} answers with {listed(stored)} ({len(stored)}), and the images are labelled by "
            f"{listed(names)} ({len(names)}): name the same columns."
        )
    return task
