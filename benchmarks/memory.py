"""Memory of a training step: `python -m benchmarks.memory [MODEL...]`.

It compiles the step (AdamW, without augmentation) for two batches and reads what XLA's buffers take: state, inputs and
temporary buffers. What grows with the batch is the bytes per image; the rest is there whatever the batch. From both
follows the largest batch that fits nine tenths of a device; the rest is for what no program counts. Beside that stands
what `python -m maxmap plan` says without compiling: what the forward pass keeps, before XLA fuses and reuses anything.

    python -m benchmarks.memory                                    every model; compiles 4 programs each, minutes
    python -m benchmarks.memory maxvit_tiny_tf_224 --check

The buffers are those of the backend that it runs on: on a CPU, patches and layouts differ from a GPU's, and bfloat16 is
partly computed in float32. Rematerialisation saves nothing there: XLA's CPU compiler drops the barriers that make the
second computation wait for the backward pass, so that blocks are computed twice and kept all the same. `--check` runs
steps: on a CPU it compares the growth of the process with the prediction, on a GPU it looks for the largest batch that
does run.
"""

import argparse
import csv
import itertools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.speed import MODELS
from maxmap.benchmark import training_step
from maxmap.config import bind, read
from maxmap.layers.primitives import pair
from maxmap.models import create_model
from maxmap.train.plan import largest_batch, plan

USED = 0.9  # of a device's memory
DEVICES = (16e9, 24e9, 40e9, 80e9)  # bytes
COLUMNS = (
    *("model", "dtype", "remat", "fixed_bytes", "bytes_per_image", "planned_bytes_per_image"),
    *(f"batch_{size / 1e9:.0f}_gb" for size in DEVICES),
    "note",
)
# A CPU's buffers do not depend on how well the code inside of the loops is, and this halves the time to compile.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def compile_step(model: str, batch: int, dtype: str, remat: bool) -> tuple[Any, tuple[Any, ...]]:
    """Returns the compiled step and the shapes of its arguments."""
    built = create_model(model, remat=remat)
    size = built.backbone.image_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    step, create_state = training_step(built, jnp.dtype(dtype))
    state = jax.eval_shape(create_state, jax.random.key(0))
    inputs = {
        "image": jax.ShapeDtypeStruct((batch, *size, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((batch,), jnp.int32),
    }
    arguments = (state, inputs, jax.eval_shape(lambda: jax.random.key(0)))
    options = QUICKLY if jax.default_backend() == "cpu" else {}
    return jax.jit(step, donate_argnums=0).lower(*arguments).compile(compiler_options=options), arguments


def held(program: Any) -> int:
    """Returns the bytes of a compiled program's buffers: arguments, results beside them, and what is temporary."""
    sizes = program.memory_analysis()
    return (
        sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes + sizes.temp_size_in_bytes
    )


def measure(model: str, dtype: str, remat: bool, batches: tuple[int, int]) -> tuple[float, float]:
    """Returns the bytes that are there whatever the batch, and those per image."""
    small, large = (held(compile_step(model, batch, dtype, remat)[0]) for batch in batches)
    per_image = (large - small) / (batches[1] - batches[0])
    return small - batches[0] * per_image, per_image


def planned(model: str, dtype: str, remat: bool) -> float:
    """Returns the bytes per image that `maxmap.train.plan` counts, with the flagship's recipe around the model."""
    size = pair(create_model(model).backbone.image_size)[0]
    changes = {"model.name": model, "model.remat": remat, "dtype": dtype, "batch_size": 8, "accumulate": 1}
    changes |= {"data.image_size": size, "model.drop_path": 0.0}
    config = read("configs/maxvit_tiny_map.py", [f"config.{key}={value}" for key, value in changes.items()])
    memory = plan(bind(config), 1, "h100-80", 0.3)["memory"]
    return (memory["activations, at most"] + memory["images"]) / 8


def run(program: Any, arguments: tuple[Any, ...]) -> None:
    """Takes one step with zeros; raises what JAX raises when memory ends."""
    state, inputs = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), arguments[:2])
    jax.block_until_ready(program(state, inputs, jax.random.key(0)))


def check(model: str, dtype: str, remat: bool, fixed: float, per_image: float, batch: int) -> str:
    """Tries the prediction; returns what was found."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        program, arguments = compile_step(model, batch, dtype, remat)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        before = resident("VmRSS")
        run(program, arguments)
        seen = resident("VmHWM") - before
        return f"batch {batch}: {1e-9 * (fixed + batch * per_image):.2f} GB predicted, {1e-9 * seen:.2f} seen"
    predicted = batch = largest_batch(USED * device.memory_stats()["bytes_limit"], fixed, per_image)
    while batch:
        try:
            run(*compile_step(model, batch, dtype, remat))
            break
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            batch = int(0.95 * batch)
    return f"{predicted} predicted for {device.device_kind}, {batch} runs"


def resident(key: str) -> int:
    """Returns a size of this process that Linux tells, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def main() -> int:
    """Prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, help="(default: the nine of the benchmark)")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=("float32",))
    parser.add_argument("--remat", nargs="+", choices=("no", "yes"), default=("no", "yes"), help="(default: both)")
    parser.add_argument("--batches", nargs=2, type=int, default=(2, 6), help="to compile for (default: 2 6)")
    parser.add_argument("--check", action="store_true", help="run steps, too")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of memory.csv")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    sizes = " | ".join(f"batch in {size / 1e9:.0f} GB" for size in DEVICES)
    print(
        f"| model | dtype | remat | fixed GB | MB per image | plan, at most | {sizes} | note |\n|{'---|' * 11}",
        flush=True,
    )
    with (arguments.out / "memory.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for model, dtype, remat in itertools.product(arguments.models, arguments.dtypes, arguments.remat):
            again = remat == "yes"
            fixed, per_image = measure(model, dtype, again, tuple(arguments.batches))
            most = planned(model, dtype, again)
            fits = [largest_batch(USED * size, fixed, per_image) for size in DEVICES]
            note = check(model, dtype, again, fixed, per_image, arguments.batches[1]) if arguments.check else ""
            writer.writerow((model, dtype, remat, fixed, per_image, most, *fits, note))
            file.flush()
            batches = " | ".join(map(str, fits))
            print(
                f"| {model} | {dtype} | {remat} | {fixed / 1e9:.2f} | {per_image / 1e6:.0f} | "
                f"{most / 1e6:.0f} | {batches} | {note} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
