"""What a TPU or GPU measures, in under eight minutes: kernels, step times and memory, beside timm where there is a GPU.

    python -m benchmarks.device                       on the machine that has the accelerator
    python -m benchmarks.device --minutes=20 --models maxvit_tiny_tf_224

First it compares the kernels that are written by hand with the plain way, forward and backward, on the device. Then it
measures forward passes and training steps in bfloat16: maxmap with its kernels, without them, and, on a GPU with torch
and timm, timm in eager mode and compiled. It goes on until the minutes are over; what is left is said. The table goes
to `benchmarks/device.csv`, with the device, the versions and the date. These are measurements; `make accelerators`
prints what compilers estimate.
"""

import argparse
import csv
import datetime
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed import compare
from maxmap import operations, runtime
from maxmap.backbones.maxxvit.attention import PartitionAttention, TransformerFields
from maxmap.backbones.maxxvit.convolution import MBConv
from maxmap.layers.blocks import ConvNeXtBlock

STORED = Path(__file__).with_suffix(".csv")
MODELS = ("maxvit_tiny_tf_224", "map_maxvit_tiny_tf_224", "map_resnet50", "convnext_tiny", "caformer_s18")
BATCH = 64
COLUMNS = (
    *("model", "task", "batch", "dtype", "contender", "milliseconds", "images_per_second", "first_seconds"),
    *("peak_gigabytes", "version", "device", "date", "note"),
)
# A bfloat16 value has 8 bits: two ways that round elsewhere differ by some of the last ones.
CLOSE = 0.05


def check_kernels() -> list[tuple[str, float]]:
    """Returns the largest relative difference of output and gradients, by block, in bfloat16 on this device."""
    modules = {
        "attention and MLP, windows of 7 x 7": (
            PartitionAttention(64, TransformerFields(), (7, 7), (("attn", "window"),)),
            (16, 28, 28, 64),
        ),
        "attention and MLP, grid of 8 x 8": (
            PartitionAttention(128, TransformerFields(), (8, 8), (("attn", "grid"),)),
            (16, 16, 16, 128),
        ),
        "MBConv": (MBConv(64), (16, 28, 28, 64)),
        "ConvNeXt block": (ConvNeXtBlock(init_values=1.0), (16, 28, 28, 96)),
    }
    found = []
    for name, (module, shape) in modules.items():
        x, grad = (jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16) for seed in (0, 1))
        variables = jax.jit(lambda module=module, x=x: module.init(jax.random.key(2), x[:1]))()
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables["params"])
        others = {key: value for key, value in variables.items() if key != "params"}

        def both(params: Any, x: Any, grad: Any, module: Any = module, others: Any = others) -> Any:
            def apply(params: Any, x: Any) -> Any:
                return module.apply({"params": params, **others}, x, train=True, mutable=["batch_stats"])[0]

            out, vjp = jax.vjp(apply, params, x)
            return out, vjp(grad)

        results = []
        for choice in ("auto", "plain"):
            with operations.kernels(choice):
                results.append(jax.tree.leaves(jax.jit(both)(params, x, grad)))
        errors = [
            np.linalg.norm(np.asarray(a, np.float32) - np.asarray(b, np.float32))
            / max(np.linalg.norm(np.asarray(b, np.float32)), 1e-6)
            for a, b in zip(*results, strict=True)
        ]
        found.append((name, float(max(errors))))
    return found


def contenders() -> list[str]:
    """Returns what this machine can run."""
    gpu = jax.default_backend() == "gpu"
    torch = gpu and all(importlib.util.find_spec(name) is not None for name in ("torch", "timm"))
    return ["maxmap", "maxmap plain", *(("timm", "timm compiled") if torch else ())]


def main() -> int:
    """Checks and measures; returns 1 where a kernel differs from the plain way, 2 without an accelerator."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--minutes", type=float, default=7.5, help="after which no other row begins (default: 7.5)")
    parser.add_argument("--batch", type=int, default=BATCH, help="images at a time (default: 64)")
    parser.add_argument("--out", type=Path, default=Path("runs/device"), help="folder of the contenders' messages")
    arguments = parser.parse_args()
    runtime.prepare_to_compute()
    if jax.default_backend() == "cpu":
        print("there is no TPU or GPU here: `make accelerators` prints what their compilers say.", file=sys.stderr)
        return 2
    until = time.monotonic() + 60 * arguments.minutes
    device = jax.devices()[0].device_kind
    wrong = 0
    for name, error in check_kernels():
        wrong += error > CLOSE
        print(f"{name}: kernels and plain way differ by {error:.4f} (at most {CLOSE})", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    work = [(model, task) for task in ("train", "forward") for model in arguments.models]
    for number, (model, task) in enumerate(work):
        if time.monotonic() > until:
            left = ", ".join(f"{name} ({kind})" for name, kind in work[number:])
            print(f"the {arguments.minutes:g} minutes are over before: {left}", flush=True)
            break
        job = {"model": model, "task": task, "batch": arguments.batch, "dtype": "bfloat16"}
        for contender in contenders():  # one after another: two of them may not fit into the device's memory
            row = compare(job, [contender], 3, 1.0, arguments.out)[0]
            row |= {"device": device, "date": datetime.date.today().isoformat()}
            rows.append(row)
            said = row.get("note") or f"{row['milliseconds']:.1f} ms, {row['images_per_second']:.0f} images/s"
            print(f"{model}, {task}, {contender}: {said}", flush=True)
    with STORED.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {STORED}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
