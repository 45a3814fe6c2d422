"""What a compiled step sends; run as a program, it compiles the tests' step for TPUs that are not there.

`python -m tests.collectives v5e:2x2 2` prints as JSON what a step sends on four chips, two of which share a state. It
needs libtpu, but no TPU.
"""

import json
import math
import os
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from maxmap.losses import total_loss
from maxmap.sharding import DATA, FSDP, replicated, split_batch
from maxmap.train.state import TrainState, abstract, create
from maxmap.train.step import make_train_step
from tests.tiny import ROOT, Tiny

# No metadata server, no TPU, and several processes that compile at a time.
TPU_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_LOG_DIR": "disabled",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
SIZES = {"f64": 8, "f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1, "u8": 1}
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


def collectives(text: str) -> list[tuple[str, int, int]]:
    """Kind, bytes and devices of every collective of a compiled program; scalars left out.

    The bytes are what it returns on one device; the devices, how many take part together. A TPU's reduce-scatter is a
    fusion that is named after the all-reduce in it; a collective that the TPU overlaps with arithmetic is written down
    in every fusion that runs beside it, each time with the same channel.
    """
    found, channels, scattered = [], set(), None
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")):
            scattered = line.partition("->")[2] if line.startswith("%all-reduce-scatter") else None
        hit = re.search(rf"= (.*?) ({KINDS})(?:-start)?\(", line)
        if hit is None:
            continue
        channel = re.search(r"channel_id=(\d+)", line)
        if channel is not None and channel[1] in channels:
            continue
        channels.add(channel and channel[1])
        shapes, kind = (hit[1], hit[2]) if scattered is None else (scattered, "reduce-scatter")
        for dtype, dims in re.findall(r"(\w+)\[([\d,]+)\]", shapes):
            found.append((kind, math.prod(map(int, dims.split(","))) * SIZES[dtype], group_size(line)))
    return found


def group_size(line: str) -> int:
    """How many devices take part in a collective together: three spellings of its replica groups."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(iota[1])
    if named := re.search(r"replica_groups=mesh\[(.*?)\].*?\{((?:'\w+',?)+)\}", line):
        lengths = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(lengths[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    return 1


def tiny_step(mesh: Mesh, dtype: Any, **fields: Any) -> tuple[jax.stages.Lowered, TrainState]:
    """The step of a network with two equal heads, lowered for a mesh; and its state, abstract."""
    model, optimizer = Tiny(**fields, constant=False), optax.adamw(1e-3)
    one = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    state = abstract(jax.eval_shape(lambda: create(model, optimizer, jax.random.key(0), one, ema=True)), mesh)
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


def main(topology: str, fsdp: str) -> None:
    """Prints the collectives of a step in bfloat16."""
    devices = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    mesh = Mesh(np.array(devices).reshape(-1, int(fsdp)), (DATA, FSDP), axis_types=(AxisType.Auto,) * 2)
    lowered, _ = tiny_step(mesh, jnp.bfloat16, num_classes=128, width=256)
    print(json.dumps(collectives(lowered.compile().as_text())))


def on_tpu(topology: str, fsdp: int) -> list[tuple[str, int, int]]:
    """Runs this file as a program of its own; `main` says what it does."""
    command = [sys.executable, "-m", "tests.collectives", topology, str(fsdp)]
    environment = os.environ | TPU_ENVIRONMENT
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [tuple(row) for row in json.loads(done.stdout.splitlines()[-1])]


if __name__ == "__main__":
    main(*sys.argv[1:])
