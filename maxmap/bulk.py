"""Predictions and embeddings of many images: folders, archives and patterns to one table, a row for each image.

The devices of a process share a batch. Of n processes, each takes every n-th image and writes a part of the table. A
command that was stopped goes on behind the last whole row; see `maxmap.result_table`. Memory does not grow with the
number of images, but for their names.
"""

import contextlib
import glob
import hashlib
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
from maxmap.result_table import ENDINGS, Table
from maxmap.sharding import gather_processes, make_mesh, replicated, split_batch, traced_on


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
      file: .csv, .jsonl or .parquet; see `maxmap.result_table`.
      top: classes of an image.
      batch_size: images at a time, over all devices of a process.
      image_size: side of the crop in pixels; None for the checkpoint's.
      pad: takes sizes that the model's windows do not divide, too; see `maxmap.create_model`.
      overwrite: replace the file.

    Returns:
      'images' in the table, 'errors' among them (they cannot be decoded), and 'before', those of an earlier call; on
      every process the same.

    Raises:
      UserError: there is no checkpoint, there are no images, or the file cannot be written.
    """
    check_arguments(predict_many, "", locals())
    model, variables, info = _resized(*load_classifier(checkpoint, pad=pad), image_size)
    classes = info["classes"]
    count = min(top, len(classes))
    task = tasks.of_checkpoint(info)
    _, columns = task.table(classes, count)

    def compute(variables: Any, images: Array) -> tuple[Array]:
        return (decoded(model, task, variables, images),)

    settings = {"kind": "predict", "top": count}
    example = columns(np.ones(len(classes), np.float32))
    return _write(checkpoint, info, variables, paths, file, compute, columns, example, settings, batch_size, overwrite)


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

    The values are those of the network, float32, without a loss.

    The arguments are those of `predict_many`.
    """
    check_arguments(embed_many, "", locals())
    model, variables, info = _resized(*load(checkpoint, pad=pad), image_size)
    shape = one_image(info, pixels=False)
    width = jax.eval_shape(lambda x: model.apply(variables, x[None], method="embed"), shape).shape[-1]
    apart = str(file).endswith(".csv")

    def compute(variables: Any, images: Array) -> tuple[Array]:
        return (model.apply(variables, images, method="embed"),)

    def columns(embedding: np.ndarray) -> dict[str, Any]:
        values = [float(f"{value:.9g}") for value in embedding]
        return {f"e{i}": value for i, value in enumerate(values)} if apart else {"embedding": values}

    example = columns(np.zeros(width, np.float32))
    return _write(
        checkpoint, info, variables, paths, file, compute, columns, example, {"kind": "embed"}, batch_size, overwrite
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
    example: Mapping[str, Any],
    settings: Mapping[str, Any],
    batch_size: int,
    overwrite: bool,
) -> dict[str, int]:
    """Computes what is not in the table yet, and writes it; see `predict_many`."""
    target = Path(storage.expand(file))
    if target.suffix not in ENDINGS:
        raise UserError(f"{printable(file)} has no known ending: give a name in {', '.join(ENDINGS)}.")
    if target.exists() and not overwrite:
        raise UserError(f"{printable(file)} is there already: give another name, or --overwrite.")
    found = find_images(paths)
    process, processes = jax.process_index(), jax.process_count()
    images = found[process::processes]
    pre = info["preprocessing"]
    about = {
        **settings,
        "checkpoint": str(checkpoint),
        "step": info["step"],
        "preprocessing": pre,
        "images": hashlib.sha256(
            "\0".join(image.name for image in found).encode("utf-8", "surrogateescape")
        ).hexdigest(),
    }
    mesh = make_mesh(jax.local_devices())  # processes need not wait for one another
    batch_size = -(-batch_size // mesh.size) * mesh.size

    def normalized(variables: Any, pixels: Array) -> tuple[Array, ...]:
        with traced_on(mesh):
            return compute(variables, normalize(pixels, pre["mean"], pre["std"]))

    step = jax.jit(normalized, out_shardings=replicated(mesh))
    placed = jax.device_put(variables, replicated(mesh))

    def crop(image: ImageFile) -> tuple[np.ndarray | None, str]:
        try:
            return cropped(image.read(), pre), ""
        except (OSError, UserError) as error:
            return None, reason(error)

    table = Table(target, example, about, process, processes)
    done, errors = table.rows, table.errors
    with contextlib.closing(table), ThreadPoolExecutor() as pool:
        progress = Progress(max(len(images), 1), shown=process == 0)
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
            results = [np.asarray(x) for x in step(placed, jax.device_put(batch, split_batch(mesh)))]
            rows = []
            for row, (image, (pixels, error)) in enumerate(zip(here, crops, strict=True)):
                values = {} if pixels is None else columns(*(result[row] for result in results))
                rows.append({"image": printable(image.name), **values, **({"error": error} if error else {})})
                errors += bool(error)
            table.append(rows)
            progress.update(start + len(here), f"{errors} cannot be read" if errors else "")
        progress.close()
    errors, done = map(int, gather_processes(np.array([[errors, done]])).sum(axis=0))  # when all processes are done
    if process == 0:
        table.finish()
    return {"images": len(found), "errors": errors, "before": done}
