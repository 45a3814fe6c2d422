"""A checkpoint as an ONNX file: one graph with its weights, for any number of images, checked by running it."""

import types
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maxmap import storage
from maxmap.convert.load import export_target, read_weights
from maxmap.cost import count_parameters
from maxmap.errors import UserError
from maxmap.onnx.lower import lower
from maxmap.onnx.proto import write
from maxmap.onnx.session import ENDING, Network, has_runtime
from maxmap.programs import check_bytes, describe, forward, one_image

TOLERANCE = 1e-4  # of a logit, relative to the largest one
_BATCHES = (1, 3)  # on which a file is checked


def export_onnx(
    source: str | Path,
    file: str | Path,
    *,
    pixels: bool = False,
    ema: bool | None = None,
    overwrite: bool = False,
) -> str:
    """Writes a checkpoint's forward pass, with its weights, as ONNX. The file appears complete or not at all.

    The graph takes images `[B, H, W, C]` of the checkpoint's size, for any B, and returns 'logits' `[B, K]`, or
    `[B, h, w, K]` of pixels, the mean over the branches. Its metadata have the model, the classes and the
    preprocessing. Where onnxruntime is installed, the file has to return the logits of the network itself, for batches
    of noise, before it gets its name.

    Args:
      source: folder of a run or of a converted checkpoint, or a published name.
      file: to write, ending in .onnx.
      pixels: the graph takes uint8 and normalises it; otherwise float32 that is normalised already.
      ema: True for the averaged weights, False for the raw ones; None for the averaged ones if there are any.
      overwrite: replace the file.

    Returns:
      A line of text that names the file and what it holds.

    Raises:
      UserError: there is no checkpoint, it is too large, it has an operation that is not known, the file exists or has
        another ending, the library is missing, or onnxruntime gets other logits.
    """
    file = export_target(file, [ENDING], overwrite)
    onnx = _library()
    variables, info = read_weights(source, ema)
    check_bytes(variables, source)
    image, run = one_image(info, pixels), forward(info, pixels)
    parameters, checks = count_parameters(variables["params"]), _references(run, variables, image)
    graph, output = lower(run, variables, image)
    del variables  # the graph has them in another order of axes
    about = describe(info, image, output) | {key: info[key] for key in ("weights", "step")} | {"parameters": parameters}
    nodes = len(graph.nodes)
    with storage.atomic_target(file, overwrite=overwrite) as unfinished:
        write(onnx, Path(unfinished), graph, image, output, about)
        error = check(unfinished, checks)
    checked = "not run, as onnxruntime is not installed" if error is None else f"within {error:.0e} by onnxruntime"
    return (
        f"{file}: {parameters:,} parameters, {info['weights']} weights, {nodes} nodes, {checked}; it takes "
        f"{about['input']}"
    )


def _library() -> types.ModuleType:
    try:
        import onnx
    except ImportError:
        raise UserError(
            "an .onnx file is written by the library onnx: install the extra 'onnx' (pip install 'maxmap[onnx]')."
        ) from None
    return onnx


def _references(run: Any, variables: Any, image: jax.ShapeDtypeStruct) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns batches of noise and the network's own logits for them; none without onnxruntime."""
    if not has_runtime():
        return []
    noise = np.random.default_rng(0).standard_normal((_BATCHES[-1], *image.shape), np.float32)
    images = np.clip(64 * noise + 128, 0, 255).astype(np.uint8) if image.dtype == np.uint8 else noise
    logits = np.asarray(jax.jit(run)(variables, images))
    return [(images[:count], logits[:count]) for count in _BATCHES]


def check(file: Path, references: list[tuple[np.ndarray, np.ndarray]]) -> float | None:
    """Runs a file; returns the largest difference of a logit, relative to the largest one, None without references.

    Raises:
      UserError: it does not run, or the difference is above `TOLERANCE`.
    """
    if not references:
        return None
    network = Network(file)
    scale = max(np.abs(references[-1][1]).max(), 1e-30)  # logits are all zero at the start of some trainings
    error = float(np.max([np.abs(network.run(batch) - wanted).max() / scale for batch, wanted in references]))
    if not error <= TOLERANCE:
        raise UserError(
            f"onnxruntime's logits differ by {error:.1e} of the largest one, more than {TOLERANCE:.0e}: the file "
            "is not written; export a .stablehlo program."
        )
    return error
