"""Knowledge distillation: a network that is trained already answers for every image that the student gets.

Soft answers are those of Hinton et al. (2015, arXiv:1503.02531), hard ones those of DeiT (Touvron et al. 2021,
arXiv:2012.12877). There is no distillation token: each branch of the student learns from the labels and from the
teacher by the same logits. What `config.loss.distillation` weighs is another thing, a head that teaches itself.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from maxmap import tasks
from maxmap.classes import listed, match, stored_names
from maxmap.cost import count_parameters
from maxmap.data.pipeline import Data
from maxmap.errors import UserError, nearest
from maxmap.inference import load_classifier
from maxmap.losses import teacher_loss
from maxmap.models import Classifier, average
from maxmap.operations import Array
from maxmap.recipe import Distillation, Recipe
from maxmap.tasks.task import Task
from maxmap.train.state import abstract
from maxmap.train.step import Loss, Metrics, cast


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A network that is trained already.

    Attributes:
      path: As `config.distill.teacher` names it.
      model: The network.
      variables: Of the network, NumPy arrays; the parameters in the type that the step computes in.
      info: What its checkpoint says of itself.
      sha256: Of the variables as they were read.
      columns: The numbers of its logits that the classes of the run have, in their order; None for all as they are.
    """

    path: str
    model: Classifier
    variables: Mapping[str, Any]
    info: Mapping[str, Any]
    sha256: str
    columns: tuple[int, ...] | None = None

    def describe(self) -> dict[str, Any]:
        """Returns what the student's checkpoints say of the teacher."""
        about = {key: self.info[key] for key in ("step", "weights")}
        return {"path": self.path, "model": self.info["model"]["name"], **about, "sha256": self.sha256}

    def like(self, mesh: Mesh | AbstractMesh) -> Any:
        """Returns shapes, types and shardings of its variables: they are split as the student's are."""
        return abstract(self.variables, mesh)

    def on(self, mesh: Mesh) -> Any:
        """Returns its variables on the devices of a mesh."""
        return jax.device_put(self.variables, jax.tree.map(lambda leaf: leaf.sharding, self.like(mesh)))

    def answer(
        self, variables: Any, images: Array, *, mean: Sequence[float], std: Sequence[float], dtype: jnp.dtype
    ) -> Array:
        """Computes its logits for the classes of the run, the mean over its branches.

        Args:
          variables: Its own, gathered.
          images: Float `[B, H, W, C]`, as the student gets them: augmented, mixed, normalised and erased.
          mean: By which they are normalised.
          std: By which they are normalised.
          dtype: That the network computes in.

        Returns:
          `[B, K]`.
        """
        own = self.info["preprocessing"]
        if [*mean, *std] != [*own["mean"], *own["std"]]:
            scale, offset = np.divide(std, own["std"]), np.subtract(mean, own["mean"]) / own["std"]
            scale, offset = (jnp.asarray(x, images.dtype)[None, None, None] for x in (scale, offset))
            images = images * scale + offset
        shape = (images.shape[0], own["image_size"], own["image_size"], images.shape[3])
        if images.shape != shape:
            images = jax.image.resize(images, shape, "bilinear")
        logits = average(self.model.apply(variables, images.astype(dtype)))
        return logits if self.columns is None else logits[:, np.array(self.columns)]


def read_teacher(recipe: Recipe) -> Teacher | None:
    """Reads the teacher of a recipe; None if it has none.

    Raises:
      UserError: There is no such checkpoint, or it is for another task or other images than the recipe's data.
    """
    path, data = recipe.distill.teacher, recipe.data.keywords
    if path is None:
        return None
    tasks.unfitted(data["task"], 2).answers(jnp.zeros((1, 2)))  # whose sentence says that a task has no teachers
    model, variables, info = load_classifier(path)
    tasks.require_task(data["task"], info, path)
    if (own := len(info["preprocessing"]["mean"])) != data["channels"]:
        raise UserError(
            f"the teacher {path} takes images of {own} channels, and config.data.channels is {data['channels']}: give "
            "one that takes the same images."
        )
    digest = hashlib.sha256()
    for place, leaf in jax.tree_util.tree_leaves_with_path(variables):
        digest.update(f"{jax.tree_util.keystr(place)} {leaf.shape} {leaf.dtype}".encode())
        digest.update(np.asarray(leaf).tobytes())
    variables = {**variables, "params": cast(variables["params"], jnp.dtype(recipe.dtype))}
    return Teacher(path, model, variables, info, digest.hexdigest())


def identity(described: Mapping[str, Any] | None) -> str | None:
    """Names a teacher that is described by `Teacher.describe` by its weights, wherever they lie; None for none."""
    return None if described is None else f"{described['model']} with the weights {described['sha256'][:12]}"


def matched(teacher: Teacher, data: Data) -> tuple[Teacher, str]:
    """Gives a teacher the classes of a run; also returns what to say of it.

    Raises:
      UserError: It lacks a class of the data.
    """
    path, here, stored = teacher.path, data.classes, teacher.info["classes"]
    told = f"{teacher.info['model']['name']}, {count_parameters(teacher.variables['params']):,} parameters"
    known = stored_names(teacher.info)
    if known is None or data.numbered:
        check_count(teacher, len(here))
        whose = f"only numbers are known of its or the data's classes, so numbers decide: 0 is {here[0]!r}"
        return teacher, told if list(stored) == list(here) else f"{told}; {whose}"
    if missing := [name for name in here if name not in set(known)]:
        raise UserError(
            f"the teacher {path} knows {len(known)} classes ({listed(known)}), of the data's {len(here)} it lacks "
            f"{len(missing)}, such as {missing[0]!r} (nearest: {nearest(missing[0], known)}): give one that has all, "
            "or leave config.distill.teacher out."
        )
    if list(known) != list(here):
        columns = match(here, known, "the data", f"the teacher {path}")
        teacher = dataclasses.replace(teacher, columns=tuple(columns.tolist()))
        told += f"; of its {len(known)} classes the {len(here)} of the data count, by their names"
    return teacher, told


def check_count(teacher: Teacher, count: int) -> None:
    """Raises UserError unless a teacher has so many classes, where only numbers are known of some."""
    if (own := len(teacher.info["classes"])) != count:
        raise UserError(
            f"the teacher {teacher.path} has {own} classes and the student {count}, and without names for both nothing "
            "says which are the same: give one with as many."
        )


def with_teacher(loss: Loss, distill: Distillation, task: Task, name: str) -> Loss:
    """Adds the teacher's term to a loss: (1 - alpha) base + alpha teacher + the other terms of `loss`.

    Args:
      loss: Of outputs and targets, with the part 'base'.
      distill: How the student learns; see `maxmap.recipe.Distillation`.
      task: What both are asked for.
      name: Of the base loss.

    Returns:
      A loss of outputs that have the teacher's logits `[B, K]`, too, as 'teacher'; its parts have that name, too.
    """

    def total(outputs: Mapping[str, Array], targets: Array) -> tuple[Array, Metrics]:
        logits, taught = outputs["logits"], outputs["teacher"]
        parts = dict(loss(outputs, targets)[1])
        del parts["loss"]
        if distill.kind == "hard":
            term = loss({"logits": logits}, task.answers(taught))[1]["base"]
        else:
            term = teacher_loss(logits, taught, name, task.divergence, distill.temperature)
        parts["base"] = (1 - distill.alpha) * parts["base"]
        parts["teacher"] = distill.alpha * term
        value = sum(parts.values(), jnp.zeros((), term.dtype))
        return value, {"loss": value, **parts}

    return total
