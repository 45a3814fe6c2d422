"""Validation: what a checkpoint reaches on labelled images, with its own preprocessing unless told otherwise."""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from maxmap import checkpoint, storage, tasks
from maxmap.classes import match
from maxmap.cost import count_parameters
from maxmap.data.archives import tar_files
from maxmap.data.folders import holds_folders
from maxmap.data.masks import IMAGES
from maxmap.data.pipeline import LABELLING, Data, open_data
from maxmap.data.preprocessing import changed, departures, in_words
from maxmap.data.tables import ENDING, split_names
from maxmap.errors import UserError, printable
from maxmap.evaluate import (
    COUNTED,
    EvalStep,
    check_image_size,
    corners,
    evaluate,
    make_eval_step,
    match_classes,
    report,
    score,
    summary,
    tell,
)
from maxmap.inference import load_classifier
from maxmap.labels import LABEL_SETS, read_real, real_labels
from maxmap.onnx.session import Network, is_graph
from maxmap.predictions import accuracies, to_csv
from maxmap.progress import Progress
from maxmap.ranges import Count, CountOrZero, Pixels, check_arguments
from maxmap.sharding import make_mesh, replicated
from maxmap.tasks.task import Task

BATCH, DENSE_BATCH = 128, 8  # images at a time; the logits of all pixels take much memory
SPLITS = ("val", "validation")  # folders, archives or CSV files that hold the evaluation split


def validate(
    path: str | Path,
    images: str | Path,
    *,
    split: str | None = None,
    tfds: str | None = None,
    labels: str | None = None,
    real: str | Path | None = None,
    changes: Mapping[str, Any] | None = None,
    batch_size: Count | None = None,
    device_batches: Count | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    check: CountOrZero = 2000,
    pad: bool = False,
    flip: bool = False,
    crops: bool = False,
    window: Pixels | None = None,
    json_file: str | Path | None = None,
    csv_file: str | Path | None = None,
) -> dict[str, Any]:
    """Evaluates a checkpoint on labelled images; prints what it is, what the images go through and the figures.

    Classes are matched by their names: a class of the images that the checkpoint does not know is refused; classes of
    the checkpoint without images stay candidates.

    Args:
      path: of the checkpoint, as for `maxmap.load`; or an .onnx file of `maxmap export`, which onnxruntime runs.
      images: a folder with a folder of images per class, or one that has such a folder `val` or `validation`; a tar
        archive, or a folder of them; a CSV file, or a folder of them, with the columns that the checkpoint was trained
        with; with `tfds`, the folder of TFDS's data sets; for a checkpoint that classifies pixels, a folder of images
        and masks (`maxmap.data.masks`).
      split: name of the split: a folder or the beginning of the archives' names in `images`; None: see `images`. Of
        TFDS, None is its split 'validation' or 'test'.
      tfds: name of a TFDS data set.
      labels: a key of `maxmap.labels.LABEL_SETS`: count as its authors do.
      real: ReaL's `real.json`, for `labels='real'`.
      changes: fields of the preprocessing that replace the checkpoint's; see `maxmap.data.preprocessing.changed`.
      batch_size: images at a time over all devices; None for `BATCH`, or `DENSE_BATCH` where pixels are classified.
      device_batches: batches that are on the devices at a time; see `maxmap.evaluate.evaluate`.
      dtype: type that the model computes in.
      check: images to decode before the start, where a broken one is an error; later ones are left out and named.
      pad: takes an image size that the model's windows do not divide, too; see `maxmap.create_model`.
      flip: averages the logits of each image with those of its mirror image.
      crops: averages the logits of five crops of each image: the corners and the centre of the square that the resize
        leaves, of which the usual crop is the centre.
      window: side of the windows in which a network that classifies pixels sees an image; None for the whole.
      json_file: file for the result; None: `eval.json`, with the name of the label set, in the folder of the
        checkpoint, or in the current folder if it is no checkpoint of ours.
      csv_file: file for the predictions; None: `predictions.csv` beside an `eval.json`, nothing beside `json_file`.

    Returns:
      The content of the file of the result.

    Raises:
      UserError: there is no checkpoint, the images are missing, or both do not fit.
    """
    check_arguments(validate, "", locals())
    if (labels == "real") != (real is not None):
        raise UserError("--labels=real needs --file=real.json, and no other label set has a file.")
    right = None if real is None else read_real(Path(storage.expand(real)))
    mesh = make_mesh()
    network = Network(path) if is_graph(path) else None
    if network:
        variables: dict[str, Any] = {}
        info, parameters = network.info, network.info["parameters"]
    else:
        model, variables, info = load_classifier(path, pad=pad)
        parameters = count_parameters(variables["params"])
    used = changed({**info["preprocessing"], "exif": info["preprocessing"].get("exif", False)}, **(changes or {}))
    task = tasks.of_checkpoint(info)
    if window and not task.dense:
        raise UserError(f"--window is for checkpoints that classify pixels, and {path} classifies images.")
    if task.dense and (crops or (network and window)):
        raise UserError("--crops is for whole images, and --window not for an .onnx file: leave it out.")
    if network:
        network.check(used, pad=pad)
        if dtype != "float32" or jax.process_count() > 1:
            raise UserError("an .onnx file computes in float32, in one process: leave out --dtype and other hosts.")
    else:
        check_image_size(model, variables, used, window)
    data = dataclasses.replace(open_images(images, split, tfds, check, info), preprocessing=used)
    data, among, present = _match_labels(data, info, path, labels)
    if jax.process_index() == 0:
        what = f"{data.num_eval:,} images of {present:,} {task.outputs} in {images}"
        print(_describe(path, info, parameters, task, what, used))
    crop = None
    if crops:
        crop = used["image_size"]
        data = dataclasses.replace(data, preprocessing=_whole_square(used))
    if network:
        eval_step = _graph_step(network, used, among, flip, crop, task)
    else:
        eval_step = make_eval_step(
            model, used, mesh, jnp.dtype(dtype), among, flip=flip, crop=crop, window=window, task=task
        )
    batch_size = batch_size or (DENSE_BATCH if task.dense else BATCH)
    placed = jax.device_put(variables, replicated(mesh))
    rows: list[dict[str, Any]] = []
    progress = Progress(data.num_eval, shown=jax.process_index() == 0)
    result = evaluate(
        eval_step, placed, data, batch_size, mesh, rows, progress=progress, device_batches=device_batches, task=task
    )
    for name in result["skipped"]:
        tell(f"left out, because it cannot be decoded: {name}")
    if right is not None:
        del result["loss"]  # of the first label alone
        result |= accuracies(rows, {row["index"]: real_labels(right, row["name"]) for row in rows})
    if present < len(info["classes"]):
        result.setdefault("classes", f"{present} of {len(info['classes'])}")
    about = {name: given for name, given in zip(COUNTED, (labels, flip, crops, window), strict=True) if given}
    result = report({**about, **result}, parameters, {**info, "preprocessing": used})
    _write(path, result, task, to_csv({info["weights"]: rows}), labels, json_file, csv_file)
    return result


