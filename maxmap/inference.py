"""Loading a checkpoint, and naming what images show."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxmap.convert.load import read_model
from maxmap.data.augment import normalize
from maxmap.data.preprocessing import cropped
from maxmap.models import Classifier, average, create_model
from maxmap.ranges import Count, check_arguments


def load(path: str | Path) -> tuple[Classifier, dict[str, Any], dict[str, Any]]:
    """Loads a checkpoint.

    Args:
      path: folder of a run (`--workdir`) or of a converted checkpoint, or the name of a published one; see
        `maxmap.convert.load.read_model`.

    Returns:
      The model; its variables, the averaged ones where there are any; and the info: 'model' (name and fields),
      'classes', 'preprocessing', 'step', 'weights'.

    Raises:
      UserError: there is no checkpoint.
    """
    variables, info = read_model(path)
    return create_model(**info["model"]), variables, info


def predict(
    path: str | Path, images: Sequence[str | Path], *, top: Count = 5, batch_size: Count = 32
) -> list[list[tuple[str, float]]]:
    """Classifies image files with a checkpoint and the preprocessing that it carries.

    Args:
      path: of the checkpoint, as for `load`.
      images: paths of image files.
      top: classes per image.
      batch_size: images at a time.

    Returns:
      For each image its `top` classes and their probabilities, the likeliest first.

    Raises:
      UserError: there is no checkpoint, or a file is no image.
    """
    check_arguments(predict, "", locals())
    model, variables, info = load(path)
    pre, classes = info["preprocessing"], info["classes"]

    @jax.jit
    def probabilities(variables: Any, batch: jax.Array) -> jax.Array:
        outputs = model.apply(variables, normalize(batch, pre["mean"], pre["std"]))
        return jax.nn.softmax(average(outputs), axis=-1)

    results = []
    for start in range(0, len(images), batch_size):
        pixels = np.stack([cropped(image, pre) for image in images[start : start + batch_size]])
        for row in np.asarray(probabilities(variables, jnp.asarray(pixels))):
            best = np.argsort(-row, kind="stable")[:top]
            results.append([(classes[i], float(row[i])) for i in best])
    return results
