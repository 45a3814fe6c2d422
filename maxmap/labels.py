"""ImageNet's relatives: data sets with its classes and labels of their own; `maxmap.validate` evaluates on them."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maxmap import storage
from maxmap.errors import UserError, reason, shortened
from maxmap.small_files import read_json

# Every set is a folder with a folder of images per class, which has the class's name or its number ("folders"). With
# "among", only the classes that occur in the set are candidates, as in its authors' evaluation.
LABEL_SETS: Mapping[str, Mapping[str, Any]] = {
    "real": {"folders": "names", "among": False},  # Beyer et al. 2020: several labels for the validation images
    "v2": {"folders": "numbers", "among": False},  # Recht et al. 2019: the folders are 0 to 999
    "a": {"folders": "names", "among": True},  # Hendrycks et al. 2021, natural adversarial examples: 200 classes
    "r": {"folders": "names", "among": True},  # Hendrycks et al. 2021, renditions: 200 classes
    "sketch": {"folders": "names", "among": False},  # Wang et al. 2019
}


def read_real(path: Path) -> list[list[int]]:
    """Reads ReaL's `real.json`: the right labels of each of the 50,000 validation images, in order.

    Raises:
      UserError: the file is something else.
    """
    try:
        labels = read_json(storage.expand(path))
        if type(labels) is not list or not all(type(row) is list and all(map(_is_label, row)) for row in labels):
            raise ValueError("it holds something else")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is not ReaL's real.json, a list of lists of labels ({shortened(reason(error))}): get it again."
        ) from None
    return labels


def _is_label(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1000


def real_labels(labels: Sequence[Sequence[int]], name: str) -> Sequence[int]:
    """Returns the right labels of a validation image.

    Args:
      labels: what `read_real` returns.
      name: file name of the image, for example `ILSVRC2012_val_00000001.JPEG`.

    Raises:
      UserError: the name is not that of a validation image.
    """
    number = re.search(r"ILSVRC2012_val_(\d{8})", name)
    if number is None or not 1 <= int(number[1]) <= len(labels):
        raise UserError(
            f"{name} is none of the {len(labels)} validation images that ReaL labels: give the folder of ImageNet's "
            "validation images under their own names, ILSVRC2012_val_00000001.JPEG and so on."
        )
    return labels[int(number[1]) - 1]
