"""MobileNetV1 in TFLite files, read without TensorFlow; integers become floating-point numbers again.

Such a file is a program: a list of operations on tensors without names that one could rely on. So the operations are
followed one by one, and they have to be those of MobileNetV1. The format is in tensorflow/lite/schema/schema.fbs.
"""

import collections
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maxmap.convert.flatbuffers import MalformedTable, Table, root
from maxmap.convert.mobilenet import (
    TRUNK,
    Convolution,
    Network,
    dequantisation_note,
    dequantised,
    name_classifier,
    name_trunk,
    tensorflow_name,
)
from maxmap.errors import UserError

MARK = b"TFL3"  # behind the first four bytes
_TYPES: dict[int, Any] = {0: np.float32, 1: np.float16, 2: np.int32, 3: np.uint8, 9: np.int8}
_CONV, _DEPTHWISE, _FULLY_CONNECTED = 3, 4, 9  # operations
_CONVOLUTIONS = (_CONV, _DEPTHWISE, _FULLY_CONNECTED)
_DEQUANTIZE = 6  # of 16-bit weights, and at the end
_POOLING = (1, 40)  # AVERAGE_POOL_2D, MEAN
_WITHOUT_WEIGHTS = (*_POOLING, 22, 43, 25, 114, _DEQUANTIZE)  # also RESHAPE, SQUEEZE, SOFTMAX, QUANTIZE
_OTHERS = {0: "ADD", 2: "CONCATENATION", 17: "MAX_POOL_2D", 18: "MUL", 34: "PAD", 41: "SUB"}  # the usual ones, by name
_SAME, _NO_ACTIVATION, _RELU6 = 0, 0, 3


def read_tflite(path: Path) -> Network:
    """Reads MobileNetV1, or its trunk or its classifier alone.

    Raises:
      UserError: the file is damaged or holds another network.
    """
    try:
        return _read(np.memmap(path, np.uint8, "r"))
    except (MalformedTable, IndexError) as error:
        what = error if isinstance(error, MalformedTable) else "it names a part that it does not have"
        raise UserError(f"{path} is damaged or no TFLite file, {what}: get it again.") from None
    except ValueError as error:
        raise UserError(
            f"{path} is no MobileNetV1, {error}: of TFLite files, only those of this network can be read."
        ) from None


