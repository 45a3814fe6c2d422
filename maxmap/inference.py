"""Loading a checkpoint, preparing images for it, and naming what they show."""

import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from maxmap import tasks
from maxmap.convert.load import read_model
from maxmap.data.augment import normalize
from maxmap.data.paired import places
from maxmap.data.preprocessing import changed, cropped, stored_size
from maxmap.errors import UserError
from maxmap.evaluate import check_image_size
from maxmap.layers.pooling import bilinear
from maxmap.models import Classifier, average, create_model, require_head
from maxmap.onnx.session import Network, is_graph
from maxmap.operations import Array
from maxmap.ranges import Count, Pixels, check_arguments
from maxmap.segmentation import segment
from maxmap.tasks.task import Named, Task

AnyImage: TypeAlias = str | os.PathLike | Image.Image | np.ndarray


def load(path: str | Path, *, pad: bool = False) -> tuple[Classifier, dict[str, Any], dict[str, Any]]:
    """Loads a checkpoint.

    Args:
      path: folder of a run (`--workdir`) or of a converted checkpoint, or the name of a published one; see
        `maxmap.convert.load.read_model`.
      pad: the model takes images of other sizes, too; see `maxmap.create_model`.

    Returns:
      The model; its variables, the averaged ones where there are any; and the info: 'model' (name and fields),
      'classes', 'preprocessing', 'step', 'weights'.

    Raises:
      UserError: there is no checkpoint.
    """
    variables, info = read_model(path)
    return create_model(**info["model"] | ({"pad": True} if pad else {})), variables, info


def load_classifier(path: str | Path, *, pad: bool = False) -> tuple[Classifier, dict[str, Any], dict[str, Any]]:
    """Does what `load` does, for a checkpoint that is asked what images show.

    Raises:
      UserError: there is no checkpoint, it has no classifier, or another one than its task needs.
    """
    model, variables, info = load(path, pad=pad)
    if not info["classes"]:
        raise UserError(f"the checkpoint {path} has no classifier: give one that has, or take maxmap embed.")
    require_head(model, tasks.of_checkpoint(info).dense, f"the checkpoint {path}")
    return model, variables, info


def preprocess(images: AnyImage | Sequence[AnyImage], info: Mapping[str, Any]) -> np.ndarray:
    """Makes of images what a checkpoint's network takes: resized, cropped and normalised as it was trained to see them.

    Args:
      images: One image or several: a path, a PIL image, a uint8 array `[H, W, C]` of the checkpoint's channels
        (or 1, 3 or 4), a list of these, or a uint8 array `[B, H, W, C]`. They may differ in size.
      info: Of the checkpoint, as `load` returns it.

    Returns:
      float32 `[B, image_size, image_size, C]` of the checkpoint's channels; B is 1 for one image.

    Raises:
      UserError: A file is missing or cannot be decoded, or an array is of another type or shape.
    """
    one = isinstance(images, str | os.PathLike | Image.Image) or (isinstance(images, np.ndarray) and images.ndim != 4)
    several: Iterable[Any] = [images] if one else cast(Sequence[AnyImage], images)
    pre = info["preprocessing"]
    pixels = np.stack([cropped(image, pre) for image in several])
    return np.asarray(normalize(jnp.asarray(pixels), pre["mean"], pre["std"]))


def decoded(model: Classifier, task: Task, variables: Any, images: Array, window: int | None = None) -> Array:
    """Returns what a model says of normalised images `[B, H, W, C]`.

    That are probabilities, shares or numbers, `[B, K]`, or the class of every pixel, uint8 `[B, H, W]`: then one image
    is computed after another, because the logits of many would fill the memory. For `window` see
    `maxmap.segmentation.segment`.
    """
    if not task.dense:
        return task.decode(average(model.apply(variables, images)))

    def mask_of(image: Array) -> Array:
        return task.decode(segment(model, variables, image[None], window=window))[0]

    return jax.lax.map(mask_of, images)


