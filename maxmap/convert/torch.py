"""PyTorch state dicts to Flax variables and back, by one rule for all families.

A Flax path is the state-dict key of the reference with its digits glued on: `stages.0.blocks.1` is `stages_0/blocks_1`.
So one rule names every leaf, and a kernel only needs a transpose.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import traverse_util

from maxmap.convert.buffers import buffers, counters
from maxmap.convert.dialects import ALIASES, CANONICAL, naming_for, rename
from maxmap.convert.wrappers import KeyMatch, leave_out, match_keys
from maxmap.errors import UserError, shortened
from maxmap.heads.linear import LinearHead
from maxmap.layers.primitives import pair
from maxmap.models import Classifier
from maxmap.shapes import eval_shape_of_init

LeafPath = tuple[str, ...]  # from the collection to the leaf, for example ('params', 'backbone', 'stem', 'bias')
LeafShapes = dict[LeafPath, jax.ShapeDtypeStruct]

_LEAVES = {
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}
_FEW, _LISTED = 25, 5  # an error names a few faults, or so many of each kind


def torch_name(path: LeafPath, model: Classifier) -> str:
    """Returns the canonical state-dict key of a leaf.

    Args:
      path: of the leaf.
      model: the model that has the leaf.
    """
    collection, room, *modules, leaf = path
    parts = [re.sub(r"_(\d+)(?=_|$)", r".\1", module) for module in modules]
    # In timm the norm before the pooling is not a part of the head.
    outside = isinstance(model.head, LinearHead) and model.head.norm == "before" and modules[:1] == ["norm"]
    prefix = ["head"] if room == "head" and not outside else []
    name = ".".join([*prefix, *parts, _LEAVES.get((collection, leaf), leaf)])
    for module in (model.head, model.backbone):
        name = rename(name, CANONICAL.get(type(module).__name__, ()))
    return name


def abstract_variables(model: Classifier, channels: int = 3) -> dict[str, Any]:
    """Returns the shapes and types of a model's variables; computes nothing, and traces each model once."""
    traced = _traced(model, channels, jnp.result_type(float))
    return jax.tree.map(lambda leaf: leaf, traced)  # dicts that the caller may change


@functools.lru_cache(maxsize=64)
def _traced(model: Classifier, channels: int, dtype: Any) -> dict[str, Any]:
    del dtype  # of the variables, which float64 mode makes wider: a part of the cache's key
    images = jax.ShapeDtypeStruct((1, *pair(model.backbone.image_size), channels), jnp.float32)
    return eval_shape_of_init(model.init, jax.random.key(0), images)


def leaf_shapes(model: Classifier) -> LeafShapes:
    """Returns the shapes of a model's leaves by path, for images of three channels."""
    return traverse_util.flatten_dict(abstract_variables(model))


def from_torch(state_dict: Mapping[str, Any], model: Classifier, *, ignore: Sequence[str] = ()) -> dict[str, Any]:
    """Converts a PyTorch state dict to variables.

    Args:
      state_dict: tensors or arrays by name, in any dialect; the names show which one. A prefix before the names of the
        model, which a wrapper such as `torch.nn.DataParallel` adds, is taken off.
      model: the model of the result. Its images may have any number of channels.
      ignore: shell patterns of entries to leave out.

    Returns:
      The variables {'params': ..., 'batch_stats': ...} as NumPy arrays, float64 ones in float64, others in float32.

    Raises:
      UserError: names all entries that are missing, left over, duplicate, of another shape or not finite.
    """
    shapes = leaf_shapes(model)
    state_dict = leave_out(state_dict, ignore)
    match = match_entries(state_dict, model, shapes)
    entries, faults = read_entries(state_dict, model, shapes, match)
    faults += [f"missing: {torch_name(path, model)}" for path in shapes if path not in entries]
    first = image_kernels(shapes)
    for path, value in entries.items():
        shape = shapes[path].shape
        if value.shape != shape and not (path in first and value.shape[:2] + value.shape[3:] == shape[:2] + shape[3:]):
            faults.append(f"misshapen: {torch_name(path, model)} is {value.shape}, the model has {shape}")
    raise_faults(faults, match)
    return traverse_util.unflatten_dict(
        {path: np.array(value, _upcast_type(value.dtype), order="C") for path, value in entries.items()}
    )


