"""Measures what a checkpoint costs: seconds and bytes of saving and restoring, and the share of training it takes.

    python -m benchmarks.checkpoint [MODEL ...] [--folder FOLDER] [--step_seconds 0.25] [--every 1000]

The state is that of AdamW with averaged weights, float32, filled with noise, which does not compress. "waits" is how
long training stands still for a save (the copy off the device); "in all" includes writing and SHA-256 in the
background; the share is "waits" in `every` steps of `step_seconds`, to be measured on the hardware in question.
"""

import argparse
import contextlib
import shutil
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from maxmap import checkpoint
from maxmap.cost import count_parameters
from maxmap.models import create_model
from maxmap.sharding import make_mesh
from maxmap.train.state import TrainState, abstract, create


def filled(like: TrainState) -> TrainState:
    """A state of noise."""
    random = np.random.default_rng(0)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        noise = random.standard_normal(leaf.shape, np.float32).astype(leaf.dtype)
        return jax.device_put(noise, leaf.sharding)

    return jax.tree.map(fill, like)


def measure(name: str, folder: Path) -> dict[str, float]:
    """Saves twice, because the first time makes threads and folders, and restores."""
    model = create_model(name)
    size = model.backbone.image_size
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    key = jax.random.key(0)
    shapes = jax.eval_shape(lambda: create(model, optax.adamw(1e-3), key, images, ema=True))
    like = abstract(shapes, make_mesh())
    state = filled(like)
    jax.block_until_ready(state)
    with contextlib.closing(checkpoint.Checkpoints(folder, keep=1)) as checkpoints:
        for step in (1, 2):
            began = time.perf_counter()
            checkpoints.save(step, state.items(), {"model": {"name": name}})
            waits = time.perf_counter() - began
            checkpoints.wait()
            total = time.perf_counter() - began
        written = sum(p.stat().st_size for p in (folder / checkpoint.FOLDER / "2").rglob("*") if p.is_file())
        del state
        began = time.perf_counter()
        assert checkpoint.newest_step(folder) == 2
        checked = time.perf_counter() - began
        jax.block_until_ready(checkpoints.restore(2, like.items()))
        restored = time.perf_counter() - began
    return {
        "parameters": count_parameters(like.params),
        "bytes": written,
        "waits": waits,
        "total": total,
        "checked": checked,
        "restored": restored,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["maxvit_tiny_tf_224", "maxvit_large_tf_224"])
    parser.add_argument("--folder", type=Path, help="a new folder on the disk in question (default: a temporary one)")
    parser.add_argument("--step_seconds", type=float, default=0.25)
    parser.add_argument("--every", type=int, default=1000)
    arguments = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    print(f"{len(jax.devices())} x {jax.devices()[0].device_kind}, a step of {arguments.step_seconds} s")
    print("| model | parameters | on disk | training waits | save in all | restore (checksums) | share of training |")
    print("|---|---|---|---|---|---|---|")
    for name in arguments.models:
        folder = arguments.folder or Path(tempfile.mkdtemp(prefix="checkpoint"))
        try:
            found = measure(name, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        share = found["waits"] / (found["waits"] + arguments.every * arguments.step_seconds)
        print(
            f"| {name} | {found['parameters']:,} | {found['bytes'] / 1e9:.2f} GB | {found['waits']:.2f} s | "
            f"{found['total']:.1f} s | {found['restored']:.1f} s ({found['checked']:.1f} s) | {100 * share:.2f} % |",
            flush=True,
        )


if __name__ == "__main__":
    main()
