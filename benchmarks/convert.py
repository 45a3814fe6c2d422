"""Time and memory of a conversion, against reading and writing the same bytes on the same disk.

    python -m benchmarks.convert                        maxvit_xlarge_tf_224, 1.9 GB
    python -m benchmarks.convert convnext_tiny pit_s    other models
    python -m benchmarks.convert --table                a row for one model of every family: docs/conversion.md

The source is a safetensors file of random weights under the reference's names, made first and not counted. Reading and
writing is a file read in pieces and written to another, with fsync. Conversion is the whole command, in a process of
its own, whose memory is the largest resident set that the system reports; it starts Python and imports JAX too.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

import maxmap
from maxmap.convert.torch import abstract_variables

FAMILIES = {
    "maxvit_tiny_tf_224": None,
    "maxvit_t": "torchvision",
    "coatnet_0_rw_224": None,
    "caformer_s18": "sail-sg",
    "convnext_tiny": "fair",
    "CSWin_64_12211_tiny_224": "microsoft",
    "faster_vit_0_224": "nvlabs",
    "pit_s": "lab-lvm",
    "pit_s_224": None,
    "vit_small_patch16_224": None,
    "resnet50": None,
    "mobilenet_v1": "lab-lvm",
    "map_convnext_tiny": "lab-lvm",
    "ga_convnext_tiny_688": "lab-lvm",
}


def make_source(name: str, path: Path, dialect: str | None = None) -> int:
    """Writes a file of random weights; returns the number of parameters."""
    model = maxmap.create_model(name)
    random = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        values = random.standard_normal(leaf.shape, np.float32)
        # As large as keeps activations of order one, and variances that are none below zero.
        return (
            abs(values) + 0.5 if len(leaf.shape) < 2 else values / np.float32(max(np.prod(leaf.shape[:-1]), 1) ** 0.5)
        )

    variables = jax.tree.map(draw, abstract_variables(model))
    state_dict = maxmap.to_torch(variables, model, dialect)
    save_file({key: np.ascontiguousarray(value) for key, value in state_dict.items()}, path)
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def copy(source: Path, dest: Path) -> float:
    """Seconds to read a file and write it to another, down to the disk."""
    began = time.perf_counter()
    with source.open("rb") as read, dest.open("wb") as write:
        while piece := read.read(1 << 24):
            write.write(piece)
        write.flush()
        os.fsync(write.fileno())
    return time.perf_counter() - began


def run(*command: object) -> tuple[float, float, int]:
    """Seconds and largest resident gigabytes of a maxmap command, and its exit status."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "maxmap", *map(str, command)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    return time.perf_counter() - began, usage.ru_maxrss / 1e6, os.waitstatus_to_exitcode(status)


def measure(name: str, folder: Path) -> None:
    source, dest = folder / "source.safetensors", folder / "dest"
    # In a process of its own: what this one has in memory would count for those that it starts.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        parameters = pool.apply(make_source, (name, source))
    size = source.stat().st_size / 1e9
    copy(source, folder / "copy")  # the first reading and writing also makes room in the cache
    copied = [copy(source, folder / "copy") for _ in range(3)]
    (folder / "copy").unlink()
    converted = [run("convert", source, dest, "--model", name, "--overwrite") for _ in range(3)]
    assert not any(status for *_, status in converted)
    idle, least, _ = run("--help")
    seconds, memory = min(row[0] for row in converted), max(row[1] for row in converted)
    print(f"{name}: {parameters:,} parameters, {size:.2f} GB")
    print(
        f"read and written in {min(copied):.1f} s; Python and JAX start in {idle:.1f} s with {least:.2f} GB of memory"
    )
    print(
        f"converted in {seconds:.1f} s, {seconds / min(copied):.2f} times as long; at most {memory:.2f} GB of memory, "
    )
    print(f"{memory / size:.2f} times the file")


def table(folder: Path) -> None:
    """Prints a Markdown table: every family through convert and verify."""
    print("| model | names | parameters | reference | float32 | float64 | gradient, float64 | seconds | GB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, dialect in FAMILIES.items():
        source, dest = folder / "source.safetensors", folder / name
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            parameters = pool.apply(make_source, (name, source, dialect))
        seconds, memory, status = run("convert", source, dest, "--model", name, "--overwrite")
        assert status == 0
        _, _, status = run("verify", dest, "--against", source)
        report = json.loads((dest / "verify.json").read_text())
        assert report["ok"] == (status == 0)
        if report["reference"]:
            shown = [f"{report['float32']['logits']:.0e}", f"{report['float64']['logits']:.0e}"]
            shown.append(f"{report['float64']['gradient']:.0e}")
        else:
            shown = ["same bits" if report["identical"] == report["entries"] else "DIFFERENT", "", ""]
        columns = [name, dialect or "timm", f"{parameters:,}", report["reference"] or "-", *shown]
        print(f"| {' | '.join([*columns, f'{seconds:.1f}', f'{memory:.2f}'])} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["maxvit_xlarge_tf_224"])
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.table:
            table(Path(folder))
        else:
            for name in arguments.models:
                measure(name, Path(folder))


if __name__ == "__main__":
    main()
