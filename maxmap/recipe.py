"""The record of a run: what training, evaluation and the commands get of a config, checked and bound."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

import optax
from jax.sharding import Mesh

from maxmap.data.pipeline import Data
from maxmap.errors import UserError
from maxmap.models import Classifier
from maxmap.operations import Array
from maxmap.ranges import Count, CountOrZero, Decay, Fraction, Positive, Range, check_fields
from maxmap.schedule import Schedule

Tracker: TypeAlias = Literal["wandb", "mlflow", "trackio"]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The section `evaluate`.

    Attributes:
      batch_size: Images at a time, over all devices.
      every_epochs: Epochs between two evaluations of a training run.
      patience: Evaluations in a row without a better top-1 accuracy (in another task: mAP, SRCC, R2 or mIoU), after
        which training ends early; None for never.
    """

    batch_size: Annotated[int, Range(at_least=1, at_most=2**20)] = 1024
    every_epochs: Count = 1
    patience: Count | None = None

    def __post_init__(self) -> None:
        check_fields(Evaluation, "evaluate", vars(self))


@dataclasses.dataclass(frozen=True)
class Saving:
    """The section `checkpoint`.

    Attributes:
      every: Steps between two checkpoints; None for an epoch.
      keep: Newest checkpoints to keep, beside the one with the best top-1 accuracy (in another task: mAP, SRCC, R2 or
        mIoU).
    """

    every: Count | None = None
    keep: Count = 3

    def __post_init__(self) -> None:
        check_fields(Saving, "checkpoint", vars(self))


@dataclasses.dataclass(frozen=True)
class Logging:
    """The section `log`.

    Attributes:
      every: Steps between two lines of the log.
      max_skips: Steps in a row that may be left out because loss or gradients are not finite; one more ends the run.
      hang_minutes: Minutes after which a step, an evaluation or a save that does not end is reported with its stack.
      to: Trackers of experiments that get the same numbers: "wandb", "mlflow", "trackio", or a list of these.
      profile: First and last step of a `jax.profiler` trace, such as (100, 110); None for no trace.
    """

    every: Count = 50
    max_skips: CountOrZero = 10
    hang_minutes: Positive = 30.0
    to: Tracker | Sequence[Tracker] = ()
    profile: tuple[Count, Count] | None = None

    def __post_init__(self) -> None:
        check_fields(Logging, "log", vars(self))

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names of `to`, each once."""
        return (self.to,) if isinstance(self.to, str) else tuple(dict.fromkeys(self.to))


@dataclasses.dataclass(frozen=True)
class Distillation:
    """The section `distill`: another network teaches the one that trains.

    Attributes:
      teacher: Checkpoint of that network, as `init_from` takes it; None for no teacher.
      kind: What the student learns: the teacher's probabilities, 'soft', or its likeliest answers as labels, 'hard'.
      alpha: Weight of what the teacher says; the labels have the rest up to 1.
      temperature: Divides the logits of both, for 'soft' only; above 1 the small probabilities count more.
    """

    teacher: str | None = None
    kind: Literal["soft", "hard"] = "soft"
    alpha: Fraction = 0.5
    temperature: Positive = 1.0

    def __post_init__(self) -> None:
        check_fields(Distillation, "distill", vars(self))
        if self.kind == "hard" and self.temperature != 1:
            raise UserError("config.distill.temperature belongs to kind='soft': leave it out with kind='hard'.")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a run computes, checked: the numbers of the run, and each section bound to its function.

    Attributes:
      epochs: Epochs to train for, cool-down not included.
      batch_size: Images of a step, over all devices and micro-batches.
      mesh: Makes the device mesh.
      model: Makes the model; takes `num_classes`.
      data: Opens the data.
      augment: Augments images on the device; takes key, images, labels and mean.
      mix: Mixes images and labels; takes key, images, labels and `num_classes`.
      erase: Erases rectangles; takes key and images.
      optim: Makes the optimizer; takes the learning rate.
      schedule: Makes the learning rate schedule; takes `steps_per_epoch` and `epochs`.
      loss: Computes the loss; takes outputs and targets.
      distill: What teaches the network, and how.
      evaluate: When and how to evaluate.
      checkpoint: When to save, and how many checkpoints to keep.
      log: When to log, and what ends a run.
      values: The complete config that this is made of, as `read` returns it.
      seed: Seed of the initialisation, of the order of the samples and of every random draw.
      steps: Steps after which training ends; None to train for `epochs`.
      accumulate: Micro-batches of a step, computed one after another.
      dtype: Type that the model computes in; parameters and statistics stay in float32.
      batch_norm: Whose samples a batch norm sees in training; see `maxmap.train.step.make_train_step`.
      kernels: "auto" takes the kernels written by hand for the platform; "plain" takes none.
      ema_decay: Share of the old moving average of the weights that a step keeps, such as 0.9999; None for no average.
      init_from: Checkpoint to start from: folder of a run or of a converted checkpoint, or a published name.
    """

    epochs: Count
    batch_size: Count
    mesh: functools.partial[Mesh]
    model: functools.partial[Classifier]
    data: functools.partial[Data]
    augment: Callable[..., Array]
    mix: Callable[..., tuple[Array, Array]]
    erase: Callable[..., Array]
    optim: functools.partial[optax.GradientTransformation]
    schedule: Callable[..., Schedule]
    loss: functools.partial[tuple[Array, dict[str, Array]]]
    distill: Distillation
    evaluate: Evaluation
    checkpoint: Saving
    log: Logging
    values: Mapping[str, Any]
    seed: Annotated[int, Range(at_least=0, at_most=2**32 - 1)] = 0
    steps: Count | None = None
    accumulate: Count = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_norm: Literal["sync", "averaged", "per_device"] = "sync"
    kernels: Literal["auto", "plain"] = "auto"
    ema_decay: Decay | None = None
    init_from: str | None = None

    def __post_init__(self) -> None:
        check_fields(Recipe, "config", vars(self))
        if self.batch_size % self.accumulate:
            raise UserError(
                f"config.accumulate is {self.accumulate}, which does not divide config.batch_size {self.batch_size}."
            )

    def describe_model(self, num_classes: int) -> dict[str, Any]:
        """Returns the keyword arguments of `create_model`, as a checkpoint stores them.

        Args:
          num_classes: Classes that the data has.

        Raises:
          UserError: The recipe names another number of classes.
        """
        given = self.model.keywords.get("num_classes", num_classes)
        if given != num_classes:
            raise UserError(
                f"config.model.num_classes is {given}, but the data has {num_classes} classes: leave it out or give "
                "other data."
            )
        return {**self.model.keywords, "num_classes": num_classes}
