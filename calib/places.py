"""Int8 layers of a Q/DQ graph, and where their constants are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .graph import (
    DEQUANTIZE,
    QUANTIZE,
    count_readers,
    find_producer,
    find_readers,
    find_source,
    get_input,
    get_node_name,
    is_constant,
    read_constant,
    read_constant_dims,
)
from .recipe import INT8_OPS
from .sampling import Layer, describe_layer


@dataclass(frozen=True)
class Place:
    """An int8 layer of a Q/DQ graph, and where its constants are.

    Attributes:
        node: the conv or product.
        layer: the same layer in the float graph.
        quantizer: of what it reads; ``None`` where it reads floats (:mod:`cmt_edge.calib.trunk`).
        dequantizer: of its weights.
        weights: in float, ``(outputs, K)``, or ``(C, taps)`` of a depthwise conv.
        transposed: whether the graph stores weights as ``(K, outputs)``.
        bias: the constant that is added to its output; ``None`` if there is none.
    """

    node: ir.Node
    layer: Layer
    quantizer: ir.Node | None
    dequantizer: ir.Node
    weights: np.ndarray
    transposed: bool
    bias: ir.Value | None


def find_places(graph: ir.Graph, original: ir.Graph) -> list[Place]:
    """The layers with constant int8 weights, in the graph's order."""
    floats = {get_node_name(node): node for node in original}
    places = (
        _find_place(node, floats[get_node_name(node)])
        for node in graph
        if node.op_type in INT8_OPS and get_node_name(node) in floats
    )
    return [place for place in places if place is not None]


def _find_place(node: ir.Node, original: ir.Node) -> Place | None:
    source, dequantizer = find_source(node.inputs[0]), find_producer(node.inputs[1])
    pair = source if source is not None and source.op_type == DEQUANTIZE else None
    quantizer = find_producer(pair.inputs[0]) if pair is not None else None
    if (
        (pair is not None and not _has_one_scale(quantizer))
        or dequantizer is None
        or dequantizer.op_type != DEQUANTIZE
        or not is_constant(dequantizer.inputs[0])
        or not is_constant(original.inputs[1])
    ):
        return None
    layer = describe_layer(original, get_input(original, 0))
    weights = read_constant(original.inputs[1])
    if layer is None or (node.op_type != "Conv" and weights.ndim != 2):
        return None
    transposed = node.op_type == "MatMul" or (
        node.op_type == "Gemm" and not node.attributes.get_int("transB", 0)
    )
    matrix = weights.T if transposed else weights.reshape(len(weights), -1)
    return Place(node, layer, quantizer, dequantizer, matrix, transposed, _find_bias(node, len(matrix)))


def _has_one_scale(quantizer: ir.Node | None) -> bool:
    """Whether it is a quantizer with one scale for the whole tensor."""
    if quantizer is None or quantizer.op_type != QUANTIZE:
        return False
    return read_constant_dims(quantizer.inputs[1]) == ()


def _find_bias(node: ir.Node, outputs: int) -> ir.Value | None:
    """The constant of one value an output that is added to what ``node`` gives, if nothing else reads it."""
    if node.op_type == "MatMul":
        readers = find_readers(node.outputs[0])
        if len(readers) != 1 or readers[0].op_type != "Add" or node.outputs[0].is_graph_output():
            return None
        found = [value for value in readers[0].inputs if is_constant(value)]
    else:
        found = [value for value in node.inputs[2:3] if is_constant(value)]
    bias = found[0] if found else None
    dims = read_constant_dims(bias)
    if bias is None or not dims or count_readers(bias) != 1:
        return None
    return bias if dims[-1] == math.prod(dims) == outputs else None
