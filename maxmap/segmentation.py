"""Semantic segmentation with a head that classifies pixels: its predictions, and the figures of a data set.

A mask is int `[B, H, W]`: the class of every pixel, and `maxmap.metrics.IGNORED` where it does not count. The loss is
`maxmap.losses.total_loss`.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from maxmap.errors import UserError
from maxmap.layers.pooling import bilinear
from maxmap.layers.primitives import pair
from maxmap.metrics import IGNORED, confusion_matrix
from maxmap.models import Classifier, average
from maxmap.operations import Array


def segment(
    model: Classifier,
    variables: Mapping[str, Any],
    images: Array,
    *,
    window: int | Sequence[int] | None = None,
    stride: int | Sequence[int] | None = None,
) -> Array:
    """Classifies every pixel of images; it can be called under `jax.jit`.

    Args:
      model: with a head that classifies pixels, `create_model(NAME, head="upernet")`.
      variables: of the model.
      images: float `[B, H, W, C]`, normalised.
      window: pixels of the windows that the network sees, one number or (height, width), for images larger than those
        of its training; None: it sees whole images. The windows of all images make one batch.
      stride: from window to window; None for two thirds of it. Logits of pixels in several windows are averaged.

    Returns:
      Logits `[B, H, W, K]`, the mean over the branches; `jnp.argmax(logits, axis=-1)` is a mask.

    Raises:
      UserError: the model's head classifies whole images, or the stride leaves pixels out.
    """
    size = images.shape[1:3]
    if window is None:
        return bilinear(_logits(model, variables, images), size)
    window = pair(window)
    stride = pair(stride) if stride is not None else tuple(-(-2 * n // 3) for n in window)
    if any(not 0 < step <= n for step, n in zip(stride, window, strict=True)):
        raise UserError(
            f"a stride of {stride} pixels leaves out pixels between windows of {window}: give at most that."
        )
    window = tuple(map(min, window, size))
    boxes = [
        (slice(None), slice(y, y + window[0]), slice(x, x + window[1]))
        for y, x in itertools.product(*map(_starts, size, window, stride))
    ]
    logits = _logits(model, variables, jnp.concatenate([images[box] for box in boxes]))
    parts = jnp.split(bilinear(logits, window), len(boxes))
    total = jnp.zeros((*images.shape[:3], logits.shape[-1]), logits.dtype)
    times = np.zeros(size)
    for box, part in zip(boxes, parts, strict=True):
        total = total.at[box].add(part)
        times[box[1:]] += 1
    return total / jnp.asarray(times, total.dtype)[None, :, :, None]


def _logits(model: Classifier, variables: Mapping[str, Any], images: Array) -> Array:
    logits = average(model.apply(variables, images))
    if logits.ndim != 4:
        raise UserError(
            f"the head {type(model.head).__name__} classifies whole images: build the model with head='upernet'."
        )
    return logits


def _starts(size: int, window: int, stride: int) -> list[int]:
    """Returns where windows begin along an axis; the last one ends where the image ends."""
    return [*range(0, size - window, stride), size - window]


def confusion(predicted: Array | np.ndarray, masks: Array | np.ndarray, num_classes: int) -> np.ndarray:
    """Counts pixels by their class and the class that was predicted: int64 `[K, K]`, classes along the first axis.

    The counts of the batches of a data set add up to those of the whole, exactly.

    Args:
      predicted: int, of any shape.
      masks: int, of the same shape; ignored pixels are left out.
      num_classes: K.
    """
    truth = np.asarray(masks)
    counts = truth != IGNORED
    return confusion_matrix(truth[counts], np.asarray(predicted)[counts], num_classes)


def figures(counts: np.ndarray) -> dict[str, Any]:
    """Returns what is reported of a segmentation, in percent.

    Args:
      counts: of `confusion`, `[K, K]`.

    Returns:
      'miou', the mean over classes of intersection / union; 'iou', that of each class, None for one that is neither in
      the masks nor predicted, which the mean leaves out; 'pixel_accuracy', the part of pixels whose class is right; and
      'class_accuracy', the mean of that over the classes of the masks.
    """
    right, truth, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    union = truth + predicted - right
    iou = [100 * float(r) / float(u) if u else None for r, u in zip(right, union, strict=True)]
    present = [value for value in iou if value is not None]
    if not present:
        raise UserError("no pixel of the masks counts, so there is nothing to report: their classes are all ignored.")
    return {
        "miou": sum(present) / len(present),
        "iou": iou,
        "pixel_accuracy": 100 * float(right.sum()) / float(truth.sum()),
        "class_accuracy": 100 * float(np.mean(right[truth > 0] / truth[truth > 0])),
    }
