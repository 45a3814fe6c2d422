"""PyTorch state dicts to Flax variables and back, for every family, by rule instead of by key table.

Flax paths are the reference's state-dict names with digits glued on (`stages.0.blocks.1` is `stages_0/blocks_1`), so
one rule names every leaf, and kernels need only a transpose.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import traverse_util

from maxmap.convert.dialects import ALIASES, CANONICAL, detect_naming, naming_for, rename, strip_prefixes
from maxmap.errors import UserError
from maxmap.heads.linear import LinearHead
from maxmap.models import Classifier

LeafPath = tuple[str, ...]
LeafShapes = dict[LeafPath, jax.ShapeDtypeStruct]

# Entries that a module computes for itself and that hold nothing learned; counters of averages too.
DERIVED = re.compile(
    r"(.*\.)?(num_batches_tracked|n_averaged|bp_index|relative_position_index|relative_coords_table|relative_bias)"
)

_LEAVES = {
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}
_LISTED = 20  # differences that an error names


def torch_name(path: LeafPath, model: Classifier) -> str:
    """Returns the canonical state-dict key of a leaf.

    Args:
      path: from the collection to the leaf, for example ('params', 'backbone', 'stem', 'conv1', 'kernel').
      model: that the leaf belongs to.
    """
    collection, room, *modules, leaf = path
    parts = [re.sub(r"_(\d+)(?=_|$)", r".\1", module) for module in modules]
    # timm keeps the norm in front of the pooling outside of its head.
    outside = isinstance(model.head, LinearHead) and model.head.norm == "before" and modules[:1] == ["norm"]
    prefix = ["head"] if room == "head" and not outside else []
    name = ".".join([*prefix, *parts, _LEAVES.get((collection, leaf), leaf)])
    for module in (model.head, model.backbone):
        name = rename(name, CANONICAL.get(type(module).__name__, ()))
    return name


def abstract_variables(model: Classifier, channels: int = 3) -> dict[str, Any]:
    """Returns the shapes and types of a model's variables, without computing anything."""
    size = model.backbone.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, height, width, channels)))


def leaf_shapes(model: Classifier) -> LeafShapes:
    """Returns the shapes of a model's leaves by path, for images of three channels; tracing takes a second or two."""
    return traverse_util.flatten_dict(abstract_variables(model))


def from_torch(state_dict: Mapping[str, Any], model: Classifier) -> dict[str, Any]:
    """Converts a PyTorch state dict.

    Args:
      state_dict: tensors or arrays by name, in any of the dialects, which their names tell.
      model: whose variables they become; the images may have other than three channels.

    Returns:
      The variables {'params': ..., 'batch_stats': ...} as NumPy arrays, in float64 where the source is, else float32.

    Raises:
      UserError: names all entries that are missing, left over, twice there, of another shape or no finite numbers.
    """
    shapes = leaf_shapes(model)
    entries, faults = read_entries(state_dict, model, shapes)
    faults += [f"missing: {torch_name(path, model)}" for path in shapes if path not in entries]
    stem = image_kernel(shapes)
    for path, value in entries.items():
        shape = shapes[path].shape
        if value.shape != shape and not (path == stem and value.shape[:2] + value.shape[3:] == shape[:2] + shape[3:]):
            faults.append(f"misshapen: {torch_name(path, model)} is {value.shape}, the model has {shape}")
    raise_faults(faults)
    return traverse_util.unflatten_dict(
        {path: np.array(value, _widened(value.dtype), order="C") for path, value in entries.items()}
    )


def to_torch(variables: Mapping[str, Any], model: Classifier, dialect: str | None = None) -> dict[str, np.ndarray]:
    """Converts Flax variables to a PyTorch state dict; the inverse of `from_torch`.

    Args:
      variables: of the model.
      model: that they belong to.
      dialect: whose names and shapes, a key of `dialects.DIALECTS`; None for the canonical ones.

    Raises:
      UserError: the dialect has no such backbone.
    """
    names = naming_for(dialect, type(model.backbone).__name__, type(model.head).__name__)
    state_dict = {}
    for path, value in traverse_util.flatten_dict(dict(variables)).items():
        key, value = torch_name(path, model), _to_torch_layout(np.asarray(value), path)
        if re.fullmatch(names.matrices, key):
            value = value.reshape(value.shape[:2])
        state_dict[names.from_canonical(key)] = value
    return state_dict


