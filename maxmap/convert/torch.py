"""PyTorch state dicts to Flax variables and back, for every family, by rule instead of by key table.

Flax paths are the reference's state-dict names with digits glued on (`stages.0.blocks.1` is `stages_0/blocks_1`), so
one rule names every leaf, and kernels need only a transpose.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from maxmap.convert.dialects import ALIASES, CANONICAL, recognise, rename
from maxmap.errors import UserError
from maxmap.heads.linear import LinearHead
from maxmap.models import Classifier

Path = tuple[str, ...]

# Entries that a module computes for itself and that hold nothing learned.
DERIVED = re.compile(
    r"(.*\.)?(num_batches_tracked|bp_index|relative_position_index|relative_coords_table|relative_bias)"
)

_LEAVES = {
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}


def torch_name(path: Path, model: Classifier) -> str:
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


def from_torch(state_dict: Mapping[str, Any], model: Classifier) -> dict[str, Any]:
    """Converts a PyTorch state dict.

    Args:
      state_dict: tensors or arrays by name.
      model: whose variables they become.

    Returns:
      The variables {'params': ..., 'batch_stats': ...} as NumPy arrays, in float64 where the source is, else float32.

    Raises:
      UserError: names all entries that are missing, left over or of another shape.
    """
    dialect = recognise(state_dict)
    renames = dialect.renames if dialect else ()
    arrays = {
        rename(rename(key, renames), ALIASES): _to_numpy(value)
        for key, value in state_dict.items()
        if not DERIVED.fullmatch(key)
    }
    template = traverse_util.flatten_dict(abstract_variables(model))
    wanted = {torch_name(path, model): path for path in template}
    # The convolution that reads the images is the one with three input channels; a checkpoint's may have others.
    stem = next((key for key, path in wanted.items() if template[path].shape[2:3] == (3,)), None)
    if stem in arrays and arrays[stem].shape[1:2] != (3,):
        template = traverse_util.flatten_dict(abstract_variables(model, arrays[stem].shape[1]))
    faults = [f"missing: {key}" for key in wanted if key not in arrays]
    faults += [f"left over: {key}" for key in arrays if key not in wanted]
    variables = {}
    for key, path in wanted.items():
        if key not in arrays:
            continue
        value = _from_torch_layout(arrays[key], path)
        shape = template[path].shape
        # A 1x1 convolution and a linear layer are the same map; checkpoints hold either.
        if path[-1] == "kernel" and tuple(n for n in value.shape if n != 1) == tuple(n for n in shape if n != 1):
            value = value.reshape(shape)
        if value.shape != shape:
            faults.append(f"misshapen: {key} is {value.shape}, the model has {shape}")
        variables[path] = value
    if faults:
        raise UserError(f"the state dict does not fit the model, {len(faults)} entries differ: {'; '.join(faults)}.")
    return traverse_util.unflatten_dict(variables)


def to_torch(variables: Mapping[str, Any], model: Classifier) -> dict[str, np.ndarray]:
    """Converts Flax variables to a PyTorch state dict with canonical names; the inverse of `from_torch`."""
    state_dict = {}
    for path, value in traverse_util.flatten_dict(dict(variables)).items():
        value = np.asarray(value)
        state_dict[torch_name(path, model)] = _to_torch_layout(value, path)
    return state_dict


def _from_torch_layout(value: np.ndarray, path: Path) -> np.ndarray:
    """Kernels `[O, I, kh, kw]` to `[kh, kw, I, O]` and `[O, I]` to `[I, O]`, other 4-d leaves from NCHW to NHWC."""
    if path[-1] == "kernel":
        return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    return value.transpose(0, 2, 3, 1) if value.ndim == 4 else value


def _to_torch_layout(value: np.ndarray, path: Path) -> np.ndarray:
    if path[-1] == "kernel":
        return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
    return value.transpose(0, 3, 1, 2) if value.ndim == 4 else value


def _to_numpy(value: Any) -> np.ndarray:
    """A tensor or array as float32, or float64 where it is that."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.double() if value.element_size() == 8 else value.float()
        value = value.numpy()
    value = np.asarray(value)
    return value if value.dtype == np.float64 else value.astype(np.float32)
