"""Exact evaluation: every image of the split counts once, whatever the batch size and the number of devices."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.errors import FlaxError
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from maxmap import checkpoint
from maxmap.convert.load import read_model
from maxmap.data.augment import normalize
from maxmap.data.pipeline import Data, open_data
from maxmap.errors import UserError, call, nearest
from maxmap.labels import LABEL_SETS, as_csv, count, read_real, real_labels, rows_of
from maxmap.models import Classifier, average, create_model
from maxmap.operations import plain_operations, upcast
from maxmap.sharding import gather, make_mesh, replicated, split_batch, to_devices

Array = jax.Array
EvalStep = Callable[[Any, Mapping[str, Array]], dict[str, Any]]

KEYS = (
    *("seed", "epochs", "steps", "batch_size", "accumulate", "dtype", "batch_norm", "ema_decay", "init_from"),
    *("mesh", "model", "data", "augment", "mix", "erase", "optim", "schedule", "loss", "evaluate", "checkpoint", "log"),
)
DTYPES = ("float32", "bfloat16")


def check_config(config: Mapping[str, Any]) -> None:
    """Raises UserError unless a config has exactly the keys that there are, and a type that models compute in."""
    for key in config:
        if key not in KEYS:
            raise UserError(f"the config has no key '{key}'; the nearest are {nearest(key, KEYS)}.")
    for key in KEYS:
        if key not in config:
            raise UserError(f"the config lacks the key '{key}': see configs/quickstart.py for one that has them all.")
    if config["dtype"] not in DTYPES:
        raise UserError(f"config.dtype is {config['dtype']!r}: give one of {', '.join(DTYPES)}.")


def settings(*, batch_size: int, every_epochs: int) -> tuple[int, int]:
    """Returns the section `evaluate`, looked through.

    Args:
      batch_size: images at a time, over all devices.
      every_epochs: epochs between two evaluations of a training run.
    """
    for key, value in {"batch_size": batch_size, "every_epochs": every_epochs}.items():
        if value < 1:
            raise UserError(f"config.evaluate.{key} is {value}: give 1 or more.")
    return batch_size, every_epochs


def model_kwargs(config: Mapping[str, Any], classes: int) -> dict[str, Any]:
    """Returns the arguments of `create_model` in a config: what is None is left out, classes are counted in the data.

    Raises:
      UserError: `num_classes` is given and differs from the number of classes in the data.
    """
    kwargs = {key: value for key, value in config["model"].items() if value is not None}
    given = kwargs.setdefault("num_classes", classes)
    if given != classes:
        raise UserError(
            f"config.model.num_classes is {given}, but the data has {classes} classes: leave it out or give other data."
        )
    return kwargs


def make_eval_step(
    model: nn.Module,
    preprocessing: Mapping[str, Any],
    mesh: Mesh,
    dtype: jnp.dtype,
    among: Sequence[int] | None = None,
) -> EvalStep:
    """Builds a jitted function of variables and a batch that returns sums over the images that count, and predictions.

    The batch has 'image' uint8 `[B, H, W, 3]`, 'label' int32 `[B]` and 'mask' bool `[B]`. The sums are 'images',
    'top1', 'top5' and 'loss' (cross-entropy of the averaged logits), and 'branch_top1' `[G]`. 'predictions' has the
    labels with the largest averaged logits, 'best' `[B, 5]`, the 'rank' `[B]` of the right one, and for each branch
    its label, 'branch' `[G, B]`, and the rank of the right one, 'branch_rank' `[G, B]`.

    `among`: the only labels that are candidates; None for all.
    """

    def step(variables: Any, batch: Mapping[str, Array]) -> dict[str, Any]:
        images = normalize(batch["image"], preprocessing["mean"], preprocessing["std"], dtype)
        params = gather(jax.tree.map(lambda p: p.astype(dtype), variables["params"]), mesh)
        outputs = model.apply({**variables, "params": params}, images)
        logits, branches = average(outputs), upcast(outputs["logits"])
        if among is not None:
            candidate = jnp.zeros(logits.shape[-1], bool).at[jnp.array(among)].set(True)
            logits = jnp.where(candidate[None], logits, -jnp.inf)
            branches = jnp.where(candidate[None, None], branches, -jnp.inf)
        labels, mask = batch["label"], batch["mask"]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        rank = rank_of(labels, logits)
        branch_rank = jax.vmap(rank_of, (None, 0))(labels, branches)
        return {
            "images": jnp.sum(mask),
            "top1": jnp.sum(mask & (rank <= 1)),
            "top5": jnp.sum(mask & (rank <= 5)),
            "loss": jnp.sum(jnp.where(mask, loss, 0)),
            "branch_top1": jnp.sum(mask[None] & (branch_rank <= 1), axis=1),
            "predictions": {
                "best": jax.lax.top_k(logits, min(5, logits.shape[-1]))[1],
                "rank": rank,
                "branch": jnp.argmax(branches, axis=-1),
                "branch_rank": branch_rank,
            },
        }

    # The variables lie where they are: split by shape while training, on every device otherwise.
    return jax.jit(step, in_shardings=(None, split_batch(mesh)), out_shardings=replicated(mesh))


def rank_of(labels: Array, logits: Array) -> Array:
    """Returns the rank of the right class, 1 for the best, `[B]` of `[B]` and `[B, K]`.

    Ties and NaN count against it, so that equal logits and a network that has diverged are no success.
    """
    target = jnp.take_along_axis(logits, labels[:, None], axis=1)
    return jnp.sum(~(logits < target), axis=1)


def evaluate(
    eval_step: EvalStep,
    variables: Any,
    data: Data,
    batch_size: int,
    mesh: Mesh,
    rows: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Evaluates variables on the whole evaluation split.

    Args:
      eval_step: of `make_eval_step`.
      variables: on the mesh.
      data: with an evaluation split.
      batch_size: over all devices; rounded up to a multiple of them.
      mesh: of the eval step.
      rows: takes a row for each image, see `maxmap.labels.rows_of`.

    Returns:
      'top1', 'top5' (percent), 'branch_top1' (percent of each branch), 'loss' (mean), 'images', and 'skipped' (names of
      files that could not be decoded, which do not count).
    """
    if data.val is None:
        raise UserError("there is no evaluation data: set --config.data.val_split.")
    devices = mesh.devices.size
    batch_size = -(-batch_size // devices) * devices
    totals: dict[str, Any] = {}
    skipped = []
    batches = data.eval_batches(batch_size, process_index=jax.process_index(), process_count=jax.process_count())
    for batch in batches:
        left_out = _of_all_processes(batch["skipped"])
        skipped += [data.val.name(int(index)) for index in left_out[left_out >= 0]]
        sums = eval_step(variables, to_devices({key: batch[key] for key in ("image", "label", "mask")}, mesh))
        predictions = sums.pop("predictions")
        if rows is not None:
            about = {key: _of_all_processes(batch[key]) for key in ("index", "label", "mask")}
            rows += rows_of(about, jax.device_get(predictions), data.val.name)
        for key, value in jax.device_get(sums).items():
            # float64 on the host: float32 cannot count beyond 2^24 images.
            totals[key] = totals.get(key, 0) + np.asarray(value, np.float64)
    images = int(totals["images"])
    if images == 0:
        raise UserError("no image of the evaluation split could be decoded, so there is nothing to evaluate.")
    return {
        "top1": 100 * float(totals["top1"]) / images,
        "top5": 100 * float(totals["top5"]) / images,
        "branch_top1": [100 * float(correct) / images for correct in totals["branch_top1"]],
        "loss": float(totals["loss"]) / images,
        "images": images,
        "skipped": skipped,
    }


def _of_all_processes(column: np.ndarray) -> np.ndarray:
    if jax.process_count() == 1:
        return column
    return np.asarray(multihost_utils.process_allgather(column.astype(np.int32), tiled=True))


def count_parameters(params: Any) -> int:
    """Returns the number of values in a tree of parameters."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def multiply_adds(function: Callable[..., Any], *arguments: Any) -> int:
    """Returns the multiply-adds of all matrix products and convolutions in a function; traces, and computes nothing.

    This is what papers call FLOPs and timm GMACs. Activations, norms, additions and pooling do not count, and neither
    does how this platform computes a convolution.
    """
    return _multiply_adds(_trace(function, *arguments)[0])


def _trace(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Any]:
    """Returns the program of a function in its plain form, and the shapes of its results."""
    with plain_operations():
        # Another function each time: JAX would return what it traced before, perhaps with other implementations.
        return jax.make_jaxpr(lambda *arguments: function(*arguments), return_shape=True)(*arguments)


def _multiply_adds(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        kind, parameters = equation.primitive.name, equation.params
        shapes = [variable.aval.shape for variable in equation.invars]
        outputs = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
        if kind == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            total += outputs * math.prod(shapes[0][axis] for axis in contracted)
        elif kind == "conv_general_dilated":
            out_channels = shapes[1][parameters["dimension_numbers"].rhs_spec[0]]
            total += outputs * math.prod(shapes[1]) // out_channels
        else:
            total += sum(_multiply_adds(inner) for inner in jax.tree.leaves(parameters) if hasattr(inner, "eqns"))
    return total


def cost(model: Classifier) -> tuple[int, int]:
    """Returns a model's parameters and the multiply-adds of one image of its own size; traces, and computes nothing."""
    size = model.backbone.image_size
    height, width = (size, size) if isinstance(size, int) else size
    images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
    run, (_, variables) = _trace(model.init_with_output, jax.random.key(0), images)
    return count_parameters(variables["params"]), _multiply_adds(run)


def report(result: Mapping[str, Any], params: Any, info: Mapping[str, Any]) -> dict[str, Any]:
    """Adds to a result what it belongs to: the content of `eval.json`."""
    about = {key: value for key, value in info["preprocessing"].items() if key not in ("mean", "std")}
    return {
        "model": info["model"]["name"],
        "step": info["step"],
        "weights": info["weights"],
        **result,
        "param_count": count_parameters(params),
        **about,
    }


def write(result: Mapping[str, Any], workdir: str | Path, name: str = "eval.json") -> None:
    """Writes `eval.json` into a folder."""
    if jax.process_index() == 0:
        checkpoint.write_text(checkpoint.place(workdir) / name, json.dumps(result, indent=2) + "\n")


def run(config: Mapping[str, Any], workdir: str | Path) -> dict[str, Any]:
    """Evaluates the newest checkpoint of a run, and writes `eval.json` and `predictions.csv`.

    Args:
      config: as for training.
      workdir: of the run; where it holds no checkpoint, the one that `config.init_from` names is evaluated.

    Returns:
      The content of `eval.json`: the averaged weights' figures where there are any, and then the raw ones' as 'raw'.

    Raises:
      UserError: there is no checkpoint, it holds another model, or the data is missing or of another size.
    """
    check_config(config)
    batch_size, _ = call(settings, "evaluate", config["evaluate"])
    mesh = call(make_mesh, "mesh", config["mesh"])
    data = call(open_data, "data", config["data"])
    kwargs = model_kwargs(config, len(data.classes))
    own = checkpoint.read_info(workdir) is not None
    path = workdir if own or config["init_from"] is None else config["init_from"]
    variables, info = read_model(path)
    check_same_model(kwargs, info["model"], path)
    model: Classifier = call(create_model, "model", kwargs)
    check_image_size(model, variables, data.preprocessing["image_size"])
    eval_step = make_eval_step(model, data.preprocessing, mesh, jnp.dtype(config["dtype"]))
    rows: dict[str, list[dict[str, Any]]] = {info["weights"]: []}
    placed = jax.device_put(variables, replicated(mesh))
    result = evaluate(eval_step, placed, data, batch_size, mesh, rows[info["weights"]])
    result = report(result, variables["params"], {**info, "preprocessing": data.preprocessing})
    if info["weights"] == "ema" and (raw := checkpoint.read_variables(path, ema=False))[1]["weights"] == "raw":
        rows["raw"] = []
        found = evaluate(eval_step, jax.device_put(raw[0], replicated(mesh)), data, batch_size, mesh, rows["raw"])
        result["raw"] = {key: found[key] for key in ("top1", "top5", "branch_top1", "loss")}
    if not checkpoint.in_bucket(workdir):
        Path(workdir).mkdir(parents=True, exist_ok=True)
    write(result, workdir)
    if jax.process_index() == 0:
        checkpoint.write_text(checkpoint.place(workdir) / "predictions.csv", as_csv(rows))
    return result


def run_on(workdir: str | Path, folder: Path, labels: str, file: Path | None, batch_size: int) -> dict[str, Any]:
    """Evaluates the newest checkpoint of an ImageNet run on one of ImageNet's relatives.

    Args:
      workdir: of the run; `eval_<labels>.json` and `predictions_<labels>.csv` are written into it.
      folder: of the images, one folder per class: by WordNet number, or, of V2, by label.
      labels: a key of `maxmap.labels.LABEL_SETS`.
      file: of ReaL: its `real.json`; the images are then the validation images.
      batch_size: images at a time.

    Returns:
      The content of `eval_<labels>.json`.

    Raises:
      UserError: there is no checkpoint, it is not one of ImageNet's 1,000 classes, or the files do not fit.
    """
    variables, info = checkpoint.read_variables(workdir)
    classes, kind = info["classes"], LABEL_SETS[labels]
    if len(classes) != 1000 or sorted(classes) != list(classes):
        raise UserError(f"{workdir} was not trained on ImageNet's 1,000 classes by WordNet number.")
    if (labels == "real") != (file is not None):
        raise UserError("--labels=real needs --file=real.json, and no other label set has a file.")
    pre = info["preprocessing"]
    data = open_data(
        "folder",
        folder.absolute().parent,
        train_split=None,
        val_split=folder.name,
        classes=[str(i) for i in range(1000)] if kind["folders"] == "numbers" else classes,
        crop_pct=pre["crop_pct"],
        crop_mode=pre["crop_mode"],
        eval_interpolation=pre["interpolation"],
        image_size=pre["image_size"],
        mean=pre["mean"],
        std=pre["std"],
    )
    assert data.val is not None
    among = None
    if kind["among"]:
        among = [label for label, name in enumerate(classes) if (folder / name).is_dir()]
    mesh, model = make_mesh(), create_model(**info["model"])
    eval_step = make_eval_step(model, pre, mesh, jnp.dtype(jnp.float32), among)
    rows: list[dict[str, Any]] = []
    result = evaluate(eval_step, jax.device_put(variables, replicated(mesh)), data, batch_size, mesh, rows)
    if file is not None:
        real = read_real(file)
        del result["loss"]  # of the first label alone
        result |= count(rows, {row["index"]: real_labels(real, row["name"]) for row in rows})
    result = report({"labels": labels, **result}, variables["params"], info)
    write(result, workdir, f"eval_{labels}.json")
    if jax.process_index() == 0:
        checkpoint.write_text(checkpoint.place(workdir) / f"predictions_{labels}.csv", as_csv({info["weights"]: rows}))
    return result


def check_image_size(model: nn.Module, variables: Any, size: int) -> None:
    """Raises UserError unless a model takes images of `size` pixels."""
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    try:
        jax.eval_shape(model.apply, variables, images)
    except (ValueError, TypeError, FlaxError) as error:
        raise UserError(f"the model does not take the images of config.data, {size} pixels: {error}.") from None


def check_same_model(wanted: Mapping[str, Any], found: Mapping[str, Any], where: str | Path) -> None:
    """Raises UserError, naming the differences, unless a checkpoint's model is the one that the config describes."""
    # What only training sees does not change the model.
    keys = [key for key in sorted({*wanted, *found}) if key not in ("drop_path", "remat")]
    wanted, found = json.loads(json.dumps(wanted)), json.loads(json.dumps(found))
    differences = [
        f"{key} is {found.get(key, 'not set')} there and {wanted.get(key, 'not set')} here"
        for key in keys
        if wanted.get(key) != found.get(key)
    ]
    if differences and not _same_model(wanted, found):
        raise UserError(
            f"the checkpoint in {where} holds another model ({'; '.join(differences)}): give another folder, or the "
            "config that it was made with."
        )


def _same_model(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two descriptions build the same model, whatever they spell out; what only training sees apart."""
    descriptions = ({key: value for key, value in fields.items() if key != "drop_path"} for fields in (one, other))
    try:
        models = [create_model(**description) for description in descriptions]
    except (UserError, TypeError):
        return False
    return one["name"] == other["name"] and models[0] == models[1]
