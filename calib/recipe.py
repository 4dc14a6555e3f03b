"""Which nodes of a hybrid stay float, once, for every runtime.

Rules are about node classes, never about names of a family. Measured on CMT (``docs/int8.md``):

* Dense convs, linears and the products of queries and keys are int8, weights per output channel, activations per tensor, all symmetric with zero
  point 0: TensorRT accepts nothing else, and asymmetric activations cost extra work on CPUs.
* Depthwise convs stay float: they are bound by memory, and runtimes ran int8 ones as float with conversions around them.
* LayerNorm, Softmax (and its product with the values), GELU and elementwise operations stay float: cheap, and where accuracy goes first.
* Products with a table of more than two dimensions (relative positions) stay float: small, and runtimes expect one scale there.
* Biases stay float: they are added in the accumulator's precision anyway.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import onnx

FLOAT_OPS = ("LayerNormalization", "Softmax", "Gelu", "Sigmoid", "Erf", "ReduceMean", "GlobalAveragePool")
"""Operations that never read a dequantized activation directly."""
INT8_OPS = ("Conv", "Gemm", "MatMul")
"""Operations that compute in int8."""


RULES = 4
"""Counts up when :meth:`Recipe.float_nodes` or what follows it changes, so that no cached graph of older rules is used."""


@dataclass(frozen=True)
class Recipe:
    """Choices of :func:`calib.quantize.quantize`.

    Attributes:
        depthwise: quantize depthwise convs too.
        attention: quantize the attention's own products of two activations, where NNCF would.
        smooth_quant: alpha of activation smoothing for matrix products, ``None`` for none; it adds a multiplication
            before each of them.
        bias_correction: correct biases for the mean error that rounding weights causes.
        range_estimator: how activation ranges are found: ``"mean_minmax"`` (mean over images of each image's extremes)
            or ``"minmax"``.
        keep_float: groups of operations (:mod:`calib.groups`) or single ones that are taken back to float after calibration, see
            :mod:`calib.restore`; they do not change how the others are calibrated.
    """

    depthwise: bool = False
    attention: bool = True
    smooth_quant: float | None = None
    bias_correction: bool = True
    range_estimator: str = "mean_minmax"
    keep_float: tuple[str, ...] = ()

    def key(self) -> str:
        """Hash of all choices, for caches and the manifest."""
        return hashlib.sha256(json.dumps(asdict(self) | {"rules": RULES}, sort_keys=True).encode()).hexdigest()

    def float_nodes(self, model: onnx.ModelProto) -> list[str]:
        """Names of the nodes of ``model`` that stay float although their operation could be int8."""
        constants = {i.name: i for i in model.graph.initializer}
        producer = {output: node for node in model.graph.node for output in node.output}
        nodes = []
        for node in model.graph.node:
            if not self.depthwise and is_depthwise(node):
                nodes.append(node.name)
            if node.op_type == "MatMul" and any(_comes_from(name, "Softmax", producer) for name in node.input):
                nodes.append(node.name)
            if node.op_type == "MatMul" and any(name in constants and len(constants[name].dims) > 2 for name in node.input):
                nodes.append(node.name)
            if not self.attention and node.op_type == "MatMul" and not any(name in constants for name in node.input):
                nodes.append(node.name)
        return nodes


DEFAULT = Recipe()
MOVES = ("Reshape", "Transpose", "Split", "Slice", "Squeeze", "Unsqueeze", "Flatten")
"""Operations that only move values."""


ELEMENTWISE = ("Add", "Sub", "Mul", "Div")


def _comes_from(name: str, op_type: str, producer: Mapping[str, onnx.NodeProto]) -> bool:
    """Whether a tensor is made from the output of such an operation by moves and elementwise arithmetic alone."""
    node = producer.get(name)
    if node is None or node.op_type == op_type:
        return node is not None
    return node.op_type in (*MOVES, *ELEMENTWISE) and any(_comes_from(i, op_type, producer) for i in node.input)


def is_depthwise(node: onnx.NodeProto) -> bool:
    """Whether ``node`` is a grouped conv (in these families every grouped conv is depthwise)."""
    return node.op_type == "Conv" and any(a.name == "group" and a.i > 1 for a in node.attribute)
