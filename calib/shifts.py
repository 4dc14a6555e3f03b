"""Shifts: values that are moved before they are rounded, so that all integers of int8 stand for something.

What a GELU leaves reaches from -0.17 to its highest value. With zero point 0 and one scale, nearly half of
the integers would stand for values that never occur. A shift ``c`` before the pair, a multiple of the scale,
moves the values to where the integers are, and the bias of the layer takes it back::

    W x + b == W (x + c) + (b - c sum(W))

Zero points stay 0, as TensorRT demands, and zero itself is still represented exactly. OpenVINO takes the
addition into its rounding (:mod:`cmt_edge.deploy.backends.openvino_graph`), so that it costs nothing there.
A layer with padding cannot be shifted: the zeros around its map are zeros of ``x``, not of ``x + c``.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .graph import (
    add_constant,
    find_producer,
    get_input,
    get_node_name,
    make_node,
)

SUFFIX = "_shift"
"""The end of the names of the additions that move values."""


def insert_shift(graph: ir.Graph, quantizer: ir.Node, move: float) -> None:
    """Insert the addition of ``move`` before ``quantizer``."""
    name = f"{get_node_name(quantizer)}{SUFFIX}"
    addition = make_node(
        "Add",
        [quantizer.inputs[0], add_constant(graph, f"{name}_move", np.array(move, np.float32))],
        f"{name}_moved",
        name,
    )
    graph.insert_before(quantizer, addition)
    quantizer.replace_input_with(0, addition.outputs[0])


def is_shift(node: ir.Node | None) -> bool:
    """Whether :func:`insert_shift` made a node."""
    return node is not None and node.op_type == "Add" and get_node_name(node).endswith(SUFFIX)


def find_unshifted(quantizer: ir.Node) -> ir.Value:
    """What a quantizer reads, before a shift."""
    value = get_input(quantizer, 0)
    node = find_producer(value)
    return get_input(node, 0) if node is not None and is_shift(node) else value
