"""Checks a Q/DQ graph against the rules that every runtime of ours accepts (see
:mod:`cmt_edge.calib.recipe`)."""

from __future__ import annotations

import math
from collections.abc import Collection

import onnx
import onnx_ir as ir

from cmt_edge.deploy.backends.graph_rules import (
    check_file,
    check_quantizer,
)

from .graph import (
    DEQUANTIZE,
    QUANTIZE,
    find_source,
    get_node_name,
    open_view,
    read_constant_dims,
)
from .recipe import FLOAT_OPS, INT8_OPS


def lint(model: onnx.ModelProto, trunk: Collection[str] = ()) -> list[str]:
    """Findings, one sentence each; empty if the graph keeps every rule.

    Args:
        model: a Q/DQ graph.
        trunk: names of layers that may read floats although their weights are int8
            (:mod:`cmt_edge.calib.trunk`).
    """
    findings = check_file(model)
    with open_view(model) as view:
        for node in view.graph:
            findings += _check_node(node, trunk)
        kinds = {node.op_type for node in view.graph}
    return findings if kinds & {QUANTIZE, DEQUANTIZE} else [*findings, "the graph has no quantized operation"]


def list_half_int8_nodes(model: onnx.ModelProto) -> list[str]:
    """Names of the operations that read int8 on one side and float on the other, in the graph's order."""
    with open_view(model) as view:
        return [get_node_name(node) for node in view.graph if _is_half_int8(node)]


def _is_half_int8(node: ir.Node) -> bool:
    return node.op_type in INT8_OPS and len(_find_dequantized_inputs(node)) == 1


def _check_node(node: ir.Node, trunk: Collection[str]) -> list[str]:
    if node.op_type in (QUANTIZE, DEQUANTIZE):
        return check_quantizer(node)
    if node.op_type in FLOAT_OPS:
        return _check_float_operation(node)
    return _check_int8_operation(node, trunk) if node.op_type in INT8_OPS else []


def _find_dequantized_inputs(node: ir.Node) -> list[tuple[int, ir.Node]]:
    """Positions of the int8 inputs of ``node``, and the nodes that dequantize them."""
    sources = [(position, find_source(value)) for position, value in enumerate(node.inputs)]
    return [
        (position, source)
        for position, source in sources
        if source is not None and source.op_type == DEQUANTIZE
    ]


def _check_float_operation(node: ir.Node) -> list[str]:
    """A finding for each int8 input."""
    finding = f"{node.name}: {node.op_type} must stay float but reads int8"
    return [finding for _ in _find_dequantized_inputs(node)]


def _check_int8_operation(node: ir.Node, trunk: Collection[str]) -> list[str]:
    """Biases are float, weights have a scale a channel, and both factors are int8 or float; layers of the
    ``trunk`` may have int8 weights alone."""
    dequantized = _find_dequantized_inputs(node)
    findings = []
    for position, source in dequantized:
        if node.op_type in ("Conv", "Gemm") and position == 2:
            findings.append(f"{node.name}: quantized bias")
        elif _has_single_scale(source):
            findings.append(f"{node.name}: weights with a single scale")
    positions = [position for position, _ in dequantized]
    if _is_half_int8(node) and not (node.name in trunk and positions == [1]):
        findings.append(f"{node.name}: one side int8, the other float")
    return findings


def _has_single_scale(dequantizer: ir.Node) -> bool:
    """Whether it gives constant weights of several channels one scale; a binary head has one channel."""
    weights, scale = (read_constant_dims(value) for value in dequantizer.inputs[:2])
    if weights is None or scale is None:
        return False
    axis = dequantizer.attributes.get_int("axis", 1)
    if -len(weights) <= axis < len(weights) and weights[axis] == 1:
        return False
    return math.prod(scale) == 1 < max(weights, default=1)
