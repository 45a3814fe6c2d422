"""What every task has."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeAlias

import jax
import numpy as np

from maxmap.errors import printable
from maxmap.operations import Array
from maxmap.wordnet import words

Named: TypeAlias = list[tuple[str, float]]  # a prediction: names and their values
Records: TypeAlias = tuple[list[str], Callable[[Named], list[dict[str, Any]]]]


class Task(Protocol):
    """What a network is asked for.

    Attributes:
      name: as `data.task` has it.
      losses: names of `maxmap.losses.total_loss` that fit; the first is the usual one.
      divergence: what the outputs stand for, see `maxmap.losses.DIVERGENCES`.
      score: the figure of an evaluation by which checkpoints are compared; higher is better.
      curves: the figures that `curves.png` draws, with their names, and the title above them.
      fewest: outputs that a network has at least.
      complete: whether data has to label all outputs of a checkpoint; classes without images are no mistake.
      outputs: what the outputs are called, in the plural.
      value: what stands beside a name in a prediction: 'probability', 'share' or 'number'.
      keeps_outputs: whether `figures` needs the outputs for every image.
      dense: whether every pixel has an answer of its own, by a head of `maxmap.models.PIXEL_HEADS`.
    """

    name: ClassVar[str]
    losses: ClassVar[tuple[str, ...]]
    divergence: ClassVar[str]
    score: ClassVar[str]
    curves: ClassVar[tuple[dict[str, str], str]]
    fewest: ClassVar[int]
    complete: ClassVar[bool]
    outputs: ClassVar[str]
    value: ClassVar[str]
    keeps_outputs: ClassVar[bool]
    dense: ClassVar[bool]

    def label_like(self, batch: int, outputs: int, size: int) -> jax.ShapeDtypeStruct:
        """Returns shape and type of the labels of a batch of training images of `size` pixels."""
        ...

    def encode(self, labels: Array) -> Array:
        """Maps the labels of a batch to what is mixed and compared with logits."""
        ...

    def decode(self, logits: Array) -> Array:
        """Maps logits `[..., K]` to predictions: probabilities, shares or numbers; of a dense task, classes `[...]`."""
        ...

    def answers(self, logits: Array) -> Array:
        """Maps a teacher's logits `[B, K]` to the targets `[B, K]` that a student learns in hard distillation."""
        ...

    def measure(self, logits: Array, branches: Array, labels: Array, mask: Array) -> dict[str, Any]:
        """Computes what an evaluation adds up, and what it keeps of every image, on the device.

        Args:
          logits: `[B, K]`, the mean over the branches; where it is dense `[B, h, w, K]`.
          branches: `[G, B, K]` or `[G, B, h, w, K]`.
          labels: of the batch.
          mask: `[B]`, False for padding.

        Returns:
          Sums over the images, 'images' and 'loss' among them, and 'predictions', with a value for each image.
        """
        ...

    def figures(
        self, totals: Mapping[str, Any], kept: Mapping[str, np.ndarray], names: Sequence[str]
    ) -> dict[str, Any]:
        """Returns the figures of the whole split, without 'images'.

        Args:
          totals: the sums of `measure` over all batches, float64.
          kept: 'label', 'outputs' `[N, K]` and 'branch' `[G, N, K]` where the task keeps outputs.
          names: of the outputs.
        """
        ...

    def columns(self, label: Any, found: Mapping[str, np.ndarray], row: int, names: Sequence[str]) -> dict[str, Any]:
        """Returns the columns of `predictions.csv` for one image of a batch, by its row and the kept predictions."""
        ...

    def running(self, totals: Mapping[str, Any]) -> str:
        """Returns what is known while an evaluation runs, as text."""
        ...

    def words(self, result: Mapping[str, Any]) -> str:
        """Returns the figures of an evaluation as text."""
        ...

    def summary(self, result: Mapping[str, Any]) -> str:
        """Returns the figures of an `eval.json` as text."""
        ...

    def caption(self, target: np.ndarray, names: Sequence[str]) -> str:
        """Returns what stands below an image whose target this is, as it is mixed and compared with logits."""
        ...

    def shown(self, value: float) -> str:
        """Returns a value of `named` as text."""
        ...

    def records(self) -> Records:
        """Returns the columns of a file of predictions, and a function from a prediction to its lines."""
        ...

    def named(self, outputs: np.ndarray, names: Sequence[str], top: int) -> Named:
        """Returns the prediction of one image by its `decode`d outputs; `top` is how many classes."""
        ...

    def table(self, names: Sequence[str], top: int) -> tuple[list[str], Callable[[np.ndarray], dict[str, Any]]]:
        """Returns the columns of a table of predictions, and a function from outputs `[K]` to their values."""
        ...

    def class_weights(self, labels: np.ndarray, outputs: int) -> np.ndarray:
        """Returns weights `[K]` for the loss, by the inverse frequency of the training labels."""
        ...

    def fitted(self, stored: "Task") -> "Task":
        """Returns the task of a checkpoint, with what the data at hand says otherwise on purpose."""
        ...


def percent(value: float) -> str:
    """Returns a probability as text."""
    return f"{100 * value:.1f} %"


def class_records() -> Records:
    """Returns `Task.records` of classes and labels."""
    columns = ["rank", "class", "words", "probability"]

    def records(named: Named) -> list[dict[str, Any]]:
        rows = ((rank, name, words(name), value) for rank, (name, value) in enumerate(named, 1))
        return [dict(zip(columns, row, strict=True)) for row in rows]

    return columns, records


def number_records() -> Records:
    """Returns `Task.records` of scores and numbers."""
    return ["name", "value"], lambda named: [{"name": name, "value": value} for name, value in named]


def caption(target: np.ndarray, classes: Sequence[str]) -> str:
    """Returns the two likeliest classes of a target `[K]`, a line each; the second only where it has weight."""
    order = np.argsort(-target, kind="stable")
    shown = [index for index in order[:2] if target[index] > np.min(target) + 0.005 or index == order[0]]
    return "\n".join(f"{100 * target[index]:.0f} % {printable(classes[index])}" for index in shown)
