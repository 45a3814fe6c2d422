"""The tasks whose labels are a row of K numbers: several labels, distributions and numbers."""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from maxmap import metrics
from maxmap.errors import UserError, printable
from maxmap.losses import binary_cross_entropy, earth_movers_distance, mean_squared_error
from maxmap.operations import Array
from maxmap.tasks.task import Named, Records, Task, caption, class_records, number_records, percent


class Rows(abc.ABC):
    """What the tasks share whose labels are a row of K numbers: what is kept, and its columns in `predictions.csv`."""

    keeps_outputs: ClassVar[bool] = True
    dense: ClassVar[bool] = False
    value: ClassVar[str]

    def label_like(self, batch: int, outputs: int, size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, outputs), jnp.float32)

    def encode(self, labels: Array) -> Array:
        return labels

    def answers(self, logits: Array) -> Array:
        raise UserError("config.distill.teacher is for classes and labels: leave it out for distributions and numbers.")

    @abc.abstractmethod
    def decode(self, logits: Array) -> Array:
        """See `Task.decode`."""

    @abc.abstractmethod
    def loss(self, logits: Array, targets: Array) -> Array:
        """Returns the loss of rows, a scalar."""

    def measure(self, logits: Array, branches: Array, labels: Array, mask: Array) -> dict[str, Any]:
        """The kept predictions are 'outputs' `[B, K]` and 'branch' `[G, B, K]`."""
        losses = jax.vmap(lambda row, target: self.loss(row[None], target[None]))(logits, self.encode(labels))
        return {
            "images": jnp.sum(mask),
            "loss": jnp.sum(jnp.where(mask, losses, 0)),
            "predictions": {"outputs": self.decode(logits), "branch": self.decode(branches)},
        }

    def columns(self, label: Any, found: Mapping[str, np.ndarray], row: int, names: Sequence[str]) -> dict[str, Any]:
        columns = {f"label {name}": _written(value) for name, value in zip(map(printable, names), label, strict=True)}
        rows = {self.value: found["outputs"][row]}
        if len(found["branch"]) > 1:
            rows |= {f"branch{g} {self.value}": outputs[row] for g, outputs in enumerate(found["branch"])}
        for kind, outputs in rows.items():
            columns |= {f"{kind} {printable(name)}": _written(x) for name, x in zip(names, outputs, strict=True)}
        return columns

    @abc.abstractmethod
    def words(self, result: Mapping[str, Any]) -> str:
        """See `Task.words`."""

    def summary(self, result: Mapping[str, Any]) -> str:
        return self.words(result)

    def running(self, totals: Mapping[str, Any]) -> str:
        return f"loss {float(totals['loss']) / float(totals['images']):.4f}"

    def caption(self, target: np.ndarray, names: Sequence[str]) -> str:
        return caption(target, names)

    def shown(self, value: float) -> str:
        return f"{value:.4g}"

    def records(self) -> Records:
        return number_records()

    def named(self, outputs: np.ndarray, names: Sequence[str], top: int) -> Named:
        del top
        return [(name, float(value)) for name, value in zip(names, outputs, strict=True)]

    def table(self, names: Sequence[str], top: int) -> tuple[list[str], Callable[[np.ndarray], dict[str, Any]]]:
        """A column for each output; `extras` come first."""
        columns = [f"{self.value} {printable(name)}" for name in names]

        def values(outputs: np.ndarray) -> dict[str, Any]:
            return self.extras(outputs, names) | dict(zip(columns, map(_written, outputs), strict=True))

        return [*self.extras(np.ones(len(names)), names), *columns], values

    def extras(self, outputs: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
        """Returns what a table says beside the outputs."""
        return {}

    def class_weights(self, labels: np.ndarray, outputs: int) -> np.ndarray:
        raise UserError("data.class_weights is for classes and labels: leave it out for distributions and numbers.")

    def fitted(self, stored: Task) -> Task:
        return stored


def _written(value: Any) -> float:
    """Returns a float32 as the shortest float that says the same."""
    return float(f"{float(value):.7g}")


@dataclasses.dataclass(frozen=True)
class MultiLabel(Rows):
    """Which of several labels an image has: binary cross-entropy, average precision, and F1 at thresholds.

    Attributes:
      thresholds: from which probability on an image counts as having a label: one number for all, or pairs of a label
        and its number.
    """

    name: ClassVar[str] = "multi_label"
    losses: ClassVar[tuple[str, ...]] = ("bce",)
    divergence: ClassVar[str] = "binary"
    score: ClassVar[str] = "map"
    curves: ClassVar[tuple[dict[str, str], str]] = ({"map": "mAP", "f1": "F1, mean of the labels"}, "mAP and F1, %")
    fewest: ClassVar[int] = 1
    complete: ClassVar[bool] = False
    outputs: ClassVar[str] = "labels"
    value: ClassVar[str] = "probability"

    thresholds: float | tuple[tuple[str, float], ...] = 0.5

    def answers(self, logits: Array) -> Array:
        return (logits > 0).astype(logits.dtype)

    def decode(self, logits: Array) -> Array:
        return jax.nn.sigmoid(logits)

    def loss(self, logits: Array, targets: Array) -> Array:
        return binary_cross_entropy(logits, targets)

    def at(self, names: Sequence[str]) -> np.ndarray:
        """Returns the thresholds of labels, `[K]`; 0.5 where pairs do not name one.

        Raises:
          UserError: a pair names another label.
        """
        if not isinstance(self.thresholds, tuple):
            return np.full(len(names), self.thresholds)
        known = by_name("data.thresholds", self.thresholds, names)
        return np.array([known.get(name, 0.5) for name in names])

    def figures(
        self, totals: Mapping[str, Any], kept: Mapping[str, np.ndarray], names: Sequence[str]
    ) -> dict[str, Any]:
        """Percent, but for the loss and the thresholds; labels that no image has do not count in the means."""
        truth, outputs, thresholds = kept["label"] > 0.5, kept["outputs"], self.at(names)
        given = outputs >= thresholds[None]
        counts = [np.sum(x, axis=0) for x in (truth & given, given, truth)]
        each = metrics.precision_recall_f1(*counts)
        precision, recall, micro = metrics.precision_recall_f1(*(np.sum(count) for count in counts))
        rows: dict[str, dict[str, Any]] = {}
        for k in map(int, np.flatnonzero(counts[2])):
            best, best_f1 = metrics.best_threshold(truth[:, k], outputs[:, k])
            rows[names[k]] = {
                "images": int(counts[2][k]),
                "ap": 100 * (metrics.average_precision(truth[:, k], outputs[:, k]) or 0.0),
                "threshold": float(thresholds[k]),
                **{key: 100 * float(x[k]) for key, x in zip(("precision", "recall", "f1"), each, strict=True)},
                "best_threshold": best,
                "best_f1": 100 * best_f1,
            }
        return {
            "map": _mean(row["ap"] for row in rows.values()),
            "f1": _mean(row["f1"] for row in rows.values()),
            "micro_precision": 100 * float(precision),
            "micro_recall": 100 * float(recall),
            "micro_f1": 100 * float(micro),
            "branch_map": [
                _mean(
                    100 * ap for k in range(len(names)) if (ap := metrics.average_precision(truth[:, k], branch[:, k]))
                )
                for branch in kept["branch"]
            ],
            "loss": float(totals["loss"]) / float(totals["images"]),
            "labels": rows,
        }

    def words(self, result: Mapping[str, Any]) -> str:
        return f"mAP {result['map']:.2f} %, F1 {result['f1']:.2f} %, loss {result['loss']:.4f}"

    def shown(self, value: float) -> str:
        return percent(value)

    def records(self) -> Records:
        return class_records()

    def named(self, outputs: np.ndarray, names: Sequence[str], top: int) -> Named:
        """All labels from their thresholds on, the likeliest first; `top` counts for nothing."""
        thresholds = self.at(names)
        order = np.argsort(-outputs, kind="stable")
        return [(names[i], float(outputs[i])) for i in order if outputs[i] >= thresholds[i]]

    def extras(self, outputs: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
        return {"labels": "|".join(printable(name) for name, _ in self.named(outputs, names, len(names)))}

    def class_weights(self, labels: np.ndarray, outputs: int) -> np.ndarray:
        """(N - n) / n: the images with a label weigh as much as those without."""
        counts = np.sum(labels, axis=0, dtype=np.float64)
        return np.asarray((len(labels) - counts) / counts)

    def fitted(self, stored: Task) -> Task:
        return self


def _mean(values: Any) -> float:
    row = list(values)
    return float(np.mean(row)) if row else 0.0


@dataclasses.dataclass(frozen=True)
class Distribution(Rows):
    """Shares of ordered scores: the earth mover's distance, and how the mean scores correlate.

    Attributes:
      scores: what the outputs stand for, in order.
    """

    name: ClassVar[str] = "distribution"
    losses: ClassVar[tuple[str, ...]] = ("emd", "softmax")
    divergence: ClassVar[str] = "categorical"
    score: ClassVar[str] = "srcc"
    curves: ClassVar[tuple[dict[str, str], str]] = ({"plcc": "PLCC", "srcc": "SRCC"}, "correlation")
    fewest: ClassVar[int] = 2
    complete: ClassVar[bool] = True
    outputs: ClassVar[str] = "scores"
    value: ClassVar[str] = "share"

    scores: tuple[float, ...]

    def decode(self, logits: Array) -> Array:
        return jax.nn.softmax(logits)

    def loss(self, logits: Array, targets: Array) -> Array:
        return earth_movers_distance(logits, targets)

    def means(self, shares: np.ndarray) -> np.ndarray:
        """Returns the mean scores of distributions `[..., K]`."""
        return np.sum(np.float64(shares) * np.array(self.scores), axis=-1)

    def figures(
        self, totals: Mapping[str, Any], kept: Mapping[str, np.ndarray], names: Sequence[str]
    ) -> dict[str, Any]:
        """'emd' is the distance with r = 1: the mean over the scores of what the cumulative shares differ by."""
        truth, found = self.means(kept["label"]), self.means(kept["outputs"])
        steps = np.abs(np.cumsum(np.float64(kept["label"]) - kept["outputs"], axis=-1))
        return {
            "plcc": metrics.pearson(truth, found),
            "srcc": metrics.spearman(truth, found),
            "mean_score": float(np.mean(found)),
            "label_mean_score": float(np.mean(truth)),
            "emd": float(np.mean(steps)),
            "branch_srcc": [metrics.spearman(truth, self.means(branch)) for branch in kept["branch"]],
            "loss": float(totals["loss"]) / float(totals["images"]),
        }

    def columns(self, label: Any, found: Mapping[str, np.ndarray], row: int, names: Sequence[str]) -> dict[str, Any]:
        means = {"label mean_score": label, "mean_score": found["outputs"][row]}
        written = {key: _written(self.means(shares)) for key, shares in means.items()}
        return written | super().columns(label, found, row, names)

    def words(self, result: Mapping[str, Any]) -> str:
        return (
            f"PLCC {result['plcc']:.4f}, SRCC {result['srcc']:.4f}, mean score {result['mean_score']:.3f} (labels "
            f"{result['label_mean_score']:.3f}), loss {result['loss']:.4f}"
        )

    def named(self, outputs: np.ndarray, names: Sequence[str], top: int) -> Named:
        """The mean score and its standard deviation, as NIMA has them."""
        return [(key, float(value)) for key, value in self.extras(outputs, names).items()]

    def extras(self, outputs: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
        mean = self.means(outputs)
        spread = np.sum(np.float64(outputs) * np.square(np.array(self.scores) - mean))
        return {"mean_score": _written(mean), "deviation": _written(np.sqrt(spread))}


@dataclasses.dataclass(frozen=True)
class Numbers(Rows):
    """One number or several; the network computes them with a mean of 0 and a deviation of 1 on the training images.

    Attributes:
      mean: of each column over the training images.
      deviation: the same, 1 for a column that is constant.
    """

    name: ClassVar[str] = "numbers"
    losses: ClassVar[tuple[str, ...]] = ("mse", "huber")
    divergence: ClassVar[str] = "normal"
    score: ClassVar[str] = "r2"
    curves: ClassVar[tuple[dict[str, str], str]] = ({"r2": "R2"}, "R2")
    fewest: ClassVar[int] = 1
    complete: ClassVar[bool] = True
    outputs: ClassVar[str] = "numbers"
    value: ClassVar[str] = "number"

    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def encode(self, labels: Array) -> Array:
        return (labels - _as_row(self.mean, labels)) / _as_row(self.deviation, labels)

    def decode(self, logits: Array) -> Array:
        return logits * _as_row(self.deviation, logits) + _as_row(self.mean, logits)

    def loss(self, logits: Array, targets: Array) -> Array:
        return mean_squared_error(logits, targets)

    def caption(self, target: np.ndarray, names: Sequence[str]) -> str:
        values = zip(names, np.asarray(self.decode(jnp.asarray(target))), strict=True)
        return "\n".join(f"{printable(name)} {value:.4g}" for name, value in list(values)[:2])

    def figures(
        self, totals: Mapping[str, Any], kept: Mapping[str, np.ndarray], names: Sequence[str]
    ) -> dict[str, Any]:
        """In the units of each column; the figures of all are means over the columns."""
        rows = {name: self._errors(kept["label"][:, k], kept["outputs"][:, k]) for k, name in enumerate(names)}
        return {
            **{key: _mean(row[key] for row in rows.values()) for key in ("mae", "rmse", "r2")},
            "branch_mae": [float(np.mean(np.abs(np.float64(kept["label"]) - branch))) for branch in kept["branch"]],
            "loss": float(totals["loss"]) / float(totals["images"]),
            "columns": rows,
        }

    def _errors(self, truth: np.ndarray, values: np.ndarray) -> dict[str, float]:
        error = np.float64(truth) - values
        return {
            "mae": float(np.mean(np.abs(error))),
            "rmse": float(np.sqrt(np.mean(np.square(error)))),
            "r2": metrics.r_squared(truth, values),
        }

    def words(self, result: Mapping[str, Any]) -> str:
        return f"MAE {result['mae']:.4g}, RMSE {result['rmse']:.4g}, R2 {result['r2']:.4f}, loss {result['loss']:.4f}"


def _as_row(values: Sequence[float], like: Array) -> Array:
    """Returns values `[K]` as an array of as many axes as another has."""
    return jnp.asarray(values, like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))


def by_name(key: str, pairs: Any, names: Sequence[str]) -> dict[str, float]:
    """Returns pairs of a name and a number as a dict; UserError where a name is not among `names`."""
    known = dict(pairs)
    for name in known:
        if name not in names:
            raise UserError(f"{key} names {name!r}, which is none of {', '.join(map(repr, names[:5]))}: correct it.")
    return known
