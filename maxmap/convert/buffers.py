"""Entries of a state dict that hold nothing learned; a reference's strict `load_state_dict` wants them too."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from maxmap.backbones.efficientvit_msra import distance_index
from maxmap.backbones.fastervit import PositionBias, PositionCode
from maxmap.convert.dialects import SECOND_NAMES, rename
from maxmap.layers.blocks import relative_index
from maxmap.models import Classifier


def counters(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the number of batches that each BatchNorm has seen. It is not known; 0 stands for it."""
    norms = [key.removesuffix("running_mean") for key in state_dict if key.endswith(".running_mean")]
    return {f"{norm}num_batches_tracked": np.zeros((), np.int64) for norm in norms}


def buffers(state_dict: Mapping[str, np.ndarray], model: Classifier) -> dict[str, np.ndarray]:
    """Returns second names of tensors, and tables that the references compute from their settings.

    The caches of position biases in FasterViT ('relative_bias') are zeros: the reference overwrites them before it uses
    them, except in its deployment mode.

    Args:
      state_dict: of the model, under the names of a dialect.
      model: the model.
    """
    found = {second: value for key, value in state_dict.items() if (second := rename(key, SECOND_NAMES)) != key}
    for key, value in state_dict.items():
        if match := re.fullmatch(r"(.*\.attn_layer\.1\.)relative_position_bias_table", key):  # torchvision
            side = (math.isqrt(value.shape[0]) + 1) // 2
            found[f"{match[1]}relative_position_index"] = _position_index(side)
        if match := re.fullmatch(r"(blocks\d.*\.)attention_biases", key):  # Microsoft's
            found[f"{match[1]}attention_bias_idxs"] = distance_index(math.isqrt(value.shape[1])).astype(np.int64)
        if match := re.fullmatch(r"(.*\.gram_token_extraction\.)ch_reduction\.0\.weight", key):
            rows, columns = np.triu_indices(value.shape[0])
            found[f"{match[1]}bp_index"] = rows * value.shape[0] + columns
    if type(model.backbone).__name__ == "FasterViT":
        found |= _fastervit_tables(model)
    return found


def _position_index(side: int) -> np.ndarray:
    """Returns where the table of a square's offsets has that of each query and key, `[side^2, side^2]`."""
    dy, dx = relative_index((side, side))
    return np.asarray(dy * (2 * side - 1) + dx, np.int64)


def _fastervit_tables(model: Classifier) -> dict[str, np.ndarray]:
    """Returns the tables of every position code and bias, whose sizes only the running model knows."""
    found: dict[str, np.ndarray] = {}

    def record(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if isinstance(module, PositionCode | PositionBias) and context.method_name == "__call__":
            name = re.sub(r"_(\d+)(?=_|$|\.)", r".\1", ".".join(module.path[1:]))
            found.update({f"{name}.{key}": value for key, value in _tables(module).items()})
        return call(*args, **kwargs)

    size = model.backbone.image_size
    height, width = (size, size) if isinstance(size, int) else size
    with nn.intercept_methods(record):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, height, width, 3)))
    return found


def _tables(module: PositionCode | PositionBias) -> dict[str, np.ndarray]:
    count = module.side**2
    if isinstance(module, PositionCode):
        return {"relative_bias": np.zeros((1, count, module.channels), np.float32)}
    total = module.carriers + count
    return {
        "relative_coords_table": module.offsets()[None],
        "relative_position_index": _position_index(module.side),
        "relative_bias": np.zeros((1, module.channels, total, total), np.float32),
    }
