"""What a compiled step sends; run as a program, it compiles the tests' step for TPUs that are not there.

`python -m tests.collectives 4 2` prints as JSON what a step sends on four v5e chips, two of which share a state. It
needs libtpu, but no TPU.
"""

import json
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from maxmap.accelerators import hlo
from maxmap.accelerators.topology import devices_of
from maxmap.losses import total_loss
from maxmap.shapes import eval_shape_of_init
from maxmap.sharding import make_mesh, replicated, split_batch
from maxmap.train.state import TrainState, abstract, create
from maxmap.train.step import make_train_step
from tests.tiny import ROOT, Tiny


def collectives(text: str) -> list[tuple[str, int, int]]:
    """Kind, bytes and devices of every array that a compiled program sends; scalars left out.

    The bytes are what arrives on one device; the devices, how many take part together.
    """
    found = hlo.collectives(hlo.parse(text))
    return [(one.kind, array.bytes, one.devices) for one in found for array in one.returned if array.dims]


def tiny_step(mesh: Mesh, dtype: Any, **fields: Any) -> tuple[jax.stages.Lowered, TrainState]:
    """The step of a network with two equal heads, lowered for a mesh; and its state, abstract."""
    model, optimizer = Tiny(**fields, constant=False), optax.adamw(1e-3)
    one = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    state = abstract(eval_shape_of_init(lambda: create(model, optimizer, jax.random.key(0), one, ema=True)), mesh)
    same, split, size = replicated(mesh), split_batch(mesh), 2 * mesh.size

    def prepare(key: jax.Array, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        del key
        return images / 255.0, jax.nn.one_hot(labels, model.num_classes)

    step = make_train_step(model, optimizer, total_loss, prepare, mesh=mesh, dtype=dtype, ema_decay=0.5)
    batch = {
        "image": jax.ShapeDtypeStruct((size, 8, 8, 3), jnp.uint8, sharding=split),
        "label": jax.ShapeDtypeStruct((size,), jnp.int32, sharding=split),
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=same)
    where = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(where, same))
    return jitted.lower(state, batch, key), state


def main(devices: str, fsdp: str) -> None:
    """Prints the collectives of a step in bfloat16."""
    mesh = make_mesh(devices_of("tpu-v5e", int(devices)), fsdp=int(fsdp))
    lowered, _ = tiny_step(mesh, jnp.bfloat16, num_classes=128, width=256)
    print(json.dumps(collectives(lowered.compile().as_text())))


def on_tpu(devices: int, fsdp: int) -> list[tuple[str, int, int]]:
    """Runs this file as a program of its own; `main` says what it does."""
    command = [sys.executable, "-m", "tests.collectives", str(devices), str(fsdp)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [tuple(row) for row in json.loads(done.stdout.splitlines()[-1])]


if __name__ == "__main__":
    main(*sys.argv[1:])
