"""Label sets of ImageNet's relatives, and the file of predictions that anyone can count again."""

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maxmap.errors import UserError

# Every set is a folder of images with one folder per class. "among": only the classes that occur in it are candidates,
# as its authors evaluate.
LABEL_SETS: Mapping[str, Mapping[str, Any]] = {
    "real": {"folders": "names", "among": False},  # Beyer et al. 2020: several labels for the validation images
    "v2": {"folders": "numbers", "among": False},  # Recht et al. 2019: the folders are 0 to 999
    "a": {"folders": "names", "among": True},  # Hendrycks et al. 2021, natural adversarial examples: 200 classes
    "r": {"folders": "names", "among": True},  # Hendrycks et al. 2021, renditions: 200 classes
    "sketch": {"folders": "names", "among": False},  # Wang et al. 2019
}


def read_real(path: Path) -> list[list[int]]:
    """Reads ReaL's `real.json`: for each of the 50,000 validation images, in order, the labels that are right.

    Raises:
      UserError: it is not such a file.
    """
    try:
        labels = json.loads(path.read_text("utf-8"))
        if not all(isinstance(label, int) for row in labels for label in row):
            raise ValueError("it holds something else")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not ReaL's real.json, a list of lists of labels ({error}).") from None
    return labels


def real_labels(labels: Sequence[Sequence[int]], name: str) -> Sequence[int]:
    """Returns the right labels of a validation image by its file name, `ILSVRC2012_val_00000001.JPEG` and on."""
    number = re.search(r"ILSVRC2012_val_(\d{8})", name)
    if number is None or not 1 <= int(number[1]) <= len(labels):
        raise UserError(f"{name} is none of the {len(labels)} validation images that ReaL labels, by its file name.")
    return labels[int(number[1]) - 1]


def count(rows: Iterable[Mapping[str, Any]], right: Mapping[int, Sequence[int]] | None = None) -> dict[str, Any]:
    """Counts predictions.

    Args:
      rows: of `evaluate`, or of the file, read by `csv.DictReader`.
      right: labels that are right for each image by its index, ReaL's; an image without any does not count. None: the
        label of the row.

    Returns:
      'images', 'top1' and 'top5' (percent), 'branch_top1' (percent of each branch).
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
        raise UserError("none of the images has a label that counts.")
    return {
        "images": images,
        "top1": 100 * top1 / images,
        "top5": 100 * top5 / images,
        "branch_top1": [100 * hits / images for hits in branches.values()],
    }


def rows_of(batch: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray], names: Any) -> list[dict[str, Any]]:
    """Makes a row of each image that counts.

    Args:
      batch: 'index', 'label' and 'mask', `[B]`.
      found: 'best' `[B, 5]`, 'rank' `[B]`, 'branch' `[G, B]`, 'branch_rank' `[G, B]`, as `make_eval_step` says.
      names: function from an index to the name of the file.
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
    """Returns the text of `predictions.csv`: the rows of every kind of weights, which is the first column.

    `rank` is the rank of the label among the averaged logits (ties count against it), so that top-k accuracy is the
    share of ranks up to k; `top1` to `top5` are the labels with the largest logits; `branchN` and `branchN_rank` the
    same of each branch.
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
