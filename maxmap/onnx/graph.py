"""A graph of ONNX operators while it is built: values whose axes move and broadcast without an operator.

JAX writes maps as NHWC and repeats values before it adds them; ONNX convolutions read NCHW, and its sums broadcast.
So a value here knows in which order its tensor has the axes, and which of them have the length 1 in place of the real
one. A transpose or a broadcast is written only where an operator needs it.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

BATCH = 1_000_003  # stands for the number of images while a program is traced: a prime that divides no other length
INPUT = "images"


@dataclasses.dataclass(frozen=True)
class Value:
    """A value of the program.

    Attributes:
      shape: that it has in the program; multiples of `BATCH` where the number of images counts.
      source: the name of its tensor, or the array of a constant.
      order: axis i of the tensor is the axis `order[i]` of the value; a constant has its own order.
      repeated: axes that have the length 1 in the tensor.
    """

    shape: tuple[int, ...]
    source: str | np.ndarray
    order: tuple[int, ...]
    repeated: frozenset[int] = frozenset()

    @property
    def rank(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def array(self) -> np.ndarray | None:
        """The numbers of a constant, with length 1 where they repeat; None for a tensor."""
        return self.source if isinstance(self.source, np.ndarray) else None

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape of the value as it is stored, in the value's own order of axes."""
        return tuple(1 if axis in self.repeated else size for axis, size in enumerate(self.shape))


def constant(array: np.ndarray, shape: Sequence[int] | None = None) -> Value:
    """Returns a constant value; axes of length 1 repeat where `shape` is longer."""
    shape = array.shape if shape is None else tuple(shape)
    repeated = frozenset(i for i, (own, size) in enumerate(zip(array.shape, shape, strict=True)) if own != size)
    return Value(shape, array, tuple(range(len(shape))), repeated)


def permuted(value: Value, permutation: Sequence[int]) -> Value:
    """Returns a value whose axis i is the axis `permutation[i]` of another one; its tensor stays as it is."""
    moves = list(permutation)
    shape = tuple(value.shape[axis] for axis in moves)
    if value.array is not None:
        return constant(value.array.transpose(moves), shape)
    order = tuple(moves.index(axis) for axis in value.order)
    return Value(shape, value.source, order, frozenset(moves.index(axis) for axis in value.repeated))


@dataclasses.dataclass
class Node:
    """An operator. 'Linear' is `MatMul` and `Add` until the graph is written (see `Graph.finish`)."""

    kind: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any]


