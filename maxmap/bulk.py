"""Predictions and embeddings of many images: folders, archives and patterns to one table, a row for each image.

The table grows while the command runs, in a file whose name ends in `.part`, and takes its own name at the end. A
command that was stopped goes on behind the last whole row. Memory does not grow with the number of images, but for
their names.
"""

import csv
import glob
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from maxmap import storage, tasks
from maxmap.data.archives import read_at, tar_members
from maxmap.data.augment import normalize
from maxmap.data.folders import is_image
from maxmap.data.preprocessing import changed, cropped
from maxmap.errors import UserError, printable, reason
from maxmap.evaluate import check_image_size
from maxmap.inference import decoded, load, load_classifier
from maxmap.models import Classifier
from maxmap.operations import Array
from maxmap.programs import one_image
from maxmap.progress import Progress
from maxmap.ranges import Count, Pixels, check_arguments
from maxmap.sharding import make_mesh, replicated, split_batch

ENDINGS = (".csv", ".jsonl")
PART = ".part"  # behind the name of a table that is not whole yet


class ImageFile(NamedTuple):
    """An image by its name: a file, or a part of an archive of `size` bytes from `offset` on."""

    name: str
    path: str
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """Returns the bytes of the image; raises OSError."""
        if self.size is not None:
            return read_at(self.path, self.offset, self.size)
        with open(self.path, "rb") as file:
            return file.read()


def find_images(paths: Sequence[str | Path]) -> list[ImageFile]:
    """Finds the images of paths, in the order of the paths and sorted within each.

    Args:
      paths: image files; folders, which are searched with all below them; tar archives; patterns such as '2026/*.jpg'.

    Raises:
      UserError: a path does not exist, a pattern matches nothing, an archive is damaged, or there are no images.
    """
    found: list[ImageFile] = []
    for given in paths:
        path = os.path.expanduser(given)
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        if not matches:
            raise UserError(f"there is no {printable(given)}: give an image, a folder, a tar archive or a pattern.")
        for match in matches:
            found += _images_at(match)
    if not found:
        raise UserError(f"there are no images in {', '.join(map(printable, paths))}: give another path.")
    return found


def _images_at(path: str) -> Iterator[ImageFile]:
    if os.path.isdir(path):
        for folder, folders, files in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            names = (os.path.join(folder, name) for name in sorted(files) if not name.startswith("."))
            yield from (ImageFile(name, name) for name in names if is_image(name))
    elif path.endswith(".tar"):
        for member in tar_members(path):
            if is_image(member.name):
                yield ImageFile(f"{path}/{member.name}", path, member.offset, member.size)
    else:
        yield ImageFile(path, path)


def predict_many(
    checkpoint: str | Path,
    paths: Sequence[str | Path],
    file: str | Path,
    *,
    top: Count = 5,
    batch_size: Count = 64,
    image_size: Pixels | None = None,
    pad: bool = False,
    overwrite: bool = False,
) -> dict[str, int]:
    """Writes the likeliest classes of many images: 'image', then 'class1', 'probability1' and so on, and 'error'.

    In other tasks there is a column for each label, score or number; see `Task.table`.

    Args:
      checkpoint: as for `maxmap.load`.
      paths: see `find_images`.
      file: .csv or .jsonl; see the top of this module.
      top: classes of an image.
      batch_size: images at a time, over all devices.
      image_size: side of the crop in pixels; None for the checkpoint's.
      pad: takes sizes that the model's windows do not divide, too; see `maxmap.create_model`.
      overwrite: replace the file.

    Returns:
      'images' in the table, 'errors' among them (they cannot be decoded), and 'before', those of an earlier call.

    Raises:
      UserError: there is no checkpoint, there are no images, or the file cannot be written.
    """
    check_arguments(predict_many, "", locals())
    model, variables, info = _resized(*load_classifier(checkpoint, pad=pad), image_size)
    classes = info["classes"]
    count = min(top, len(classes))
    task = tasks.of_checkpoint(info)
    names, columns = task.table(classes, count)

    def compute(variables: Any, images: Array) -> tuple[Array]:
        return (decoded(model, task, variables, images),)

    settings = {"kind": "predict", "top": count}
    return _write(checkpoint, info, variables, paths, file, compute, columns, names, settings, batch_size, overwrite)


def embed_many(
    checkpoint: str | Path,
    paths: Sequence[str | Path],
    file: str | Path,
    *,
    batch_size: Count = 64,
    image_size: Pixels | None = None,
    pad: bool = False,
    overwrite: bool = False,
) -> dict[str, int]:
    """Writes the embeddings `[D]` of many images: 'image', 'embedding' (in .csv a column for each value) and 'error'.

    The arguments are those of `predict_many`.
    """
    check_arguments(embed_many, "", locals())
    model, variables, info = _resized(*load(checkpoint, pad=pad), image_size)
    shape = one_image(info, pixels=False)
    width = jax.eval_shape(lambda x: model.apply(variables, x[None], method="embed"), shape).shape[-1]
    whole = str(file).endswith(".jsonl")

    def compute(variables: Any, images: Array) -> tuple[Array]:
        return (model.apply(variables, images, method="embed"),)

    def columns(embedding: np.ndarray) -> dict[str, Any]:
        values = [float(f"{value:.7g}") for value in embedding]
        return {"embedding": values} if whole else {f"e{i}": value for i, value in enumerate(values)}

    names = ["embedding"] if whole else [f"e{i}" for i in range(width)]
    return _write(
        checkpoint, info, variables, paths, file, compute, columns, names, {"kind": "embed"}, batch_size, overwrite
    )


