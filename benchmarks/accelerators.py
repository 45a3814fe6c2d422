"""What the compilers of a TPU v5e and an H100 say of our programs: `make accelerators`; no device is needed.

It compiles programs for devices that are not here, each in a process of its own, and prints the compiler's estimates
beside those of `benchmarks/accelerators.csv`, which an earlier commit stored. What they are and what they leave out,
`maxmap/accelerators/program.py` says. Nothing has been measured on a chip.

    make accelerators                                 every program that changed; all of them: over an hour on two cores
    make accelerators ARGS=--quick                    parts of networks: some minutes
    make accelerators ARGS="--again step"             also compiles what did not change
    make accelerators ARGS="half mbconv"              the rows whose names hold one of these words
    make accelerators GPU=1 ARGS=h100                 rows for the H100; installs CUDA's compiler, 5.5 GB
    make accelerators ARGS="--quick --store"          writes what it found into the file

An estimate follows from the program, the compiler and the way of counting alone. So a row is traced, and compiled only
where a digest of the three is not that of the file.

A training step is forward, backward, AdamW and moving averages in bfloat16 with 64 images a chip on four chips (128 on
one H100), of the model's own size, without augmentation. A part is compiled forward and backward for 64 images on one
chip: "half" is LayerNorm, window attention and MLP of MaxViT-T, "mbconv" its convolution block, "head" the MAP head on
its maps. The TPU's compiler chooses the layout of the maps that a part reads and writes, as it does inside of a
network. A forward pass is in bfloat16 on one chip.
"""

import argparse
import csv
import datetime
import functools
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

from maxmap.accelerators import program, topology
from maxmap.accelerators.hardware import HARDWARE
from maxmap.backbones.maxxvit.attention import PartitionAttention, TransformerFields
from maxmap.backbones.maxxvit.convolution import MBConv
from maxmap.config import bind, complete
from maxmap.errors import UserError
from maxmap.layers.primitives import pair
from maxmap.models import average, create_model, fuse
from maxmap.shapes import eval_shape_of_init
from maxmap.train.compile import lower_step

STORED = Path(__file__).with_suffix(".csv")
MODELS = (
    *("maxvit_tiny_tf_224", "map_maxvit_tiny_tf_224", "map_resnet50", "convnext_tiny", "caformer_s18"),
    *("coatnet_1_rw_224", "ga_convnext_tiny_688"),
)
MAXVIT, MAP, SMALL = "maxvit_tiny_tf_224", "map_maxvit_tiny_tf_224", "map_maxvit_mini_32"
BATCH = 64  # images of a chip
COLUMNS = (
    *("program", "target", "mcycles", "milliseconds", "bytes_gb", "accessed_gb", "temporaries_gb", "images"),
    *("collectives", "compile_seconds", "compiler", "commit", "date", "digest", "note"),
)
NUMBERS = COLUMNS[2 : COLUMNS.index("compiler")]


class Row(NamedTuple):
    """A row of the table: the hardware, the images of a device, and what traces its program."""

    hardware: str
    images: int
    lower: Callable[[], program.Lowered]


def step(model: str, hardware: str, images: int, devices: int) -> program.Lowered:
    """A training step."""
    size = pair(create_model(model).backbone.image_size)[0]
    values = {
        "epochs": 300,
        "batch_size": images * devices,
        "dtype": "bfloat16",
        "ema_decay": 0.999,
        "model": {"name": model},
        "data": {"source": "folder", "path": "imagenet", "image_size": size},
        "augment": {"hflip": 0.0},
        "optim": {"name": "adamw", "weight_decay": 0.05},
        "schedule": {"lr": 1e-3},
    }
    return lower_step(bind(complete(values)), devices, hardware)[0]


def forward(model: str, hardware: str, images: int, *, fused: bool = False) -> program.Lowered:
    """A forward pass, with batch norms or without those that `maxmap.fuse` folds."""
    network = create_model(model)
    size = pair(network.backbone.image_size)
    variables = eval_shape_of_init(network.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *size, 3), jnp.float32))
    if fused:
        variables = jax.eval_shape(lambda variables: fuse(network, variables)[1], variables)
    place = _placed(hardware)
    params = {**place(variables), "params": place(variables["params"], jnp.bfloat16)}
    batch = place(jax.ShapeDtypeStruct((images, *size, 3), jnp.bfloat16))
    run = jax.jit(lambda variables, images: average(network.apply(variables, images)))
    return program.lower_for(hardware, run, params, batch)


