"""Proof of a conversion: the reference implementation runs the source, our model runs the checkpoint."""

import contextlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from maxmap import checkpoint, storage
from maxmap.convert import hub
from maxmap.convert.dialects import naming_for
from maxmap.convert.load import read_model
from maxmap.convert.mobilenet import identity_variances
from maxmap.convert.sources import read_source
from maxmap.convert.torch import as_array, image_kernels, leaf_shapes, match_entries, to_torch
from maxmap.errors import UserError
from maxmap.layers.primitives import pair
from maxmap.models import Classifier, create_model
from maxmap.ranges import Count, Positive

REPORT = "verify.json"
TOLERANCES = {"float32": 1e-3, "float64": 1e-9}


def verify(
    path: str | Path,
    against: str | Path,
    *,
    ema: bool | None = None,
    tolerance: Positive | None = None,
    images: Count = 2,
    classifier: str | Path | None = None,
) -> dict[str, Any]:
    """Compares a checkpoint with its source, and writes the report beside the checkpoint.

    All values are compared bit by bit. If timm (for maxvit_t: torchvision) has the model, both also run on the same
    noise in float32 and float64, and the logits, the feature maps and the gradients of all parameters are compared. The
    gradients decide in float64 alone.

    Args:
      path: of the checkpoint.
      against: the source; see `read_source`.
      ema: weights of the source, True for the averaged ones; None for those that the checkpoint was made from.
      tolerance: largest difference in float64; None for `TOLERANCES`. Differences are relative, see `_compare`.
      images: size of the batch.
      classifier: file of the classifier, where the source has the trunk alone; see `read_source`.

    Returns:
      The report: 'model', 'source', 'reference', 'identical' (entries with the same bits), 'entries', 'ok', and for
      each type 'logits', 'logits_max', 'features' (a list), 'top1', 'gradient', 'tolerance'.

    Raises:
      UserError: there is no checkpoint or source, or they are of different models.
    """
    against = storage.expand(against)
    variables, info = read_model(path)
    model = create_model(**info["model"])
    where = hub.download(str(against)) if hub.is_name(against) and not Path(against).exists() else Path(against)
    source = read_source(where, ema=info["weights"] == "ema" if ema is None else ema, classifier=classifier)
    keys = match_entries(source.tensors, model, leaf_shapes(model)).names
    theirs = {name: as_array(source.tensors[key]) for key, name in keys.items()}
    theirs |= identity_variances(theirs, model)
    ours = to_torch(variables, model)
    identical = sum(_identical(value, theirs.get(name)) for name, value in ours.items())
    report: dict[str, Any] = {
        "model": info["model"],
        "source": str(against),
        "reference": None,
        "entries": len(ours),
        "identical": identical,
        "ok": identical == len(ours),
    }
    reference = _reference(model, info["model"], theirs)
    if reference is not None:
        report["reference"] = _library(reference)
        first = image_kernels(leaf_shapes(model))
        channels = traverse_util.flatten_dict(variables)[first[0]].shape[2] if first else 3
        size = pair(model.backbone.image_size)
        x = np.random.default_rng(0).standard_normal((images, *size, channels))
        for dtype, allowed in (TOLERANCES | ({} if tolerance is None else {"float64": tolerance})).items():
            with jax.enable_x64(dtype == "float64"):
                row = _compare(model, variables, reference, x.astype(dtype))
            report[dtype] = {**row, "tolerance": allowed}
            # In float32 a rounding may switch a ReLU, which changes gradients by more than a rounding.
            gradient = row["gradient"] if dtype == "float64" else 0.0
            worst = max(row["logits"], gradient, *row["features"])
            report["ok"] = report["ok"] and bool(worst <= allowed)
    if storage.in_bucket(path) or checkpoint.folder(path).is_dir():
        storage.write_text(storage.resolve(path) / REPORT, json.dumps(report, indent=2) + "\n")
    return report


def import_timm() -> ModuleType:
    """Imports and returns timm, also where the compiled operators of torchvision do not load with this torch."""
    import torch

    if not _torchvision_operators_load(torch):
        # The package index has torchvision for CUDA only, whose operators do not load with a CPU build of torch. Its
        # import then fails at these two operators, so they are declared first. No model calls them.
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)
    import timm

    return timm


_LIBRARIES: list[Any] = []  # keeps the library alive: torch removes the operators of a deleted one


@contextlib.contextmanager
def keeping_float64() -> Iterator[None]:
    """Runs PyTorch with a `Tensor.float()` that leaves float64 as it is.

    timm calls that method where half precision would not do. A comparison in float64 wants float64 there too.
    """
    import torch

    kind: Any = torch.Tensor
    inherited = kind.float
    kind.float = lambda tensor: tensor if tensor.dtype == torch.float64 else inherited(tensor)
    try:
        yield
    finally:
        del kind.float


def _torchvision_operators_load(torch: ModuleType) -> bool:
    if hasattr(torch.ops.torchvision, "nms"):
        return True
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("torchvision is not installed: run make setup.")
    for path in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(path)
        except OSError:
            return False
        return True
    return False


