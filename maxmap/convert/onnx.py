"""The weights in ONNX files, read without its library: the constants of the graph, under their names there.

PyTorch's exports keep the names of the state dict, if they are made without constant folding. Numbers in files beside
the graph are read too. The format is in onnx/onnx.proto of https://github.com/onnx/onnx.
"""

import collections
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from maxmap.convert.manifests import is_beside, is_shape
from maxmap.convert.mobilenet import Network, dequantisation_note, dequantised
from maxmap.errors import UserError, shortened
from maxmap.protobuf import MalformedMessage, Message

_TYPES: dict[int, Any] = {
    1: np.float32,
    2: np.uint8,
    3: np.int8,
    6: np.int32,
    7: np.int64,
    10: np.float16,
    11: np.float64,
    16: ml_dtypes.bfloat16,
}
_FLOATS, _INTEGERS, _LONG_INTEGERS, _DOUBLES = 4, 5, 7, 10  # fields with a tensor's numbers, beside the raw bytes
_RAW, _EXTERNAL = 9, 13
_LARGEST = (1 << 31) - 1  # bytes, the most that a protocol buffer has


def read_onnx(path: Path) -> Network:
    """Reads the weights of a file: its constants of floating-point numbers, and the integers that it dequantises.

    Raises:
      UserError: the file is cut off, damaged or of another kind.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise MalformedMessage("it has more than 2 GB")
        model = Message(path.read_bytes())
        if _text(model, 2) == "maxmap":
            raise UserError(
                f"{path} was written by `maxmap export`, and its weights are parts of a program: predict (without "
                "--to) and validate run it; give all else the checkpoint that it was made of."
            )
        graphs = model.messages(7)
        if not graphs:
            raise MalformedMessage("it has no graph")
        constants = {}
        for tensor in graphs[-1].messages(5):
            name = _text(tensor, 8)
            if name in constants:
                raise MalformedMessage(f"it has the entry {shortened(name)} twice")
            constants[name] = _values(tensor, name, path)
        return _weights(constants, graphs[-1])
    except MalformedMessage as error:
        raise UserError(f"{path} is cut off or no ONNX file, {shortened(error)}: get it again.") from None


def _weights(constants: Mapping[str, np.ndarray], graph: Message) -> Network:
    """Returns the constants that are weights. Those of integers and single numbers belong to the program."""
    tensors = {name: value for name, value in constants.items() if value.ndim and value.dtype.kind not in "iu"}
    counts: collections.Counter[str] = collections.Counter()
    for node in graph.messages(1):
        inputs = [name.decode(errors="replace") for name in node.strings(1)]
        if _text(node, 4) != "DequantizeLinear" or not inputs or inputs[0] not in constants:
            continue
        stored, *others = (constants.get(name) for name in inputs[:3])
        name = inputs[0].removesuffix("_quantized")
        if name in tensors or stored is None or not others or any(value is None for value in others):
            raise MalformedMessage(f"it dequantises {shortened(name)} twice, or without constants for it")
        tensors[name] = _dequantised(name, stored, others, _axis(node))
        counts[str(stored.dtype)] += 1
        for other in inputs[1:3]:
            tensors.pop(other, None)
    if not tensors:
        raise MalformedMessage("it holds no weights")
    return Network(tensors, notes=dequantisation_note(counts))


def _dequantised(name: str, stored: np.ndarray, others: list[Any], axis: int) -> np.ndarray:
    """Dequantises by a scale and perhaps a zero point, with one of both or one for each entry of an axis."""
    one_each = others[0].size > 1
    inside = -stored.ndim <= axis < stored.ndim
    if one_each and not (inside and all(value.shape == (stored.shape[axis],) for value in others)):
        raise MalformedMessage(f"the scales of {shortened(name)} do not fit its shape")
    if not one_each and any(value.size != 1 for value in others):
        raise MalformedMessage(f"the scales of {shortened(name)} do not fit its shape")
    scale, zero = others if len(others) == 2 else (others[0], np.zeros(others[0].shape, np.int64))
    return dequantised(stored, scale, zero, axis)


def _axis(node: Message) -> int:
    """Returns the attribute 'axis' of a node, whose default is 1."""
    for attribute in node.messages(5):
        if _text(attribute, 1) == "axis":
            value = attribute.integer(3)
            return value - (1 << 64) if value >= 1 << 63 else value
    return 1


def _values(tensor: Message, name: str, path: Path) -> np.ndarray:
    """Returns the numbers of a tensor, as many as its shape has."""
    kind, shape = tensor.integer(2), tensor.integers(1)
    if kind not in _TYPES:  # text, complex numbers and the like are no weights
        return np.zeros((), np.int64)
    dtype = np.dtype(_TYPES[kind])
    if not is_shape(shape):
        raise MalformedMessage(f"{shortened(name)} has the shape {shortened(shape)}")
    wanted = math.prod(shape) * dtype.itemsize
    if tensor.integer(14):
        data = _external(tensor, name, path, wanted)
    elif _RAW in tensor:
        data = np.frombuffer(b"".join(tensor.strings(_RAW)), np.uint8)
    elif kind in (1, 11):
        data = np.frombuffer(b"".join(tensor.strings(_FLOATS if kind == 1 else _DOUBLES)), np.uint8)
    else:
        stored = np.array(tensor.integers(_LONG_INTEGERS if kind == 7 else _INTEGERS), np.uint64)
        # 16-bit numbers are stored by their bits, one integer each.
        data = stored.astype(np.uint16 if dtype.itemsize == 2 else dtype).view(np.uint8)
    if data.size != wanted:
        raise MalformedMessage(f"{shortened(name)} has {data.size:,} bytes, its shape needs {wanted:,}")
    return data.view(dtype).reshape(shape)


def _external(tensor: Message, name: str, path: Path, wanted: int) -> np.ndarray:
    """Returns the bytes of a tensor that lie in a file beside the graph, as a view of it."""
    where = {_text(entry, 1): _text(entry, 2) for entry in tensor.messages(_EXTERNAL)}
    file = where.get("location", "")
    if not is_beside(file):
        raise UserError(f"{path} keeps {shortened(name)} in {shortened(file)}, which is not beside it: get it again.")
    if not (path.parent / file).is_file():
        raise UserError(f"there is no file {shortened(file)} beside {path}, which keeps weights in it: get it too.")
    begin, length = where.get("offset", "0"), where.get("length", str(wanted))
    if not (begin.isdecimal() and len(begin) < 20) or length != str(wanted):
        raise MalformedMessage(f"{shortened(name)} has no place in {shortened(file)}")
    size = (path.parent / file).stat().st_size
    if int(begin) + wanted > size:
        raise MalformedMessage(f"{shortened(file)} ends within {shortened(name)}")
    memory = np.memmap(path.parent / file, np.uint8, "r") if size else np.zeros(0, np.uint8)
    return memory[int(begin) : int(begin) + wanted]


def _text(message: Message, number: int) -> str:
    values = message.strings(number)
    return values[-1].decode(errors="replace") if values else ""