def part(make: Callable[[], tuple[Any, Any]], hardware: str) -> program.Lowered:
    """A module forward and backward; `make` returns it and the shapes that it takes.

    A TPU's compiler chooses how the maps that go in and out lie in memory, as it does inside of a network. Parameters
    lie in rows, as those of a training step do.
    """
    module, inputs = make()
    place = _placed(hardware)
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = jax.eval_shape(functools.partial(module.init, train=False), key, inputs)
    params, others = variables["params"], {name: tree for name, tree in variables.items() if name != "params"}

    def both(params: Any, others: Any, inputs: Any, key: Any, grads: Any) -> Any:
        def apply(params: Any, inputs: Any) -> Any:
            return module.apply(
                {"params": params, **others}, inputs, train=True, mutable=["batch_stats"], rngs={"dropout": key}
            )

        outputs, backward, mutated = jax.vjp(apply, params, inputs, has_aux=True)
        return outputs, mutated, backward(grads)

    def outputs(params: Any, others: Any, inputs: Any, key: Any) -> Any:
        return module.apply(
            {"params": params, **others}, inputs, train=True, mutable=["batch_stats"], rngs={"dropout": key}
        )[0]

    arguments = (place(params, jnp.bfloat16), place(others), place(inputs), place(key))
    grads = place(jax.eval_shape(outputs, *arguments))
    if HARDWARE[hardware].platform == "gpu":
        return program.lower_for(hardware, jax.jit(both), *arguments, grads)
    rows = _sharding(hardware)
    chosen = Format(Layout.AUTO, rows)
    run = jax.jit(both, in_shardings=(rows, rows, chosen, rows, chosen), out_shardings=(chosen, rows, (rows, chosen)))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (*arguments, grads))
    return program.lower_for(hardware, run, *shapes)


def half(model: str, stage: int) -> tuple[Any, Any]:
    """The attention half of a MaxViT block, and its input."""
    backbone = create_model(model).backbone
    fields = TransformerFields(**backbone.transformer)
    names = (("attn", "window"),)
    channels = backbone.embed_dim[stage]
    module = PartitionAttention(channels, fields, backbone.window(), names, init_scheme=backbone.init_scheme)
    return module, _map(backbone, stage)


def mbconv(model: str, stage: int) -> tuple[Any, Any]:
    """The convolution block of MaxViT without stride, and its input."""
    backbone = create_model(model).backbone
    return MBConv(backbone.embed_dim[stage], init_scheme=backbone.init_scheme, **backbone.conv), _map(backbone, stage)


def head(name: str) -> tuple[Any, Any]:
    """The head of a model, and the maps that it takes."""
    model = create_model(name)
    size = pair(model.backbone.image_size)
    images = jax.ShapeDtypeStruct((BATCH, *size, 3), jnp.float32)
    maps, _ = eval_shape_of_init(model.backbone.init_with_output, jax.random.key(0), images)
    return model.head, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), maps)


def _map(backbone: Any, stage: int) -> jax.ShapeDtypeStruct:
    side = pair(backbone.image_size)[0] // 2
    for stride in backbone.strides[: stage + 1]:
        side //= stride
    return jax.ShapeDtypeStruct((BATCH, side, side, backbone.embed_dim[stage]), jnp.bfloat16)


def _placed(hardware: str) -> Callable[..., Any]:
    """Returns a function that puts shapes on one device of some hardware, floats in another type where one is given."""
    sharding = _sharding(hardware)

    def place(tree: Any, dtype: Any = None) -> Any:
        def one(leaf: Any) -> jax.ShapeDtypeStruct:
            change = dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating)
            return jax.ShapeDtypeStruct(leaf.shape, dtype if change else leaf.dtype, sharding=sharding)

        return jax.tree.map(one, tree)

    return place


def _sharding(hardware: str) -> SingleDeviceSharding:
    return SingleDeviceSharding(topology.devices_of(hardware, 1)[0])


