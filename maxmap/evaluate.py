"""Exact evaluation: every image of the split counts once, whatever the batch size and the number of devices."""

import collections
import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.errors import FlaxError
from jax.sharding import Mesh

from maxmap import checkpoint, operations, storage, tasks
from maxmap.classes import stored_names
from maxmap.comparison import differences
from maxmap.convert.load import read_model
from maxmap.cost import count_parameters
from maxmap.data.augment import normalize
from maxmap.data.pipeline import Data
from maxmap.data.preprocessing import departures
from maxmap.errors import UserError, printable
from maxmap.layers.primitives import pair
from maxmap.models import Classifier, average
from maxmap.operations import Array, upcast
from maxmap.predictions import make_rows, to_csv
from maxmap.progress import Progress
from maxmap.recipe import Recipe
from maxmap.segmentation import segment
from maxmap.sharding import gather, gather_processes, replicated, split_batch, to_devices, traced_on
from maxmap.tasks import SINGLE_LABEL
from maxmap.tasks.task import Task

_LARGEST_STRIDE = 64  # of any model: larger images need no check of theirs

# Options of an evaluation that its result names, because they count in another way than a run does.
COUNTED = ("labels", "flip", "crops", "window")

EvalStep = Callable[[Any, Mapping[str, Array]], dict[str, Any]]


def make_eval_step(
    model: nn.Module,
    preprocessing: Mapping[str, Any],
    mesh: Mesh,
    dtype: jnp.dtype,
    among: Sequence[int] | None = None,
    kernels: str = "auto",
    flip: bool = False,
    crop: int | None = None,
    window: int | None = None,
    task: Task = SINGLE_LABEL,
) -> EvalStep:
    """Builds the evaluation step: a jitted function of variables and a batch.

    The batch has 'image' uint8 `[B, H, W, C]`, 'label' int32 `[B]` and 'mask' bool `[B]`, False for padding.

    The step returns sums over the images: 'images', 'top1', 'top5', 'loss' (cross-entropy of the averaged logits) and
    'branch_top1' `[G]`. It also returns 'predictions': 'best' `[B, 5]`, the labels with the largest averaged logits;
    'rank' `[B]`, the rank of the right label; 'probability' and 'label_probability' `[B]`, of the best label and of the
    right one; 'branch' `[G, B]`, each branch's label; and 'branch_rank' `[G, B]`, the rank of the right label in each
    branch. Other tasks have labels and results of their own; see `Task.measure`.

    Args:
      model: Maps images to outputs with 'logits' `[G, B, K]`.
      preprocessing: Holds 'mean' and 'std'.
      mesh: Of the variables and the batch.
      dtype: That the model computes in.
      among: The only labels that are candidates; None for all.
      kernels: See `maxmap.operations.kernels`.
      flip: The logits are the mean of those of an image and of its mirror image.
      crop: Side of five crops of an image, its corners and its centre, whose logits are averaged; None for the whole.
      window: Side of the windows in which a model that classifies pixels sees an image; None for the whole.
      task: What the model is asked for.
    """

    def step(variables: Any, batch: Mapping[str, Array]) -> dict[str, Any]:
        images = normalize(batch["image"], preprocessing["mean"], preprocessing["std"], dtype)
        params = gather(jax.tree.map(lambda p: p.astype(dtype), variables["params"]), mesh)

        def logits_of(images: Array) -> Array:
            if window is not None:
                return segment(cast(Classifier, model), {**variables, "params": params}, images, window=window)[None]
            return upcast(model.apply({**variables, "params": params}, images)["logits"])

        def branches_of(images: Array) -> Array:
            logits = logits_of(images)
            if not flip:
                return logits
            mirrored = logits_of(images[:, :, ::-1])
            return (logits + (mirrored[:, :, :, ::-1] if task.dense else mirrored)) / 2

        def branches_at(corner: Array) -> Array:
            sizes = (images.shape[0], crop, crop, images.shape[3])
            return branches_of(jax.lax.dynamic_slice(images, (0, corner[0], corner[1], 0), sizes))

        with traced_on(mesh), operations.kernels(kernels):
            if crop is None:
                branches = branches_of(images)
            else:
                branches = jnp.mean(jax.lax.map(branches_at, jnp.array(corners(images.shape[1] - crop))), axis=0)
        return score(branches, batch, among, task)

    # None keeps the variables' own sharding: training splits them, other callers have them on every device.
    return jax.jit(step, in_shardings=(None, split_batch(mesh)), out_shardings=replicated(mesh))


