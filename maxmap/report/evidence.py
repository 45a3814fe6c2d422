"""What a report is made of: read from the folder of a checkpoint, and computed where it is missing or out of date."""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from maxmap import checkpoint, evaluate, storage
from maxmap.config import bind, departures, with_defaults
from maxmap.cost import count_parameters
from maxmap.data.augment import normalize
from maxmap.data.labelled import ImageSource
from maxmap.data.preprocessing import cropped
from maxmap.errors import UserError, printable, sentence
from maxmap.explanation import explain
from maxmap.inference import load_classifier
from maxmap.models import Classifier
from maxmap.pictures import overlay
from maxmap.predictions import Predictions, read_csv
from maxmap.ranges import CountOrZero, check_arguments
from maxmap.report.figures import least_certain, most_wrong
from maxmap.tasks import require_classes
from maxmap.train.report import read_log
from maxmap.validate import open_images, result_folder, validate


@dataclasses.dataclass(frozen=True)
class Seen:
    """An image of the evaluation as the network sees it.

    Attributes:
      position: among the predictions.
      pixels: uint8 `[H, W, C]`.
      heat: the same with Grad-CAM of the class that the network names, uint8 `[H, W, 3]`; None without explanations.
    """

    position: int
    pixels: np.ndarray
    heat: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What is known of a checkpoint.

    Attributes:
      path: of the checkpoint.
      info: what it says of itself; see `maxmap.load`.
      parameters: of its model.
      settings: path, value and default of the recipe's keys that are not the default; see `maxmap.config.departures`.
      log: the lines of `metrics.jsonl`.
      result: the content of `eval.json`; None if nothing could be evaluated.
      predictions: of its images, with the same weights.
      wrong: the images whose right class got the lowest probability.
      uncertain: the images whose likeliest class got the lowest probability.
      missing: why something is not known, a sentence for each of 'recipe', 'log', 'evaluation' and 'images'.
    """

    path: str
    info: Mapping[str, Any]
    parameters: int
    settings: Sequence[tuple[str, Any, Any]] = ()
    log: Sequence[Mapping[str, Any]] = ()
    result: Mapping[str, Any] | None = None
    predictions: Predictions | None = None
    wrong: Sequence[Seen] = ()
    uncertain: Sequence[Seen] = ()
    missing: Mapping[str, str] = dataclasses.field(default_factory=dict)


def gather(
    path: str | Path,
    images: str | Path | None = None,
    *,
    split: str | None = None,
    tfds: str | None = None,
    shown: CountOrZero = 12,
    explained: bool = True,
) -> Evidence:
    """Gathers what a report shows.

    `eval.json` and `predictions.csv` are read where they are of this checkpoint, these images and its preprocessing,
    and contain the same figures. Otherwise they are written anew, as `--mode=eval` does, or `validate` for `images`.

    Args:
      path: of the checkpoint, as for `maxmap.load`.
      images: labelled images, as for `maxmap.validate.validate`; None for the evaluation split of the run's recipe.
      split: see `maxmap.validate.validate`.
      tfds: see `maxmap.validate.validate`.
      shown: the most wrong images, and the least certain ones, at most.
      explained: whether to compute where the network looked in the most wrong ones.

    Raises:
      UserError: there is no checkpoint, it has no classifier or another task than one class per image, or `images` are
        missing or do not fit. That data of a recipe is gone is no error: its sentence stands in `missing`.
    """
    check_arguments(gather, "", locals())
    model, variables, info = load_classifier(path)
    require_classes(info, "report", path)
    missing: dict[str, str] = {}
    log, settings = _log(path), _settings(info, missing)
    if not log:
        missing["log"] = "There is no metrics.jsonl of a training run in the checkpoint's folder."
    source = result = predictions = None
    try:
        if images is None:
            source, compute = _of_recipe(path, info)
        else:
            source = open_images(images, split, tfds, 0, info).val
            compute = functools.partial(validate, path, images, split=split, tfds=tfds)
        result, predictions = _evaluation(path, info, source, compute)
    except UserError as error:
        if images is not None:
            raise
        source = None  # where it was opened, an evaluation may be of other images
        if (found := _read(path, info)) and _is_current(*found, info, source):
            result, predictions = found
        missing["images" if result else "evaluation"] = sentence(error)
    of_wrong: list[Seen] = []
    of_uncertain: list[Seen] = []
    if source is not None and predictions is not None:
        look = functools.partial(_look, source, predictions, info)
        of_wrong = look(most_wrong(predictions.rank, predictions.label_probability, shown))
        of_uncertain = look(least_certain(predictions.probability, shown))
        if explained:
            of_wrong = _explain(model, variables, info, predictions, of_wrong)
    return Evidence(
        os.fspath(path),
        info,
        count_parameters(variables["params"]),
        settings,
        log,
        result,
        predictions,
        of_wrong,
        of_uncertain,
        missing,
    )


def _log(path: str | Path) -> list[dict[str, Any]]:
    """Returns the lines of the log of a run; none for a checkpoint that no run wrote."""
    file = storage.resolve(path) / "metrics.jsonl" if checkpoint.is_workdir(path) else None
    return [row for _, row in read_log(file)] if file is not None and file.exists() else []


def _settings(info: Mapping[str, Any], missing: dict[str, str]) -> list[tuple[str, Any, Any]]:
    """Returns what a recipe sets; none, with the reason in `missing`, where there is none or one of another version."""
    if "config" not in info:
        missing["recipe"] = "The checkpoint was not trained by a recipe: it was converted, or made by other code."
        return []
    try:
        return departures(with_defaults(info["config"]))
    except UserError as error:
        missing["recipe"] = sentence(error)
        return []


def _of_recipe(path: str | Path, info: Mapping[str, Any]) -> tuple[ImageSource | None, Callable[[], object]]:
    """Returns the evaluation images of a run's recipe, and what evaluates the run."""
    if "config" not in info:
        raise UserError(
            "The checkpoint names no labelled images: give some behind it, as in maxmap report CHECKPOINT IMAGES."
        )
    recipe = bind({**with_defaults(info["config"]), "mesh": {}})  # this machine may have other devices
    if recipe.values["data"]["val_split"] is None:
        raise UserError("The recipe has no evaluation split: give labelled images behind the checkpoint.")
    try:
        source = recipe.data(train_split=None, check=0).val
    except UserError as error:
        raise UserError(
            "Give labelled images behind the checkpoint, as in maxmap report CHECKPOINT IMAGES; those of its recipe "
            f"cannot be opened: {error}"
        ) from error
    return source, functools.partial(evaluate.run, recipe, path)