def _identical(ours: np.ndarray, theirs: np.ndarray | None) -> bool:
    if theirs is None or ours.size != theirs.size:
        return False
    return np.array_equal(ours, theirs.astype(np.float32).reshape(ours.shape))


def _reference(model: Classifier, fields: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> Any:
    """Returns the reference implementation with the source's weights, None if no installed one has the model."""
    try:
        timm = import_timm()
    except ModuleNotFoundError:
        return None
    import torch

    name, classes = fields["name"], fields["num_classes"]
    if set(fields) - {"name", "num_classes", "image_size"}:
        return None  # the model has fields of its own, which timm does not know
    state_dict = {key: torch.from_numpy(value.astype(np.float64)) for key, value in weights.items()}
    if name == "maxvit_t":
        import torchvision

        reference = torchvision.models.maxvit_t(num_classes=classes)
    elif (known := name if name in timm.list_models() else name.removesuffix("_384")) in timm.list_models():
        sized = {"img_size": fields["image_size"]} if "image_size" in fields else {}
        try:
            reference = timm.create_model(known, num_classes=classes, **sized)
        except TypeError:  # models for any size do not have this argument
            reference = timm.create_model(known, num_classes=classes)
        if getattr(model.head, "hidden_epsilon", None) is not None:
            # timm has 1e-6 here. The authors trained the weights with 1e-5.
            reference.head.fc.norm.eps = model.head.hidden_epsilon
    else:
        return None
    naming = naming_for(_library(reference), type(model.backbone).__name__, type(model.head).__name__)
    shapes = reference.state_dict()
    state_dict = {naming.from_canonical(key): value for key, value in state_dict.items()}
    state_dict = {
        key: value.reshape(shapes[key].shape) if key in shapes and value.numel() == shapes[key].numel() else value
        for key, value in state_dict.items()
    } | {key: value for key, value in shapes.items() if key.endswith("relative_position_index")}  # torchvision's
    try:
        reference.load_state_dict(state_dict)
    except RuntimeError as error:
        raise UserError(
            f"the reference does not load the source ({' '.join(str(error).split())[:200]}): verify needs a checkpoint "
            "that was converted without changes of classes, image size or channels."
        ) from None
    return reference.eval()


def _compare(model: Classifier, variables: Any, reference: Any, x: np.ndarray) -> dict[str, Any]:
    """Runs both models in the type of the images and returns the differences.

    All but 'logits_max' are relative: of logits to their standard deviation, of feature maps and gradients to their
    largest value.
    """
    import torch

    dtype = x.dtype
    reference = reference.to(torch.float64 if dtype == np.float64 else torch.float32)
    for parameter in reference.parameters():
        parameter.grad = None
    images = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    direction = np.random.default_rng(1).standard_normal((len(x), model.head.num_classes)).astype(dtype)
    with keeping_float64():
        logits = reference(images)
        (logits * torch.from_numpy(direction)).sum().backward()
    wanted_logits = logits.detach().numpy()
    wanted_gradient = {key: p.grad.numpy() for key, p in reference.named_parameters() if p.grad is not None}
    wanted_maps: list[np.ndarray] = []
    if hasattr(reference, "forward_intermediates"):
        with torch.no_grad(), keeping_float64():
            _, maps = reference.forward_intermediates(images)
        wanted_maps = [np.asarray(m.permute(0, 2, 3, 1)) for m in maps if m.ndim == 4]
    variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), variables)

    def run(module: Classifier, images: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        features = module.backbone(images)
        return features, jnp.mean(module.head(features)["logits"], axis=0)

    def loss(params: Any, images: jax.Array) -> tuple[jax.Array, Any]:
        features, logits = model.apply({**variables, "params": params}, images, method=run)
        return jnp.sum(logits * direction), (features, logits)

    with jax.default_matmul_precision("highest"):
        gradient, (features, ours) = jax.jit(jax.grad(loss, has_aux=True))(variables["params"], jnp.asarray(x))
    ours = np.asarray(ours)
    if getattr(model.backbone, "head_width", 0):  # timm does not return the map of this convolution
        features = features[:-1]
    pairs = list(zip(reversed(features), reversed(wanted_maps), strict=False))
    maps = [_relative(a, b, np.abs(b).max()) for a, b in reversed(pairs) if a.shape == b.shape]
    named = to_torch({"params": gradient}, model, _library(reference))
    norm = max(np.abs(value).max() for value in wanted_gradient.values())
    difference = np.abs(ours - wanted_logits).max()
    return {
        "logits": float(difference / wanted_logits.std()),
        "logits_max": float(difference),
        "features": maps,
        "top1": float(np.mean(ours.argmax(-1) == wanted_logits.argmax(-1))),
        "gradient": max(
            _relative(value, wanted_gradient[key].reshape(value.shape), norm)
            for key, value in named.items()
            if key in wanted_gradient
        ),
    }


def _library(reference: Any) -> str:
    """Returns the library of a reference implementation, "timm" or "torchvision", which is a dialect's name too."""
    return type(reference).__module__.partition(".")[0]


def _relative(ours: Any, wanted: np.ndarray, scale: float) -> float:
    return float(np.abs(np.asarray(ours) - wanted).max() / scale)