class _Graph:
    """The tensors of a file."""

    def __init__(self, model: Table, graph: Table, size: int):
        self.buffers, self.tensors = model.tables(4), graph.tables(0)
        self.sources: dict[int, int] = {}  # constants by the tensor that they are turned into
        self.unread = size  # bytes of the file: weights may share some, but not so many that they need much memory
        self.dequantised: collections.Counter[str] = collections.Counter()  # tensors by type

    def quantisation(self, index: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Returns scales, zero points and their axis; no scales if the tensor is not quantised."""
        table = self.tensors[index].table(4)
        if table is None:
            return np.zeros(0, np.float32), np.zeros(0, np.int64), 0
        return table.vector(2, np.float32), table.vector(3, np.int64), table.scalar(6)

    def shape(self, index: int) -> tuple[int, ...]:
        return tuple(int(size) for size in self.tensors[index].vector(0, np.int32))

    def values(self, index: int) -> np.ndarray:
        """Returns a constant in float32."""
        index = self.sources.get(index, index)
        tensor, shape = self.tensors[index], self.shape(index)
        kind, data = tensor.scalar(1, "<b"), self.buffers[tensor.scalar(2, "<I")].vector(0, np.uint8)
        if kind not in _TYPES:
            raise ValueError(f"its tensor {index} is of type {kind}, which is no type of weights")
        dtype = np.dtype(_TYPES[kind])
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != data.size:
            raise ValueError(f"its tensor {index} has {data.size} bytes, which is not what its shape needs")
        self.unread -= data.size
        if self.unread < 0:
            raise ValueError("its operations use the same weights again and again")
        values = data.view(dtype).reshape(shape)
        if dtype.kind == "f":
            return values.astype(np.float32)
        scales, zeros, axis = self.quantisation(index)
        if not scales.size or zeros.size not in (0, scales.size):
            raise ValueError(f"its tensor {index} has integers without scales")
        if scales.size > 1 and not (0 <= axis < len(shape) and shape[axis] == scales.size):
            raise ValueError(f"its tensor {index} has {scales.size} scales, which do not fit its shape")
        zeros = np.zeros(scales.size, np.int64) if not zeros.size else zeros
        self.dequantised[str(dtype)] += 1
        return dequantised(values, scales, zeros, axis)

    def ends_at_six(self, index: int) -> bool:
        """Whether the integers of a result stand for 0 to 6, so that rounding to them is ReLU6."""
        scales, zeros, _ = self.quantisation(index)
        lowest = {3: 0, 9: -128}.get(self.tensors[index].scalar(1, "<b"))
        return scales.size == 1 and abs(255 * float(scales[0]) - 6) < 0.01 and zeros.tolist() == [lowest]


def _read(data: np.ndarray) -> Network:
    """Follows the operations of a program and collects their weights."""
    model = root(data)
    graphs = model.tables(2)
    if len(graphs) != 1:
        raise ValueError(f"it has {len(graphs)} graphs")
    graph, codes = _Graph(model, graphs[0], data.size), model.tables(1)
    last = int(graphs[0].vector(1, np.int32)[0])
    size = graph.shape(last)
    pooled = size[1:3] == (1, 1)
    trunk: list[Convolution] = []
    classifier: Convolution | None = None
    for number, operator in enumerate(graphs[0].tables(3), 1):
        code = codes[operator.scalar(0, "<I")]
        kind = max(code.scalar(0, "<b"), code.scalar(3))
        inputs, output = operator.vector(1, np.int32), int(operator.vector(2, np.int32)[0])
        if kind == _DEQUANTIZE and inputs[0] != last:
            graph.sources[output] = int(inputs[0])
            continue
        if inputs[0] != last:
            raise ValueError(f"its operation {number} does not follow the one before")
        last, pooled = output, pooled or kind in _POOLING
        if kind in _WITHOUT_WEIGHTS:
            continue
        if kind not in _CONVOLUTIONS or classifier is not None or len(trunk) > len(TRUNK):
            what = f"is {_OTHERS[kind]}" if kind in _OTHERS else f"has the code {kind}"
            raise ValueError(f"its operation {number} {what}, which does not belong there")
        convolution, activation = _convolution(graph, operator, kind, number)
        if pooled:
            classifier = convolution
            if convolution.weight.shape[2:] != (1, 1) or activation != _NO_ACTIVATION:
                raise ValueError(f"its operation {number}, behind the pooling, is no linear map")
        else:
            trunk.append(convolution)
            if activation != _RELU6 and not (activation == _NO_ACTIVATION and graph.ends_at_six(output)):
                raise ValueError(f"its operation {number} has the activation {activation}, not ReLU6")
    return _network(graph, trunk, classifier, size)


def _convolution(graph: _Graph, operator: Table, kind: int, number: int) -> tuple[Convolution, int]:
    """Reads a convolution and its activation; raises ValueError unless it is of a kind that MobileNetV1 has."""
    inputs = operator.vector(1, np.int32)
    if inputs.size != 3:
        raise ValueError(f"its operation {number} has no bias")
    weight, bias = graph.values(int(inputs[1])), graph.values(int(inputs[2]))
    if kind == _FULLY_CONNECTED and weight.ndim == 2:
        weight = weight[:, None, None]
    if weight.ndim != 4 or (kind == _DEPTHWISE and weight.shape[0] != 1):
        raise ValueError(f"its operation {number} has weights of the shape {weight.shape}")
    # TFLite has [O, kh, kw, I], and [1, kh, kw, O] for depthwise convolutions.
    weight = weight.transpose(3, 0, 1, 2) if kind == _DEPTHWISE else weight.transpose(0, 3, 1, 2)
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"its operation {number} has a bias of the shape {bias.shape}")
    padding, stride, activation = _options(operator.table(4), kind, number)
    if padding != _SAME and weight.shape[2:] != (1, 1):
        raise ValueError(f"its operation {number} has no 'same' padding")
    return Convolution(weight, bias, stride, kind == _DEPTHWISE), activation


def _options(options: Table | None, kind: int, number: int) -> tuple[int, int, int]:
    """Returns padding, stride and activation of a convolution."""
    if options is None:
        raise MalformedTable(f"its operation {number} lacks its options")
    if kind == _FULLY_CONNECTED:
        return _SAME, 1, options.scalar(0, "<b")
    strides = options.scalar(1), options.scalar(2)
    multiplier, first = (options.scalar(3), 4) if kind == _DEPTHWISE else (1, 3)
    dilations = [options.scalar(first + 1, default=1), options.scalar(first + 2, default=1)]
    if strides[0] != strides[1] or dilations != [1, 1] or multiplier != 1:
        raise ValueError(f"its operation {number} has other strides, dilations or multipliers")
    return options.scalar(0, "<b"), strides[0], options.scalar(first, "<b")


def _network(
    graph: _Graph, trunk: Sequence[Convolution], classifier: Convolution | None, size: tuple[int, ...]
) -> Network:
    """Names the convolutions."""
    if not trunk and classifier is None:
        raise ValueError("it has no convolutions")
    network = Network()
    if trunk:
        network.tensors |= name_trunk(trunk)
        network.name = tensorflow_name(len(trunk[0].bias))
        network.image_size = size[1] if len(size) == 4 and size[1] == size[2] > 0 else None
        network.notes.append(f"made {len(trunk)} batch norms, which were folded into the convolutions")
    if classifier is not None:
        tensors, notes = name_classifier(classifier.weight[:, :, 0, 0], classifier.bias)
        network.tensors |= tensors
        network.notes += notes
    network.notes += dequantisation_note(graph.dequantised)
    return network
