"""A checkpoint as a program that runs without maxmap: StableHLO, as `jax.export` writes it."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export  # not a part of `import jax`
import jax.numpy as jnp

from maxmap import storage, tasks
from maxmap.convert.load import export_target, read_weights
from maxmap.cost import count_parameters
from maxmap.data.augment import normalize
from maxmap.data.pipeline import LABELLING
from maxmap.errors import UserError
from maxmap.kernels.target import compiled_for
from maxmap.models import average, create_model
from maxmap.operations import Array, kernels

ENDING = ".stablehlo"
PLATFORMS = ("cpu", "cuda", "tpu")
_LARGEST = 2**31 - 2**27  # bytes of weights: the formats count bytes in 31 bits, and the program needs some, too


def export_program(
    source: str | Path,
    file: str | Path,
    *,
    platforms: Sequence[str] = PLATFORMS,
    pixels: bool = False,
    ema: bool | None = None,
    overwrite: bool = False,
) -> str:
    """Writes a checkpoint's forward pass, with its weights, and a JSON file beside it that says what goes in and out.

    The program takes any number of images and returns the logits `[B, K]`, or `[B, h, w, K]` of pixels, the mean over
    the branches. It is loaded by `jax.export.deserialize`. For a single platform the operations are laid out as they
    are fastest there. For several they have one form, in which depthwise convolutions are slow on a CPU.

    Args:
      source: folder of a run or of a converted checkpoint.
      file: to write, ending in .stablehlo; the JSON file has .json in place of that.
      platforms: where it is to run, a part of `PLATFORMS`.
      pixels: the program takes uint8 `[B, H, W, C]` and normalises them; otherwise float32 that is normalised already.
      ema: True for the averaged weights, False for the raw ones; None for the averaged ones if there are any.
      overwrite: replace the files.

    Returns:
      A line of text that names the file and what it holds.

    Raises:
      UserError: there is no checkpoint, it is too large, or the file exists or has another ending.
    """
    file = export_target(file, [ENDING], overwrite)
    about = export_target(file.with_suffix(".json"), [".json"], overwrite)
    unknown = sorted(set(platforms) - set(PLATFORMS))
    if unknown or not platforms:
        raise UserError(f"there is no platform '{', '.join(unknown)}', only {', '.join(PLATFORMS)}.")
    variables, info = read_weights(source, ema)
    check_bytes(variables, source)
    image, run = one_image(info, pixels), functools.partial(forward(info, pixels), variables)
    inputs = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("b"), *image.shape), image.dtype)
    target = {"cuda": "gpu"}.get(platforms[0], platforms[0]) if len(platforms) == 1 else "plain"
    with compiled_for(target), kernels("plain"):
        program = jax.export.export(jax.jit(run), platforms=list(platforms))(inputs)
    with storage.atomic_target(file, overwrite=overwrite) as unfinished:
        Path(unfinished).write_bytes(program.serialize())
    described = {
        **describe(info, image, program.out_avals[0].shape[1:]),
        "platforms": list(platforms),
        "jax": jax.__version__,
    }
    storage.write_named(about, json.dumps(described, indent=2) + "\n")
    return (
        f"{file}: {count_parameters(variables['params']):,} parameters, {info['weights']} weights, for "
        f"{', '.join(platforms)}; it takes {described['input']}; {about.name} names classes and preprocessing"
    )


def check_bytes(variables: Any, source: str | Path) -> None:
    """Raises UserError if a program that holds these weights would be too large for its format."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    if size > _LARGEST:
        raise UserError(
            f"the weights of {source} take {size / 1e9:.1f} GB, and a program holds at most {_LARGEST / 1e9:.1f}: "
            "export a smaller network, or .safetensors."
        )


def one_image(info: Mapping[str, Any], pixels: bool) -> jax.ShapeDtypeStruct:
    """Returns the shape and the type of an image that a program takes."""
    side, channels = info["preprocessing"]["image_size"], len(info["preprocessing"]["mean"])
    return jax.ShapeDtypeStruct((side, side, channels), jnp.uint8 if pixels else jnp.float32)


def forward(info: Mapping[str, Any], pixels: bool) -> Callable[[Any, Array], Array]:
    """Returns the function that is exported, of variables and images to logits."""
    model, preprocessing = create_model(**info["model"]), info["preprocessing"]

    def run(variables: Any, images: Array) -> Array:
        if pixels:
            images = normalize(images, preprocessing["mean"], preprocessing["std"])
        return average(model.apply(variables, images))

    return run


def describe(info: Mapping[str, Any], image: jax.ShapeDtypeStruct, output: tuple[int, ...]) -> dict[str, Any]:
    """Returns what a program says of itself, given the shape of the logits of an image."""
    pixels = image.dtype == jnp.uint8
    return {
        "model": info["model"],
        "input": f"{image.dtype} {list(('B', *image.shape))}".replace("'", "")
        + (", pixels from 0 to 255" if pixels else ", normalised"),
        "output": f"float32 {list(('B', *output))}, logits".replace("'", ""),
        "classes": info["classes"],
        "task": tasks.describe(tasks.of_checkpoint(info)),
        "labelling": {key: value for key, value in info.get("config", {}).get("data", {}).items() if key in LABELLING},
        "preprocessing": info["preprocessing"],
    }
