"""The rules of TensorRT's ONNX parser, checked before a device ever sees the graph.

What 10.3 (JetPack 6) refuses is refused here, so a bundle builds on every version from 10.3 to 11. Source:
the onnx-tensorrt project, ``docs/operators.md`` and ``onnxOpImporters.cpp`` of the 10.3 and 10.15 releases;
TensorRT documentation, "Explicit Quantization". TensorRT for RTX has no plugins, so it refuses more, see
:data:`PLUGINS`. ``tests/deploy/test_rtx_parser.py`` compares every rule with its real parser;
:data:`ACCEPTED_BY_RTX` says why those stay that it does not have.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx_ir as ir
from onnx import shape_inference

from cmt_edge.deploy.backends.graph_rules import (
    STANDARD_DOMAINS,
    check_file,
    check_quantizer,
)

from .bindings import RTX, TENSORRT, Product

SUPPORTED = frozenset(
    """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast
    CastLike Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum
    DeformConv DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten
    Floor GRU Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool
    Greater GreaterOrEqual GridSample GroupNormalization HardSigmoid HardSwish Hardmax Identity If
    ImageScaler InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual
    Log LogSoftmax Loop LpNormalization LpPool MatMul Max MaxPool Mean MeanVarianceNormalization Min
    Mish Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or PRelu Pad ParametricSoftplus Pow
    QuantizeLinear RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal
    ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
    ReduceSumSquare Relu Reshape Resize ReverseSequence RoiAlign Round ScaledTanh Scan Scatter
    ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus
    Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu
    Unsqueeze Upsample Where Xor
    """.split()  # noqa: SIM905 (150 names, one a line otherwise)
)
"""Operations that the parser of 10.3 reads."""

PARSER_TYPES = (
    ir.DataType.FLOAT,
    ir.DataType.FLOAT16,
    ir.DataType.INT8,
    ir.DataType.INT32,
    ir.DataType.INT64,
    ir.DataType.BOOL,
)
"""Types of tensors inside a graph. The parser also reads bfloat16, but this package writes none."""

PLUGINS = frozenset({"DeformConv", "NonMaxSuppression", "NonZero", "RoiAlign"})
"""Operations that TensorRT runs, and TensorRT for RTX does not: most of them are plugins of TensorRT's."""

CONSTANT_INPUTS = {
    "CumSum": slice(1, None),
    "Dropout": slice(2, None),
    "OneHot": slice(1, 2),
    "Pad": slice(3, None),
    "Squeeze": slice(1, None),
    "Unsqueeze": slice(1, None),
}
"""Operation -> the inputs that must be constants, besides the axes of reductions."""

FLOAT32_ONLY = ("Celu", "Range")
"""Operations whose constants the parser makes in float32, so that their other inputs cannot be float16."""

SINGLE_OUTPUT = ("LayerNormalization", "MaxPool", "Dropout")
"""Operations of which the parser supports the first output only."""

MIXED_FLOATS = ("Resize", "DequantizeLinear", "LayerNormalization")
"""Operations that may read float32 and float16 at once."""

RESIZE_MODES = (
    "half_pixel",
    "pytorch_half_pixel",
    "tf_half_pixel_for_nn",
    "asymmetric",
    "align_corners",
)
"""How ``Resize`` may place its samples."""

ALLOWED: dict[str, dict[str, tuple[int | str, ...]]] = {
    "AveragePool": {"dilations": (1,)},
    "BatchNormalization": {"training_mode": (0,)},
    "LpPool": {"dilations": (1,), "p": (1, 2)},
    "MaxPool": {"dilations": (1,)},
    "Resize": {
        "antialias": (0,),
        "coordinate_transformation_mode": RESIZE_MODES,
        "keep_aspect_ratio_policy": ("stretch",),
    },
    "ScatterND": {"reduction": ("none",)},
}
"""Operation -> attribute -> the values that the parser reads; of a list every element must be one of them."""

