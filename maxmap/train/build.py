"""What a training run is built of: model, optimizer, state, steps; tried out by tracing before anything is written."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.errors import FlaxError
from jax.sharding import Mesh

from maxmap import tasks
from maxmap.data.augment import normalize
from maxmap.data.pipeline import Data
from maxmap.errors import UserError
from maxmap.evaluate import EvalStep, check_image_size, make_eval_step
from maxmap.models import Classifier, block_paths, require_head
from maxmap.operations import Array
from maxmap.optim import check_frozen
from maxmap.recipe import Recipe
from maxmap.schedule import Schedule
from maxmap.sharding import check_batch, replicated, split_batch
from maxmap.tasks import SINGLE_LABEL
from maxmap.tasks.task import Task
from maxmap.train.state import TrainState, abstract, create
from maxmap.train.step import Answers, Loss, Prepare, make_diagnosis, make_train_step
from maxmap.train.teacher import Teacher, with_teacher


class Images(NamedTuple):
    """What a training step knows of its images: side in pixels, number of classes, mean and deviation of each channel,
    what they are labelled for, and what each class counts in the loss (None for 1)."""

    size: int
    num_classes: int
    mean: Sequence[float]
    std: Sequence[float]
    task: Task = SINGLE_LABEL
    class_weights: tuple[float, ...] | None = None

    def batch(self, count: int) -> tuple[int, int, int, int]:
        """Returns the shape of `count` images, `[B, H, W, C]`."""
        return count, self.size, self.size, len(self.mean)

    @classmethod
    def of(cls, data: Data, task: Task | None = None) -> "Images":
        """Returns what it knows of a data set; `task` is that of a run that goes on."""
        task = task or tasks.of_data(data)
        colours = data.preprocessing["mean"], data.preprocessing["std"]
        return cls(data.image_size, len(data.classes), *colours, task, tasks.class_weights(data, task))


@dataclasses.dataclass(frozen=True)
class Step:
    """The training step of a recipe on a mesh, and what it is made of.

    Attributes:
      model: The network.
      schedule: The learning rate by step.
      prepare: What the step does to its batch on the device.
      loss: Of outputs and targets.
      answers: Of a teacher; None for no teacher.
      create_state: Function of a key that makes a fresh state.
      like: Shapes, types and shardings of a state.
      function: Jitted function of state, batch, key and, with a teacher, its variables; see
        `maxmap.train.step.make_train_step`.
      batch: Shapes, types and shardings of a batch.
      teacher: Shapes, types and shardings of a teacher's variables, as a list with one entry; empty for no teacher.
    """

    model: Classifier
    schedule: Schedule
    prepare: Prepare
    loss: Loss
    answers: Answers | None
    create_state: Callable[[Array], TrainState]
    like: TrainState
    function: jax.stages.Wrapped
    batch: dict[str, jax.ShapeDtypeStruct]
    teacher: list[Any]

    def arguments(self) -> tuple[Any, ...]:
        """Returns shapes, types and shardings of what the function takes, to trace and to compile it."""
        return self.like, self.batch, jax.eval_shape(lambda: jax.random.key(0)), *self.teacher


@dataclasses.dataclass(frozen=True)
class Parts:
    """All that a recipe describes, built; nothing of it changes while the run goes on.

    Attributes:
      recipe: That the parts are built from.
      mesh: Of the state and of the batches.
      data: Training and evaluation split.
      task: What the network is asked for.
      model: The network.
      schedule: The learning rate by step.
      steps_per_epoch: Steps of an epoch.
      total_steps: Steps of the run.
      create_state: Function of a key that makes a fresh state.
      like: Shapes, types and shardings of a state.
      train_step: Jitted function; see `Step`.
      diagnose: Jitted function of the same arguments; see `maxmap.train.step.make_diagnosis`.
      eval_step: Jitted function of variables and batch; see `maxmap.evaluate.make_eval_step`.
      teacher: Its variables on the devices, as a list with one entry; empty for no teacher.
      info: What a checkpoint says of itself.
    """

    recipe: Recipe
    mesh: Mesh
    data: Data
    task: Task
    model: Classifier
    schedule: Schedule
    steps_per_epoch: int
    total_steps: int
    create_state: Callable[[Array], TrainState]
    like: TrainState
    train_step: jax.stages.Wrapped
    diagnose: Callable[..., Any]
    eval_step: EvalStep
    teacher: list[Any]
    info: dict[str, Any]

    def keys(self) -> tuple[Array, Array]:
        """Returns the keys of the fresh state and of the steps."""
        init, train = jax.random.split(jax.random.key(self.recipe.seed))
        return init, train

    @property
    def state_sharding(self) -> TrainState:
        """The sharding of every array of a state."""
        return _shardings(self.like)


def open_data(recipe: Recipe) -> Data:
    """Opens the data of a training run, which needs both splits."""
    data = recipe.data()
    if data.train is None:
        raise UserError("there is no training data: set --config.data.train_split.")
    if data.val is None:
        raise UserError("there is no evaluation data: set --config.data.val_split.")
    if len(data.classes) < tasks.of_data(data).fewest:
        raise UserError(
            f"the training data has one class alone, {data.classes[0]!r}, with {data.train.name(0)}: give images of "
            "two classes or more, each in a folder of its own directly in the split's folder."
        )
    return data


def build(
    recipe: Recipe, mesh: Mesh, data: Data, found: Mapping[str, Any] | None = None, teacher: Teacher | None = None
) -> Parts:
    """Builds the parts of a run.

    Args:
      recipe: What the run is.
      mesh: Of all devices of the run.
      data: With both splits.
      found: Info of the checkpoint that the run goes on from, whose task it keeps; None for none.
      teacher: Of `recipe.distill`, with the classes of the data; None for none.

    Raises:
      UserError: Batch, mesh, model and images do not fit each other.
    """
    steps_per_epoch = data.steps_per_epoch(recipe.batch_size)
    task = tasks.of_data(data)
    if found is not None:
        task = task.fitted(tasks.of_checkpoint(found))
    step = make_step(recipe, mesh, Images.of(data, task), steps_per_epoch, teacher)
    if data.preprocessing["image_size"] != data.image_size:
        check_image_size(step.model, step.like.variables(), data.preprocessing)
    dtype, schedule = jnp.dtype(recipe.dtype), step.schedule
    return Parts(
        recipe=recipe,
        mesh=mesh,
        data=data,
        task=task,
        model=step.model,
        schedule=schedule,
        steps_per_epoch=steps_per_epoch,
        total_steps=min(schedule.total_steps, recipe.steps or schedule.total_steps),
        create_state=step.create_state,
        like=step.like,
        train_step=step.function,
        diagnose=jax.jit(
            make_diagnosis(step.model, step.loss, step.prepare, mesh=mesh, dtype=dtype, answers=step.answers)
        ),
        eval_step=make_eval_step(step.model, data.preprocessing, mesh, dtype, kernels=recipe.kernels, task=task),
        teacher=[] if teacher is None else [teacher.on(mesh)],
        info=_info(recipe, mesh, data, task) | ({} if teacher is None else {"teacher": teacher.describe()}),
    )


def make_step(recipe: Recipe, mesh: Mesh, images: Images, steps_per_epoch: int, teacher: Teacher | None = None) -> Step:
    """Builds the training step of a recipe; nothing is computed, and the devices of the mesh need not be here.

    Args:
      recipe: What the run is.
      mesh: Of the state and of the batches.
      images: That the run trains on.
      steps_per_epoch: Steps of an epoch, for the learning rate.
      teacher: Of `recipe.distill`; None for none.

    Raises:
      UserError: Batch, mesh, model and images do not fit each other.
    """
    model = recipe.model(num_classes=images.num_classes)
    require_head(model, images.task.dense, "config.model")
    check_batch(recipe.batch_size // recipe.accumulate, mesh, "config.batch_size / config.accumulate =")
    schedule = recipe.schedule(steps_per_epoch=steps_per_epoch, epochs=recipe.epochs)
    optimizer = make_optimizer(recipe, model, schedule)
    prepare, loss, answers = make_prepare(recipe, images), make_loss(recipe, images), None
    dtype = jnp.dtype(recipe.dtype)
    same, split = replicated(mesh), split_batch(mesh)
    label = images.task.label_like(recipe.batch_size, images.num_classes, images.size)
    batch = {
        "image": jax.ShapeDtypeStruct(images.batch(recipe.batch_size), jnp.uint8, sharding=split),
        "label": jax.ShapeDtypeStruct(label.shape, label.dtype, sharding=split),
    }
    _trace_once(prepare, loss, batch, images)
    taught = [] if teacher is None else [teacher.like(mesh)]
    if teacher is not None:
        answers = functools.partial(teacher.answer, mean=images.mean, std=images.std, dtype=dtype)
        loss = with_teacher(loss, recipe.distill, images.task, recipe.loss.keywords["name"])

    def create_state(key: Array) -> TrainState:
        one = jax.ShapeDtypeStruct(images.batch(1), jnp.float32)
        return create(model, optimizer, key, one, ema=recipe.ema_decay is not None)

    like = _abstract_state(create_state, mesh, f"{recipe.model.keywords['name']} with images of {images.size} pixels")
    freeze = recipe.optim.keywords["freeze"]
    check_frozen(like.params, freeze)
    state_sharding = _shardings(like)
    options = {key: getattr(recipe, key) for key in ("ema_decay", "accumulate", "batch_norm", "kernels")}
    function = jax.jit(
        make_train_step(
            model, optimizer, loss, prepare, mesh=mesh, dtype=dtype, freeze=freeze, answers=answers, **options
        ),
        in_shardings=(state_sharding, {"image": split, "label": split}, same, *_shardings(taught)),
        out_shardings=(state_sharding, same),
        donate_argnums=0,
    )
    return Step(model, schedule, prepare, loss, answers, create_state, like, function, batch, taught)


def _shardings(like: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, like)


def _info(recipe: Recipe, mesh: Mesh, data: Data, task: Task) -> dict[str, Any]:
    """Returns what a checkpoint says of itself, as JSON holds it."""
    return {
        "model": recipe.describe_model(len(data.classes)),
        "classes": list(data.classes),
        "task": tasks.describe(task),
        "preprocessing": data.preprocessing,
        "devices": mesh.size,
        "config": json.loads(json.dumps(recipe.values)),
    }


def _abstract_state(create_state: Callable[[Array], TrainState], mesh: Mesh, what: str) -> TrainState:
    """Returns the shapes and shardings of a fresh state; UserError says that the model does not take the images."""
    try:
        return abstract(jax.eval_shape(create_state, jax.random.key(0)), mesh)
    except (ValueError, TypeError, FlaxError) as error:
        raise UserError(f"{what}: {str(error).rstrip('.')}.") from None


def make_optimizer(
    recipe: Recipe, model: Classifier, learning_rate: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
    """Builds the optimizer of a recipe; finding the model's blocks takes a trace, which only layer-wise decay needs."""
    blocks = () if recipe.optim.keywords["layer_decay"] is None else block_paths(model)
    return recipe.optim(learning_rate, blocks=blocks)


