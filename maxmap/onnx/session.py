"""Runs an ONNX file of `maxmap.onnx.export` by onnxruntime, on the CPU, with what the file says of itself."""

import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from maxmap import storage
from maxmap.data.augment import normalize
from maxmap.errors import UserError, reason

ENDING = ".onnx"
SAID = (
    "model",
    "classes",
    "task",
    "preprocessing",
    "weights",
    "step",
    "parameters",
    "input",
)  # in the metadata of a file


def has_runtime() -> bool:
    """Whether onnxruntime is installed."""
    return importlib.util.find_spec("onnxruntime") is not None


def is_graph(path: str | Path) -> bool:
    """Whether a path is an ONNX file on this machine."""
    return str(path).endswith(ENDING) and not storage.in_bucket(path) and os.path.isfile(storage.expand(path))


class Network:
    """A network in onnxruntime.

    Args:
      file: that `maxmap export` wrote.

    Attributes:
      info: 'model', 'classes', 'task', 'preprocessing', 'weights' and 'step' as `maxmap.load` returns them; of the
        'config' how its run read labels; the number of 'parameters', and the 'input' in words.

    Raises:
      UserError: the file cannot be run, is not maxmap's, or onnxruntime is not installed.
    """

    def __init__(self, file: str | Path):
        if not has_runtime():
            raise UserError(f"{file} is run by onnxruntime: install the extra 'onnx' (pip install 'maxmap[onnx]').")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what is wrong comes as an exception
        try:
            self._session = onnxruntime.InferenceSession(
                storage.expand(file), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # of its own kinds
            raise UserError(f"onnxruntime cannot run {file} ({reason(error)}): export it again.") from None
        said = self._session.get_modelmeta().custom_metadata_map
        if missing := [field for field in SAID if field not in said]:
            raise UserError(
                f"{file} does not say its {', '.join(missing)}, as a file of `maxmap export` does: export it again, or "
                "`maxmap convert` it."
            )
        try:
            self.info: dict[str, Any] = {
                key: said[key] if key in ("weights", "input") else json.loads(said[key]) for key in SAID
            }
            self.info["config"] = {"data": dict(json.loads(said.get("labelling", "{}")))}
        except (TypeError, ValueError):
            raise UserError(f"what {file} says of itself is damaged: export it again.") from None
        (self._input,) = self._session.get_inputs()

    def run(self, images: np.ndarray) -> np.ndarray:
        """Returns the logits `[B, K]` of images `[B, H, W, C]` as the file takes them."""
        (logits,) = self._session.run(None, {self._input.name: images})
        return logits

    def logits(self, pixels: np.ndarray, preprocessing: Mapping[str, Any]) -> np.ndarray:
        """Returns the logits `[B, K]` of crops, uint8 `[B, H, W, C]`, normalised by the file or here."""
        if self._input.type == "tensor(uint8)":
            return self.run(pixels)
        return self.run(np.asarray(normalize(jnp.asarray(pixels), preprocessing["mean"], preprocessing["std"])))

    def check(self, preprocessing: Mapping[str, Any], *, pad: bool = False) -> None:
        """Raises UserError unless the file classifies images as asked: of its size and, with pixels, its colours."""
        own, side = self.info["preprocessing"], self._input.shape[1]
        if not self.info["classes"]:
            raise UserError("this .onnx file has no classifier, so it names no classes: export a checkpoint that has.")
        if pad or preprocessing["image_size"] != side:
            raise UserError(
                f"an .onnx file takes images of its own size, {side} pixels: export another for other sizes."
            )
        fixed = () if self._input.type != "tensor(uint8)" else ("mean", "std")
        if any(list(preprocessing[key]) != list(own[key]) for key in fixed):
            raise UserError("this .onnx file normalises by its own mean and std: export one without --pixels.")