def canonical_names(state_dict: Mapping[str, Any]) -> dict[str, str]:
    """Returns the canonical name of every key of a state dict that holds something learned."""
    keys = strip_prefixes(key for key in state_dict if not DERIVED.fullmatch(key))
    names = detect_naming(keys.values())
    return {key: names.to_canonical(short) for key, short in keys.items()}


def detect_dialect(state_dict: Mapping[str, Any]) -> str:
    """Returns whose names a state dict has."""
    return detect_naming(strip_prefixes(key for key in state_dict if not DERIVED.fullmatch(key)).values()).dialect


def read_entries(
    state_dict: Mapping[str, Any], model: Classifier, shapes: LeafShapes
) -> tuple[dict[LeafPath, np.ndarray], list[str]]:
    """Finds each leaf of a model in a state dict, whatever its shape.

    Args:
      state_dict: as for `from_torch`.
      model: whose leaves they are.
      shapes: of `leaf_shapes`.

    Returns:
      The leaves that are there by path, in Flax's layout, as views of the source in its own type; and the faults, a
      phrase each: entries that are left over, twice there or no finite numbers.
    """
    faults = []
    sources: dict[str, str] = {}  # keys by canonical name
    for key, second_name in canonical_names(state_dict).items():
        name = rename(second_name, ALIASES)
        other = sources.setdefault(name, key)
        if other != key:
            aliased = name != second_name or rename(other, ALIASES) != other
            if not (aliased and np.array_equal(as_array(state_dict[other]), as_array(state_dict[key]))):
                faults.append(f"twice there: {name}, as {other} and as {key}")
    wanted = {torch_name(path, model): path for path in shapes}
    faults += [f"left over: {name}" for name in sources if name not in wanted]
    entries = {}
    for name, path in wanted.items():
        if name not in sources:
            continue
        value = as_array(state_dict[sources[name]])
        if not jnp.issubdtype(value.dtype, jnp.floating):
            faults.append(f"no floating-point numbers: {name} is of type {value.dtype}")
            value = np.broadcast_to(np.float32(0), value.shape)
        if value.size and not (np.isfinite(value.min()) and np.isfinite(value.max())):
            faults.append(f"not finite: {name} holds NaN or infinity")
        entries[path] = _from_torch_layout(value, path, len(shapes[path].shape))
    return entries, faults


def image_kernel(shapes: LeafShapes) -> LeafPath | None:
    """Returns the path of the convolution that reads the images: the one with three input channels."""
    return next((path for path, leaf in shapes.items() if path[-1] == "kernel" and leaf.shape[2:3] == (3,)), None)


def raise_faults(faults: Sequence[str]) -> None:
    """Raises UserError, naming what differs, if there are faults."""
    if faults:
        more = [f"and {len(faults) - _LISTED} more"] if len(faults) > _LISTED else []
        listed = "; ".join([*faults[:_LISTED], *more])
        raise UserError(
            f"the state dict does not fit the model, {len(faults)} entries differ: {listed}; give the model, number of "
            "classes and image size that it was made with."
        )


def as_array(value: Any) -> np.ndarray:
    """A tensor or array as an array of the same type that shares its memory."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # NumPy has no such type, and torch does not know the one of ml_dtypes
            import torch

            return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        value = value.numpy()
    return np.asarray(value)


def _widened(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def _from_torch_layout(value: np.ndarray, path: LeafPath, ndim: int) -> np.ndarray:
    """Kernels `[O, I, kh, kw]` to `[kh, kw, I, O]` and `[O, I]` to `[I, O]`, other 4-d leaves from NCHW to NHWC.

    A 1x1 convolution and a linear layer are the same map; checkpoints hold either, `ndim` is what the model has.
    """
    if path[-1] == "kernel":
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
        if (value.ndim, ndim) == (2, 4):
            return value[None, None]
        return value[0, 0] if (value.ndim, ndim) == (4, 2) and value.shape[:2] == (1, 1) else value
    return value.transpose(0, 2, 3, 1) if value.ndim == 4 else value


def _to_torch_layout(value: np.ndarray, path: LeafPath) -> np.ndarray:
    if path[-1] == "kernel":
        return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
    return value.transpose(0, 3, 1, 2) if value.ndim == 4 else value