def _resized(
    model: Classifier, variables: dict[str, Any], info: dict[str, Any], image_size: int | None
) -> tuple[Classifier, dict[str, Any], dict[str, Any]]:
    """Returns a loaded checkpoint for images of another size, or of its own for None."""
    info = {**info, "preprocessing": changed(info["preprocessing"], image_size=image_size)}
    check_image_size(model, variables, info["preprocessing"])
    return model, variables, info


def _write(
    checkpoint: str | Path,
    info: Mapping[str, Any],
    variables: Any,
    paths: Sequence[str | Path],
    file: str | Path,
    compute: Callable[..., tuple[Array, ...]],
    columns: Callable[..., dict[str, Any]],
    names: Sequence[str],
    settings: Mapping[str, Any],
    batch_size: int,
    overwrite: bool,
) -> dict[str, int]:
    """Computes what is not in the table yet, and writes it; see `predict_many`."""
    target = Path(storage.expand(file))
    if target.suffix not in ENDINGS:
        raise UserError(f"{printable(file)} has no known ending: give a name in {' or '.join(ENDINGS)}.")
    if target.exists() and not overwrite:
        raise UserError(f"{printable(file)} is there already: give another name, or --overwrite.")
    images = find_images(paths)
    pre = info["preprocessing"]
    about = {
        **settings,
        "checkpoint": str(checkpoint),
        "step": info["step"],
        "preprocessing": pre,
        "images": hashlib.sha256(
            "\0".join(image.name for image in images).encode("utf-8", "surrogateescape")
        ).hexdigest(),
    }
    mesh = make_mesh()
    batch_size = -(-batch_size // mesh.size) * mesh.size
    step = jax.jit(
        lambda variables, pixels: compute(variables, normalize(pixels, pre["mean"], pre["std"])),
        in_shardings=(None, split_batch(mesh)),
        out_shardings=replicated(mesh),
    )
    placed = jax.device_put(variables, replicated(mesh))

    def crop(image: ImageFile) -> tuple[np.ndarray | None, str]:
        try:
            return cropped(image.read(), pre), ""
        except (OSError, UserError) as error:
            return None, reason(error)

    with _Table(target, ["image", *names, "error"], about) as table, ThreadPoolExecutor() as pool:
        done, progress = table.rows, Progress(len(images))
        errors = table.errors
        progress.update(done)
        starts = range(done, len(images), batch_size)
        ahead = pool.map(crop, images[done : done + batch_size])
        for start in starts:
            crops, here = list(ahead), images[start : start + batch_size]
            ahead = pool.map(crop, images[start + batch_size : start + 2 * batch_size])  # while the device computes
            batch = np.zeros((batch_size, *one_image(info, pixels=True).shape), np.uint8)
            for row, (pixels, _) in enumerate(crops):
                if pixels is not None:
                    batch[row] = pixels
            results = [np.asarray(x) for x in step(placed, batch)]
            rows = []
            for row, (image, (pixels, error)) in enumerate(zip(here, crops, strict=True)):
                found = {} if pixels is None else columns(*(result[row] for result in results))
                rows.append({"image": printable(image.name), **found, **({"error": error} if error else {})})
                errors += bool(error)
            table.append(rows)
            progress.update(start + len(here), f"{errors} cannot be read" if errors else "")
        progress.close()
    return {"images": len(images), "errors": errors, "before": done}


class _Table:
    """A table that is written row by row, and goes on behind the last whole row of an earlier call.

    Args:
      target: .csv or .jsonl; it is there when the table is whole.
      columns: of a row.
      about: what the rows are of; a later call has to be of the same.
    """

    def __init__(self, target: Path, columns: Sequence[str], about: Mapping[str, Any]):
        self._target, self._columns = target, list(columns)
        self._part = target.with_name(target.name + PART)
        self._about = target.with_name(f"{target.name}{PART}.json")
        self.rows = self.errors = 0
        text = json.dumps(about, indent=2)
        try:
            if self._part.exists() and self._about.exists():
                if self._about.read_text("utf-8") != text:
                    raise UserError(
                        f"{printable(self._part)} is of another call, with other images, another checkpoint or other "
                        "options: remove it, or give another file."
                    )
                self._keep_whole_rows()
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                self._about.write_text(text, "utf-8")
                self._part.write_text(self._header(), "utf-8")
            self._file = self._part.open("a", encoding="utf-8", newline="")
        except OSError as error:
            raise self._cannot(error) from error

    def _cannot(self, error: OSError) -> UserError:
        return UserError(
            f"cannot write {printable(self._part)} ({reason(error)}): make room, or give another file; the same "
            "command goes on behind its last row."
        )

    def _header(self) -> str:
        if self._target.suffix == ".jsonl":
            return ""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(self._columns)
        return text.getvalue()

    def _keep_whole_rows(self) -> None:
        """Cuts off what a stopped call left of its last row, and counts the others."""
        whole = len(self._header().encode())
        with self._part.open("rb") as file:
            file.seek(whole)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                self.rows += 1
                text = line.decode("utf-8")
                failed = '"error": ' in text if self._target.suffix == ".jsonl" else not text.endswith(",\n")
                self.errors += failed
        os.truncate(self._part, whole)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes rows, and gives them to the operating system."""
        text = io.StringIO()
        if self._target.suffix == ".jsonl":
            text.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(text, self._columns, lineterminator="\n")
            writer.writerows(rows)
        try:
            self._file.write(text.getvalue())
            self._file.flush()
        except OSError as error:
            raise self._cannot(error) from error

    def __enter__(self) -> "_Table":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if kind is None:
            os.replace(self._part, self._target)
            self._about.unlink()
