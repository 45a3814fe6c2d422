"""A class for every pixel."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from maxmap.errors import UserError
from maxmap.layers.pooling import bilinear
from maxmap.metrics import IGNORED
from maxmap.operations import Array
from maxmap.segmentation import figures
from maxmap.tasks.task import Named, Records, Task, caption, percent

_MOST_PIXELS = 2**32  # of a batch, which are counted in 32 bits


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """The class of every pixel: cross-entropy and mean IoU."""

    name: ClassVar[str] = "segmentation"
    losses: ClassVar[tuple[str, ...]] = ("softmax",)
    divergence: ClassVar[str] = "categorical"
    score: ClassVar[str] = "miou"
    curves: ClassVar[tuple[dict[str, str], str]] = (
        {"miou": "mIoU", "pixel_accuracy": "pixel accuracy"},
        "mIoU and pixel accuracy, %",
    )
    fewest: ClassVar[int] = 2
    complete: ClassVar[bool] = False
    outputs: ClassVar[str] = "classes"
    value: ClassVar[str] = "share"
    keeps_outputs: ClassVar[bool] = False
    dense: ClassVar[bool] = True

    def label_like(self, batch: int, outputs: int, size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, size, size), jnp.uint8)

    def encode(self, labels: Array) -> Array:
        return labels.astype(jnp.int32)

    def answers(self, logits: Array) -> Array:
        raise UserError("config.distill.teacher is for classes of images and for labels: leave it out for masks.")

    def decode(self, logits: Array) -> Array:
        """The class of every pixel, uint8."""
        return jnp.argmax(logits, axis=-1).astype(jnp.uint8)

    def measure(self, logits: Array, branches: Array, labels: Array, mask: Array) -> dict[str, Any]:
        """Counts every pixel of the masks by its class and by that of the network's pixel where it lies.

        Args:
          logits: `[B, h, w, K]`; they are resized to S x S.
          branches: not used.
          labels: uint8 `[B, S, S, N]`; see `maxmap.data.paired.eval_pair`.
          mask: `[B]`, False for padding.

        Returns:
          'counts' `[K, K]`, the right class along the first axis; 'loss', the sum over the pixels; and 'images'. The
          kept predictions are 'pixels' and 'right' `[B]`: how many count, and how many of these are right.
        """
        if labels.size >= _MOST_PIXELS:
            raise UserError(f"a batch of {len(labels)} masks has too many pixels to count: give a smaller batch_size.")
        classes = logits.shape[-1]
        logits = bilinear(logits, labels.shape[1:3])
        truth = labels.astype(jnp.int32)
        counted = (truth != IGNORED) & mask[:, None, None, None]
        truth = jnp.where(counted, truth, 0)
        found = jnp.argmax(logits, axis=-1)[..., None]
        pairs = jnp.where(counted, classes * truth + found, classes**2)  # the last one is dropped
        counts = jnp.zeros(classes**2, jnp.uint32).at[pairs.reshape(-1)].add(1, mode="drop")
        own = jnp.take_along_axis(jax.nn.log_softmax(logits), truth, axis=-1)
        return {
            "images": jnp.sum(mask),
            "counts": counts.reshape(classes, classes),
            "loss": -jnp.sum(jnp.where(counted, own, 0)),
            "predictions": {
                "pixels": jnp.sum(counted, axis=(1, 2, 3)),
                "right": jnp.sum(counted & (truth == found), axis=(1, 2, 3)),
            },
        }

    def figures(
        self, totals: Mapping[str, Any], kept: Mapping[str, np.ndarray], names: Sequence[str]
    ) -> dict[str, Any]:
        """Percent, but for loss and pixels; classes that are neither in the masks nor predicted are left out."""
        counts = totals["counts"]
        found = figures(counts)
        rows = zip(names, found.pop("iou"), np.diag(counts), counts.sum(1), strict=True)
        return {
            **found,
            "loss": float(totals["loss"]) / float(counts.sum()),
            "classes": {
                name: {"pixels": int(pixels), "iou": iou, "accuracy": 100 * float(right) / float(max(pixels, 1))}
                for name, iou, right, pixels in rows
                if iou is not None
            },
        }

    def columns(self, label: Any, found: Mapping[str, np.ndarray], row: int, names: Sequence[str]) -> dict[str, Any]:
        pixels, right = int(found["pixels"][row]), int(found["right"][row])
        return {"pixels": pixels, "pixel_accuracy": round(100 * right / max(pixels, 1), 4)}

    def running(self, totals: Mapping[str, Any]) -> str:
        return f"mIoU {figures(totals['counts'])['miou']:.2f} %" if totals["counts"].any() else "no pixel counts yet"

    def words(self, result: Mapping[str, Any]) -> str:
        return (
            f"mIoU {result['miou']:.2f} %, pixel accuracy {result['pixel_accuracy']:.2f} %, loss {result['loss']:.4f}"
        )

    def summary(self, result: Mapping[str, Any]) -> str:
        return self.words(result)

    def caption(self, target: np.ndarray, names: Sequence[str]) -> str:
        return caption(_shares(target, len(names)), names)

    def shown(self, value: float) -> str:
        return percent(value)

    def records(self) -> Records:
        return ["class", "share"], lambda named: [{"class": name, "share": share} for name, share in named]

    def named(self, outputs: np.ndarray, names: Sequence[str], top: int) -> Named:
        """The `top` classes with the largest shares of the pixels of a mask `[H, W]`, without those of none."""
        shares = _shares(outputs, len(names))
        return [(names[i], float(shares[i])) for i in np.argsort(-shares, kind="stable")[:top] if shares[i]]

    def table(self, names: Sequence[str], top: int) -> tuple[list[str], Callable[[np.ndarray], dict[str, Any]]]:
        raise UserError(
            "a table has a row for each image, and this network answers for every pixel: give --masks=FOLDER in place "
            "of --to."
        )

    def class_weights(self, labels: np.ndarray, outputs: int) -> np.ndarray:
        raise UserError("data.class_weights='inverse' is for classes of images: give pairs of a class and its weight.")

    def fitted(self, stored: Task) -> Task:
        return stored


def _shares(mask: np.ndarray, classes: int) -> np.ndarray:
    """Returns what part of the pixels of a mask that count each class has, `[K]`."""
    counts = np.bincount(mask.reshape(-1), minlength=IGNORED + 1)[:classes]
    return counts / max(counts.sum(), 1)
