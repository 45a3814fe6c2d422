"""What the parity tests compare with: the reference implementation (timm) and the weights of the golden files."""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from maxmap.convert import verify

POSITIONS = ("relative_position", "pos_embed", "cls_token", "x_cls", "rel_pos")


def import_timm() -> ModuleType:
    """Returns the module timm."""
    import torch

    torch.set_num_threads(1)  # one test worker per core: more threads only get in each other's way
    return verify.import_timm()


def fill(key: str, shape: Sequence[int], prefix: str = "") -> np.ndarray:
    """Returns the float32 weights of one state-dict entry as the golden files were made with.

    The values depend on the key and the shape alone. Norm scales, running statistics and biases are random too:
    a network whose branches are multiplied by zero would hide any fault in them.
    """
    shape = tuple(shape)
    random = np.random.RandomState(zlib.crc32(f"{prefix}{key}".encode()) & 0x7FFFFFFF)
    z = np.asarray(random.standard_normal(shape)).astype(np.float32)
    mean, scale = _moments(key, shape)
    if key.endswith("running_var"):
        z = np.abs(z)
    return np.asarray(np.float32(mean) + np.float32(scale) * z, np.float32)


def _moments(key: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and scale of an entry; the first rule that fits decides."""
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "running_mean":
        return 0.0, 0.1
    if leaf == "running_var":
        return 0.5, 1.0
    if len(shape) >= 2 and any(word in key for word in POSITIONS):
        return 0.0, 0.2
    if len(shape) >= 2:
        return 0.0, float(np.sqrt(2.0)) / float(np.sqrt(np.prod(shape[1:])))
    if len(shape) == 1 and key.endswith("bias"):
        return 0.0, 0.1
    return 1.0, 0.1


def fill_state_dict(rows: Sequence[Sequence[Any]], prefix: str = "") -> dict[str, np.ndarray]:
    """Returns the weights for a manifest's `state_dict` rows: `[key, shape, dtype, constant?, alias of?]`.

    Constants (integer buffers and tables that a constructor computes) are left out; an alias has the values of the
    entry that it is a second name of.
    """
    weights = {}
    for key, shape, _, *rest in rows:
        constant = bool(rest and rest[0])
        if not constant:
            weights[key] = fill(rest[1] if len(rest) > 1 else key, shape, prefix)
    return weights


def read_manifest(folder: Path, name: str) -> dict[str, Any]:
    """Returns 'state_dict' (rows as `fill_state_dict` takes them) and 'params_total' of a reference model."""
    return json.loads((folder / f"{name}.json").read_text())


def read_golden(folder: Path, name: str) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, np.ndarray]]:
    """Returns the weights, the images [2, 224, 224, 3] and the outputs of a reference model, all in float64."""
    manifest = read_manifest(folder, name)
    weights = {key: value.astype(np.float64) for key, value in fill_state_dict(manifest["state_dict"]).items()}
    assert sum(value.size for key, value in weights.items() if "running" not in key) == manifest["params_total"]
    images = np.random.RandomState(0).standard_normal((2, 3, 224, 224)).astype(np.float32)
    with np.load(folder / f"{name}.npz") as arrays:
        outputs = {key.removesuffix("_f64"): arrays[key] for key in arrays}
    return weights, images.transpose(0, 2, 3, 1).astype(np.float64), outputs
