"""Checks a Q/DQ graph against the rules that every runtime of ours accepts (see
:mod:`cmt_edge.calib.recipe`)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import numpy_helper

from .recipe import FLOAT_OPS, INT8_OPS, MOVES

MAX_OPSET = 20


def lint(model: onnx.ModelProto) -> list[str]:
    """Findings, one sentence each; empty if the graph keeps every rule."""
    graph = model.graph
    constants = {i.name: i for i in graph.initializer}
    producer = {output: node for node in graph.node for output in node.output}
    findings = common_findings(model)
    quantized = 0
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            quantized += 1
            findings += check_parameters(node, constants)
        findings += _check_consumer(node, producer, constants)
    return findings if quantized else [*findings, "the graph has no quantized operation"]


def common_findings(model: onnx.ModelProto) -> list[str]:
    """Rules for every graph: opset, domains, weights inside the file."""
    findings = [
        f"opset {o.version} is above {MAX_OPSET}"
        for o in model.opset_import
        if o.domain in ("", "ai.onnx") and o.version > MAX_OPSET
    ]
    findings += [
        f"operation domain {o.domain!r} is not standard"
        for o in model.opset_import
        if o.domain not in ("", "ai.onnx")
    ]
    return findings + [
        f"{i.name}: weights are stored outside the file" for i in model.graph.initializer if i.external_data
    ]


def check_parameters(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> list[str]:
    """Scale, zero point and granularity of one Q or DQ node."""
    if len(node.input) < 3 or node.input[1] not in constants or node.input[2] not in constants:
        return [f"{node.name}: scale and zero point must be constants"]
    scale, zero = (numpy_helper.to_array(constants[name]) for name in node.input[1:3])
    findings = []
    if zero.dtype != np.int8:
        findings.append(f"{node.name}: {zero.dtype} instead of int8")
    if np.any(zero != 0):
        findings.append(f"{node.name}: zero point is not 0")
    if not (np.isfinite(scale).all() and np.all(scale > 0)):
        findings.append(f"{node.name}: scale is not positive")
    if node.input[0] not in constants and scale.size != 1:
        findings.append(f"{node.name}: activation with one scale a channel")
    return findings


def _check_consumer(
    node: onnx.NodeProto, producer: dict[str, onnx.NodeProto], constants: dict[str, onnx.TensorProto]
) -> list[str]:
    """What one operation reads: float biases, per-channel weights, float inputs where the recipe says so."""
    if node.op_type not in (*FLOAT_OPS, *INT8_OPS):
        return []
    sources = [(i, source_of(name, producer)) for i, name in enumerate(node.input)]
    dequantized = [
        (i, source) for i, source in sources if source is not None and source.op_type == "DequantizeLinear"
    ]
    findings = []
    for position, dq in dequantized:
        constant = dq.input[0] in constants
        if node.op_type in FLOAT_OPS:
            findings.append(f"{node.name}: {node.op_type} must stay float but reads int8")
        elif node.op_type in ("Conv", "Gemm") and position == 2:
            findings.append(f"{node.name}: quantized bias")
        elif (
            node.op_type in INT8_OPS
            and constant
            and _size(constants.get(dq.input[1])) == 1 < _channels(constants[dq.input[0]])
        ):
            findings.append(f"{node.name}: weights with a single scale")
    if node.op_type in INT8_OPS and len(dequantized) == 1:
        findings.append(f"{node.name}: one side int8, the other float")
    return findings


def source_of(name: str, producer: dict[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    """The node that computed a tensor, looking through operations that only move its values, and joints of
    dequantized ones."""
    node = producer.get(name)
    while node is not None and node.op_type in MOVES:
        node = producer.get(node.input[0])
    if node is not None and node.op_type == "Concat":
        sources = [source_of(i, producer) for i in node.input]
        if all(s is not None and s.op_type == "DequantizeLinear" for s in sources):
            return sources[0]
    return node


def _size(tensor: onnx.TensorProto | None) -> int:
    return int(np.prod(tensor.dims)) if tensor is not None else 0


def _channels(tensor: onnx.TensorProto) -> int:
    return max(tensor.dims, default=1)