class Graph:
    """Operators and constants; see the top of this module."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.constants: dict[str, np.ndarray] = {}
        self._names: dict[tuple[Any, ...], str] = {}  # constants and transposes that are there already

    def add(self, kind: str, inputs: Sequence[str], *, outputs: int = 1, **attributes: Any) -> list[str]:
        """Adds an operator; returns the names of its outputs."""
        names = [f"{kind.lower()}_{len(self.nodes)}{f'_{i}' * (outputs > 1)}" for i in range(outputs)]
        self.nodes.append(Node(kind, list(inputs), names, attributes))
        return names

    def store(self, array: np.ndarray) -> str:
        """Returns the name of a constant; equal small ones are stored once."""
        array = np.asarray(array)
        key = (array.dtype.str, array.shape, array.tobytes() if array.size <= 1024 else id(array))
        if key not in self._names:
            self._names[key] = f"constant_{len(self._names)}"
            self.constants[self._names[key]] = array
        return self._names[key]

    def integers(self, *values: int) -> str:
        """Returns the name of a constant list of integers, as operators take axes and shapes."""
        return self.store(np.array(values, np.int64))

    def tensor(self, value: Value, order: Sequence[int] | None = None) -> str:
        """Returns the name of a value's tensor with its axes in this order; None for the value's own."""
        order = tuple(range(value.rank)) if order is None else tuple(order)
        if isinstance(value.source, np.ndarray):
            return self.store(value.source if order == tuple(range(value.rank)) else value.source.transpose(order))
        if value.order == order:
            return value.source
        key = (value.source, value.order, order)
        if key not in self._names:
            moves = [value.order.index(axis) for axis in order]
            (self._names[key],) = self.add("Transpose", [value.source], perm=moves)
        return self._names[key]

    def whole(self, value: Value) -> Value:
        """Returns the value with all its axes in their real lengths."""
        if not value.repeated:
            return value
        if value.array is not None and not any(value.shape[axis] % BATCH == 0 for axis in value.repeated):
            return constant(np.ascontiguousarray(np.broadcast_to(value.array, value.shape)))
        target = self.lengths([value.shape[axis] if axis in value.repeated else 1 for axis in value.order])
        (name,) = self.add("Expand", [self.tensor(value, value.order), target])
        return Value(value.shape, name, value.order)

    def lengths(self, shape: Sequence[int]) -> str:
        """Returns the name of a tensor with the integers of a shape; that of the batch is read from the input."""
        if all(size % BATCH or not size for size in shape):
            return self.integers(*shape)
        (batch,) = self.add("Shape", [INPUT], start=0, end=1)
        parts = []
        for size in shape:
            if size % BATCH:
                parts.append(self.integers(size))
            elif size == BATCH:
                parts.append(batch)
            else:
                parts += self.add("Mul", [batch, self.integers(size // BATCH)])
        return parts[0] if len(parts) == 1 else self.add("Concat", parts, axis=0)[0]

    def reshape(self, value: Value, shape: Sequence[int]) -> Value:
        """Returns the value with another shape; what repeats still does where the new axes allow it."""
        shape = tuple(shape)
        if shape == value.shape:
            return value
        repeated: set[int] = set()
        for old, new in _factors(value.shape, shape):
            long = [axis for axis in old if value.shape[axis] > 1]
            if long and value.repeated.issuperset(long):
                repeated.update(axis for axis in new if shape[axis] > 1)
            elif value.repeated.intersection(old):
                return self.reshape(self.whole(value), shape)
        stored = tuple(1 if axis in repeated else size for axis, size in enumerate(shape))
        if value.array is not None:
            return constant(value.array.reshape(stored), shape)
        unknown = [size for size in stored if size % BATCH == 0]
        target = (
            self.lengths(stored) if len(unknown) > 1 else self.integers(*(-1 if s in unknown else s for s in stored))
        )
        (name,) = self.add("Reshape", [self.tensor(value), target])
        return Value(shape, name, tuple(range(len(shape))), frozenset(repeated))

    def finish(self, output: Value, name: str) -> None:
        """Names the output, folds what constants allow and leaves out operators that nothing reads."""
        result = self.tensor(self.whole(output))
        self.nodes.append(Node("Identity", [result], [name], {}))
        self._drop_unread(name)
        self._average()
        self._fold()
        self._write_linear()
        last = self.nodes.pop()
        for node in self.nodes:
            node.outputs = [name if output == last.inputs[0] else output for output in node.outputs]
            node.inputs = [name if read == last.inputs[0] else read for read in node.inputs]
        read = {name for node in self.nodes for name in node.inputs}
        self.constants = {name: array for name, array in self.constants.items() if name in read}

    def _drop_unread(self, name: str) -> None:
        read, kept = {name}, []
        for node in reversed(self.nodes):
            if read.intersection(node.outputs):
                read.update(node.inputs)
                kept.append(node)
        self.nodes = kept[::-1]

    def _readers(self) -> dict[str, list[Node]]:
        readers: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in node.inputs:
                readers.setdefault(name, []).append(node)
        return readers

    def _merge(self, first: Node, second: Node) -> None:
        """Has `first` return what its only reader returned, and removes that."""
        first.outputs = second.outputs
        self.nodes.remove(second)

    def _average(self) -> None:
        """Writes a sum that is divided by the number of its terms as a mean."""
        readers = self._readers()
        for node in [node for node in self.nodes if node.kind == "ReduceSum"]:
            terms, after = node.attributes.pop("terms"), readers[node.outputs[0]]
            if len(after) == 1 and after[0].kind == "Div" and after[0].inputs[0] == node.outputs[0]:
                divisor = self.constants.get(after[0].inputs[1])
                if divisor is not None and divisor.size == 1 and divisor.item() == terms:
                    node.kind = "ReduceMean"
                    self._merge(node, after[0])

    def _fold(self) -> None:
        """Takes factors and sums of the output's channels into the constants of convolutions and linear maps."""
        readers = self._readers()
        for node in [node for node in self.nodes if node.kind in ("Conv", "Linear")]:
            while len(after := readers.get(node.outputs[0], [])) == 1 and self._takes(node, after[0]):
                self._merge(node, after[0])

    def _takes(self, node: Node, after: Node) -> bool:
        kernel = self.constants.get(node.inputs[1])
        others = [name for name in after.inputs if name != node.outputs[0]]
        if kernel is None or after.kind not in ("Mul", "Add") or len(others) != 1 or others[0] not in self.constants:
            return False
        other, convolves = self.constants[others[0]], node.kind == "Conv"
        channels = kernel.shape[0 if convolves else -1]
        axis = other.ndim - (3 if convolves else 1)  # of the channels in the other constant, which aligns at its end
        if other.size not in (1, channels) or (other.size > 1 and (axis < 0 or other.shape[axis] != channels)):
            return False
        vector = np.broadcast_to(other.reshape(-1), channels).astype(kernel.dtype)
        bias = self.constants[node.inputs[2]] if len(node.inputs) > 2 else np.zeros(channels, kernel.dtype)
        if after.kind == "Mul":
            scaled = kernel * (vector.reshape(-1, *[1] * (kernel.ndim - 1)) if convolves else vector)
            node.inputs[1] = self.store(scaled)
            node.inputs[2:] = [self.store(bias * vector)] if len(node.inputs) > 2 else []
        else:
            node.inputs[2:] = [self.store(bias + vector)]
        return True

    def _write_linear(self) -> None:
        """Replaces linear maps by the operators that ONNX has."""
        nodes = []
        for node in self.nodes:
            if node.kind == "Linear" and len(node.inputs) > 2:
                product = f"{node.outputs[0]}_product"
                nodes.append(Node("MatMul", node.inputs[:2], [product], {}))
                node = Node("Add", [product, node.inputs[2]], node.outputs, {})
            elif node.kind == "Linear":
                node.kind = "MatMul"
            nodes.append(node)
        self.nodes = nodes


