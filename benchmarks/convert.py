"""Time and memory of a conversion, against reading and writing the same bytes on the same disk.

    python -m benchmarks.convert                        maxvit_xlarge_tf_224, 1.9 GB
    python -m benchmarks.convert convnext_tiny pit_s    other models
    python -m benchmarks.convert --table                a row for every family's files: docs/conversion.md

The source is a file of random weights under the reference's names; the time to make it does not count. Reading and
writing copies a file in pieces, with fsync. Conversion is the whole command in a process of its own, which includes the
start of Python and the import of JAX. Its memory is the largest resident set that the system reports.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

import maxmap
from maxmap.convert import tensorflow
from maxmap.convert.torch import abstract_variables

# Every family as its authors publish it: model, dialect of the names, kind of file, key of the weights in the file.
FAMILIES = (
    ("maxvit_tiny_tf_224", "google-research", "tensorflow", ""),
    ("maxvit_tiny_tf_224", "timm", ".safetensors", ""),
    ("maxvit_t", "torchvision", ".pth", ""),
    ("coatnet_0_rw_224", "timm", ".safetensors", ""),
    ("coatnext_nano_rw_224", "timm", ".safetensors", ""),
    ("maxxvit_rmlp_nano_rw_256", "timm", ".safetensors", ""),
    ("maxxvitv2_nano_rw_256", "timm", ".safetensors", ""),
    ("caformer_s18", "sail-sg", ".pth", ""),
    ("poolformerv2_s12", "sail-sg", ".pth", ""),
    ("convnext_tiny", "fair", ".pth", "model"),
    ("CSWin_64_12211_tiny_224", "microsoft", ".pth", "state_dict_ema"),
    ("faster_vit_0_224", "nvlabs", ".pth.tar", "state_dict"),
    ("efficientvit_b1", "mit", ".pt", "state_dict"),
    ("efficientvit_m1", "microsoft", ".pth", "model"),
    ("fastvit_sa12", "apple", ".pth.tar", "state_dict"),
    ("mobilevit_s", "timm", ".safetensors", ""),
    ("mobilevitv2_100", "timm", ".safetensors", ""),
    ("pit_s_224", "timm", ".safetensors", ""),
    ("vit_small_patch16_224", "timm", ".safetensors", ""),
    ("resnet50", "timm", ".pth", ""),
    ("mobilenet_v1", "lab-lvm", ".pth.tar", "state_dict"),
    ("map_pit_s", "lab-lvm", ".pth.tar", "state_dict"),
    ("map_convnext_tiny", "lab-lvm", ".pth.tar", "state_dict"),
    ("map_maxvit_tiny_tf_224", "lab-lvm", ".pth.tar", "state_dict"),
    ("ga_convnext_tiny_688", "lab-lvm", ".pth.tar", "state_dict"),
    ("ga_cswin_tiny_p42", "lab-lvm", ".pth.tar", "state_dict"),
)

# Writes the arrays of a file as a TensorFlow checkpoint, raw and averaged; runs in a process of its own.
TO_TENSORFLOW = """
import sys
import numpy as np
import tensorflow as tf

