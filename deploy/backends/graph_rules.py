"""Rules for ONNX graphs that every runtime keeps: the common part of ``cmt_edge.calib.lint`` and of
:mod:`cmt_edge.deploy.tensorrt.parser_rules`."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

MAX_OPSET = 20
"""The newest ONNX opset that every runtime reads."""

STANDARD_DOMAINS = ("", "ai.onnx")
"""The two names of ONNX's own domain of operations."""


def check_file(model: onnx.ModelProto) -> list[str]:
    """Broken rules of the file as a whole (opset, domains, weights inside the file), one sentence each."""
    findings = [
        f"opset {opset.version} is above {MAX_OPSET}"
        for opset in model.opset_import
        if opset.domain in STANDARD_DOMAINS and opset.version > MAX_OPSET
    ]
    findings += [
        f"operation domain {opset.domain!r} is not standard"
        for opset in model.opset_import
        if opset.domain not in STANDARD_DOMAINS
    ]
    return findings + [
        f"{tensor.name}: weights are stored outside the file"
        for tensor in model.graph.initializer
        if tensor.external_data
    ]


def check_quantizer(node: ir.Node) -> list[str]:
    """Broken rules of one ``QuantizeLinear`` or ``DequantizeLinear``, one sentence each.

    Scale and zero point are constants, the zero point is an int8 zero, and an activation has a single scale.
    """
    constants = [_read_constant(value) for value in node.inputs[1:3]]
    if len(constants) < 2 or constants[0] is None or constants[1] is None:
        return [f"{node.name}: scale and zero point must be constants"]
    scale, zero = constants[0], constants[1]
    data = node.inputs[0]
    findings = []
    if zero.dtype != np.int8:
        findings.append(f"{node.name}: {zero.dtype} instead of int8")
    if np.any(zero != 0):
        findings.append(f"{node.name}: zero point is not 0")
    if not (np.isfinite(scale).all() and np.all(scale > 0)):
        findings.append(f"{node.name}: scale is not positive")
    if scale.size != 1 and not (data is not None and data.is_initializer()):
        findings.append(f"{node.name}: activation with one scale a channel")
    return findings


def _read_constant(value: ir.Value | None) -> np.ndarray | None:
    """The value of an initializer."""
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    return value.const_value.numpy()