def _rows() -> dict[str, Row]:
    rows = {}
    for name, make in (("half", half), ("mbconv", mbconv)):
        for stage in (0, 2):
            run = functools.partial(part, functools.partial(make, MAXVIT, stage), "tpu-v5e")
            rows[f"{name} stage {stage}"] = Row("tpu-v5e", BATCH, run)
    rows["head"] = Row("tpu-v5e", BATCH, functools.partial(part, functools.partial(head, MAP), "tpu-v5e"))
    # Of the small network alone: tests/test_accelerators.py compares them with the file.
    for name, small in (("half", functools.partial(half, SMALL, 0)), ("mbconv", functools.partial(mbconv, SMALL, 0))):
        rows[f"small {name}"] = Row("tpu-v5e", BATCH, functools.partial(part, small, "tpu-v5e"))
    rows["small head"] = Row("tpu-v5e", BATCH, functools.partial(part, functools.partial(head, SMALL), "tpu-v5e"))
    for model in MODELS:
        for images in (64, 1):
            run = functools.partial(forward, model, "tpu-v5e", images)
            rows[f"forward {model} batch {images}"] = Row("tpu-v5e", images, run)
    for model in (MAXVIT, "map_resnet50"):
        run = functools.partial(forward, model, "tpu-v5e", BATCH, fused=True)
        rows[f"forward fused {model} batch {BATCH}"] = Row("tpu-v5e", BATCH, run)
    for model in MODELS:
        rows[f"step {model}"] = Row("tpu-v5e", BATCH, functools.partial(step, model, "tpu-v5e", BATCH, 4))
    for name, make in (("half", half), ("mbconv", mbconv)):
        for stage in (0, 2):
            run = functools.partial(part, functools.partial(make, MAXVIT, stage), "h100-80")
            rows[f"{name} stage {stage} h100"] = Row("h100-80", BATCH, run)
    rows[f"forward {MAXVIT} h100"] = Row("h100-80", 128, functools.partial(forward, MAXVIT, "h100-80", 128))
    rows[f"step {MAXVIT} h100"] = Row("h100-80", 128, functools.partial(step, MAXVIT, "h100-80", 128, 1))
    return rows


ROWS = _rows()
QUICK = tuple(name for name in ROWS if name.startswith(("half", "mbconv", "head", "small")))
CHECKED = ("small half", "small mbconv")  # by the tests


def in_a_process(name: str, again: bool) -> dict[str, Any]:
    """Calls `found_in` in a process of its own; returns its columns, or 'note' where the row cannot be compiled."""
    command = [sys.executable, "-m", "benchmarks.accelerators", "--one", name, *["--again"][:again]]
    finished = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in finished.stdout.splitlines() if line.startswith("{")]
    if lines:
        return json.loads(lines[-1])
    said = [line for line in finished.stderr.splitlines() if line.strip()]
    return {"program": name, "target": ROWS[name].hardware, "note": said[-1] if said else "ended without a word"}


def found_in(name: str, again: bool = False) -> dict[str, Any]:
    """Compiles a row in this process if it changed, or `again`; returns its columns."""
    row, before = ROWS[name], stored().get(name)
    try:
        lowered = row.lower()
        digest = program.digest(lowered)
        if before and before.get("digest") == digest and not before["note"] and not again:
            numbers = {key: json.loads(value or "null") for key, value in before.items() if key in NUMBERS}
            return {**before, **numbers, "unchanged": True}
        found, _ = program.compile_lowered(lowered)
    except UserError as error:
        return {"program": name, "target": row.hardware, "note": str(error)}
    return {
        "digest": digest,
        "program": name,
        "target": row.hardware,
        "mcycles": None if found["cycles"] is None else round(found["cycles"] / 1e6, 3),
        "milliseconds": round(1e3 * found["seconds"], 3),
        "bytes_gb": round(found["bytes"] / 1e9, 3),
        "accessed_gb": None if found["cycles"] is None else round((found["bytes_accessed"] or 0) / 1e9, 3),
        "temporaries_gb": round(found["memory"]["temporaries"] / 1e9, 3),
        "images": row.images,
        "collectives": sum(kind["count"] for kind in found["collectives"].values()),
        "compile_seconds": round(found["compile_seconds"]),
        "compiler": found["compiler"],
        "note": "; ".join(found["not_counted"]),
    }