def _graph_step(
    network: Network,
    preprocessing: Mapping[str, Any],
    among: Sequence[int] | None,
    flip: bool,
    crop: int | None,
    task: Task,
) -> EvalStep:
    """Builds the evaluation step of an .onnx file, which returns what that of `make_eval_step` does for one branch."""
    count = jax.jit(functools.partial(score, among=None if among is None else tuple(among), task=task))

    def step(_: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        pixels = np.asarray(batch["image"])
        views = [pixels]
        if crop is not None:
            views = [pixels[:, y : y + crop, x : x + crop] for y, x in corners(pixels.shape[1] - crop)]
        found = [network.logits(view, preprocessing) for view in views]
        if flip:
            mirrored = [network.logits(view[:, :, ::-1], preprocessing) for view in views]
            found += [logits[:, :, ::-1] for logits in mirrored] if task.dense else mirrored
        logits = np.mean(found, axis=0)
        return count(logits[None], {key: np.asarray(batch[key]) for key in ("label", "mask")})

    return step


def _whole_square(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a preprocessing that ends before the crop."""
    side = math.floor(preprocessing["image_size"] / preprocessing["crop_pct"])
    if side == preprocessing["image_size"]:
        raise UserError(
            f"--crops has nothing to crop with crop_pct {preprocessing['crop_pct']}: give a smaller one, such as "
            "--crop-pct=0.875."
        )
    return {**preprocessing, "image_size": side, "crop_pct": 1.0}


def open_images(
    images: str | Path, split: str | None, tfds: str | None, check: int, info: Mapping[str, Any] | None = None
) -> Data:
    """Opens labelled images for evaluation alone; see `validate`.

    `info` is what the checkpoint says of itself: its images have so many channels, and a CSV file is read as that run's
    was.

    Raises:
      UserError: there are none, or they are malformed or broken.
    """
    path = os.path.abspath(storage.expand(images))
    if info is not None and tasks.of_checkpoint(info).dense:
        if tfds is not None:
            raise UserError("TFDS's data sets have no masks that are read: leave out --tfds and give a folder.")
        return _open_masks(path, split, check, info)
    options: dict[str, Any] = {"check": check} | (
        {} if info is None else {"channels": len(info["preprocessing"]["mean"])}
    )
    if tfds is not None:
        return open_data("tfds", path, name=tfds, train_split=None, val_split=split or "val", **options)
    if os.path.isfile(path) and path.endswith(".tar"):
        source, path, split = "tar", os.path.dirname(path), os.path.basename(path)
    elif os.path.isdir(path) or (os.path.isfile(path) and path.endswith(ENDING)):
        source, path, split = _find_split(path, split, _labelling(info, "csv").get("split_column", "split"))
    else:
        raise UserError(
            f"there is no folder of images and no tar archive or CSV file {printable(path)}: give another path."
        )
    options |= _labelling(info, "csv") if source == "csv" else {}
    return open_data(source, path, train_split=None, val_split=split, **options)


def _open_masks(path: str, split: str | None, check: int, info: Mapping[str, Any]) -> Data:
    """Opens images with masks, which are numbered as the run of a checkpoint numbered them."""
    found = (name for name in SPLITS if os.path.isdir(os.path.join(path, IMAGES, name)))
    return open_data(
        "masks",
        path,
        train_split=None,
        val_split=split or next(found, SPLITS[0]),
        classes=info["classes"],
        check=check,
        crop_pct=1.0,  # of a preprocessing that the caller replaces, as the next
        crop_mode="border",
        **({"task": "segmentation"} | _labelling(info, "masks")),
    )


def result_folder(path: str | Path) -> epath.Path:
    """Returns where the results of a checkpoint go: into its own folder, or the current one if it is none of ours."""
    return storage.resolve(path if checkpoint.is_workdir(path) else ".")


def _labelling(info: Mapping[str, Any] | None, source: str) -> dict[str, Any]:
    """Returns how the run of a checkpoint read the labels of such a source; nothing if it read another one."""
    data = (info or {}).get("config", {}).get("data", {})
    found = {key: data[key] for key in LABELLING if key in data}
    return found if found.pop("source", None) == source else {}


def _find_split(path: str, split: str | None, column: str) -> tuple[str, str, str]:
    """Returns the kind of source that a folder or a CSV file is, and path and name of its split."""
    if os.path.isfile(path):
        present = [] if split else split_names(path, column)
        return "csv", path, split or next((name for name in SPLITS if name in present), "")
    for name in [split] if split else SPLITS:
        if os.path.isfile(os.path.join(path, name + ENDING)):
            return "csv", path, name
        if holds_folders(os.path.join(path, name)):
            return "folder", path, name
        if tar_files(path, name):
            return "tar", path, name
    if split:
        return "folder", path, split  # whose sentence says what there is
    if not holds_folders(path) and tar_files(path, ""):
        return "tar", path, ""  # every archive
    return "folder", os.path.dirname(path), os.path.basename(path)


def _match_labels(
    data: Data, info: Mapping[str, Any], path: str | Path, labels: str | None
) -> tuple[Data, list[int] | None, int]:
    """Gives data the labels of a checkpoint.

    Returns:
      The data; the classes that are candidates, None for all; and how many classes the data has.

    Raises:
      UserError: the data has a class that the checkpoint does not know, or the label set is not of its classes.
    """
    classes = info["classes"]
    tasks.require_same(data, info, path)
    if labels is None:
        data, present = match_classes(data, info, path)
        if len(data.classes) != len(classes):
            raise UserError(
                f"the data has {present} classes, and the {len(classes)} of the checkpoint {path} have numbers in "
                "place of names: convert it with --classes=FILE, a line for each class."
            )
        return data, None, present
    kind = LABEL_SETS[labels]
    if len(classes) != 1000 or sorted(classes) != list(classes):
        raise UserError(f"{path} was not trained on ImageNet's 1,000 classes by WordNet number.")
    whose = f"the checkpoint in {path}"
    names = [str(i) for i in range(1000)] if kind["folders"] == "numbers" else classes
    own = match(data.classes, names, "the data", whose)
    return data.with_classes(names, whose), sorted(own.tolist()) if kind["among"] else None, len(own)


def _describe(
    path: str | Path,
    info: Mapping[str, Any],
    parameters: int,
    task: Task,
    images: str,
    used: Mapping[str, Any],
) -> str:
    """Returns what is evaluated, on what and after what preprocessing, as lines of text."""
    lines = [
        f"{info['model']['name']}, {parameters:,} parameters, {len(info['classes']):,} "
        f"{task.outputs}: {info['weights']} weights of {path}, step {info['step']}",
        images,
        f"preprocessing: {in_words(used)}",
    ]
    departing = departures(used, info["preprocessing"])
    lines.append(f"not the checkpoint's: {'; '.join(departing)}" if departing else "all of it is the checkpoint's")
    return "\n".join(map(printable, lines))


def _write(
    path: str | Path,
    result: Mapping[str, Any],
    task: Task,
    predictions: str,
    labels: str | None,
    json_file: str | Path | None,
    csv_file: str | Path | None,
) -> None:
    """Writes the files of a validation and prints its last line, on the first process alone."""
    if jax.process_index() > 0:
        return
    folder, ending = result_folder(path), f"_{labels}" if labels else ""
    if json_file is None:
        json_file, csv_file = folder / f"eval{ending}.json", csv_file or folder / f"predictions{ending}.csv"
    files = {json_file: json.dumps(result, indent=2) + "\n"} | ({csv_file: predictions} if csv_file else {})
    print(f"{labels or ''} {summary(result, task)}".lstrip(), flush=True)  # first, because a disk may be full
    for file, text in files.items():
        storage.write_named(file, text)
    print(f"written to {' and '.join(map(printable, files))}")
