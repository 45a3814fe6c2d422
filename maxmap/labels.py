"""Labels of ImageNet's relatives, and the file of predictions, from which anyone can compute the accuracies again."""

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maxmap.errors import UserError

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
        labels = json.loads(path.read_text("utf-8"))
        if not all(isinstance(label, int) for row in labels for label in row):
            raise ValueError("it holds something else")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not ReaL's real.json, a list of lists of labels ({error}).") from None
    return labels


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


def count(rows: Iterable[Mapping[str, Any]], right: Mapping[int, Sequence[int]] | None = None) -> dict[str, Any]:
    """Computes accuracies from the rows of predictions.

    Args:
      rows: what `rows_of` returns, or the rows of `predictions.csv`, read by `csv.DictReader`.
      right: the right labels of each image by its index, as ReaL has them; an image without right labels does not
        count. None: the label of the row is the only right one.

    Returns:
      'images' (how many count), 'top1' and 'top5' (percent), 'branch_top1' (percent, for each branch).

    Raises:
      UserError: no image counts.
    """
    images, top1, top5 = 0, 0, 0
    branches: dict[str, int] = {}
    for row in rows:
        if right is None:
            rank = int(row["rank"])
            hits = {key: int(value) <= 1 for key, value in row.items() if re.fullmatch(r"branch\d+_rank", key)}
        else:
            labels = right[int(row["index"])]
            if not labels:
                continue
            best = [int(value) for key, value in row.items() if re.fullmatch(r"top\d", key)]
            rank = next((i for i, label in enumerate(best, 1) if label in labels), len(best) + 1)
            hits = {key: int(value) in labels for key, value in row.items() if re.fullmatch(r"branch\d+", key)}
        images += 1
        top1 += rank <= 1
        top5 += rank <= 5
        for key, hit in hits.items():
            branches[key] = branches.get(key, 0) + hit
    if not images:
        raise UserError("none of the images has a right label: check that the labels belong to these images.")
    return {
        "images": images,
        "top1": 100 * top1 / images,
        "top5": 100 * top5 / images,
        "branch_top1": [100 * hits / images for hits in branches.values()],
    }


def rows_of(batch: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray], names: Any) -> list[dict[str, Any]]:
    """Returns a row for each image of a batch that is not padding.

    Args:
      batch: 'index', 'label' and 'mask' (False for padding), each `[B]`.
      found: 'best' `[B, 5]`, 'rank' `[B]`, 'branch' `[G, B]`, 'branch_rank' `[G, B]`; see
        `maxmap.evaluate.make_eval_step`.
      names: function from the index of an image to the name of its file.
    """
    rows = []
    for i in np.flatnonzero(batch["mask"]):
        row: dict[str, Any] = {"index": int(batch["index"][i]), "name": names(int(batch["index"][i]))}
        row |= {"label": int(batch["label"][i]), "rank": int(found["rank"][i])}
        row |= {f"top{k}": int(label) for k, label in enumerate(found["best"][i], 1)}
        for g, (label, rank) in enumerate(zip(found["branch"][:, i], found["branch_rank"][:, i], strict=True)):
            row |= {f"branch{g}": int(label), f"branch{g}_rank": int(rank)}
        rows.append(row)
    return rows


def as_csv(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Returns the text of `predictions.csv`: a line for each image and kind of weights.

    Its columns:

    - `weights`: "ema" or "raw".
    - `index`, `name`, `label`: the image's index, its file and its label.
    - `rank`: rank of the label among the logits, averaged over the branches. Ties count against it. The top-k accuracy
      is the share of ranks up to k.
    - `top1` to `top5`: the classes with the largest averaged logits.
    - `branchN`, `branchN_rank`: the class with the largest logit of a branch, and the rank of the label among its
      logits.

    Args:
      rows: for each kind of weights what `rows_of` returns.
    """
    text = io.StringIO()
    writer = None
    for weights, part in rows.items():
        for row in part:
            if writer is None:
                writer = csv.DictWriter(text, ["weights", *row], lineterminator="\n")
                writer.writeheader()
            writer.writerow({"weights": weights, **row})
    return text.getvalue()