def stored() -> dict[str, dict[str, str]]:
    """Returns the rows of the file by the names of their programs."""
    if not STORED.is_file():
        return {}
    with STORED.open(encoding="utf-8", newline="") as file:
        return {row["program"]: row for row in csv.DictReader(file)}


def store(found: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows that were compiled into the file, in place of those of the same programs; others stay."""
    shown = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    today = datetime.date.today().isoformat()
    new = {row["program"]: {**row, "commit": shown, "date": today} for row in found if _compiled(row)}
    rows = {**stored(), **new}
    unfinished = STORED.with_suffix(".new")  # other rows may be reading the file
    with unfinished.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[name] for name in ROWS if name in rows)
    unfinished.replace(STORED)


def _compiled(row: Mapping[str, Any]) -> bool:
    return "milliseconds" in row and not row.get("unchanged")


def line(row: Mapping[str, Any], before: Mapping[str, str] | None) -> str:
    """Returns a row of the Markdown table: today's figures with the stored ones in brackets."""

    def cell(key: str) -> str:
        value = row.get(key)
        earlier = f" ({before[key]})" if before and before.get(key) else ""
        return ("-" if value is None else f"{value}") + earlier

    if "milliseconds" not in row:
        return f"| {row['program']} | {row['target']} | {row['note']} |"
    change = ""
    if before:
        was, now = float(before["milliseconds"]), float(row["milliseconds"])
        change = f"{100 * (now / was - 1):+.1f} %" if was else ""
    per_image = 1e3 * row["temporaries_gb"] / row["images"]
    note = row.get("note") or ""
    if before and before["compiler"] != row["compiler"]:
        note = f"{note}; stored with {before['compiler']}".lstrip("; ")
    if row.get("unchanged"):
        note = f"{note}; the program of {row['commit']}, not compiled again".lstrip("; ")
    cells = (*map(cell, ("mcycles", "milliseconds")), change, *map(cell, ("bytes_gb", "accessed_gb", "temporaries_gb")))
    cells = (*cells, f"{per_image:.1f}", cell("collectives"), f"{row['compile_seconds']}", row["compiler"], note)
    return f"| {row['program']} | {row['target']} | {' | '.join(cells)} |"


HEADER = (
    "| program | target | Mcycles | ms | change | GB moved | GB accessed, on chip too | temporaries GB | MB an image | "
    "collectives | compile s | compiler | note |\n|---|---|" + "---|" * 11
)


def main() -> int:
    """Prints the table; returns 1 where a row of the choice could not be compiled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="rows whose names hold one of these words (default: all)")
    parser.add_argument("--quick", action="store_true", help="parts of networks alone")
    parser.add_argument("--store", action="store_true", help=f"write the figures into {STORED.name}")
    parser.add_argument("--jobs", type=int, default=2, help="rows at a time (default: 2); a step takes some GB each")
    parser.add_argument("--again", action="store_true", help="also compile programs that did not change")
    parser.add_argument("--one", help=argparse.SUPPRESS, choices=ROWS)  # in the process of one row
    arguments = parser.parse_args()
    if arguments.one:
        # Kernels name the lines of their source, but the digest depends on what they compute alone.
        jax.config.update("jax_traceback_in_locations_limit", 0)
        print(json.dumps(found_in(arguments.one, arguments.again)))
        return 0
    names = QUICK if arguments.quick else tuple(ROWS)
    names = tuple(name for name in names if not arguments.words or any(word in name for word in arguments.words))
    if not names:
        parser.error(f"no row's name holds {' or '.join(arguments.words)}; the rows are {', '.join(ROWS)}")
    print("Estimates of compilers, not measurements; in brackets those that are stored.\n", flush=True)
    print(HEADER, flush=True)
    before, done = stored(), []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for row in pool.map(in_a_process, names, itertools.repeat(arguments.again)):
            done.append(row)
            print(line(row, before.get(row["program"])), flush=True)
            if arguments.store:
                store([row])
    return 0 if all("milliseconds" in row for row in done) else 1


if __name__ == "__main__":
    sys.exit(main())
