"""Safetensors, and folders of the Hugging Face hub: config.json, index, refs and the paths that they name."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from maxmap.convert.load import read_foreign
from maxmap.convert.sources import read_source
from tests.fuzz.changes import spoil, spoil_json, spoil_one
from tests.fuzz.rows import Files, Row

FILE = "file.safetensors"
_SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
_INDEX = "model.safetensors.index.json"
_NESTED = (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, b"[" * 10_000 + b"]" * 10_000, b"[" * 100_000)


def packed(header: Any, data: bytes = b"") -> bytes:
    """A file of safetensors; the header is bytes, or a value for JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    names = {"stem.conv1.weight": (4, 3, 3, 3), "stem.conv1.bias": (4,), "head.fc.weight": (3, 8), "head.fc.bias": (3,)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in names.items()}


def _whole(arrays: dict[str, np.ndarray]) -> bytes:
    from safetensors.numpy import save

    return save(arrays, {"format": "pt"})


def _valid_files() -> list[Files]:
    kinds = {kind: np.arange(6).astype(kind).reshape(2, 3) for kind in ("float16", "int64", "uint8", "bool")}
    return [{FILE: _whole(_arrays())}, {FILE: _whole(kinds)}]


def _spoil_file(files: Files, rng: random.Random) -> Files:
    """Changes bytes anywhere, or values of the header, whose length is then right."""
    data = files[FILE]
    if rng.random() < 0.4:
        return {FILE: spoil(data, rng)}
    start = 8 + int.from_bytes(data[:8], "little")
    return {FILE: packed(spoil_json(json.loads(data[8:start]), rng), data[start:])}


def _hostile_files() -> dict[str, Files]:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    huge = int("9" * 4000)
    headers: dict[str, Any] = {
        **{f"offsets {str(x)[:20]}": {"a": entry | {"data_offsets": x}} for x in ([], [0], [0, 4, 8], 4, [-4, 0])},
        **{f"shape {str(x)[:20]}": {"a": entry | {"shape": x}} for x in ([1] * 65, [huge], [-1], [1 << 40], [1.0])},
        "an offset of 4,000 digits": {"a": entry | {"data_offsets": [0, huge]}},
        "two in one place": {"a": entry, "b": entry},
        "40,000 entries of nothing": {f"{i}": entry | {"data_offsets": [0, huge]} for i in range(4000)},
        "an entry twice": b'{"a": %b, "a": %b}' % ((json.dumps(entry).encode(),) * 2),
        "a name of a megabyte": {"a" * 1_000_000: None},
        **{f"nested {number}": text for number, text in enumerate(_NESTED)},
        "a number of 5,000 digits": b'{"a": ' + b"9" * 5000 + b"}",
        "no text": b"\xff\xfe",
    }
    files = {name: {FILE: packed(header, bytes(4))} for name, header in headers.items()}
    files["a header of 2^60 bytes"] = {FILE: (1 << 60).to_bytes(8, "little") + bytes(100)}
    return files


def _many_entries() -> Files:
    empty = {f"{i:06}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}
    empty["z"] = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    return {FILE: packed(empty, bytes(4))}


def _read_file(folder: Path) -> Any:
    found = read_source(folder / FILE)
    return found.tensors, found.weights


_CONFIG = {
    "architecture": "test_maxvit",
    "num_classes": 3,
    "label_names": ["ant", "bee", "cat"],
    "pretrained_cfg": {
        "input_size": [3, 160, 160],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "crop_pct": 0.95,
        "crop_mode": "center",
        "interpolation": "bicubic",
    },
}


def _model() -> dict[str, np.ndarray]:
    """The state dict of the tests' network."""
    import jax

    from maxmap.convert.torch import abstract_variables, to_torch
    from maxmap.models import create_model

    model = create_model("test_maxvit", num_classes=3)
    zeros = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, leaf.dtype), abstract_variables(model, 3))
    return {key: np.ascontiguousarray(value) for key, value in to_torch(zeros, model).items()}


def _valid_folders() -> list[Files]:
    arrays, config = _model(), json.dumps(_CONFIG).encode()
    names = sorted(arrays)
    map_of = {key: _SHARDS[number % 2] for number, key in enumerate(names)}
    shards = {file: _whole({key: arrays[key] for key in names if map_of[key] == file}) for file in _SHARDS}
    index = json.dumps({"metadata": {"total_size": 1}, "weight_map": map_of}).encode()
    whole = {"config.json": config, "model.safetensors": _whole(arrays)}
    return [
        whole,
        {"config.json": config, _INDEX: index, **shards},
        {"refs/main": b"abc", **{f"snapshots/abc/{name}": data for name, data in whole.items()}},
    ]


def _spoil_folder(files: Files, rng: random.Random) -> Files:
    """Changes values of the JSON files or of a header of weights; else the bytes of one of the small files."""
    name = rng.choice(sorted(files))
    if name.endswith(".json") and rng.random() < 0.7:
        return {**files, name: spoil_json(json.loads(files[name]), rng)}
    if name.endswith(".safetensors") and rng.random() < 0.7:
        return {**files, name: _spoil_file({FILE: files[name]}, rng)[FILE]}
    if name == "refs/main" and rng.random() < 0.5:
        other = (b"../../../etc", b"/etc", b".", b"..", b"", b"a\0b", b"\xff", b"x" * 5000, b"abc/../abc", b" abc\n")
        return {**files, name: rng.choice(other)}
    return {**files, name: spoil_one({name: files[name]}, rng)[name]}


def _hostile_folders() -> dict[str, Files]:
    weights = _whole({"a": np.zeros(3, np.float32)})
    folders: dict[str, Files] = {}
    paths = (
        _INDEX,
        "other.index.json",
        "",
        ".",
        "..",
        "folder/file",
        "a\0b",
        "/dev/zero",
        "../x.safetensors",
        "\ud800",
    )
    for shard in paths:
        index = json.dumps({"weight_map": {"a": shard}}).encode()
        folders[f"shard {shard[:20]!r}"] = {_INDEX: index, "folder/file": weights}
    for version in ("def", "../elsewhere", "", "..", ".", "a\0b", "x" * 5000, "/etc"):
        elsewhere = {"snapshots/abc/model.safetensors": weights}
        folders[f"version {version[:20]!r}"] = {"refs/main": version.encode(), **elsewhere}
    for number, text in enumerate((*_NESTED, b"9" * 5000, b"[]", b"{}", b"\xff")):
        folders[f"index {number}"] = {_INDEX: text}
        folders[f"config {number}"] = {"config.json": text, "model.safetensors": weights}
    return folders


def _read_folder(folder: Path) -> Any:
    found = read_foreign(folder)
    return found.variables, {key: found.info[key] for key in ("model", "classes", "preprocessing")}


ROWS = (
    Row(
        "safetensors",
        ("maxmap.convert.sources", "maxmap.convert.safetensors_files"),
        2500,
        _valid_files,
        _spoil_file,
        _read_file,
        _hostile_files,
        lambda: {"100,000 entries": _many_entries},
    ),
    Row(
        "config.json, index, refs, paths of a hub folder",
        ("maxmap.convert.sources", "maxmap.convert.hub", "maxmap.convert.load"),
        600,
        _valid_folders,
        _spoil_folder,
        _read_folder,
        _hostile_folders,
    ),
)
