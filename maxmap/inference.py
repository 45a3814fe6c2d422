"""Loading a checkpoint, preparing images for it, and naming what they show."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from maxmap.convert.load import read_model
from maxmap.data.augment import normalize
from maxmap.data.preprocessing import changed, cropped
from maxmap.evaluate import check_image_size
from maxmap.models import Classifier, average, create_model
from maxmap.onnx.session import Network, is_graph
from maxmap.ranges import Count, Pixels, check_arguments

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


def preprocess(images: AnyImage | Sequence[AnyImage], info: Mapping[str, Any]) -> np.ndarray:
    """Makes of images what a checkpoint's network takes: resized, cropped and normalised as it was trained to see them.

    Args:
      images: One image or several: a path, a PIL image, a uint8 array `[H, W, 3]` (or 1 or 4 channels), a list of
        these, or a uint8 array `[B, H, W, C]`. They may differ in size.
      info: Of the checkpoint, as `load` returns it.

    Returns:
      float32 `[B, image_size, image_size, 3]`; B is 1 for one image.

    Raises:
      UserError: A file is missing or cannot be decoded, or an array is of another type or shape.
    """
    one = isinstance(images, str | os.PathLike | Image.Image) or (isinstance(images, np.ndarray) and images.ndim != 4)
    several: Iterable[Any] = [images] if one else cast(Sequence[AnyImage], images)
    pre = info["preprocessing"]
    pixels = np.stack([cropped(image, pre) for image in several])
    return np.asarray(normalize(jnp.asarray(pixels), pre["mean"], pre["std"]))


def predict(
    path: str | Path,
    images: Sequence[str | Path],
    *,
    top: Count = 5,
    batch_size: Count = 32,
    image_size: Pixels | None = None,
    pad: bool = False,
) -> list[list[tuple[str, float]]]:
    """Classifies image files with a checkpoint and the preprocessing that it carries.

    Args:
      path: of the checkpoint, as for `load`; or an .onnx file of `maxmap export`, which onnxruntime runs.
      images: paths of image files.
      top: classes per image.
      batch_size: images at a time.
      image_size: side of the crop in pixels; None for the checkpoint's.
      pad: takes sizes that the model's windows do not divide, too; see `maxmap.create_model`.

    Returns:
      For each image its `top` classes and their probabilities, the likeliest first.

    Raises:
      UserError: there is no checkpoint, a file is no image, or the model does not take images of that size.
    """
    check_arguments(predict, "", locals())
    network = Network(path) if is_graph(path) else None
    if network:
        info = network.info
    else:
        model, variables, info = load(path, pad=pad)
    preprocessing = changed(info["preprocessing"], image_size=image_size)
    if network:
        network.check(preprocessing, pad=pad)
    elif image_size is not None:
        check_image_size(model, variables, image_size)

    @jax.jit
    def logits(variables: Any, batch: np.ndarray) -> jax.Array:
        return average(model.apply(variables, batch))

    results = []
    for start in range(0, len(images), batch_size):
        files = images[start : start + batch_size]
        if network:
            pixels = np.stack([cropped(image, preprocessing) for image in files])
            found = network.logits(pixels, preprocessing)
        else:
            found = logits(variables, preprocess(files, {**info, "preprocessing": preprocessing}))
        for row in np.asarray(jax.nn.softmax(found, axis=-1)):
            best = np.argsort(-row, kind="stable")[:top]
            results.append([(info["classes"][i], float(row[i])) for i in best])
    return results
