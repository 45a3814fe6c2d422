"""Small files in the formats of phones and browsers, as their own libraries write them: TFLite, TensorFlow.js, ONNX."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np

KINDS = {"float32": 0, "float16": 1, "int32": 2, "uint8": 3, "int8": 9}
CONV, DEPTHWISE, DEQUANTIZE, POOL, RESHAPE, SOFTMAX = 3, 4, 6, 1, 22, 25


class TFLite:
    """A TFLite file with one graph, whose operations follow one another.

    Args:
      shape: of the input.
      kind: its type.
    """

    def __init__(self, shape: Sequence[int], kind: str = "uint8"):
        self.data: list[bytes] = [b""]
        self.tensors: list[tuple[Any, ...]] = []
        self.operators: list[tuple[int, list[int], int, list[tuple[str, int]]]] = []
        self.last = self.tensor(shape, kind)

    def tensor(self, shape: Sequence[int], kind: str, values: Any = None, scales: Any = (), zeros: Any = (), axis=0):
        """Adds a tensor, a constant if it has values; returns its number."""
        self.data += [] if values is None else [np.ascontiguousarray(values).tobytes()]
        self.tensors.append((shape, kind, 0 if values is None else len(self.data) - 1, scales, zeros, axis))
        return len(self.tensors) - 1

    def operator(self, code: int, constants: Sequence[int], output: int, *options: tuple[str, int]) -> None:
        """Adds an operation on the last result; `options` are type and value of each field."""
        self.operators.append((code, [self.last, *constants], output, list(options)))
        self.last = output

    def widen(self, constant: int, shape: Sequence[int]) -> int:
        """Adds an operation that turns a constant into float32; returns the number of its result."""
        result = self.tensor(shape, "float32")
        self.operators.append((DEQUANTIZE, [constant], result, []))
        return result

    def write(self, path: Path) -> None:
        builder = flatbuffers.Builder(1 << 20)
        tables = builder.CreateNumpyVector

        def offsets(items: Sequence[int]) -> int:
            builder.StartVector(4, len(items), 4)
            for item in reversed(items):
                builder.PrependUOffsetTRelative(item)
            return builder.EndVector()

        def table(count: int, **slots: Any) -> int:
            """Fields by number, such as `o2` for an offset, `b0` for a byte and `i3` for an integer."""
            builder.StartObject(count)
            for name, value in slots.items():
                number = int(name[1:])
                if name[0] == "o":
                    builder.PrependUOffsetTRelativeSlot(number, value, 0)
                elif name[0] == "b":
                    builder.PrependInt8Slot(number, value, 0)
                else:
                    builder.PrependInt32Slot(number, value, 0)
            return builder.EndObject()

        codes = sorted({code for code, *_ in self.operators})
        tensors = []
        for shape, kind, buffer, scales, zeros, axis in self.tensors:
            vectors = (
                tables(np.array(shape, np.int32)),
                tables(np.array(scales, np.float32)),
                tables(np.array(zeros, np.int64)),
            )
            quantisation = table(7, o2=vectors[1], o3=vectors[2], i6=axis)
            tensors.append(table(5, o0=vectors[0], b1=KINDS[kind], i2=buffer, o4=quantisation))
        operators = []
        for code, inputs, output, options in self.operators:
            found = table(7, **{f"{kind}{number}": value for number, (kind, value) in enumerate(options)})
            ends = tables(np.array(inputs, np.int32)), tables(np.array([output], np.int32))
            operators.append(table(5, i0=codes.index(code), o1=ends[0], o2=ends[1], o4=found))
        ends = tables(np.array([0], np.int32)), tables(np.array([self.last], np.int32))
        parts = offsets(tensors), offsets(operators)
        graphs = offsets([table(4, o0=parts[0], o1=ends[0], o2=ends[1], o3=parts[1])])
        operator_codes = offsets([table(4, b0=code) for code in codes])
        stored = [tables(np.frombuffer(data, np.uint8)) if data else None for data in self.data]
        buffers = offsets([table(1, **({} if data is None else {"o0": data})) for data in stored])
        builder.Finish(table(5, i0=3, o1=operator_codes, o2=graphs, o4=buffers), file_identifier=b"TFL3")
        path.write_bytes(builder.Output())


def write_tfjs(folder: Path, weights: Mapping[str, np.ndarray], size: int) -> None:
    """Writes a folder of TensorFlow.js: the weights in one group of two files, the first in 8 bits."""
    layers = [{"class_name": "InputLayer", "config": {"batch_input_shape": [None, size, size, 3]}}]
    entries, data = [], b""
    for name, values in weights.items():
        entry: dict[str, Any] = {"name": name, "shape": list(values.shape), "dtype": "float32"}
        if not entries:
            low, step = float(values.min()), float(np.ptp(values)) / 255
            values = np.round((values - low) / step).astype(np.uint8)
            entry["quantization"] = {"dtype": "uint8", "scale": step, "min": low}
        entries.append(entry)
        data += values.tobytes()
    folder.mkdir()
    (folder / "group1-shard1of2").write_bytes(data[:1001])
    (folder / "group1-shard2of2").write_bytes(data[1001:])
    manifest = [{"paths": ["group1-shard1of2", "group1-shard2of2"], "weights": entries}]
    topology = {"model_config": {"class_name": "Model", "config": {"layers": layers}}}
    (folder / "model.json").write_text(json.dumps({"modelTopology": topology, "weightsManifest": manifest}))


def varint(value: int) -> bytes:
    """An unsigned integer of a protocol buffer."""
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def field(number: int, value: int | str | bytes) -> bytes:
    """A field of a protocol buffer."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def onnx_tensor(name: str, shape: Sequence[int], kind: int, *fields: bytes) -> bytes:
    """A constant of an ONNX graph, as a field of the graph; `fields` hold its numbers."""
    return field(5, b"".join([*(field(1, size) for size in shape), field(2, kind), field(8, name), *fields]))


def onnx_dequantise(values: str, scale: str, zero: str, axis: int) -> bytes:
    """A node that dequantises constants, as a field of the graph."""
    attribute = field(5, field(1, "axis") + field(3, axis))
    names = b"".join(field(1, name) for name in (values, scale, zero))
    return field(1, names + field(2, f"{values}_real") + field(4, "DequantizeLinear") + attribute)


def write_onnx(path: Path, *graph: bytes) -> None:
    """Writes an ONNX file whose graph has these fields."""
    path.write_bytes(field(1, 8) + field(2, "a test") + field(7, b"".join(graph)))
