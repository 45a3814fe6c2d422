"""The file of predictions, from which anyone can compute the accuracies again."""

import csv
import dataclasses
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from maxmap.errors import UserError, printable, reason


def accuracies(rows: Iterable[Mapping[str, Any]], right: Mapping[int, Sequence[int]] | None = None) -> dict[str, Any]:
    """Computes accuracies from the rows of predictions.

    Args:
      rows: what `make_rows` returns, or the rows of `predictions.csv`, read by `csv.DictReader`.
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


def class_columns(label: int, found: Mapping[str, np.ndarray], row: int) -> dict[str, Any]:
    """Returns the columns of an image that has one class.

    Args:
      label: the number of its class.
      found: of the batch: 'best' `[B, 5]`, 'rank', 'probability' and 'label_probability' `[B]`, 'branch' and
        'branch_rank' `[G, B]`; see `maxmap.evaluate.make_eval_step`.
      row: of the image in the batch.
    """
    columns = {"label": int(label), "rank": int(found["rank"][row])}
    columns |= {f"top{k}": int(best) for k, best in enumerate(found["best"][row], 1)}
    for g, (best, rank) in enumerate(zip(found["branch"][:, row], found["branch_rank"][:, row], strict=True)):
        columns |= {f"branch{g}": int(best), f"branch{g}_rank": int(rank)}
    return columns | {key: float(f"{found[key][row]:.6g}") for key in ("probability", "label_probability")}


def make_rows(
    batch: Mapping[str, np.ndarray],
    found: Mapping[str, np.ndarray],
    names: Callable[[int], str],
    columns: Callable[[Any, Mapping[str, np.ndarray], int], dict[str, Any]] = class_columns,
) -> list[dict[str, Any]]:
    """Returns a row for each image of a batch that is not padding.

    Args:
      batch: 'index', 'label' and 'mask' (False for padding), each `[B]` or, for the label, `[B, K]`.
      found: predictions of the batch, which `columns` takes.
      names: function from the index of an image to the name of its file.
      columns: function from the label of an image, `found` and its row to the columns behind its name.
    """
    rows = []
    for i in np.flatnonzero(batch["mask"]):
        index = int(batch["index"][i])
        rows.append({"index": index, "name": printable(names(index)), **columns(batch["label"][i], found, int(i))})
    return rows


def to_csv(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Returns the text of `predictions.csv`: a line for each image and kind of weights.

    Its columns:

    - `weights`: "ema" or "raw".
    - `index`, `name`: the image's index and its file (see `maxmap.errors.printable`).

    Then, where an image has one class:

    - `label`: its number.
    - `rank`: rank of the label among the logits, averaged over the branches. Ties count against it. The top-k accuracy
      is the share of ranks up to k.
    - `top1` to `top5`: the classes with the largest averaged logits.
    - `branchN`, `branchN_rank`: the class with the largest logit of a branch, and the rank of the label among its
      logits.
    - `probability`, `label_probability`: of the class `top1` and of the label: softmax of the averaged logits.

    Where every pixel has a class: `pixels` that count, and `pixel_accuracy` among them, percent.

    In other tasks a column for each label or number and for what the network says of it: `label NAME`, then
    `probability NAME`, `share NAME` or `number NAME`, and of each branch of several `branchN probability NAME`.

    Args:
      rows: for each kind of weights what `make_rows` returns.
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


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What `predictions.csv` says of N images and one kind of weights; see `to_csv`.

    Attributes:
      index: of the images in their split, `[N]`.
      name: their names.
      label: `[N]`.
      rank: of the label, `[N]`.
      best: the class with the largest averaged logit, `[N]`.
      probability: of `best`, `[N]`; a network that diverged gives NaN.
      label_probability: of `label`, `[N]`.
      branch: each branch's class, `[G, N]`.
    """

    index: np.ndarray
    name: tuple[str, ...]
    label: np.ndarray
    rank: np.ndarray
    best: np.ndarray
    probability: np.ndarray
    label_probability: np.ndarray
    branch: np.ndarray


def read_csv(content: str, weights: str) -> Predictions:
    """Reads the predictions of one kind of weights from the text of `predictions.csv`.

    Raises:
      ValueError: it has none, or it lacks columns or values.
    """
    try:
        rows = [row for row in csv.DictReader(io.StringIO(content)) if row["weights"] == weights]
        if not rows:
            raise ValueError(f"it has no predictions of {weights} weights")
        columns = ("index", "label", "rank", "top1")
        index, label, rank, best = (np.array([int(row[key]) for row in rows]) for key in columns)
        given, right = (np.array([float(row[key]) for row in rows]) for key in ("probability", "label_probability"))
        branches = [key for key in rows[0] if re.fullmatch(r"branch\d+", key)]
        branch = np.array([[int(row[key]) for row in rows] for key in branches], int).reshape(len(branches), len(rows))
        return Predictions(index, tuple(row["name"] for row in rows), label, rank, best, given, right, branch)
    except (csv.Error, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"it is not what --mode=eval writes: {reason(error)}") from error