def to_torch(variables: Mapping[str, Any], model: Classifier, dialect: str | None = None) -> dict[str, np.ndarray]:
    """Converts Flax variables to a PyTorch state dict; the inverse of `from_torch`.

    In a dialect the result has every key that a strict `load_state_dict` of that code base wants, see `buffers`.

    Args:
      variables: variables of the model.
      model: the model.
      dialect: names and shapes of the result, a key of `dialects.DIALECTS`; None for the canonical ones.

    Returns:
      The arrays by name, in PyTorch's layout and in the types of the variables.

    Raises:
      UserError: there is no such dialect, it does not have the backbone, or the batch norms are folded.
    """
    naming = naming_for(dialect, type(model.backbone).__name__, type(model.head).__name__)
    leaves = traverse_util.flatten_dict(dict(variables))
    require_whole(leaves, model)
    state_dict = {}
    for path, value in leaves.items():
        key, value = torch_name(path, model), _to_torch_layout(np.asarray(value), path)
        if re.fullmatch(naming.matrices, key):
            value = value.reshape(value.shape[:2])
        state_dict[naming.from_canonical(key)] = value
    if dialect is not None:
        state_dict |= counters(state_dict) | buffers(state_dict, model)
    return state_dict


def require_whole(leaves: Mapping[LeafPath, Any], model: Classifier) -> None:
    """Raises UserError if batch norms are folded into the layers beside them: only their biases are left then."""
    biases = [path[1:-1] for path in leaves if path[-1] == "bias" and (*path[:-1], "kernel") not in leaves]
    means = {("batch_stats", *path, "mean") for path in biases if ("params", *path, "scale") not in leaves}
    missing = means - leaves.keys()
    if missing and leaf_shapes(model).keys() & missing:  # the model is traced only then
        raise UserError("the variables are fused for inference: give those from before maxmap.fuse.")


def match_entries(state_dict: Mapping[str, Any], model: Classifier, shapes: LeafShapes) -> KeyMatch:
    """Finds a model's entries in a state dict by its keys; see `match_keys`."""
    return match_keys(state_dict, {torch_name(path, model) for path in shapes})


def read_entries(
    state_dict: Mapping[str, Any], model: Classifier, shapes: LeafShapes, match: KeyMatch
) -> tuple[dict[LeafPath, np.ndarray], list[str]]:
    """Finds the leaves of a model in a state dict. It does not compare shapes.

    Args:
      state_dict: see `from_torch`.
      model: the model.
      shapes: `leaf_shapes` of the model.
      match: `match_entries` of the same.

    Returns:
      The leaves by path, in Flax's layout, as views of the source in its own types; and the faults, a phrase for each
      entry that is left over, duplicate, not readable or not finite.
    """
    faults = []
    sources: dict[str, str] = {}  # keys by canonical name
    for key, second_name in match.names.items():
        name = rename(second_name, ALIASES)
        other = sources.setdefault(name, key)
        if other != key:
            aliased = name != second_name or rename(match.names[other], ALIASES) != match.names[other]
            if not (aliased and np.array_equal(as_array(state_dict[other]), as_array(state_dict[key]))):
                faults.append(f"twice there: {shortened(name)}, as {shortened(other)} and as {shortened(key)}")
    wanted = {torch_name(path, model): path for path in shapes}
    faults += [f"left over: {shortened(key)}" for name, key in sources.items() if name not in wanted]
    entries = {}
    for name, path in wanted.items():
        if name not in sources:
            continue
        value = as_array(state_dict[sources[name]])
        if not jnp.issubdtype(value.dtype, jnp.floating):
            faults.append(f"no floating-point numbers: {sources[name]} is {_describe(state_dict[sources[name]])}")
            value = np.broadcast_to(np.float32(0), value.shape)
        if value.size and not (np.isfinite(value.min()) and np.isfinite(value.max())):
            faults.append(f"not finite: {sources[name]} holds NaN or infinity")
        entries[path] = _from_torch_layout(value, path, len(shapes[path].shape))
    return entries, faults