arrays = dict(np.load(sys.argv[1]))
average = {f"{name}/ExponentialMovingAverage": value for name, value in arrays.items()}
tensors = {**{name: value * 0.5 for name, value in arrays.items()}, **average}
names = sorted(tensors)
values = [tf.constant(tensors[name]) for name in names]
tf.raw_ops.SaveV2(prefix=sys.argv[2], tensor_names=names, shape_and_slices=[""] * len(names), tensors=values)
"""


def make_source(name: str, path: Path, dialect: str | None = None, key: str = "") -> int:
    """Writes a file of random weights; returns the number of parameters.

    Args:
      name: of the model.
      path: of the file. Its suffix gives the kind; without one it is the prefix of a TensorFlow checkpoint.
      dialect: names of the entries; None for the canonical ones.
      key: of the weights in the file, beside entries that training writes; empty for the weights alone.
    """
    model = maxmap.create_model(name)
    random = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        values = random.standard_normal(leaf.shape, np.float32)
        # This scale keeps activations of order one, and these variances are positive.
        return (
            abs(values) + 0.5 if len(leaf.shape) < 2 else values / np.float32(max(np.prod(leaf.shape[:-1]), 1) ** 0.5)
        )

    variables = jax.tree.map(draw, abstract_variables(model))
    in_tensorflow = not path.suffix
    state_dict = maxmap.to_torch(variables, model, None if in_tensorflow else dialect)
    state_dict = {name: np.ascontiguousarray(value) for name, value in state_dict.items()}
    if in_tensorflow:
        arrays = path.with_name("arrays.npz")
        np.savez(arrays, **dict(official(state_dict)))
        subprocess.run([sys.executable, "-c", TO_TENSORFLOW, arrays, path], check=True, capture_output=True)
    elif path.suffix == ".safetensors":
        save_file(state_dict, path)
    else:
        import torch

        tensors = {name: torch.from_numpy(value) for name, value in state_dict.items()}
        settings = argparse.Namespace(model=name, lr=1e-3)
        torch.save({key: tensors, "epoch": 300, "args": settings} if key else tensors, path)
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def official(state_dict: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Turns timm's state dict of a MaxViT into the official variables; the inverse of `from_tensorflow`."""
    modules = [pattern.replace("([qkv])", letter) for pattern, _ in tensorflow.MODULES for letter in "qkv"]
    modules = sorted({pattern.replace("(_1)?", grid) for pattern in modules for grid in ("", "_1")})
    blocks = {tuple(key.split(".")[1:4:2]) for key in state_dict if key.startswith("stages.")}
    places = ["", *(f"block_{int(stage):02}_{int(block):02}/" for stage, block in sorted(blocks))]
    for place, module in itertools.product(places, modules):
        leaves = ("bias", "weight")
        if "norm" in module:
            leaves = ("gamma", "beta", "moving_mean", "moving_variance")
        elif "conv" in module:
            leaves = ("bias", "depthwise_kernel" if "depthwise" in module else "kernel")
        elif re.fullmatch(r"attention(_1)?", module):
            leaves = ("relative_bias",)
        for leaf in leaves:
            name = f"maxvit/{place}{module}/{leaf}"
            key = tensorflow.timm_name(name)
            assert key is not None
            which = re.fullmatch(r"(.*\.attn\.)([qkv])(\.\w+)", key)
            value = state_dict.get(f"{which[1]}qkv{which[3]}" if which else key)
            if value is None:
                continue
            if which:
                value = np.split(value, 3)["qkv".index(which[2])]
            if leaf == "weight" and ".attn." in key:
                heads = len(state_dict[f"{key.rpartition('.attn.')[0]}.attn.rel_pos.relative_position_bias_table"])
                shape = (heads, -1, value.shape[0]) if module.endswith("o") else (value.shape[1], heads, -1)
                yield name, value.T.reshape(shape)
            else:
                order = {"kernel": (2, 3, 1, 0), "depthwise_kernel": (2, 3, 0, 1), "weight": (1, 0)}.get(leaf)
                yield name, value if order is None else value.transpose(order)


def copy(source: Path, dest: Path) -> float:
    """Returns the seconds to copy a file, until it is on the disk."""
    began = time.perf_counter()
    with source.open("rb") as read, dest.open("wb") as write:
        while piece := read.read(1 << 24):
            write.write(piece)
        write.flush()
        os.fsync(write.fileno())
    return time.perf_counter() - began


def run(*command: object) -> tuple[float, float, int]:
    """Returns seconds, largest resident gigabytes and exit status of a maxmap command."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "maxmap", *map(str, command)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    return time.perf_counter() - began, usage.ru_maxrss / 1e6, os.waitstatus_to_exitcode(status)


def measure(name: str, folder: Path) -> None:
    """Prints time and memory of the conversion of one model."""
    source, dest = folder / "source.safetensors", folder / "dest"
    # A child's largest resident set starts at its parent's, so a process of its own makes the source.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        parameters = pool.apply(make_source, (name, source))
    size = source.stat().st_size / 1e9
    copy(source, folder / "copy")  # the first copy is slower, because it fills the cache
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
    """Prints a Markdown table with a row for each family: what convert and verify measure."""
    print("| model | names | file | parameters | reference | float32 | float64 | gradient, float64 | seconds | GB |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for name, dialect, kind, key in FAMILIES:
        within = folder / name
        within.mkdir(exist_ok=True)
        source, dest = within / ("source" if kind == "tensorflow" else f"source{kind}"), within / "dest"
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            parameters = pool.apply(make_source, (name, source, dialect, key))
        where = within / "source.index" if kind == "tensorflow" else source
        seconds, memory, status = run("convert", where, dest, "--model", name, "--overwrite")
        assert status == 0, name
        _, _, status = run("verify", dest, "--against", where)
        report = json.loads((dest / "verify.json").read_text())
        assert report["ok"] == (status == 0)
        if report["reference"]:
            shown = [f"{report['float32']['logits']:.0e}", f"{report['float64']['logits']:.0e}"]
            shown.append(f"{report['float64']['gradient']:.0e}")
        else:
            shown = ["same bits" if report["identical"] == report["entries"] else "DIFFERENT", "", ""]
        file = f"`{kind}`, `{key}`" if key else "checkpoint, averaged" if kind == "tensorflow" else f"`{kind}`"
        columns = [f"`{name}`", dialect, file, f"{parameters:,}", report["reference"] or "-", *shown]
        print(f"| {' | '.join([*columns, f'{seconds:.1f}', f'{memory:.2f}'])} |", flush=True)
        shutil.rmtree(within)


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
