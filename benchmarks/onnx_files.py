"""What `maxmap export FILE.onnx` writes: operators, size, difference from our own logits, processor time and memory.

    python -m benchmarks.onnx_files                                    the models of docs/export.md
    python -m benchmarks.onnx_files maxvit_tiny_tf_224:384 map_pit_s   these; a size behind a name is that of the images

A model gets random weights and is exported by the command, in a process of its own. The difference is that of the
command's check, for batches of 1 and 3, relative to the largest logit. "batch 8" is how far the logits of eight images
together are from those of one image at a time. `tests/onnx/` compares every head on every family, in small.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from maxmap import checkpoint, create_model
from maxmap.cost import count_parameters
from maxmap.models import FAMILIES, MODELS
from maxmap.onnx.session import Network
from tests.tiny import preprocessing

EXAMPLES = (
    *("convnext_tiny", "CSWin_64_12211_tiny_224", "efficientvit_b0", "efficientvit_m0", "faster_vit_0_224"),
    *("fastvit_t8", "maxvit_tiny_tf_224", "maxvit_tiny_tf_224:288", "maxvit_tiny_tf_224:384", "caformer_s18"),
    *("mobilenet_v1", "mobilevit_xxs", "pit_s", "resnet50", "vit_small_patch16_224", "map_mobilenet_v1", "map_pit_s"),
    *("map_resnet50", "ga_convnext_tiny_688", "ga_vit_small", "maxvit_base_tf_224"),
)


def write_checkpoint(name: str, size: int | None, folder: Path) -> int:
    """Writes a checkpoint with random weights; returns their number."""
    given = {"name": name} | ({"image_size": size} if size else {})
    model = create_model(**given)
    side = model.backbone.image_size
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32))
    rng = np.random.default_rng(0)

    def leaf(shape: tuple[int, ...]) -> np.ndarray:
        """Values with which roundings do not grow from block to block, as in trained networks."""
        if len(shape) < 2:
            return (1 + 0.3 * rng.random(shape)).astype(np.float32)
        return rng.standard_normal(shape, np.float32) / np.sqrt(np.prod(shape[:-1])).astype(np.float32)

    variables = jax.tree.map(lambda each: leaf(each.shape), dict(shapes))
    info = {"model": given, "classes": [str(i) for i in range(1000)], "preprocessing": preprocessing()}
    info["preprocessing"]["image_size"] = side
    checkpoint.write_variables(folder, variables, info | {"step": 0, "weights": "raw"})
    return count_parameters(variables["params"])


def measure(example: str, folder: Path) -> str:
    """Exports a model; returns a row of the table."""
    name, _, size = example.partition(":")
    count = write_checkpoint(name, int(size) if size else None, folder / "checkpoint")
    file = folder / "network.onnx"
    command = [sys.executable, "-m", "maxmap", "export", str(folder / "checkpoint"), str(file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    told = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        return f"| {example} | failed | | | | | | | | |"
    nodes, error = re.search(r"([\d,]+) nodes, within (\S+) by", told).groups()  # type: ignore[union-attr]
    network, side = Network(file), int(re.search(r"\[B, (\d+),", told)[1])  # type: ignore[index]
    images = np.random.default_rng(1).standard_normal((8, side, side, 3), np.float32)
    one_by_one = np.concatenate([network.run(image[None]) for image in images])
    eight = np.abs(network.run(images) - one_by_one).max() / np.abs(one_by_one).max()
    family = next(family for family, variants in FAMILIES.items() if MODELS[name].backbone in variants)
    return (
        f"| {family} | {MODELS[name].head['name']} | {name} | {side} | {nodes} | {error} | {eight:.0e} | "
        f"{count / 1e6:.1f} M | {file.stat().st_size / 1e6:.1f} MB | {usage.ru_utime:.0f} s | "
        f"{usage.ru_maxrss / 1e6:.2f} GB |"
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=EXAMPLES, help="(default: those of docs/export.md)")
    header = (
        *("family", "head", "model", "pixels", "nodes", "error", "batch 8", "parameters", "file"),
        *("processor time", "memory"),
    )
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for example in parser.parse_args().models:
        with tempfile.TemporaryDirectory() as folder:
            print(measure(example, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
