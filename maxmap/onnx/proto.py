"""Writes a graph as an .onnx file, which is a protocol buffer, without a second copy of the weights in memory.

The library `onnx` makes all of the message but the weights. These follow one by one, from where they lie. The format is
described in https://protobuf.dev/programming-guides/encoding and in onnx.proto.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from maxmap.onnx.graph import INPUT, Graph
from maxmap.onnx.lower import OPSET, OUTPUT

# Fields of onnx.proto whose values are of wire type 2: a length and so many bytes.
_GRAPH_OF_MODEL, _INITIALIZER_OF_GRAPH, _RAW_DATA_OF_TENSOR = 7, 5, 9


def write(
    onnx: ModuleType,
    file: Path,
    graph: Graph,
    image: jax.ShapeDtypeStruct,
    output: tuple[int, ...],
    about: Mapping[str, Any],
) -> None:
    """Writes a graph; its constants are removed on the way, to save memory.

    Args:
      onnx: the library.
      file: to write.
      graph: of `lower`.
      image: shape and type of an image.
      output: shape of an image's logits.
      about: metadata, kept as JSON unless it is text.
    """
    helper, kind = onnx.helper, onnx.helper.np_dtype_to_tensor_dtype
    nodes = []
    for node in graph.nodes:
        attributes = {k: kind(v) if isinstance(v, np.dtype) else v for k, v in node.attributes.items()}
        nodes.append(helper.make_node(node.kind, node.inputs, node.outputs, **attributes))
    body = helper.make_graph(
        nodes,
        "maxmap",
        [helper.make_tensor_value_info(INPUT, kind(np.dtype(image.dtype)), ["batch", *image.shape])],
        [helper.make_tensor_value_info(OUTPUT, kind(np.dtype(np.float32)), ["batch", *output])],
    ).SerializeToString()
    opsets = [helper.make_opsetid("", OPSET)]
    model = onnx.ModelProto(producer_name="maxmap", opset_import=opsets)
    model.ir_version = helper.find_min_ir_version_for(opsets)  # for runtimes that are older than the library
    helper.set_model_props(
        model, {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
    )
    heads = {}  # of the constants: all but their values
    for name, array in graph.constants.items():
        tensor = onnx.TensorProto(name=name, dims=array.shape, data_type=kind(array.dtype))
        heads[name] = tensor.SerializeToString() + _start(_RAW_DATA_OF_TENSOR, array.nbytes)
    starts = {
        name: _start(_INITIALIZER_OF_GRAPH, len(head) + graph.constants[name].nbytes) + head
        for name, head in heads.items()
    }
    size = len(body) + sum(len(start) + graph.constants[name].nbytes for name, start in starts.items())
    with open(file, "wb") as out:
        out.write(model.SerializeToString() + _start(_GRAPH_OF_MODEL, size) + body)
        for name, start in starts.items():
            out.write(start)
            out.write(np.ascontiguousarray(graph.constants.pop(name)).data)


def _start(field: int, size: int) -> bytes:
    """Returns what stands before the bytes of a field: its number and their count."""
    return _varint(field << 3 | 2) + _varint(size)


def _varint(value: int) -> bytes:
    """Returns an integer as groups of seven bits, the lowest first; all but the last have the eighth bit set."""
    groups = []
    while value > 127:
        groups.append(value & 127 | 128)
        value >>= 7
    return bytes([*groups, value])
