"""The formats of phones and browsers: TFLite, TensorFlow.js and ONNX."""

import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from maxmap.convert.sources import read_source
from tests.convert.program_files import field, onnx_dequantise, onnx_tensor, write_onnx, write_tfjs
from tests.fuzz.changes import spoil, spoil_json, spoil_one
from tests.fuzz.rows import Files, Row

TFLITE, ONNX, TFJS = "model.tflite", "model.onnx", "model.json"
_TABLES = 6000  # bytes at the beginning and at the end of a TFLite file, which hold its tables


def _written(write: Callable[[Path], Any]) -> Files:
    """The files that a function writes into a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "made")
        root = Path(folder) / "made"
        if root.is_file():
            return {"": root.read_bytes()}
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def _valid_tflite() -> list[Files]:
    from tests.convert.test_mobilenet import write_mobilenet

    return [{TFLITE: _written(write_mobilenet)[""]}]


def _spoil_tflite(files: Files, rng: random.Random) -> Files:
    data = files[TFLITE]
    if rng.random() < 0.3:
        return {TFLITE: spoil(data, rng)}
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 3))):
        at = rng.randrange(8, _TABLES) if rng.random() < 0.5 else len(data) - rng.randrange(8, _TABLES)
        value = rng.choice((0, 1, 2, 65, 2**15, 2**31 - 1, 2**31, 2**32 - 1, rng.randrange(2**32), len(data)))
        size = rng.choice((1, 2, 4))
        changed[at : at + size] = value.to_bytes(4, "little")[:size]
    return {TFLITE: bytes(changed)}


def _hostile_tflite() -> dict[str, Files]:
    mark = b"TFL3"
    files = {
        "nothing": b"\x08\0\0\0" + mark,
        "a table within itself": b"\x08\0\0\0" + mark + bytes(64),
        "an offset beyond": b"\xff\xff\xff\x7f" + mark + bytes(64),
        "a table of 65,535 fields": b"\x0c\0\0\0" + mark + b"\xff\xff\0\0" + b"\4\0\0\0" + bytes(64),
    }
    return {name: {TFLITE: data} for name, data in files.items()}


def _valid_tfjs() -> list[Files]:
    rng = np.random.default_rng(0)
    weights = {
        name: rng.standard_normal(shape).astype(np.float32) for name, shape in (("a", (40, 8)), ("b/kernel", (9,)))
    }
    return [_written(lambda folder: write_tfjs(folder, weights, 32))]


def _spoil_tfjs(files: Files, rng: random.Random) -> Files:
    if rng.random() < 0.7:
        return {**files, TFJS: spoil_json(json.loads(files[TFJS]), rng)}
    return spoil_one(files, rng)


def _hostile_tfjs() -> dict[str, Files]:
    (valid,) = _valid_tfjs()
    content = json.loads(valid[TFJS])
    group = content["weightsManifest"][0]
    changes: dict[str, Any] = {
        **{
            f"paths {str(paths)[:20]}": {"paths": paths}
            for paths in (["../x"], ["/dev/zero"], ["a\0b"], [""], 1, [], [1])
        },
        "2^61 numbers": {"weights": [{"name": "a", "shape": [1 << 61, 8], "dtype": "float32"}]},
        "65 dimensions": {"weights": [{"name": "a", "shape": [1] * 65, "dtype": "float32"}]},
        "a size of 4,000 digits": {"weights": [{"name": "a", "shape": [int("9" * 4000)], "dtype": "float32"}]},
        "a type of text": {"weights": [{"name": "a", "shape": [1], "dtype": "string"}]},
        "no weights": {"weights": None},
    }
    files = {name: json.dumps({**content, "weightsManifest": [group | change]}) for name, change in changes.items()}
    files["nested"] = '{"weightsManifest":' + "[" * 10_000 + "]" * 10_000 + "}"
    return {name: {**valid, TFJS: text.encode()} for name, text in files.items()}


def _onnx(*graph: bytes) -> Files:
    return {ONNX: _written(lambda path: write_onnx(path, *graph))[""], "weights.bin": bytes(range(36))}


def _valid_onnx() -> list[Files]:
    scales, zero, stored = np.float32([0.5, 2]).tobytes(), bytes(2), bytes([1, 2, 3, 4])
    place = {"location": "weights.bin", "offset": "0", "length": "36"}
    beside = [field(13, field(1, key) + field(2, value)) for key, value in place.items()]
    return [
        _onnx(
            onnx_tensor("stem.weight", (3, 3), 1, *beside, field(14, 1)),
            onnx_tensor("stem.bias", (4,), 1, field(9, bytes(range(16)))),
            onnx_tensor("packed", (4,), 1, field(4, bytes(range(16)))),
            onnx_tensor("head_quantized", (2, 2), 3, field(9, stored)),
            onnx_tensor("scale", (2,), 1, field(9, scales)),
            onnx_tensor("zero", (2,), 3, field(9, zero)),
            onnx_dequantise("head_quantized", "scale", "zero", 0),
        )
    ]


def _hostile_onnx() -> dict[str, Files]:
    def elsewhere(location: str, offset: str = "0", length: str = "4") -> bytes:
        place = {"location": location, "offset": offset, "length": length}
        entries = [field(13, field(1, key) + field(2, value)) for key, value in place.items()]
        return onnx_tensor("a", (1,), 1, *entries, field(14, 1))

    graphs = {
        "2^80 numbers": onnx_tensor("a", (2**40, 2**40), 1, field(9, bytes(8))),
        "2^63 numbers": onnx_tensor("a", (2**63,), 1, field(9, bytes(8))),
        "65 dimensions": onnx_tensor("a", (1,) * 65, 1, field(9, bytes(4))),
        "60,000 dimensions": onnx_tensor("a", (1,) * 60_000, 1, field(9, bytes(4))),
        "twice": onnx_tensor("a", (1,), 1, field(9, bytes(4))) * 2,
        "a name of a megabyte": onnx_tensor("a" * 1_000_000, (2,), 1, field(9, bytes(4))),
        "a field of another type": field(5, 7),
        "no weights": b"",
        **{
            f"a file {name[:12]!r}": elsewhere(name)
            for name in ("../x", "/dev/zero", "a\0b", "", ".", "nothing", "x" * 5000)
        },
        "an offset of 4,000 digits": elsewhere("weights.bin", "9" * 4000),
        "a negative offset": elsewhere("weights.bin", "-4"),
        "an offset beyond": elsewhere("weights.bin", "36"),
        "another length": elsewhere("weights.bin", "0", "99999999999"),
    }
    return {name: _onnx(graph) for name, graph in graphs.items()}


def _read(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        found = read_source(folder / name)
        return found.tensors, found.architecture, found.image_size, found.notes

    return read


ROWS = (
    Row(
        "TFLite",
        ("maxmap.convert.tflite", "maxmap.convert.flatbuffers"),
        1000,
        _valid_tflite,
        _spoil_tflite,
        _read(TFLITE),
        _hostile_tflite,
    ),
    Row(
        "TensorFlow.js",
        ("maxmap.convert.tfjs", "maxmap.convert.manifests"),
        1000,
        _valid_tfjs,
        _spoil_tfjs,
        _read(TFJS),
        _hostile_tfjs,
    ),
    Row("ONNX", ("maxmap.convert.onnx", "maxmap.protobuf"), 1000, _valid_onnx, spoil_one, _read(ONNX), _hostile_onnx),
)
