"""The commands that use a checkpoint on images: predict, embed, validate and explain."""

import argparse
import collections
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maxmap import storage
from maxmap.arguments import Number, add_checkpoint, add_processes, local_path
from maxmap.bulk import embed_many, predict_many
from maxmap.data.decode import CROP_MODES, FILTERS
from maxmap.data.preprocessing import changed
from maxmap.errors import UserError, printable, reason
from maxmap.explanation import explain_files
from maxmap.inference import answers, predict, predict_masks
from maxmap.labels import LABEL_SETS
from maxmap.pictures import mask_picture, save_picture
from maxmap.sharding import initialize_processes
from maxmap.validate import BATCH, DENSE_BATCH, validate
from maxmap.wordnet import readable

_PREPROCESSING = ("crop_pct", "crop_mode", "interpolation", "mean", "std")


def add_predict(command: argparse.ArgumentParser) -> None:
    """Fills the parser of `predict`."""
    command.add_argument("workdir", type=storage.expand, help="folder of a run, converted checkpoint or published name")
    command.add_argument(
        "images", type=local_path, nargs="+", help="image files; with --to also folders, tar archives and patterns"
    )
    _add_table(command, required=False)
    command.add_argument("--top", type=Number(predict, "top"), default=5, help="classes per image (default: 5)")
    _add_image_size(command, Number(predict, "image_size"))
    _add_window(command)
    command.add_argument(
        "--masks", type=local_path, metavar="DIR", help="folder for a mask of each image, where pixels are classified"
    )
    command.add_argument("--json", type=storage.expand, dest="json_file", help="file for the same as JSON")
    command.add_argument("--csv", type=storage.expand, dest="csv_file", help="file for a line per image and class")
    command.set_defaults(run=predict_command)


def add_embed(command: argparse.ArgumentParser) -> None:
    """Fills the parser of `embed`."""
    add_checkpoint(command)
    command.add_argument(
        "images", type=local_path, nargs="+", help="image files, folders, tar archives and patterns such as 'a/*.jpg'"
    )
    _add_table(command, required=True)
    _add_image_size(command, Number(embed_many, "image_size"))
    command.set_defaults(run=embed_command)


def _add_table(command: argparse.ArgumentParser, *, required: bool) -> None:
    command.add_argument(
        "--to",
        type=local_path,
        required=required,
        metavar="FILE",
        help=".csv, .jsonl or .parquet with a row for each image; the same command goes on where it was stopped",
    )
    command.add_argument(
        "--batch-size", type=Number(embed_many, "batch_size"), default=64, help="images at a time (default: 64)"
    )
    command.add_argument("--overwrite", action="store_true", help="replace FILE")
    add_processes(command)


def add_validate(command: argparse.ArgumentParser) -> None:
    """Fills the parser of `validate`."""
    add_checkpoint(command)
    command.add_argument(
        "images",
        type=local_path,
        help="folder of class folders, tar archive, CSV file, folder of these, of images and masks, or TFDS directory",
    )
    command.add_argument("--split", help="folder or archives in IMAGES, or split of TFDS (default: val, validation)")
    command.add_argument("--tfds", metavar="NAME", help="data set in the TFDS directory, for example imagenet2012")
    command.add_argument("--labels", choices=LABEL_SETS, help="count as ImageNet-ReaL, V2, A, R or Sketch do")
    command.add_argument("--file", type=local_path, dest="real", help="real.json, which --labels=real needs")
    _add_image_size(command, Number(changed, "image_size"))
    _add_window(command)
    add_preprocessing(command, "the checkpoint's")
    command.add_argument(
        "--batch-size",
        type=Number(validate, "batch_size"),
        help=f"images at a time (default: {BATCH}, or {DENSE_BATCH} where pixels are classified)",
    )
    command.add_argument(
        "--device-batches",
        type=Number(validate, "device_batches"),
        help="batches on the devices at a time (default: 1 on a CPU, else 2)",
    )
    command.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: float32)")
    command.add_argument("--flip", action="store_true", help="average the logits with those of the mirror image")
    command.add_argument("--crops", action="store_true", help="average the logits of the corners and the centre")
    command.add_argument(
        "--check",
        type=Number(validate, "check"),
        default=2000,
        help="images decoded before the start, where a broken one is an error (default: 2000)",
    )
    command.add_argument(
        "--json", type=storage.expand, dest="json_file", help="for the result (default: the checkpoint's eval.json)"
    )
    command.add_argument(
        "--csv", type=storage.expand, dest="csv_file", help="for a line per image (default: its predictions.csv)"
    )
    command.set_defaults(run=validate_command)


def add_explain(command: argparse.ArgumentParser) -> None:
    """Fills the parser of `explain`."""
    add_checkpoint(command)
    command.add_argument("images", type=local_path, nargs="+", help="image files")
    command.add_argument(
        "--out", type=local_path, default=Path("explained"), help="folder for pictures and numbers (default: explained)"
    )
    command.add_argument("--class", dest="class_name", metavar="NAME", help="class to explain (default: the likeliest)")
    command.set_defaults(run=explain_command)


def _add_image_size(command: argparse.ArgumentParser, number: Number) -> None:
    command.add_argument("--image-size", type=number, help="side of the crop in pixels (default: the checkpoint's)")
    command.add_argument("--pad", action="store_true", help="take sizes that the model's windows do not divide, too")


