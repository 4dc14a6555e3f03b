"""The rules of TensorRT's ONNX parser, checked before a device ever sees the graph.

What 10.3 (JetPack 6) refuses is refused here, so a bundle builds on every version from 10.3 to 11. Source:
the onnx-tensorrt project, ``docs/operators.md`` and ``onnxOpImporters.cpp`` of the 10.3 and 10.15 releases;
TensorRT documentation, "Explicit Quantization".
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import TensorProto, shape_inference

from cmt_edge.calib.lint import check_parameters, common_findings

SUPPORTED = frozenset(
    [
        "Abs",
        "Acos",
        "Acosh",
        "Add",
        "And",
        "ArgMax",
        "ArgMin",
        "Asin",
        "Asinh",
        "Atan",
        "Atanh",
        "AveragePool",
        "BatchNormalization",
        "Cast",
        "CastLike",
        "Ceil",
        "Celu",
        "Clip",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "Conv",
        "ConvTranspose",
        "Cos",
        "Cosh",
        "CumSum",
        "DeformConv",
        "DepthToSpace",
        "DequantizeLinear",
        "Div",
        "Dropout",
        "Einsum",
        "Elu",
        "Equal",
        "Erf",
        "Exp",
        "Expand",
        "EyeLike",
        "Flatten",
        "Floor",
        "GRU",
        "Gather",
        "GatherElements",
        "GatherND",
        "Gelu",
        "Gemm",
        "GlobalAveragePool",
        "GlobalLpPool",
        "GlobalMaxPool",
        "Greater",
        "GreaterOrEqual",
        "GridSample",
        "GroupNormalization",
        "HardSigmoid",
        "HardSwish",
        "Hardmax",
        "Identity",
        "If",
        "ImageScaler",
        "InstanceNormalization",
        "IsInf",
        "IsNaN",
        "LRN",
        "LSTM",
        "LayerNormalization",
        "LeakyRelu",
        "Less",
        "LessOrEqual",
        "Log",
        "LogSoftmax",
        "Loop",
        "LpNormalization",
        "LpPool",
        "MatMul",
        "Max",
        "MaxPool",
        "Mean",
        "MeanVarianceNormalization",
        "Min",
        "Mish",
        "Mod",
        "Mul",
        "Neg",
        "NonMaxSuppression",
        "NonZero",
        "Not",
        "OneHot",
        "Or",
        "PRelu",
        "Pad",
        "ParametricSoftplus",
        "Pow",
        "QuantizeLinear",
        "RNN",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "Range",
        "Reciprocal",
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSum",
        "ReduceLogSumExp",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceProd",
        "ReduceSum",
        "ReduceSumSquare",
        "Relu",
        "Reshape",
        "Resize",
        "ReverseSequence",
        "RoiAlign",
        "Round",
        "ScaledTanh",
        "Scan",
        "Scatter",
        "ScatterElements",
        "ScatterND",
        "Selu",
        "Shape",
        "Shrink",
        "Sigmoid",
        "Sign",
        "Sin",
        "Sinh",
        "Size",
        "Slice",
        "Softmax",
        "Softplus",
        "Softsign",
        "SpaceToDepth",
        "Split",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Sum",
        "Tan",
        "Tanh",
        "ThresholdedRelu",
        "Tile",
        "TopK",
        "Transpose",
        "Trilu",
        "Unsqueeze",
        "Upsample",
        "Where",
        "Xor",
    ]
)
"""Operations that the parser of 10.3 reads."""
TYPES = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.INT8,
    TensorProto.INT32,
    TensorProto.INT64,
    TensorProto.BOOL,
)
"""Types of tensors inside a graph; bfloat16 would do too, but this toolchain writes none."""
CONSTANT_INPUTS = {"Squeeze": 1, "Unsqueeze": 1, "Pad": 3, "CumSum": 1}
"""Operation -> first input that must be a constant, besides the axes of reductions."""


def parser_findings(model: onnx.ModelProto) -> list[str]:
    """What TensorRT's parser would refuse or misread, one sentence each; empty if nothing."""
    graph = model.graph
    constants = {i.name: i for i in graph.initializer} | {
        n.output[0]: n for n in graph.node if n.op_type == "Constant"
    }
    findings = common_findings(model)
    types = _types(model)
    for value in (*graph.input, *graph.output):
        if types[value.name] != TensorProto.FLOAT:
            findings.append(f"{value.name}: inputs and outputs must be float32")
    for name, kind in types.items():
        if kind not in TYPES:
            findings.append(f"{name}: tensors of type {TensorProto.DataType.Name(kind)} are not supported")
    for node in graph.node:
        findings += _check_node(node, constants, types)
    return findings


def _types(model: onnx.ModelProto) -> dict[str, int]:
    graph = shape_inference.infer_shapes(model).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    return {v.name: v.type.tensor_type.elem_type for v in values} | {
        i.name: i.data_type for i in graph.initializer
    }


def _check_node(node: onnx.NodeProto, constants: Mapping[str, object], types: Mapping[str, int]) -> list[str]:
    where = f"{node.name} ({node.op_type})"
    attributes = {a.name: a for a in node.attribute}
    if node.op_type not in SUPPORTED or node.domain not in ("", "ai.onnx"):
        return [f"{where}: the parser has no such operation"]
    findings = []
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        initializers = {n: c for n, c in constants.items() if isinstance(c, TensorProto)}
        findings += check_parameters(node, initializers)
        scale = initializers.get(node.input[1])
        if scale is not None and list(scale.dims) not in ([], [1]) and "axis" not in attributes:
            findings.append(f"{where}: no axis, and versions differ in its default")
    if node.op_type == "Gemm" and any(attributes[a].f != 1.0 for a in ("alpha", "beta") if a in attributes):
        findings.append(f"{where}: alpha and beta other than 1 become float32 constants")
    if (
        node.op_type.startswith("Reduce")
        and len(node.input) > 1
        and node.input[1]
        and node.input[1] not in constants
    ):
        findings.append(f"{where}: axes must be constant")
    first = CONSTANT_INPUTS.get(node.op_type)
    if first is not None and any(n and n not in constants for n in node.input[first:]):
        findings.append(f"{where}: its inputs from the {first + 1}. on must be constant")
    if len(node.output) > 1 and node.op_type in ("LayerNormalization", "MaxPool", "Dropout"):
        findings.append(f"{where}: only the first output is supported")
    floats = {types[n] for n in node.input if types.get(n) in (TensorProto.FLOAT, TensorProto.FLOAT16)}
    if len(floats) > 1 and node.op_type not in ("Resize", "DequantizeLinear", "LayerNormalization"):
        findings.append(f"{where}: reads float32 and float16 at once")
    return findings