def image_kernels(shapes: LeafShapes) -> list[LeafPath]:
    """Returns the paths of the kernels with three input channels, which read the images; FastViT has two."""
    paths = [path for path, leaf in shapes.items() if path[-1] == "kernel" and leaf.shape[2:3] == (3,)]
    return [path for path in paths if path[:3] == paths[0][:3]]


def raise_faults(faults: Sequence[str], match: KeyMatch | None = None) -> None:
    """Raises UserError if there are faults; it lists the first ones of each kind.

    Args:
      faults: phrases such as "missing: stem.weight", whose beginning up to the colon is their kind.
      match: how the keys of a foreign state dict fit the model.
    """
    if not faults:
        return
    by_kind: dict[str, list[str]] = {}
    for fault in faults:
        by_kind.setdefault(fault.partition(":")[0], []).append(fault)
    listed: list[str] = []
    for kind, found in by_kind.items():
        shown = len(found) if len(faults) <= _FEW else _LISTED
        listed += [*found[:shown], *([f"and {len(found) - shown} more {kind}"] if len(found) > shown else [])]
    about, advice = (f", {match.describe()}", match.advice(faults)) if match else ("", "")
    raise UserError(
        f"the state dict does not fit the model, {len(faults)} entries differ{about}: "
        f"{'; '.join(listed)}; give the model, the head, the number of classes and the image size of the state "
        f"dict{advice}."
    )


def as_array(value: Any) -> np.ndarray:
    """Returns a tensor or array as an array of the same type that shares its memory.

    What has no numbers in the memory that NumPy can read, such as a sparse, quantised or meta tensor, becomes an empty
    array of objects, which `read_entries` calls a fault.
    """
    try:
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            if str(value.dtype) == "torch.bfloat16":  # NumPy has no such type, and torch does not know ml_dtypes' one
                import torch

                return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            value = value.numpy()
        is_number = hasattr(value, "shape") or isinstance(value, (int, float))
        return np.asarray(value) if is_number else np.empty((), object)
    except (TypeError, ValueError, RuntimeError):  # torch and JAX raise many kinds of these
        return np.empty((), object)


def _describe(value: Any) -> str:
    """Returns what a value without readable floating-point numbers is, and what to give instead."""
    if as_array(value).dtype != object:
        return f"of type {as_array(value).dtype}"
    if not hasattr(value, "detach"):
        return f"of type {type(value).__name__}"
    traits = [str(getattr(value, name, "")).removeprefix("torch.") for name in ("dtype", "layout", "device")]
    return f"a tensor ({', '.join(traits)}) that cannot be read, give a dense one of float32 in memory"


def _upcast_type(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def _from_torch_layout(value: np.ndarray, path: LeafPath, ndim: int) -> np.ndarray:
    """Returns an entry in Flax's layout.

    Kernels change from `[O, I, kh, kw]` to `[kh, kw, I, O]` and from `[O, I]` to `[I, O]`, other leaves with four
    dimensions from NCHW to NHWC. A 1x1 convolution and a linear layer are the same map, so the kernel of one becomes
    that of the other if the model's leaf has `ndim` dimensions.
    """
    if path[-1] == "kernel":
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
        if (value.ndim, ndim) == (2, 4):
            return value[None, None]
        return value[0, 0] if (value.ndim, ndim) == (4, 2) and value.shape[:2] == (1, 1) else value
    return value.transpose(0, 2, 3, 1) if value.ndim == 4 else value


def _to_torch_layout(value: np.ndarray, path: LeafPath) -> np.ndarray:
    """Returns a leaf in PyTorch's layout; the inverse of `_from_torch_layout` for equal dimensions."""
    if path[-1] == "kernel":
        return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
    return value.transpose(0, 3, 1, 2) if value.ndim == 4 else value