ALLOWED_WITHOUT_PLUGINS: dict[str, dict[str, tuple[int | str, ...]]] = {
    "ScatterElements": {"reduction": ("none",)},
}
"""The same for what TensorRT for RTX does not read."""

MULTIPLYING = ("MatMul", "Gemm")
"""Operations that multiply matrices, which must not be whole numbers."""

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
"""Types of floating-point numbers that graphs have."""

WHOLE = (ir.DataType.INT32, ir.DataType.INT64)
"""Types of whole numbers that the parser reads."""

MOST_DIMENSIONS = 8
"""The largest number of dimensions of a tensor."""
ACCEPTED_BY_RTX = {
    "opset 21 is above 20": "TensorRT 10.3 alone: it reads operations up to opset 20",
    "domain 'com.microsoft'": "our own: the same file goes to every runtime",
    "input: inputs and outputs must be float32": "our own: sessions copy float32",
    "logits: inputs and outputs must be float32": "our own: sessions copy float32",
    "tensors of type DOUBLE": "misread: the parser narrows them to float32",
    "uint8 instead of int8": "TensorRT 10.3 alone: it knows uint8 as an input only",
    "scale and zero point must be constants": "our own: a missing zero point means uint8 in ONNX",
    "activation with one scale a channel": "TensorRT 10.3 alone: activations have one scale",
    "no axis, and versions differ": "misread: the default axis differs between versions",
    "alpha and beta other than 1": "misread: the factors become float32 constants in a float16 graph",
}
"""Part of a finding -> why the rule stays, although the parser of TensorRT for RTX 1.7 takes such a graph."""


def find_parser_problems(model: onnx.ModelProto, product: Product = TENSORRT) -> list[str]:
    """What the parser of ``product`` would refuse or misread, one sentence each; empty if nothing."""
    graph = ir.from_proto(shape_inference.infer_shapes(model)).graph
    findings = check_file(model)
    for value in (*graph.inputs, *graph.outputs):
        if value.dtype != ir.DataType.FLOAT:
            findings.append(f"{value.name}: inputs and outputs must be float32")
    for value in _list_values(graph):
        findings += _check_tensor(value)
    for node in graph.all_nodes():
        findings += _check_node(node)
        if product == RTX:
            findings += _check_plugins(node)
    return findings


def _list_values(graph: ir.Graph) -> list[ir.Value]:
    """Every tensor of a graph and of the graphs inside it, those of branches and loops."""
    made = [value for node in graph.all_nodes() for value in node.outputs]
    constants = [value for part in (graph, *graph.subgraphs()) for value in part.initializers.values()]
    return [*graph.inputs, *made, *constants]


def _check_tensor(value: ir.Value) -> list[str]:
    """A finding for a type or a number of dimensions that the parser does not read."""
    findings = []
    if value.dtype is not None and value.dtype not in PARSER_TYPES:
        findings.append(f"{value.name}: tensors of type {value.dtype.name} are not supported")
    if value.shape is not None and value.shape.rank() > MOST_DIMENSIONS:
        findings.append(f"{value.name}: has {value.shape.rank()} dimensions, more than {MOST_DIMENSIONS}")
    return findings


def _check_node(node: ir.Node) -> list[str]:
    where = _name_node(node)
    if node.op_type not in SUPPORTED or node.domain not in STANDARD_DOMAINS:
        return [f"{where}: the parser has no such operation"]
    findings = _check_quantizer(node, where) + _check_attributes(node, ALLOWED) + _check_inputs(node, where)
    if node.op_type == "Gemm" and _scales_product(node):
        findings.append(f"{where}: alpha and beta other than 1 become float32 constants")
    if node.op_type == "Dropout" and _is_training(node):
        findings.append(f"{where}: is in training mode")
    if node.op_type in SINGLE_OUTPUT and any(value.name for value in node.outputs[1:]):
        findings.append(f"{where}: only the first output is supported")
    return findings


