"""Checks a Q/DQ graph against the rules that every runtime of ours accepts (see
:mod:`cmt_edge.calib.recipe`)."""

from __future__ import annotations

import math

import onnx
import onnx_ir as ir

from cmt_edge.deploy.backends.graph_rules import check_file, check_quantizer

from .graph import DEQUANTIZE, QUANTIZE, constant_dims, read_model, source_of
from .recipe import FLOAT_OPS, INT8_OPS


def lint(model: onnx.ModelProto) -> list[str]:
    """Findings, one sentence each; empty if the graph keeps every rule."""
    graph = read_model(model).graph
    findings = check_file(model)
    quantized = False
    for node in graph:
        if node.op_type in (QUANTIZE, DEQUANTIZE):
            quantized = True
            findings += check_quantizer(node)
        elif node.op_type in FLOAT_OPS:
            findings += _check_float_operation(node)
        elif node.op_type in INT8_OPS:
            findings += _check_int8_operation(node)
    return findings if quantized else [*findings, "the graph has no quantized operation"]


def _dequantized_inputs(node: ir.Node) -> list[tuple[int, ir.Node]]:
    """Positions of the int8 inputs of ``node``, and the nodes that dequantize them."""
    sources = [(position, source_of(value)) for position, value in enumerate(node.inputs)]
    return [
        (position, source)
        for position, source in sources
        if source is not None and source.op_type == DEQUANTIZE
    ]


def _check_float_operation(node: ir.Node) -> list[str]:
    """A finding for each int8 input."""
    finding = f"{node.name}: {node.op_type} must stay float but reads int8"
    return [finding for _ in _dequantized_inputs(node)]


def _check_int8_operation(node: ir.Node) -> list[str]:
    """Biases are float, weights have a scale a channel, and both factors are int8 or float."""
    dequantized = _dequantized_inputs(node)
    findings = []
    for position, source in dequantized:
        if node.op_type in ("Conv", "Gemm") and position == 2:
            findings.append(f"{node.name}: quantized bias")
        elif _has_single_scale(source):
            findings.append(f"{node.name}: weights with a single scale")
    if len(dequantized) == 1:
        findings.append(f"{node.name}: one side int8, the other float")
    return findings


def _has_single_scale(dequantizer: ir.Node) -> bool:
    """Whether it gives constant weights of several channels one scale."""
    weights, scale = (constant_dims(value) for value in dequantizer.inputs[:2])
    if weights is None or scale is None:
        return False
    return math.prod(scale) == 1 < max(weights, default=1)
