"""ImageNet's relatives: data sets with its classes and labels of their own, and evaluation on them."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from maxmap import checkpoint, storage
from maxmap.data.pipeline import Data, open_data
from maxmap.errors import UserError, reason, shortened
from maxmap.evaluate import evaluate, make_eval_step, report, write
from maxmap.models import create_model
from maxmap.predictions import accuracies, to_csv
from maxmap.ranges import Count
from maxmap.sharding import make_mesh, replicated
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


def evaluate_set(
    workdir: str | Path, folder: Path, labels: str, file: Path | None, batch_size: Count
) -> dict[str, Any]:
    """Evaluates the newest checkpoint of an ImageNet run on one of the `LABEL_SETS`.

    Args:
      workdir: of the run; `eval_<labels>.json` and `predictions_<labels>.csv` are written into it.
      folder: of the images, one folder per class: by WordNet number, or, of V2, by label.
      labels: a key of `LABEL_SETS`.
      file: of ReaL: its `real.json`; the images are then the validation images.
      batch_size: images at a time.

    Returns:
      The content of `eval_<labels>.json`.

    Raises:
      UserError: there is no checkpoint, it is not one of ImageNet's 1,000 classes, or the files do not fit.
    """
    folder = Path(storage.expand(folder))
    variables, info = checkpoint.read_variables(workdir)
    classes, kind = info["classes"], LABEL_SETS[labels]
    if len(classes) != 1000 or sorted(classes) != list(classes):
        raise UserError(f"{workdir} was not trained on ImageNet's 1,000 classes by WordNet number.")
    if (labels == "real") != (file is not None):
        raise UserError("--labels=real needs --file=real.json, and no other label set has a file.")
    pre = info["preprocessing"]
    folders = [str(i) for i in range(1000)] if kind["folders"] == "numbers" else classes
    data = _open_images(folder, pre).with_classes(folders, f"the checkpoint in {workdir}")
    present = [label for label, name in enumerate(classes) if (folder / name).is_dir()]
    among = present if kind["among"] else None
    mesh, model = make_mesh(), create_model(**info["model"])
    eval_step = make_eval_step(model, pre, mesh, jnp.dtype(jnp.float32), among)
    rows: list[dict[str, Any]] = []
    result = evaluate(eval_step, jax.device_put(variables, replicated(mesh)), data, batch_size, mesh, rows)
    if file is not None:
        real = read_real(file)
        del result["loss"]  # of the first label alone
        result |= accuracies(rows, {row["index"]: real_labels(real, row["name"]) for row in rows})
    result = report({"labels": labels, **result}, variables["params"], info)
    write(result, workdir, f"eval_{labels}.json")
    if jax.process_index() == 0:
        storage.write_text(storage.resolve(workdir) / f"predictions_{labels}.csv", to_csv({info["weights"]: rows}))
    return result


def _open_images(folder: Path, preprocessing: Mapping[str, Any]) -> Data:
    """Opens a folder of class folders for evaluation alone, with the preprocessing of a checkpoint."""
    return open_data(
        "folder",
        folder.absolute().parent,
        train_split=None,
        val_split=folder.name,
        eval_interpolation=preprocessing["interpolation"],
        exif=preprocessing.get("exif", False),
        **{key: preprocessing[key] for key in ("crop_pct", "crop_mode", "image_size", "mean", "std")},
    )
