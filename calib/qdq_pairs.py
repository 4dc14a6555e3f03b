"""What follows calibration: the signs of quantizers, and where their pairs stand."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from .graph import (
    DEQUANTIZE,
    MOVES,
    QUANTIZE,
    add_constant,
    count_readers,
    find_producer,
    find_readers,
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
    place. Pairs of one scale whose values a ``Concat`` joins for layers become one pair behind it.

    The values are the same where one scale serves the whole tensor. Other pairs stay, and so do those
    that several layers read without a ``Concat``. OpenVINO moves int8 values more slowly than floats (a
    transposition of heads took twice as long), and version 2026.4 computes something else where a pair stands
    before a transposition and any ``Concat`` is in the graph: int8 CvT was two to four times farther from
    PyTorch there than in ONNX Runtime. ONNX Runtime computes a layer in integers only where a pair stands
    directly before it, and a layer behind a ``Concat`` of pairs would read values of several scales as soon
    as one of them is changed.
    """
    layers = [node for node in graph if node.op_type in INT8_OPS and _has_weight(node)]
    found = {layer: way for layer in layers if (way := _find_way(layer)) is not None}
    ways = _drop_shared(found)
    rounded: dict[ir.Value, ir.Value] = {}
    for layer, way in ways.items():
        value = get_input(layer, 0)
        if value not in rounded:
            rounded[value] = _insert_pair(graph, layer, way)
        layer.replace_input_with(0, rounded[value])
    for way in ways.values():
        for start, position, quantizer in way.starts:
            start.replace_input_with(position, quantizer.inputs[0])
    if ways:
        remove_unread(graph)


class _Way(NamedTuple):
    """How a layer reads pairs of one scale through moves of values.

    Attributes:
        nodes: the moves, and the ``Concat`` if there is one.
        starts: which of them reads a pair, in which position, and the pair's quantizer.
    """

    nodes: tuple[ir.Node, ...]
    starts: tuple[tuple[ir.Node, int, ir.Node], ...]

    @property
    def is_joined(self) -> bool:
        """Whether there is a ``Concat``."""
        return any(node.op_type == "Concat" for node in self.nodes)


def _find_way(layer: ir.Node) -> _Way | None:
    """The way from ``layer`` to its pairs, if it reads them through moves."""
    nodes: list[ir.Node] = []
    starts: list[tuple[ir.Node, int, ir.Node]] = []
    pending, is_joined = [(layer, 0)], False
    while pending:
        reader, position = pending.pop()
        node = find_producer(get_input(reader, position))
        if node is not None and _moves(node, joins=not is_joined):
            is_joined = is_joined or node.op_type == "Concat"
            nodes.append(node)
            pending += [(node, number) for number in range(_count_moved(node))]
            continue
        quantizer = _find_quantizer(node)
        if quantizer is None:
            return None
        starts.append((reader, position, quantizer))
    is_one = all(_rounds_alike(quantizer, starts[0][2]) for _, _, quantizer in starts)
    return _Way(tuple(nodes), tuple(starts)) if nodes and is_one else None


def _moves(node: ir.Node, *, joins: bool) -> bool:
    """Whether ``node`` only moves values into one tensor; ``joins``: a ``Concat`` does, too."""
    return (node.op_type in MOVES and len(node.outputs) == 1) or (joins and node.op_type == "Concat")


def _count_moved(node: ir.Node) -> int:
    """How many inputs of a node are values that it moves."""
    return len(node.inputs) if node.op_type == "Concat" else 1


def _find_quantizer(pair: ir.Node | None) -> ir.Node | None:
    """The quantizer of the pair that ends with the node ``pair``, if both have the same scale, a single one,
    and the same zero point."""
    if pair is None or pair.op_type != DEQUANTIZE:
        return None
    quantizer = find_producer(pair.inputs[0])
    if quantizer is None or quantizer.op_type != QUANTIZE or not _rounds_alike(quantizer, pair):
        return None
    return quantizer if read_constant_dims(quantizer.inputs[1]) == () else None


def _rounds_alike(one: ir.Node, other: ir.Node) -> bool:
    """Whether two nodes of pairs have the same scale and the same zero point, which gives the type, too."""
    if len(one.inputs) != 3 or len(other.inputs) != 3:
        return False
    return all(
        first is second
        or (
            is_constant(first)
            and is_constant(second)
            and _is_same(read_constant(first), read_constant(second))
        )
        for first, second in zip(one.inputs[1:], other.inputs[1:], strict=True)
    )


def _is_same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two constants have the same type, shape and values."""
    return one.dtype == other.dtype and np.array_equal(one, other)


def _drop_shared(ways: dict[ir.Node, _Way]) -> dict[ir.Node, _Way]:
    """The ways on which every value is read by nodes of such ways alone.

    Others would find that what they read is not rounded. Without a ``Concat`` a value that several read keeps
    its pair, so that it is rounded once.
    """
    while True:
        ours = {node for way in ways.values() for node in way.nodes} | set(ways)
        kept = {
            layer: way
            for layer, way in ways.items()
            if all(_is_free(node, joined=way.is_joined) and _serves(node, ours) for node in way.nodes)
        }
        if len(kept) == len(ways):
            return kept
        ways = kept


def _is_free(node: ir.Node, *, joined: bool) -> bool:
    """Whether one node reads the result of ``node``, or a ``Concat`` is among its readers or on the way."""
    value = node.outputs[0]
    return joined or count_readers(value) == 1 or any(n.op_type == "Concat" for n in find_readers(value))


def _serves(node: ir.Node, ours: set[ir.Node]) -> bool:
    """Whether only nodes of ``ours`` read the result of ``node``, as what they move or multiply."""
    value = node.outputs[0]
    data = all(use.node in ours and (use.idx == 0 or use.node.op_type == "Concat") for use in value.uses())
    return data and not value.is_graph_output()


def _has_weight(layer: ir.Node) -> bool:
    """Whether the second operand of a conv or product is a constant, quantized or not."""
    value = layer.inputs[1]
    while (source := find_producer(value)) is not None and source.op_type in (DEQUANTIZE, *MOVES):
        value = source.inputs[0]
    return is_constant(value)


def _insert_pair(graph: ir.Graph, layer: ir.Node, way: _Way) -> ir.Value:
    """Insert a pair like those of ``way`` before ``layer``, and return what it gives.

    Where several become one, its scale is a constant of its own, so that it can be chosen for what is joined
    alone.
    """
    quantizer = way.starts[0][2]
    value, constants = get_input(layer, 0), list(quantizer.inputs[1:])
    if way.is_joined:
        scale = read_constant(get_input(quantizer, 1))
        constants[0] = add_constant(graph, f"{get_node_name(layer)}_input_scale", scale)
    for kind, end in (
        (QUANTIZE, "quantized"),
        (DEQUANTIZE, "dequantized"),
    ):
        name = f"{get_node_name(layer)}_input_{end}"
        node = make_node(kind, [value, *constants], name, name)
        graph.insert_before(layer, node)
        value = node.outputs[0]
    return value
