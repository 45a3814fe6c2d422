"""Models of TensorFlow.js: a `model.json`, which lists weights, and files beside it that hold their bytes.

Keras's names of MobileNetV1 become canonical ones; other names stay. The format is in tfjs-core/src/io/types.ts of
https://github.com/tensorflow/tfjs.
"""

import collections
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from maxmap.convert.manifests import is_beside, is_shape, is_size, read_json
from maxmap.convert.mobilenet import TRUNK, Network, dequantisation_note, name_classifier, tensorflow_name
from maxmap.errors import UserError, shortened

NAME = "model.json"
_TYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "int32": np.int32,
    "uint16": np.uint16,
    "uint8": np.uint8,
    "bool": np.bool_,
}
_LEAVES = {
    "kernel": "weight",
    "depthwise_kernel": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
_LARGEST_NUMBER = 1e30  # as scales are
_PARTS = re.compile(r"(?:.*/)?(conv1|conv_dw_\d+|conv_pw_\d+|conv_preds)(_bn)?/(\w+)")


def read_tfjs(path: Path) -> Network:
    """Reads the weights that a `model.json` lists.

    Args:
      path: of the `model.json`; the other files are beside it.

    Raises:
      UserError: files are missing or outside of the folder, or do not hold what is listed.
    """
    content = read_json(path)
    manifest = content.get("weightsManifest")
    if not isinstance(manifest, list) or not manifest:
        raise UserError(f"{path} is no model of TensorFlow.js: it has no 'weightsManifest'.")
    files: set[str] = set()
    counts: collections.Counter[str] = collections.Counter()
    tensors: dict[str, np.ndarray] = {}
    for group in manifest:
        data = _bytes_of(path, group, files)
        position = 0
        for entry in _entries(path, group):
            name, values, position = _read_entry(path, entry, data, position, counts)
            if name in tensors:
                raise UserError(f"{path} lists the weights {shortened(name)} twice: get it again.")
            tensors[name] = values
        if position != data.size:
            raise UserError(
                f"the files of {path} hold {data.size - position:,} bytes more than it lists: get them again."
            )
    network = _named(tensors, dequantisation_note(counts))
    network.image_size = _image_size(content)
    return network


def _image_size(content: Mapping[str, Any]) -> int | None:
    """Returns the side of the images that Keras's description of the network begins with; None if it has none."""
    value: Any = content
    for key in ("modelTopology", "model_config", "config", "layers", "first", "config", "batch_input_shape"):
        if key == "first":
            value = value[0] if isinstance(value, list) and value else None
        else:
            value = value.get(key) if isinstance(value, dict) else None
    square = isinstance(value, list) and len(value) == 4 and value[1] == value[2]
    return value[1] if square and is_size(value[1]) and value[1] else None


def _bytes_of(path: Path, group: Any, files: set[str]) -> np.ndarray:
    """Returns what the files of a group hold, one after another, mapped if it is one; adds them to `files`."""
    names = group.get("paths") if isinstance(group, dict) else None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} lists weights without 'paths' to their files: get it again.")
    parts = []
    for name in names:
        if not is_beside(name):
            raise UserError(f"{path} names the file {shortened(name)}, which is not beside it: get it again.")
        if name in files:
            raise UserError(f"{path} names the file {shortened(name)} twice: get it again.")
        files.add(name)
        file = path.parent / name
        if not file.is_file():
            raise UserError(f"there is no file {shortened(name)} beside {path}, which lists weights in it: get it too.")
        parts.append(np.memmap(file, np.uint8, "r") if file.stat().st_size else np.zeros(0, np.uint8))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _entries(path: Path, group: Mapping[str, Any]) -> list[Any]:
    entries = group.get("weights")
    if not isinstance(entries, list):
        raise UserError(f"{path} has a group without 'weights': get it again.")
    return entries


def _read_entry(
    path: Path, entry: Any, data: np.ndarray, position: int, counts: collections.Counter[str]
) -> tuple[str, np.ndarray, int]:
    """Reads one tensor; returns its name, its values and where the next one begins."""
    name, shape, dtype = (entry.get(key) if isinstance(entry, dict) else None for key in ("name", "shape", "dtype"))
    if not isinstance(name, str) or not is_shape(shape):
        raise UserError(f"{path} lists weights without a name or a shape: get it again.")
    packing = entry.get("quantization", {})
    stored = packing.get("dtype", dtype) if isinstance(packing, dict) else None
    if not isinstance(stored, str) or stored not in _TYPES:
        raise UserError(f"{path} lists {shortened(name)} with the type {shortened(stored)}, which maxmap cannot read.")
    size = math.prod(shape) * np.dtype(_TYPES[stored]).itemsize
    if size > data.size - position:
        raise UserError(f"the files of {path} end within {shortened(name)}: get them again.")
    values = data[position : position + size].view(_TYPES[stored]).reshape(shape)
    if packing and stored != "float16":
        scale, least = packing.get("scale"), packing.get("min")
        if not (_is_number(scale) and _is_number(least)):
            raise UserError(f"{path} lists {shortened(name)} as integers without 'scale' and 'min': get it again.")
        with np.errstate(all="ignore"):  # what is not finite is refused later, with its name
            values = values.astype(np.float32) * np.float32(scale) + np.float32(least)
        counts[stored] += 1
    return name, values, position + size


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _LARGEST_NUMBER  # also False for NaN


def _named(tensors: Mapping[str, np.ndarray], notes: list[str]) -> Network:
    """Gives the variables of Keras's MobileNetV1 canonical names and PyTorch's layout."""
    modules = {"conv1": "layers.0.0.0", "conv_preds": "fc.2"}
    for number, (name, *_) in enumerate(TRUNK[1:]):
        modules[f"conv_{('dw', 'pw')[number % 2]}_{number // 2 + 1}"] = name
    network = Network(notes=notes)
    for key, values in tensors.items():
        match = _PARTS.fullmatch(key)
        module = modules.get(match[1]) if match else None
        if match is None or module is None or match[3] not in _LEAVES:
            network.tensors[key] = values
            continue
        if match[2]:  # a norm, whose number is one more than its convolution's
            module = f"{module[:-1]}{int(module[-1]) + 1}"
        if values.ndim == 4:
            values = values.transpose((2, 3, 0, 1) if match[3] == "depthwise_kernel" else (3, 2, 0, 1))
        if module == "fc.2" and values.ndim == 4:
            values = values[:, :, 0, 0]
        network.tensors[f"{module}.{_LEAVES[match[3]]}"] = values
        if key.endswith("conv1/kernel") and values.ndim == 4:
            network.name = tensorflow_name(values.shape[0])
    weight, bias = (network.tensors.get(f"fc.2.{leaf}") for leaf in ("weight", "bias"))
    if weight is not None and bias is not None and len(weight) == len(bias):
        classifier, said = name_classifier(weight, bias)
        network.tensors |= classifier
        network.notes += said
    return network