def _add_window(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--window",
        type=Number(predict_masks, "window"),
        metavar="PIXELS",
        help="classify pixels in overlapping windows of this side (default: the whole image at once)",
    )


def add_preprocessing(command: argparse.ArgumentParser, default: str) -> None:
    """Adds the options that set fields of the preprocessing, but for the image size; `default` stands in their help."""

    def add(name: str, what: str, **options: Any) -> None:
        command.add_argument(name, help=f"{what} (default: {default})", **options)

    add("--crop-pct", "part of the resized side that the crop keeps", type=Number(changed, "crop_pct"))
    add("--crop-mode", "which side the resize fits", choices=CROP_MODES)
    add("--interpolation", "filter of the resize", choices=FILTERS)
    for name in ("mean", "std"):
        add(f"--{name}", "of each colour in 0..1", type=Number(changed, name), nargs=3, metavar=("R", "G", "B"))


def take_preprocessing(options: dict[str, Any]) -> dict[str, Any]:
    """Removes the options of `add_preprocessing` from others; returns those that the user gave."""
    given = {key: options.pop(key) for key in _PREPROCESSING}
    return {key: value for key, value in given.items() if value is not None}


def predict_command(
    workdir: str,
    images: list[Path],
    to: Path | None,
    overwrite: bool,
    json_file: str | None,
    csv_file: str | None,
    masks: Path | None,
    window: int | None,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    **options: Any,
) -> None:
    """Prints what a checkpoint says of every image, and writes it into files; or writes a table of many images."""
    if to is not None:
        if json_file or csv_file or masks or window:
            raise UserError("--to is a table of its own: leave out --json, --csv, --masks and --window.")
        initialize_processes(coordinator, num_processes, process_id)
        _tell(to, predict_many(workdir, images, to, overwrite=overwrite, **options))
        return
    if (coordinator, num_processes, process_id) != (None, None, None):
        raise UserError(
            "several processes write a table: give --to=FILE, too, or leave out --coordinator and the like."
        )
    keep = None if masks is None else _mask_writer(masks, images)
    task, results = answers(workdir, images, window=window, keep=keep, **options)
    for path, named in zip(images, results, strict=True):
        said = ", ".join(f"{readable(name)} {task.shown(value)}" for name, value in named)
        print(f"{printable(path)}: {said or 'none of the labels'}")
    columns, records = task.records()
    rows = [
        {"image": printable(path), **record}
        for path, named in zip(images, results, strict=True)
        for record in records(named) or [dict.fromkeys(columns)]  # no image is left out
    ]
    if json_file is not None:
        storage.write_named(json_file, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    if csv_file is not None:
        text = io.StringIO()
        writer = csv.DictWriter(text, ["image", *columns], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        storage.write_named(csv_file, text.getvalue())


def _mask_writer(folder: Path, images: list[Path]) -> Callable[[str | Path, np.ndarray], None]:
    """Returns what writes the mask of an image into a folder, by the image's name."""
    stems = collections.Counter(image.stem for image in images)
    if twice := [stem for stem, count in stems.items() if count > 1]:
        raise UserError(
            f"{stems[twice[0]]} images are called {printable(twice[0])!r}, and so would their masks be: give those of "
            "one folder at a time."
        )
    for image in images:
        if (there := folder / f"{image.stem}.png").exists() and there.samefile(image):
            raise UserError(f"the mask of {printable(image)} would replace the image itself: give another folder.")

    def write(image: str | Path, mask: np.ndarray) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {printable(folder)} ({reason(error)}): give another.") from error
        save_picture(mask_picture(mask), folder / f"{Path(image).stem}.png")

    return write


def embed_command(
    checkpoint: str,
    images: list[Path],
    to: Path,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    **options: Any,
) -> None:
    """Writes the embeddings of many images into a table."""
    initialize_processes(coordinator, num_processes, process_id)
    _tell(to, embed_many(checkpoint, images, to, **options))


def _tell(file: Path, counts: dict[str, int]) -> None:
    """Prints what is in a table, on the first process."""
    if jax.process_index() > 0:
        return
    before = f", {counts['before']:,} of them by an earlier call" if counts["before"] else ""
    errors = f"; {counts['errors']:,} cannot be read, see its column 'error'" if counts["errors"] else ""
    print(f"{printable(file)}: {counts['images']:,} images{before}{errors}")


def explain_command(checkpoint: str, images: list[Path], out: Path, class_name: str | None) -> None:
    """Prints what the logit of every image's class is made of, and writes pictures of where the network looked."""
    for row in explain_files(checkpoint, images, out, class_name=class_name):
        parts = ""
        if "shares" in row:
            branches = (f"branch {g} {sum(tokens):+.2f}" for g, tokens in enumerate(row["shares"]))
            parts = f" = {', '.join(branches)}, bias {row['bias']:+.2f}"
        print(
            f"{row['image']}: {readable(row['class'])} {100 * row['probability']:.1f} %, logit {row['logit']:.2f}"
            f"{parts}; {printable(out / row['picture'])}"
        )


def validate_command(checkpoint: str, images: Path, image_size: int | None, **options: Any) -> None:
    """Prints and writes what a checkpoint reaches on labelled images."""
    changes = {"image_size": image_size, **take_preprocessing(options)}
    validate(checkpoint, images, changes=changes, **options)
