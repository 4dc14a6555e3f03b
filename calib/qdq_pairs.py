"""What follows calibration: the signs of quantizers, and where their pairs stand."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .graph import (
    DEQUANTIZE,
    MOVES,
    QUANTIZE,
    count_readers,
    find_producer,
    get_input,
    get_node_name,
    is_constant,
    make_node,
    read_constant,
    read_constant_dims,
    remove_unread,
    set_constant,
)
from .recipe import INT8_OPS

SIGNED_RANGE = np.float32(255 / 127)
"""How much larger the scale of a signed quantizer is that has the range of an unsigned one."""


def sign_quantizers(graph: ir.Graph) -> None:
    """Turn every unsigned quantizer (of values that are never negative) into a signed one of the same range,
    in place.

    That costs one bit there, but TensorRT reads nothing else, and one kind of activation serves every
    runtime.
    """
    quantizers = [node for node in graph if node.op_type in (QUANTIZE, DEQUANTIZE)]
    unsigned = [node for node in quantizers if _is_unsigned(node)]
    for node in unsigned:
        if node.op_type == QUANTIZE:
            node.outputs[0].dtype = ir.DataType.INT8
    for scale in dict.fromkeys(get_input(node, 1) for node in unsigned):
        if is_constant(scale):
            set_constant(scale, read_constant(scale) * SIGNED_RANGE)
    for zero in dict.fromkeys(get_input(node, 2) for node in unsigned):
        set_constant(zero, read_constant(zero).astype(np.int8))


def _is_unsigned(quantizer: ir.Node) -> bool:
    """Whether its zero point is a constant 0 of type uint8."""
    if len(quantizer.inputs) != 3 or not is_constant(quantizer.inputs[2]):
        return False
    zero = read_constant(quantizer.inputs[2])
    return zero.dtype == np.uint8 and not zero.any()


def move_pairs_to_layers(graph: ir.Graph) -> None:
    """Move every pair that a conv or linear reads through moves of values to directly before that layer, in
    place.

    The values are the same where one scale serves the whole tensor. Other pairs stay, and so do those
    that several layers read. OpenVINO moves int8 values more slowly than floats (a transposition of heads
    took twice as long), and version 2026.4 computes something else where a pair stands before a
    transposition and any ``Concat`` is in the graph: int8 CvT was two to four times farther from PyTorch
    there than in ONNX Runtime.
    """
    moved = False
    for layer in list(graph):
        first = _find_first_move(layer) if layer.op_type in INT8_OPS and _has_weight(layer) else None
        quantizer = _find_quantizer_before(first) if first is not None else None
        if first is not None and quantizer is not None:
            first.replace_input_with(0, quantizer.inputs[0])
            _insert_pair(graph, layer, quantizer)
            moved = True
    if moved:
        remove_unread(graph)


def _find_first_move(layer: ir.Node) -> ir.Node | None:
    """The first of the moves between ``layer`` and what it reads, if nothing else reads on the way."""
    value, first = get_input(layer, 0), None
    while (node := value.producer()) is not None and node.op_type in MOVES:
        if count_readers(value) != 1 or len(node.outputs) != 1:
            break
        value, first = get_input(node, 0), node
    return first


def _find_quantizer_before(move: ir.Node) -> ir.Node | None:
    """The quantizer of the pair that ``move`` reads, if it has one scale."""
    pair = find_producer(move.inputs[0])
    if pair is None or pair.op_type != DEQUANTIZE:
        return None
    quantizer = find_producer(pair.inputs[0])
    if quantizer is None or quantizer.op_type != QUANTIZE:
        return None
    return quantizer if read_constant_dims(quantizer.inputs[1]) == () else None


def _has_weight(layer: ir.Node) -> bool:
    """Whether the second operand of a conv or product is a constant, quantized or not."""
    value = layer.inputs[1]
    while (source := find_producer(value)) is not None and source.op_type in (DEQUANTIZE, *MOVES):
        value = source.inputs[0]
    return is_constant(value)


def _insert_pair(
    graph: ir.Graph,
    layer: ir.Node,
    quantizer: ir.Node,
) -> None:
    """Insert a pair like that of ``quantizer`` between ``layer`` and what it reads."""
    value = get_input(layer, 0)
    for kind, end in (
        (QUANTIZE, "quantized"),
        (DEQUANTIZE, "dequantized"),
    ):
        name = f"{get_node_name(layer)}_input_{end}"
        node = make_node(
            kind,
            [value, *quantizer.inputs[1:]],
            name,
            name,
        )
        graph.insert_before(layer, node)
        value = node.outputs[0]
    layer.replace_input_with(0, value)