def corners(last: int) -> list[tuple[int, int]]:
    """Returns where five crops of a square start, which end at most `last` pixels further."""
    return [(0, 0), (0, last), (last, 0), (last, last), (last // 2, last // 2)]


def score(
    branches: Array, batch: Mapping[str, Array], among: Sequence[int] | None = None, task: Task = SINGLE_LABEL
) -> dict[str, Any]:
    """Returns what an evaluation step does, see `make_eval_step`, given the branches' logits `[G, B, K]`."""
    logits = average({"logits": branches})
    if among is not None:
        candidate = jnp.zeros(logits.shape[-1], bool).at[jnp.array(among)].set(True)
        logits = jnp.where(candidate[None], logits, -jnp.inf)
        branches = jnp.where(candidate[None, None], branches, -jnp.inf)
    return task.measure(logits, branches, batch["label"], batch["mask"])


def evaluate(
    eval_step: EvalStep,
    variables: Any,
    data: Data,
    batch_size: int,
    mesh: Mesh,
    rows: list[dict[str, Any]] | None = None,
    *,
    progress: Progress | None = None,
    device_batches: int | None = None,
    task: Task = SINGLE_LABEL,
) -> dict[str, Any]:
    """Evaluates variables on the whole evaluation split.

    Args:
      eval_step: See `make_eval_step`.
      variables: Of the model, on the mesh.
      data: With an evaluation split.
      batch_size: Images at a time over all devices; rounded up to a multiple of their number.
      mesh: Of the evaluation step.
      rows: List to which a row is added for each image; see `maxmap.predictions.make_rows`.
      progress: Shows how far it is; closed at the end.
      device_batches: Batches that are on the devices at a time; None for 1 on a CPU, else 2. With 2, a batch is
        computed while the host reads the figures of the one before.
      task: What the model is asked for; that of `eval_step`.

    Returns:
      The figures of the task, such as 'top1' and 'top5' (percent), 'branch_top1' (percent, for each branch) and 'loss'
      (mean); 'images' (how many count) and 'skipped' (names of files that cannot be decoded, which do not count).
    """
    if data.val is None:
        raise UserError("there is no evaluation data: set --config.data.val_split.")
    devices = mesh.devices.size
    batch_size = -(-batch_size // devices) * devices
    ahead = device_batches or (1 if jax.default_backend() == "cpu" else 2)
    totals: dict[str, Any] = {}
    parts: dict[str, list[np.ndarray]] = {"label": [], "outputs": [], "branch": []}
    columns = functools.partial(task.columns, names=data.classes)
    skipped = []

    def computed() -> Iterator[tuple[Mapping[str, np.ndarray], dict[str, Any]]]:
        for batch in data.eval_batches(
            batch_size, process_index=jax.process_index(), process_count=jax.process_count()
        ):
            on_devices = to_devices({key: batch[key] for key in ("image", "label", "mask")}, mesh)
            yield batch, eval_step(variables, on_devices)

    with contextlib.closing(progress) if progress else contextlib.nullcontext():
        for batch, sums in _delayed(computed(), ahead - 1):
            left_out = gather_processes(batch["skipped"])
            skipped += [printable(data.val.name(int(index))) for index in left_out[left_out >= 0]]
            predictions = sums.pop("predictions")
            if rows is not None or task.keeps_outputs:
                about = {key: gather_processes(batch[key]) for key in ("index", "label", "mask")}
                predictions = jax.device_get(predictions)
            if rows is not None:
                rows += make_rows(about, predictions, data.val.name, columns)
            if task.keeps_outputs:
                parts["label"].append(about["label"][about["mask"]])
                parts["outputs"].append(predictions["outputs"][about["mask"]])
                parts["branch"].append(predictions["branch"][:, about["mask"]])
            for key, value in jax.device_get(sums).items():
                # float64 on the host: float32 cannot count beyond 2^24 images.
                totals[key] = totals.get(key, 0) + np.asarray(value, np.float64)
            if progress and totals["images"]:
                progress.update(int(totals["images"]) + len(skipped), task.running(totals))
    images = int(totals["images"])
    if images == 0:
        raise UserError("no image of the evaluation split could be decoded, so there is nothing to evaluate.")
    kept = {key: np.concatenate(arrays, axis=-2) for key, arrays in parts.items() if arrays}
    return {**task.figures(totals, kept, data.classes), "images": images, "skipped": skipped}


def _delayed(items: Iterator[Any], count: int) -> Iterator[Any]:
    """Yields items in their order, each when `count` more of them were taken."""
    waiting: collections.deque[Any] = collections.deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def report(result: Mapping[str, Any], parameters: int, info: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of `eval.json`: a result with the model, weights and preprocessing that it belongs to."""
    errors = {f"{key}_err": round(100 - result[key], 6) for key in ("top1", "top5") if key in result}
    return {
        "model": info["model"]["name"],
        "step": info["step"],
        "weights": info["weights"],
        "task": tasks.of_checkpoint(info).name,
        **result,
        **errors,
        "param_count": parameters,
        **info["preprocessing"],
    }


def summary(result: Mapping[str, Any], task: Task = SINGLE_LABEL) -> str:
    """Returns the content of `eval.json` as one line, as timm's validate.py ends, with what the figures belong to."""
    return (
        f"* {task.summary(result)}, {result['images']:,} images, {result['param_count']:,} parameters, "
        f"{result['image_size']} px, crop {result['crop_pct']} {result['crop_mode']}, {result['interpolation']}"
    )


def write(result: Mapping[str, Any], workdir: str | Path, name: str = "eval.json") -> None:
    """Writes a result into a folder, on the first process alone."""
    if jax.process_index() == 0:
        storage.write_text(storage.resolve(workdir) / name, json.dumps(result, indent=2) + "\n")


def run(recipe: Recipe, workdir: str | Path) -> dict[str, Any]:
    """Evaluates the newest checkpoint of a run, and writes `eval.json` and `predictions.csv`.

    Args:
      recipe: As for training.
      workdir: Of the run; without a checkpoint in it, the one that `recipe.init_from` names is evaluated.

    Returns:
      The content of `eval.json`: the averaged weights' figures where there are any, and then the raw ones' as 'raw'.

    Raises:
      UserError: There is no checkpoint, it holds another model, or the data is missing or of another size.
    """
    workdir = storage.expand(workdir)
    mesh = recipe.mesh()
    own = checkpoint.read_info(workdir) is not None
    path = workdir if own or recipe.init_from is None else recipe.init_from
    variables, info = read_model(path)
    data, present = open_for(recipe, info, path)
    if departing := departures(data.preprocessing, info.get("preprocessing", {})):
        tell(f"the config's preprocessing is not that of the checkpoint in {path}: {'; '.join(departing)}")
    check_same_model(recipe.describe_model(len(data.classes)), info["model"], path)
    model = recipe.model(num_classes=len(data.classes))
    check_image_size(model, variables, data.preprocessing)
    dtype = jnp.dtype(recipe.dtype)
    task = tasks.of_data(data).fitted(tasks.of_checkpoint(info))
    info = {**info, "task": tasks.describe(task)}
    eval_step = make_eval_step(model, data.preprocessing, mesh, dtype, kernels=recipe.kernels, task=task)
    rows: dict[str, list[dict[str, Any]]] = {}

    def figures(variables: Any, weights: str) -> dict[str, Any]:
        rows[weights] = []
        placed = jax.device_put(variables, replicated(mesh))
        progress = Progress(data.num_eval, shown=jax.process_index() == 0)
        batch_size = recipe.evaluate.batch_size
        return evaluate(eval_step, placed, data, batch_size, mesh, rows[weights], progress=progress, task=task)

    result = figures(variables, info["weights"])
    if present < len(data.classes):
        result.setdefault("classes", f"{present} of {len(data.classes)}")  # the figures of each say more
    result = report(result, count_parameters(variables["params"]), {**info, "preprocessing": data.preprocessing})
    if info["weights"] == "ema" and (raw := checkpoint.read_variables(path, ema=False))[1]["weights"] == "raw":
        raw_figures = figures(raw[0], "raw")
        result["raw"] = {key: value for key, value in raw_figures.items() if key not in ("images", "skipped")}
    if not storage.in_bucket(workdir):
        Path(workdir).mkdir(parents=True, exist_ok=True)
    write(result, workdir)
    if jax.process_index() == 0:
        storage.write_text(storage.resolve(workdir) / "predictions.csv", to_csv(rows))
    return result


def open_for(recipe: Recipe, info: Mapping[str, Any], where: str | Path) -> tuple[Data, int]:
    """Opens data to evaluate a checkpoint on, with labels in the order of the checkpoint's classes.

    Classes are found by their names. The data may have fewer than the checkpoint, whose classes all stay candidates. If
    only numbers are known on one side, the numbers of classes must be equal, and class i is class i.

    Args:
      recipe: Of the data.
      info: What the checkpoint says of itself.
      where: Of the checkpoint, for messages.

    Returns:
      The data, and how many of the checkpoint's classes it has.

    Raises:
      UserError: The data is missing, or has a class that the checkpoint does not have.
    """
    # Without an evaluation split of its own the data says what is wrong, or takes it from the training split.
    no_split = recipe.data.keywords.get("val_split", "val") is None or recipe.data.keywords.get("folds") is not None
    data = recipe.data() if no_split else recipe.data(train_split=None)
    # What the labels of an evaluation split without some of the classes mean, the training split says.
    if stored_names(info) is None and not no_split and len(data.classes) != len(info.get("classes", ())):
        data = recipe.data()
    return match_classes(data, info, where)


def match_classes(data: Data, info: Mapping[str, Any], where: str | Path) -> tuple[Data, int]:
    """Gives data labels in the order of a checkpoint's classes, found by their names; see `open_for`."""
    known, stored = stored_names(info), info.get("classes", ())
    names = list(data.classes)
    same_count = len(names) == len(stored)
    tasks.require_same(data, info, where)
    if (data.numbered and same_count) or (known is None and not set(names) <= set(stored)):
        if same_count and names != list(stored):
            unnamed = "the data" if data.numbered else where
            tell(f"{unnamed} has numbers in place of class names: {names[0]!r} of the data is taken for {stored[0]!r}")
        return data, len(names)
    data = data.with_classes(stored, f"the checkpoint in {where}")
    if len(names) < len(stored):
        tell(f"the data has {len(names)} of the {len(stored)} classes of {where}, which all stay candidates")
    return data, len(names)


def tell(text: str) -> None:
    """Prints a line on stderr, on the first process alone."""
    if jax.process_index() == 0:
        print(f"maxmap: {text}.", file=sys.stderr)


def check_image_size(
    model: nn.Module, variables: Any, preprocessing: Mapping[str, Any], window: int | None = None
) -> None:
    """Raises UserError unless a model takes images of the size and the channels that a preprocessing makes.

    With a `window` it is shown the image in windows of that side; see `maxmap.segmentation.segment`.
    """
    size, channels = preprocessing["image_size"], len(preprocessing["mean"])
    size = size if window is None else min(window, size)
    small = isinstance(model, Classifier) and size < _LARGEST_STRIDE
    if small and size < (stride := _stride(model, variables, channels)):
        raise UserError(f"images of {size} pixels are smaller than the model's stride of {stride}: give larger ones.")
    images = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    try:
        jax.eval_shape(model.apply, variables, images)
    except (ValueError, TypeError, FlaxError) as error:
        raise UserError(f"the model does not take images of {size} pixels: {str(error).rstrip('.')}.") from None


def _stride(model: Classifier, variables: Any, channels: int) -> int:
    """Returns how many pixels of a side become one position of the smallest feature map."""
    height, width = pair(model.backbone.image_size)
    images = jax.ShapeDtypeStruct((1, height, width, channels), jnp.float32)
    maps = jax.eval_shape(functools.partial(model.apply, method="features"), variables, images)
    return height // min(side for side in (leaf.shape[1] for leaf in maps) if side > 1)  # PiT's class token is a map


def check_same_model(wanted: Mapping[str, Any], found: Mapping[str, Any], where: str | Path) -> None:
    """Raises UserError, naming the differences, unless a checkpoint's model is the one that the config describes."""
    if changed := differences(found, wanted):
        raise UserError(
            f"the checkpoint in {where} holds another model ({'; '.join(changed)}): give another folder, or the config "
            "that it was made with."
        )
