"""Traces a JAX function and writes it as ONNX operators (opset 20); what depends on weights alone is computed.

`RULES` has the operators of every primitive that evaluated networks consist of. The names in `CALLS` are those under
which `maxmap.operations` keeps an operation together that ONNX has an operator for; every other call is taken apart.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxmap.errors import UserError
from maxmap.kernels.target import compiled_for
from maxmap.onnx.graph import BATCH, INPUT, Graph, Value, constant, elementwise, permuted
from maxmap.operations import Array, kernels

OPSET = 20
OUTPUT = "logits"


def lower(
    function: Callable[[Any, Array], Array], variables: Any, images: jax.ShapeDtypeStruct
) -> tuple[Graph, tuple[int, ...]]:
    """Returns the graph of a function, and the shape of what it returns for an image.

    Args:
      function: of variables and images `[B, H, W, C]`; returns `[B, ...]`.
      variables: whose values the graph has as constants.
      images: the shape and type of one image, `[H, W, C]`.

    Raises:
      UserError: the function has an operation without a rule.
    """
    batch = jax.ShapeDtypeStruct((BATCH, *images.shape), images.dtype)
    with compiled_for("onnx"), kernels("plain"):
        program, result = jax.make_jaxpr(function, return_shape=True)(variables, batch)
    graph = Graph()
    inputs = [constant(np.asarray(leaf)) for leaf in jax.tree.leaves(variables)]
    inputs.append(Value(batch.shape, INPUT, tuple(range(len(batch.shape)))))
    (output,) = _run(graph, program.jaxpr, [constant(np.asarray(value)) for value in program.consts], inputs)
    graph.finish(output, OUTPUT)
    return graph, result.shape[1:]


def _run(graph: Graph, program: Any, constants: Sequence[Value], inputs: Sequence[Value]) -> list[Value]:
    """Adds the operators of a jaxpr to a graph; returns its results."""
    values = dict(zip([*program.constvars, *program.invars], [*constants, *inputs], strict=True))
    last_reads = {variable: i for i, equation in enumerate(program.eqns) for variable in _variables(equation)}
    for i, equation in enumerate(program.eqns):
        operands = [_read(values, variable) for variable in equation.invars]
        results = _apply(graph, equation, operands)
        values.update(zip(equation.outvars, results, strict=True))
        for variable in {v for v in _variables(equation) if last_reads[v] == i} - set(program.outvars):
            del values[variable]  # frees arrays that are computed from weights
    return [_read(values, variable) for variable in program.outvars]


def _variables(equation: Any) -> list[Any]:
    return [variable for variable in equation.invars if not hasattr(variable, "val")]


def _read(values: Mapping[Any, Value], variable: Any) -> Value:
    return constant(np.asarray(variable.val)) if hasattr(variable, "val") else values[variable]


def _apply(graph: Graph, equation: Any, operands: list[Value]) -> list[Value]:
    name, params = equation.primitive.name, equation.params
    outputs = [variable.aval for variable in equation.outvars]
    if name == "composite" and params["name"] in CALLS and any(value.array is None for value in operands):
        attributes = {key: tree.unflatten(leaves) for key, leaves, tree in params["attributes"]}
        return [CALLS[params["name"]](graph, operands, outputs[0].shape, **attributes)]
    if inner := params.get("call_jaxpr", params.get("jaxpr")):
        consts = [constant(np.asarray(value)) for value in getattr(inner, "consts", ())]
        return _run(graph, getattr(inner, "jaxpr", inner), consts, operands)
    if name in RULES:
        result = RULES[name](graph, operands, outputs[0].shape, _Bound(equation))
        return result if isinstance(result, list) else [result]
    if all(value.array is not None and not value.repeated for value in operands):
        results = equation.primitive.bind(*(value.array for value in operands), **params)
        results = results if equation.primitive.multiple_results else [results]
        return [constant(np.asarray(result)) for result in results]
    raise UserError(
        f"the network has the operation '{name}', which the export to ONNX does not know: export a .stablehlo program."
    )


class _Bound:
    """A primitive with its parameters: reads one as an attribute, and computes constants when it is called."""

    def __init__(self, equation: Any):
        self._primitive, self._params = equation.primitive, equation.params
        self.dtype = equation.outvars[0].aval.dtype

    def __getattr__(self, name: str) -> Any:
        return self._params[name]

    def __call__(self, *arrays: np.ndarray) -> Any:
        return self._primitive.bind(*map(jnp.asarray, arrays), **self._params)


Rule = Callable[[Graph, list[Value], tuple[int, ...], _Bound], Value | list[Value]]


def _constants(operands: Sequence[Value]) -> list[np.ndarray] | None:
    """Returns the arrays of operands that are all constant and do not repeat; None otherwise."""
    arrays = [value.array for value in operands if value.array is not None and not value.repeated]
    return arrays if len(arrays) == len(operands) else None


def _operator(kind: str) -> Rule:
    return lambda graph, operands, shape, bound: elementwise(graph, kind, operands, shape, bound)


def _maximum(graph: Graph, operands: list[Value], shape: tuple[int, ...], bound: _Bound) -> Value:
    others = [value for value in operands if value.array is None or value.array.any()]
    if len(others) == 1 and others[0].array is None:
        return elementwise(graph, "Relu", others, shape, bound)
    return elementwise(graph, "Max", operands, shape, bound)


def _rsqrt(graph: Graph, operands: list[Value], shape: tuple[int, ...], bound: _Bound) -> Value:
    if operands[0].array is not None:
        return elementwise(graph, "", operands, shape, bound)
    return elementwise(graph, "Reciprocal", [elementwise(graph, "Sqrt", operands, shape, bound)], shape, bound)


def _square(graph: Graph, operands: list[Value], shape: tuple[int, ...], bound: _Bound) -> Value:
    return elementwise(graph, "Mul", operands * 2, shape, lambda x, _: bound(x))


def _power(graph: Graph, operands: list[Value], shape: tuple[int, ...], bound: _Bound) -> Value:
    exponent = constant(np.asarray(bound.y, operands[0].array.dtype if operands[0].array is not None else np.float32))
    return elementwise(graph, "Pow", [operands[0], exponent], shape, lambda x, _: bound(x))


def _where(graph: Graph, operands: list[Value], shape: tuple[int, ...], bound: _Bound) -> Value:
    which, otherwise, chosen = operands
    return elementwise(graph, "Where", [which, chosen, otherwise], shape, lambda w, c, o: bound(w, o, c))


def _convert(graph: Graph, operands: list[Value], shape: tuple[int, ...], bound: _Bound) -> Value:
    (x,) = operands
    if x.array is not None:
        return elementwise(graph, "", operands, shape, bound)
    (name,) = graph.add("Cast", [graph.tensor(x, x.order)], to=np.dtype(bound.dtype))
    return Value(shape, name, x.order, x.repeated)


def _same(graph: Graph, operands: list[Value], shape: tuple[int, ...], bound: _Bound) -> Value:
    return operands[0]


def _reshape(graph: Graph, operands: list[Value], shape: tuple[int, ...], bound: _Bound) -> Value:
    return graph.reshape(operands[0], shape)


def _squeeze(graph: Graph, operands: list[Value], shape: tuple[int, ...], bound: _Bound) -> Value:
    (x,) = operands
    kept = [axis for axis in range(x.rank) if axis not in bound.dimensions]
    if x.array is not None or x.order == tuple(range(x.rank)):
        return graph.reshape(x, shape)
    axes = [x.order.index(axis) for axis in bound.dimensions]
    (name,) = graph.add("Squeeze", [graph.tensor(x, x.order), graph.integers(*axes)])
    order = tuple(kept.index(axis) for axis in x.order if axis in kept)
    return Value(shape, name, order, frozenset(kept.index(axis) for axis in x.repeated))


def _transpose(graph: Graph, operands: list[Value], shape: tuple[int, ...], bound: _Bound) -> Value:
    return permuted(operands[0], bound.permutation)


def _broadcast(graph: Graph, operands: list[Value], shape: tuple[int, ...], bound: _Bound) -> Value:
    (x,), places = operands, bound.broadcast_dimensions
    longer = [size if axis in places else 1 for axis, size in enumerate(shape)]
    for axis, place in enumerate(places):
        longer[place] = x.shape[axis]
    x = graph.reshape(x, longer)
    repeated = x.repeated | {axis for axis, size in enumerate(shape) if size != longer[axis]}
    return Value(shape, x.source, x.order, frozenset(repeated))


def _concatenate(graph: Graph, operands: list[Value], shape: tuple[int, ...], bound: _Bound) -> Value:
    return _joined(graph, operands, shape, bound.dimension, bound)


def _joined(
    graph: Graph, operands: list[Value], shape: tuple[int, ...], axis: int, fold: Callable[..., Any] | None = None
) -> Value:
    operands = [graph.whole(value) for value in operands]
    if fold and (arrays := _constants(operands)):
        return constant(np.asarray(fold(*arrays)))
    if len(operands) == 1:
        return operands[0]
    order = next(value.order for value in operands if value.array is None)
    (name,) = graph.add("Concat", [graph.tensor(value, order) for value in operands], axis=order.index(axis))
    return Value(shape, name, order)


def _stack(graph: Graph, operands: list[Value], shape: tuple[int, ...], bound: _Bound) -> Value:
    axis = bound.axis
    one = tuple(1 if i == axis else size for i, size in enumerate(shape))
    return _joined(graph, [graph.reshape(value, one) for value in operands], shape, axis)


def _slice(graph: Graph, operands: list[Value], shape: tuple[int, ...], bound: _Bound) -> Value:
    (x,), steps = operands, bound.strides or (1,) * len(shape)
    bounds = list(zip(bound.start_indices, bound.limit_indices, steps, strict=True))
    cut = [axis for axis in range(x.rank) if shape[axis] != x.shape[axis] and axis not in x.repeated]
    if x.array is not None:
        part = tuple(slice(*bounds[axis]) if axis in cut else slice(None) for axis in range(x.rank))
        return constant(x.array[part], shape)
    repeated = frozenset(axis for axis in x.repeated if shape[axis] > 1)
    if not cut:
        return Value(shape, x.source, x.order, repeated)
    lists = [graph.integers(*(bounds[axis][i] for axis in cut)) for i in range(3)]
    axes = graph.integers(*(x.order.index(axis) for axis in cut))
    (name,) = graph.add("Slice", [graph.tensor(x, x.order), *lists[:2], axes, lists[2]])
    return Value(shape, name, x.order, repeated)


def _split(graph: Graph, operands: list[Value], shape: tuple[int, ...], bound: _Bound) -> list[Value]:
    (x,), sizes, axis = [graph.whole(value) for value in operands], bound.sizes, bound.axis
    if x.array is not None:
        return [constant(part) for part in np.split(x.array, np.cumsum(sizes)[:-1], axis)]
    names = graph.add(
        "Split", [graph.tensor(x, x.order), graph.integers(*sizes)], outputs=len(sizes), axis=x.order.index(axis)
    )
    shapes = [(*x.shape[:axis], size, *x.shape[axis + 1 :]) for size in sizes]
    return [Value(each, name, x.order) for each, name in zip(shapes, names, strict=True)]


def _pad(graph: Graph, operands: list[Value], shape: tuple[int, ...], bound: _Bound) -> Value:
    x, fill = graph.whole(operands[0]), operands[1]
    if arrays := _constants([x, fill]):
        return constant(np.asarray(bound(*arrays)))
    widths = [bound.padding_config[axis] for axis in x.order]
    if any(inside or min(before, after) < 0 for before, after, inside in widths):
        raise UserError("the network pads by less than nothing or inside of a map: export a .stablehlo program.")
    ends = graph.integers(*(width[side] for side in (0, 1) for width in widths))
    (name,) = graph.add("Pad", [graph.tensor(x, x.order), ends, graph.tensor(fill)])
    return Value(shape, name, x.order)


def _gather(graph: Graph, operands: list[Value], shape: tuple[int, ...], bound: _Bound) -> Value:
    x, places = graph.whole(operands[0]), graph.whole(operands[1])
    if arrays := _constants([x, places]):
        return constant(np.asarray(bound(*arrays)))
    numbers = bound.dimension_numbers
    taken = numbers.collapsed_slice_dims
    whole = all(size == x.shape[axis] for axis, size in enumerate(bound.slice_sizes) if axis not in taken)
    if places.array is None or len(taken) != 1 or numbers.start_index_map != taken or not whole or places.rank > 2:
        raise UserError("the network picks values by places that it computes: export a .stablehlo program.")
    (axis,) = taken
    index = places.array[..., 0].astype(np.int64)
    (name,) = graph.add("Gather", [graph.tensor(x), graph.store(index)], axis=axis)
    offsets = list(numbers.offset_dims)
    if index.ndim:
        (own,) = set(range(len(shape))) - set(offsets)
        offsets.insert(axis, own)
    return Value(shape, name, tuple(offsets))


def _reduce(kind: str) -> Rule:
    def rule(graph: Graph, operands: list[Value], shape: tuple[int, ...], bound: _Bound) -> Value:
        (x,), axes = [graph.whole(value) for value in operands], bound.axes
        if arrays := _constants([x]):
            return constant(np.asarray(bound(*arrays)))
        places = graph.integers(*sorted(x.order.index(axis) for axis in axes))
        terms = {"terms": math.prod(x.shape[axis] for axis in axes)} if kind == "ReduceSum" else {}
        (name,) = graph.add(kind, [graph.tensor(x, x.order), places], keepdims=0, **terms)
        kept = [axis for axis in range(x.rank) if axis not in axes]
        return Value(shape, name, tuple(kept.index(axis) for axis in x.order if axis in kept))

    return rule


def _window(kind: str) -> Rule:
    def rule(graph: Graph, operands: list[Value], shape: tuple[int, ...], bound: _Bound) -> Value:
        x = operands[0]
        sizes, steps, pads = bound.window_dimensions, bound.window_strides, bound.padding
        moved = [axis for axis in range(x.rank) if sizes[axis] > 1 or steps[axis] > 1 or any(pads[axis])]
        if x.array is not None:  # the axes that the window leaves alone may repeat
            near = tuple(x.shape[axis] if axis in moved else x.array.shape[axis] for axis in range(x.rank))
            return constant(np.asarray(bound(np.broadcast_to(x.array, near))), shape)
        if len(moved) > 2 or any(d != 1 for d in (*bound.base_dilation, *bound.window_dilation)) or x.rank != 4:
            raise UserError("the network pools in more than two axes: export a .stablehlo program.")
        x, spatial = graph.whole(x), moved if len(moved) == 2 else [1, 2]
        order = (*(axis for axis in range(4) if axis not in spatial), *spatial)
        options: dict[str, Any] = {
            "kernel_shape": [sizes[axis] for axis in spatial],
            "strides": [steps[axis] for axis in spatial],
            "pads": [pads[axis][side] for side in (0, 1) for axis in spatial],
        }
        if kind == "MaxPool":
            return Value(shape, graph.add(kind, [graph.tensor(x, order)], **options)[0], order)
        (mean,) = graph.add("AveragePool", [graph.tensor(x, order)], **options, count_include_pad=1)
        terms = np.array(math.prod(sizes), np.float32)
        return Value(shape, graph.add("Mul", [mean, graph.store(terms)])[0], order)

    return rule


def _convolution(graph: Graph, operands: list[Value], shape: tuple[int, ...], bound: _Bound) -> Value:
    x, kernel = map(graph.whole, operands)
    if arrays := _constants([x, kernel]):
        return constant(np.asarray(bound(*arrays)))
    if any(step != 1 for step in bound.lhs_dilation) or bound.batch_group_count != 1:
        raise UserError("the network has a transposed convolution: export a .stablehlo program.")
    numbers, pads = bound.dimension_numbers, bound.padding
    (name,) = graph.add(
        "Conv",
        [graph.tensor(x, numbers.lhs_spec), graph.tensor(kernel, numbers.rhs_spec)],
        kernel_shape=[kernel.shape[axis] for axis in numbers.rhs_spec[2:]],
        strides=list(bound.window_strides),
        pads=[pad[side] for side in (0, 1) for pad in pads],
        dilations=list(bound.rhs_dilation),
        group=bound.feature_group_count,
    )
    return Value(shape, name, tuple(numbers.out_spec))


def _dot(graph: Graph, operands: list[Value], shape: tuple[int, ...], bound: _Bound) -> Value:
    if arrays := _constants([graph.whole(v) if v.array is not None else v for v in operands]):
        return constant(np.asarray(bound(*arrays)))
    return _product(graph, operands, shape, *bound.dimension_numbers)


def _product(
    graph: Graph,
    operands: list[Value],
    shape: tuple[int, ...],
    contracted: tuple[Sequence[int], Sequence[int]],
    shared: tuple[Sequence[int], Sequence[int]] = ((), ()),
) -> Value:
    """Adds a product: sums over the `contracted` axes of both operands, for every place of the `shared` axes."""
    x, y = map(graph.whole, operands)
    free = [
        [axis for axis in range(value.rank) if axis not in (*contracted[side], *shared[side])]
        for side, value in enumerate((x, y))
    ]
    # A matrix of constants comes second: then it is a linear map, whatever axes the other operand has.
    if not shared[0] and len(contracted[0]) == len(free[0]) == 1 and x.array is not None:
        moved = _product(graph, [y, x], (), (contracted[1], contracted[0]))
        count = len(free[1])
        return Value(shape, moved.source, (*range(1, count + 1), 0))
    if not shared[0] and len(contracted[1]) == len(free[1]) == 1 and y.array is not None:
        kernel = graph.tensor(y, (*contracted[1], *free[1]))
        (name,) = graph.add("Linear", [graph.tensor(x, (*free[0], *contracted[0])), kernel])
        return Value(shape, name, tuple(range(len(free[0]) + 1)))
    one = _matrices(graph, x, shared[0], free[0], contracted[0])
    other = _matrices(graph, y, shared[1], contracted[1], free[1])
    (name,) = graph.add("MatMul", [graph.tensor(one), graph.tensor(other)])
    product = (*one.shape[:-1], other.shape[-1])
    return graph.reshape(Value(product, name, tuple(range(len(product)))), shape)


def _matrices(graph: Graph, x: Value, shared: Sequence[int], rows: Sequence[int], columns: Sequence[int]) -> Value:
    """Returns a value as matrices, one for every place of the shared axes."""
    order = (*shared, *rows, *columns)
    x = permuted(x, order)
    sizes = [math.prod(x.shape[len(shared) : len(shared) + len(rows)]), math.prod(x.shape[len(shared) + len(rows) :])]
    return graph.reshape(x, (*x.shape[: len(shared)], *sizes))


def _linear(graph: Graph, operands: list[Value], shape: tuple[int, ...]) -> Value:
    x, kernel, *bias = operands
    y = _product(graph, [x, kernel], shape, ((x.rank - 1,), (0,)))
    if not bias:
        return y
    (name,) = graph.add("Add", [graph.tensor(y), graph.tensor(graph.whole(bias[0]))])
    return Value(shape, name, tuple(range(len(shape))))


def _layer_norm(graph: Graph, operands: list[Value], shape: tuple[int, ...], *, epsilon: float) -> Value:
    names = [graph.tensor(graph.whole(value)) for value in operands]
    (name,) = graph.add("LayerNormalization", names, axis=-1, epsilon=float(epsilon))
    return Value(shape, name, tuple(range(len(shape))))


def _softmax(graph: Graph, operands: list[Value], shape: tuple[int, ...]) -> Value:
    (name,) = graph.add("Softmax", [graph.tensor(graph.whole(operands[0]))], axis=-1)
    return Value(shape, name, tuple(range(len(shape))))


def _attend(graph: Graph, operands: list[Value], shape: tuple[int, ...]) -> Value:
    logits, values = operands
    weights, axes = _softmax(graph, [logits], logits.shape), tuple(range(len(shape) - 2))
    return _product(graph, [weights, values], shape, ((len(axes) + 1,), (len(axes),)), (axes, axes))


def _activation(kind: str, **attributes: Any) -> Callable[..., Value]:
    def call(graph: Graph, operands: list[Value], shape: tuple[int, ...]) -> Value:
        (x,) = operands
        (name,) = graph.add(kind, [graph.tensor(x, x.order)], **attributes)
        return Value(shape, name, x.order, x.repeated)

    return call


CALLS: dict[str, Callable[..., Value]] = {
    "attend": _attend,
    "gelu": _activation("Gelu"),
    "gelu_tanh": _activation("Gelu", approximate="tanh"),
    "hard_silu": _activation("HardSwish"),
    "layer_norm": _layer_norm,
    "linear": _linear,
    "softmax": _softmax,
}
RULES: dict[str, Rule] = {
    "abs": _operator("Abs"),
    "add": _operator("Add"),
    "add_any": _operator("Add"),
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "convert_element_type": _convert,
    "copy": _same,
    "div": _operator("Div"),
    "dot_general": _dot,
    "eq": _operator("Equal"),
    "erf": _operator("Erf"),
    "exp": _operator("Exp"),
    "gather": _gather,
    "ge": _operator("GreaterOrEqual"),
    "gt": _operator("Greater"),
    "integer_pow": _power,
    "le": _operator("LessOrEqual"),
    "log": _operator("Log"),
    "logistic": _operator("Sigmoid"),
    "lt": _operator("Less"),
    "max": _maximum,
    "min": _operator("Min"),
    "mul": _operator("Mul"),
    "neg": _operator("Neg"),
    "optimization_barrier": lambda graph, operands, shape, bound: operands,
    "pad": _pad,
    "pow": _operator("Pow"),
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_window_max": _window("MaxPool"),
    "reduce_window_sum": _window("AveragePool"),
    "reshape": _reshape,
    "rsqrt": _rsqrt,
    "select_n": _where,
    "slice": _slice,
    "split": _split,
    "sqrt": _operator("Sqrt"),
    "square": _square,
    "squeeze": _squeeze,
    "stack": _stack,
    "stop_gradient": _same,
    "sub": _operator("Sub"),
    "tanh": _operator("Tanh"),
    "transpose": _transpose,
}