def predict(
    path: str | Path,
    images: Sequence[str | Path],
    *,
    top: Count = 5,
    batch_size: Count = 32,
    image_size: Pixels | None = None,
    pad: bool = False,
) -> list[Named]:
    """Classifies image files with a checkpoint and the preprocessing that it carries.

    Args:
      path: of the checkpoint, as for `load`; or an .onnx file of `maxmap export`, which onnxruntime runs.
      images: paths of image files.
      top: classes per image.
      batch_size: images at a time.
      image_size: side of the crop in pixels; None for the checkpoint's.
      pad: takes sizes that the model's windows do not divide, too; see `maxmap.create_model`.

    Returns:
      For each image its `top` classes and their probabilities, the likeliest first; in other tasks what `Task.named`
      returns: all labels above their thresholds, a mean score and its deviation, numbers, or the classes with the
      largest shares of its pixels.

    Raises:
      UserError: there is no checkpoint, a file is no image, or the model does not take images of that size.
    """
    return answers(path, images, top=top, batch_size=batch_size, image_size=image_size, pad=pad)[1]


def predict_masks(
    path: str | Path,
    images: Sequence[str | Path],
    *,
    batch_size: Count = 32,
    image_size: Pixels | None = None,
    pad: bool = False,
    window: Pixels | None = None,
) -> list[np.ndarray]:
    """Classifies the pixels of image files with a checkpoint that was trained on masks.

    Args:
      path: see `predict`.
      images: paths of image files.
      batch_size: images at a time.
      image_size: side in pixels of what the network sees; None for the checkpoint's.
      pad: see `predict`.
      window: side of the windows in which the network sees it, see `maxmap.segmentation.segment`; None for the whole.

    Returns:
      The class of every pixel, uint8 `[H, W]` for each image, of its own size.

    Raises:
      UserError: see `predict`; or the checkpoint classifies whole images.
    """
    masks: list[np.ndarray] = []

    def keep(_: str | Path, mask: np.ndarray) -> None:
        masks.append(mask)

    answers(path, images, batch_size=batch_size, image_size=image_size, pad=pad, window=window, keep=keep)
    return masks


def answers(
    path: str | Path,
    images: Sequence[str | Path],
    *,
    top: Count = 5,
    batch_size: Count = 32,
    image_size: Pixels | None = None,
    pad: bool = False,
    window: Pixels | None = None,
    keep: Callable[[str | Path, np.ndarray], object] | None = None,
) -> tuple[Task, list[Named]]:
    """Does what `predict` does, and returns the checkpoint's task with the predictions.

    `keep` gets each path with its mask; see `predict_masks`, also for `window`.
    """
    check_arguments(answers, "", locals())
    network = Network(path) if is_graph(path) else None
    if network:
        info = network.info
    else:
        model, variables, info = load_classifier(path, pad=pad)
    task, names = tasks.of_checkpoint(info), info["classes"]
    info = {**info, "preprocessing": changed(info["preprocessing"], image_size=image_size)}
    if not task.dense and (window or keep):
        raise UserError(f"masks and windows are for checkpoints that classify pixels, and {path} classifies images.")
    if network and window:
        raise UserError("an .onnx file sees whole images: leave out --window.")
    if network:
        network.check(info["preprocessing"], pad=pad)

        def outputs(files: Sequence[str | Path]) -> Array:
            pixels = np.stack([cropped(image, info["preprocessing"]) for image in files])
            logits = jnp.asarray(network.logits(pixels, info["preprocessing"]))
            return task.decode(bilinear(logits, pixels.shape[1:3]) if task.dense else logits)

    else:
        if image_size is not None or window is not None:
            check_image_size(model, variables, info["preprocessing"], window)
        compute = jax.jit(functools.partial(decoded, model, task, window=window))

        def outputs(files: Sequence[str | Path]) -> Array:
            return compute(variables, preprocess(files, info))

    if network and task.dense:
        batch_size = 1  # the logits of many would fill the memory; see `decoded`
    results = []
    for start in range(0, len(images), batch_size):
        files = images[start : start + batch_size]
        for file, row in zip(files, np.asarray(outputs(files)), strict=True):
            if task.dense:
                row = row[np.ix_(*places(stored_size(file, info["preprocessing"]), info["preprocessing"]))]
            if keep:
                keep(file, row)
            results.append(task.named(row, names, top))
    return task, results
