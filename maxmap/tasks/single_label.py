"""One class per image."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from maxmap.errors import printable
from maxmap.operations import Array
from maxmap.predictions import class_columns
from maxmap.tasks.task import Named, Records, Task, caption, class_records, percent


@dataclasses.dataclass(frozen=True)
class SingleLabel:
    """The class of an image: cross-entropy and accuracy."""

    name: ClassVar[str] = "single_label"
    losses: ClassVar[tuple[str, ...]] = ("softmax", "bce", "emd")
    divergence: ClassVar[str] = "categorical"
    score: ClassVar[str] = "top1"
    curves: ClassVar[tuple[dict[str, str], str]] = ({"top1": "top-1", "top5": "top-5"}, "accuracy, %")
    fewest: ClassVar[int] = 2
    complete: ClassVar[bool] = False
    outputs: ClassVar[str] = "classes"
    value: ClassVar[str] = "probability"
    keeps_outputs: ClassVar[bool] = False
    dense: ClassVar[bool] = False

    def label_like(self, batch: int, outputs: int, size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch,), jnp.int32)

    def encode(self, labels: Array) -> Array:
        return labels

    def decode(self, logits: Array) -> Array:
        return jax.nn.softmax(logits)

    def answers(self, logits: Array) -> Array:
        return jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])

    def measure(self, logits: Array, branches: Array, labels: Array, mask: Array) -> dict[str, Any]:
        """The kept predictions are those of `maxmap.predictions.class_columns`."""
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        rank = rank_of(labels, logits)
        best_logit, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
        branch_rank = jax.vmap(rank_of, (None, 0))(labels, branches)
        return {
            "images": jnp.sum(mask),
            "top1": jnp.sum(mask & (rank <= 1)),
            "top5": jnp.sum(mask & (rank <= 5)),
            "loss": jnp.sum(jnp.where(mask, loss, 0)),
            "branch_top1": jnp.sum(mask[None] & (branch_rank <= 1), axis=1),
            "predictions": {
                "best": best,
                "rank": rank,
                "probability": jnp.exp(best_logit[:, 0] - jax.nn.logsumexp(logits, axis=-1)),
                "label_probability": jnp.exp(-loss),
                "branch": jnp.argmax(branches, axis=-1),
                "branch_rank": branch_rank,
            },
        }

    def figures(
        self, totals: Mapping[str, Any], kept: Mapping[str, np.ndarray], names: Sequence[str]
    ) -> dict[str, Any]:
        images = float(totals["images"])
        return {
            "top1": 100 * float(totals["top1"]) / images,
            "top5": 100 * float(totals["top5"]) / images,
            "branch_top1": [100 * float(correct) / images for correct in totals["branch_top1"]],
            "loss": float(totals["loss"]) / images,
        }

    def columns(self, label: Any, found: Mapping[str, np.ndarray], row: int, names: Sequence[str]) -> dict[str, Any]:
        return class_columns(label, found, row)

    def running(self, totals: Mapping[str, Any]) -> str:
        top1, top5 = (100 * float(totals[key]) / float(totals["images"]) for key in ("top1", "top5"))
        return f"top-1 {top1:.2f} %, top-5 {top5:.2f} %"

    def summary(self, result: Mapping[str, Any]) -> str:
        top1, top5 = (f"{result[key]:.3f} ({result[f'{key}_err']:.3f})" for key in ("top1", "top5"))
        return f"Acc@1 {top1} Acc@5 {top5}"

    def words(self, result: Mapping[str, Any]) -> str:
        return f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, loss {result['loss']:.4f}"

    def caption(self, target: np.ndarray, names: Sequence[str]) -> str:
        return caption(target, names)

    def shown(self, value: float) -> str:
        return percent(value)

    def records(self) -> Records:
        return class_records()

    def named(self, outputs: np.ndarray, names: Sequence[str], top: int) -> Named:
        return [(names[i], float(outputs[i])) for i in np.argsort(-outputs, kind="stable")[:top]]

    def table(self, names: Sequence[str], top: int) -> tuple[list[str], Callable[[np.ndarray], dict[str, Any]]]:
        columns = [f"{kind}{rank}" for rank in range(1, min(top, len(names)) + 1) for kind in ("class", "probability")]

        def values(outputs: np.ndarray) -> dict[str, Any]:
            flat = [x for name, p in self.named(outputs, names, top) for x in (printable(name), round(p, 6))]
            return dict(zip(columns, flat, strict=True))

        return columns, values

    def class_weights(self, labels: np.ndarray, outputs: int) -> np.ndarray:
        """N / (K n): an image of a class with n of N images weighs so much, and the mean weight of the images is 1."""
        return len(labels) / (outputs * np.bincount(labels, minlength=outputs))

    def fitted(self, stored: Task) -> Task:
        return stored


def rank_of(labels: Array, logits: Array) -> Array:
    """Returns the rank of the right class among the logits, 1 for the best.

    Ties and NaN count against the right class, so that constant logits and a diverged network get no credit.

    Args:
      labels: int `[B]`.
      logits: `[B, K]`.

    Returns:
      int `[B]`.
    """
    target = jnp.take_along_axis(logits, labels[:, None], axis=1)
    return jnp.sum(~(logits < target), axis=1)