def _factors(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Splits the axes of two shapes of equal size into groups, as fine as possible, whose sizes are equal."""
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        mine: list[int] = []
        theirs: list[int] = []
        sizes = [1, 1]
        while True:
            if sizes[0] <= sizes[1] and i < len(old):
                mine.append(i)
                sizes[0] *= old[i]
                i += 1
            elif j < len(new):
                theirs.append(j)
                sizes[1] *= new[j]
                j += 1
            else:
                break
            if sizes[0] == sizes[1] and (theirs or sizes[0] == 1):
                break
        groups.append((mine, theirs))
    return groups


def elementwise(
    graph: Graph, kind: str, operands: Sequence[Value], shape: Sequence[int], fold: Callable[..., Any]
) -> Value:
    """Adds an operator on values of one shape (or single numbers), in the order of axes that the first tensor has.

    Args:
      graph: gets the operator.
      kind: of the operator.
      operands: of it.
      shape: of the result.
      fold: computes the result of constants.
    """
    shape = tuple(shape)
    axes = [value for value in operands if value.rank]
    repeated = frozenset(
        axis for axis, size in enumerate(shape) if size > 1 and all(axis in value.repeated for value in axes)
    )
    stored = tuple(1 if axis in repeated else size for axis, size in enumerate(shape))
    arrays = [value.array for value in operands if value.array is not None]
    if len(arrays) == len(operands):
        return constant(np.asarray(fold(*np.broadcast_arrays(*arrays))).reshape(stored), shape)
    tensors = [value for value in axes if value.array is None]
    largest = max(tensors, key=lambda value: math.prod(value.stored), default=None)
    order = largest.order if largest else tuple(range(len(shape)))
    (name,) = graph.add(kind, [graph.tensor(v, order if v.rank else ()) for v in operands])
    return Value(shape, name, order, repeated)
