"""Runs an ONNX file of `maxmap.onnx.export` by onnxruntime, on the CPU."""

import importlib.util
from pathlib import Path

import numpy as np


def has_runtime() -> bool:
    """Whether onnxruntime is installed."""
    return importlib.util.find_spec("onnxruntime") is not None


class Session:
    """A network in onnxruntime.

    Args:
      file: of `maxmap.onnx.export`.
    """

    def __init__(self, file: str | Path):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors alone
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(self, images: np.ndarray) -> np.ndarray:
        """Returns the logits `[B, K]` of images `[B, H, W, 3]`."""
        (logits,) = self._session.run(None, {self._session.get_inputs()[0].name: images})
        return logits