def _name_node(node: ir.Node) -> str:
    return f"{node.name} ({node.op_type})"


def _check_inputs(node: ir.Node, where: str) -> list[str]:
    """Findings for types of inputs, and for inputs that must be constants."""
    findings = []
    if node.op_type in MULTIPLYING and _reads(node, WHOLE):
        findings.append(f"{where}: multiplies matrices of whole numbers")
    if node.op_type == "Mod" and not node.attributes.get_int("fmod", 0) and _reads(node, FLOATS):
        findings.append(f"{where}: takes the remainder of floating-point numbers without fmod")
    if node.op_type in FLOAT32_ONLY and _reads(node, (ir.DataType.FLOAT16,)):
        findings.append(f"{where}: reads float16, and its constants are float32")
    if node.op_type.startswith("Reduce") and not _are_constant(node.inputs[1:2]):
        findings.append(f"{where}: axes must be constant")
    fixed = CONSTANT_INPUTS.get(node.op_type)
    if fixed is not None and not _are_constant(node.inputs[fixed]):
        which = f"input {fixed.stop}" if fixed.stop else f"its inputs from the {fixed.start + 1}. on"
        findings.append(f"{where}: {which} must be constant")
    if node.op_type not in MIXED_FLOATS and _reads(node, FLOATS[:1]) and _reads(node, FLOATS[1:]):
        findings.append(f"{where}: reads float32 and float16 at once")
    return findings


def _check_plugins(node: ir.Node) -> list[str]:
    """What TensorRT for RTX does not run, since it has no plugins."""
    if node.op_type in PLUGINS:
        return [f"{_name_node(node)}: TensorRT for RTX has no such operation"]
    return _check_attributes(node, ALLOWED_WITHOUT_PLUGINS)


def _check_attributes(
    node: ir.Node,
    rules: dict[str, dict[str, tuple[int | str, ...]]],
) -> list[str]:
    """A finding for each attribute with a value that the parser does not read."""
    findings = []
    for name, allowed in rules.get(node.op_type, {}).items():
        given = node.attributes[name].value if name in node.attributes else ()
        values = (given,) if isinstance(given, (int, str)) else given
        if not all(value in allowed for value in values):
            choices = " or ".join(map(str, allowed))
            findings.append(f"{_name_node(node)}: {name} must be {choices}")
    return findings


def _check_quantizer(node: ir.Node, where: str) -> list[str]:
    """The rules of a ``QuantizeLinear`` or ``DequantizeLinear``; nothing for other operations."""
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return []
    findings = check_quantizer(node)
    scale = node.inputs[1]
    if scale is None or not scale.is_initializer() or scale.const_value is None:
        return findings
    is_single = tuple(scale.const_value.shape.numpy()) in ((), (1,))
    if not is_single and "axis" not in node.attributes:
        findings.append(f"{where}: no axis, and versions differ in its default")
    return findings


def _scales_product(gemm: ir.Node) -> bool:
    """Whether a ``Gemm`` has factors other than 1."""
    return any(gemm.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta"))


def _are_constant(values: Sequence[ir.Value | None]) -> bool:
    """Whether all inputs that are not left out are initializers or results of ``Constant`` nodes."""
    given = [value for value in values if value is not None]
    return all(ir.convenience.get_const_tensor(value) is not None for value in given)


def _is_training(dropout: ir.Node) -> bool:
    """Whether a ``Dropout`` has a constant that makes it drop; one that is no constant is another finding."""
    given = dropout.inputs[2] if len(dropout.inputs) > 2 else None
    constant = ir.convenience.get_const_tensor(given) if given is not None else None
    return constant is not None and bool(constant.numpy().any())


def _reads(node: ir.Node, types: Sequence[ir.DataType]) -> bool:
    """Whether an input is of one of ``types``."""
    return any(value is not None and value.dtype in types for value in node.inputs)
