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
        aligned = [1] * len(shape)
        if scales.size > 1:
            aligned[axis] = scales.size
        zeros = np.zeros(scales.size, np.int64) if not zeros.size else zeros
        self.dequantised[str(dtype)] += 1
        return (values - zeros.reshape(aligned)).astype(np.float32) * scales.reshape(aligned)

    def ends_at_six(self, index: int) -> bool:
        """Whether the integers of a result stand for 0 to 6, so that rounding to them is ReLU6."""
        scales, zeros, _ = self.quantisation(index)
        lowest = {3: 0, 9: -128}.get(self.tensors[index].scalar(1, "<b"))
        return scales.size == 1 and abs(255 * float(scales[0]) - 6) < 0.01 and zeros.tolist() == [lowest]


def _read(data: np.ndarray) -> Network:
    model = root(data)
    graphs = model.tables(2)
    if len(graphs) != 1:
        raise ValueError(f"it has {len(graphs)} graphs")
    graph = _Graph(model, graphs[0], data.size)
    codes = model.tables(1)
    trunk: list[Convolution] = []
    classifier: Convolution | None = None
    last = int(graphs[0].vector(1, np.int32)[0]) if graphs[0].vector(1, np.int32).size else -1
    size = graph.shape(last)
    pooled = size[1:3] == (1, 1)
    for number, operator in enumerate(graphs[0].tables(3), 1):
        code = codes[operator.scalar(0, "<I")]
        kind = max(code.scalar(0, "<b"), code.scalar(3))
        inputs, outputs = operator.vector(1, np.int32), operator.vector(2, np.int32)
        if kind == _DEQUANTIZE and inputs.size and outputs.size and inputs[0] != last:
            graph.sources[int(outputs[0])] = int(inputs[0])
            continue
        if not (inputs.size and outputs.size) or inputs[0] != last:
            raise ValueError(f"its operation {number} does not follow the one before")
        last = int(outputs[0])
        pooled = pooled or kind in _POOLING
        if kind in _WITHOUT_WEIGHTS:
            continue
        if kind not in _CONVOLUTIONS or classifier is not None or len(trunk) > len(TRUNK):
            what = f"is {_OTHERS[kind]}" if kind in _OTHERS else f"has the code {kind}"
            raise ValueError(f"its operation {number} {what}, which does not belong there")
        convolution = _convolution(graph, operator, kind, number, inputs, last, pooled)
        if pooled:
            classifier = convolution
        else:
            trunk.append(convolution)
    return _network(graph, trunk, classifier, size)


def _convolution(
    graph: _Graph, operator: Table, kind: int, number: int, inputs: np.ndarray, output: int, is_classifier: bool
) -> Convolution:
    """Reads a convolution; raises ValueError unless it computes what one of MobileNetV1 does."""
    if inputs.size != 3:
        raise ValueError(f"its operation {number} has no bias")
    options = operator.table(4)
    weight, bias = graph.values(int(inputs[1])), graph.values(int(inputs[2]))
    if kind == _FULLY_CONNECTED:
        weight = weight[:, None, None] if weight.ndim == 2 else weight
        padding, stride, activation = _SAME, 1, 0 if options is None else options.scalar(0, "<b")
    else:
        if options is None:
            raise MalformedTable(f"its operation {number} lacks its options")
        padding, strides = options.scalar(0, "<b"), (options.scalar(1), options.scalar(2))
        multiplier, first = (options.scalar(3), 4) if kind == _DEPTHWISE else (1, 3)
        activation, *dilations = options.scalar(first, "<b"), options.scalar(first + 1, default=1)
        dilations.append(options.scalar(first + 2, default=1))
        stride = strides[0]
        if strides != (stride, stride) or dilations != [1, 1] or multiplier != 1:
            raise ValueError(f"its operation {number} has other strides, dilations or multipliers")
    if weight.ndim != 4 or (kind == _DEPTHWISE and weight.shape[0] != 1):
        raise ValueError(f"its operation {number} has weights of the shape {weight.shape}")
    # TFLite has [O, kh, kw, I], and [1, kh, kw, O] for depthwise convolutions.
    weight = weight.transpose(3, 0, 1, 2) if kind == _DEPTHWISE else weight.transpose(0, 3, 1, 2)
    found = Convolution(weight, bias, stride, kind == _DEPTHWISE)
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"its operation {number} has a bias of the shape {bias.shape}")
    if is_classifier and (weight.shape[2:] != (1, 1) or activation != _NO_ACTIVATION):
        raise ValueError(f"its operation {number}, behind the pooling, is no linear map")
    if not is_classifier and padding != _SAME and weight.shape[2:] != (1, 1):
        raise ValueError(f"its operation {number} has no 'same' padding")
    if not is_classifier and activation != _RELU6 and not (activation == 0 and graph.ends_at_six(output)):
        raise ValueError(f"its operation {number} has the activation {activation}, not ReLU6")
    return found


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