def _evaluation(
    path: str | Path, info: Mapping[str, Any], source: ImageSource | None, compute: Callable[[], object]
) -> tuple[dict[str, Any], Predictions]:
    """Returns result and predictions for images, which are computed if the files are not up to date."""
    found = _read(path, info)
    if found is None or not _is_current(*found, info, source):
        compute()
        found = _read(path, info)
    if found is None:  # what was written a moment ago
        raise UserError(f"{result_folder(path)} cannot be read back: see whether other programs write there.")
    return found


def _read(path: str | Path, info: Mapping[str, Any]) -> tuple[dict[str, Any], Predictions] | None:
    """Reads what an evaluation wrote; None if it is missing, damaged or of other weights."""
    folder = result_folder(path)
    try:
        result = json.loads((folder / "eval.json").read_text())
        return result, read_csv((folder / "predictions.csv").read_text(), info["weights"])
    except (OSError, ValueError, RecursionError):
        return None


def _is_current(result: Any, predictions: Predictions, info: Mapping[str, Any], source: ImageSource | None) -> bool:
    """Whether an evaluation is of this checkpoint, its preprocessing and these images, and one with the predictions.

    Args:
      result: the content of `eval.json`.
      predictions: of `predictions.csv`.
      info: of the checkpoint.
      source: the images; None if they are not known.
    """
    wanted = {"model": info["model"]["name"], "step": info["step"], "weights": info["weights"], **info["preprocessing"]}
    if not isinstance(result, dict) or any(result.get(key) != value for key, value in wanted.items()):
        return False
    if not result.keys().isdisjoint(evaluate.COUNTED):
        return False
    if not _same_figures(result, predictions):
        return False
    labels = (predictions.label, predictions.best, *predictions.branch)
    if not all(each.min() >= 0 and each.max() < len(info["classes"]) for each in labels):
        return False
    if source is None:
        return True
    return len(source) == len(predictions.name) + len(result.get("skipped", ())) and all(
        printable(source.name(int(number))) == name
        for number, name in zip(predictions.index, predictions.name, strict=True)
    )


def _same_figures(result: Mapping[str, Any], predictions: Predictions) -> bool:
    """Whether the figures of a result are those of the predictions, but for the rounding of the file."""
    with np.errstate(divide="ignore"):  # a probability may be rounded to 0
        loss = -np.mean(np.log(predictions.label_probability))
    counted = {"images": len(predictions.name), "loss": loss}
    counted |= {f"top{k}": 100 * np.mean(predictions.rank <= k) for k in (1, 5)}
    return all(
        isinstance(result.get(key), int | float) and math.isclose(result[key], value, rel_tol=1e-4)
        for key, value in counted.items()
    )


def _look(source: ImageSource, predictions: Predictions, info: Mapping[str, Any], positions: np.ndarray) -> list[Seen]:
    """Returns images as the network sees them; those that can no longer be read are left out."""
    seen = []
    for position in positions:
        try:
            image, _ = source[int(predictions.index[position])]
            seen.append(Seen(int(position), cropped(image, info["preprocessing"])))
        except (OSError, UserError):
            continue
    return seen


def _explain(
    model: Classifier,
    variables: Mapping[str, Any],
    info: Mapping[str, Any],
    predictions: Predictions,
    images: Sequence[Seen],
) -> list[Seen]:
    """Adds to images where the network looked for the class that it names."""
    if not images:
        return []
    pre = info["preprocessing"]
    batch = normalize(jnp.asarray(np.stack([image.pixels for image in images])), pre["mean"], pre["std"])
    found = explain(model, variables, batch, [int(predictions.best[image.position]) for image in images])
    return [
        dataclasses.replace(image, heat=overlay(image.pixels, saliency))
        for image, saliency in zip(images, found.saliency, strict=True)
    ]