def make_prepare(recipe: Recipe, about: Images) -> Prepare:
    """Returns what a step does to its batch on the device: flips and RandAugment, mixing, normalisation, erasing."""

    def prepare(key: Array, images: Array, labels: Array) -> tuple[Array, Array]:
        augment_key, mix_key, erase_key = jax.random.split(key, 3)
        images, labels = recipe.augment(augment_key, images, labels, mean=about.mean)
        images, targets = recipe.mix(mix_key, images, about.task.encode(labels), num_classes=about.num_classes)
        return recipe.erase(erase_key, normalize(images, about.mean, about.std)), targets

    return prepare


def make_loss(recipe: Recipe, about: Images) -> Loss:
    """Returns the loss of a recipe for what the images are labelled for.

    Raises:
      UserError: The recipe names a loss that does not fit.
    """
    tasks.check_loss(about.task, recipe.loss.keywords["name"])
    weights = None if about.class_weights is None else jnp.array(about.class_weights, jnp.float32)
    return functools.partial(recipe.loss, weights=weights, divergence=about.task.divergence)


def _trace_once(prepare: Prepare, loss: Loss, batch: dict[str, jax.ShapeDtypeStruct], about: Images) -> None:
    """Traces augmentation and loss, so that a mistake in their sections shows before anything is built."""
    images, labels = (jax.ShapeDtypeStruct(batch[key].shape, batch[key].dtype) for key in ("image", "label"))
    _, targets = jax.eval_shape(prepare, jax.random.key(0), images, labels)
    classified = targets.shape if about.task.dense else images.shape[:1]
    logits = jax.ShapeDtypeStruct((1, *classified, about.num_classes), jnp.float32)
    jax.eval_shape(loss, {"logits": logits}, targets)
