"""Which nodes of a hybrid stay float, once, for every runtime.

Rules are about node classes, never about names of a family. Measured on CMT (``docs/int8.md``):

* Dense convs and linears are int8, weights per output channel, activations per tensor, all symmetric with
  zero point 0: TensorRT accepts nothing else, and asymmetric activations cost extra work on CPUs. What convs
  read is made to suit that first (:mod:`cmt_edge.calib.equalize`).
* Depthwise convs between two dense ones whose channels have been equalized are int8: nothing is converted on
  the way then. Others stay float: they are bound by memory, and a scale for all channels costs them accuracy.
* A conv of an image by small filters stays float: quantizing the image cost more than int8 saved.
* The attention's own products of two activations stay float: they cost little, and pairs around them more
than int8 saves.
* LayerNorm, Softmax (and its product with the values), GELU and elementwise operations stay float: cheap, and
where accuracy goes first.
* Products with a table of more than two dimensions (relative positions) stay float: small, and runtimes
expect one scale there.
* Biases stay float: they are added in the accumulator's precision anyway.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import onnx

FLOAT_OPS = ("LayerNormalization", "Softmax", "Gelu", "Sigmoid", "Erf", "ReduceMean", "GlobalAveragePool")
"""Operations that never read a dequantized activation directly."""
INT8_OPS = ("Conv", "Gemm", "MatMul")
"""Operations that compute in int8."""


RULES = 7
"""Counts up when :meth:`Recipe.float_nodes` or what follows it changes, so that no cached graph of older
rules is used."""


@dataclass(frozen=True)
class Recipe:
    """Choices of :func:`cmt_edge.calib.quantize.quantize`.

    Attributes:
        equalize: rescale what convs read before calibration (:func:`cmt_edge.calib.equalize.equalize`).
        depthwise: quantize the depthwise convs of :func:`inner_depthwise` too.
        attention: quantize the attention's own products of two activations, where NNCF would.
        smooth_quant: alpha of activation smoothing for matrix products, ``None`` for none; it adds a
            multiplication before each of them.
        bias_correction: correct biases for the mean error that rounding weights causes.
        range_estimator: how activation ranges are found: ``"mean_minmax"`` (mean over images of each image's
            extremes), ``"minmax"``, or ``"auto"``: ``"minmax"`` for a graph that was equalized, where every
            channel reaches its extremes on some image and a mean would cut most of them off.
        keep_float: groups of operations (:mod:`cmt_edge.calib.groups`) or single ones that are taken back to
            float after calibration, see :mod:`cmt_edge.calib.restore`; they do not change how the others are
            calibrated.
    """

    equalize: bool = True
    depthwise: bool = True
    attention: bool = False
    smooth_quant: float | None = None
    bias_correction: bool = True
    range_estimator: str = "auto"
    keep_float: tuple[str, ...] = ()

    def key(self) -> str:
        """Hash of all choices, for caches and the manifest."""
        return hashlib.sha256(
            json.dumps(asdict(self) | {"rules": RULES}, sort_keys=True).encode()
        ).hexdigest()

    def float_nodes(self, model: onnx.ModelProto) -> list[str]:
        """Names of the nodes of ``model`` that stay float although their operation could be int8."""
        constants = {i.name: i for i in model.graph.initializer}
        producer = {output: node for node in model.graph.node for output in node.output}
        image = {i.name for i in model.graph.input}
        inner = inner_depthwise(model) if self.depthwise and self.equalize else set()
        nodes = []
        for node in model.graph.node:
            if is_depthwise(node) and node.name not in inner:
                nodes.append(node.name)
            if (
                is_dense(node)
                and node.input[0] in image
                and _filter_size(constants.get(node.input[1])) < SMALL_FILTER
            ):
                nodes.append(node.name)
            if node.op_type == "MatMul" and any(
                _comes_from(name, "Softmax", producer) for name in node.input
            ):
                nodes.append(node.name)
            if node.op_type == "MatMul" and any(
                name in constants and len(constants[name].dims) > 2 for name in node.input
            ):
                nodes.append(node.name)
            if (
                not self.attention
                and node.op_type == "MatMul"
                and not any(name in constants for name in node.input)
            ):
                nodes.append(node.name)
        return nodes


SMALL_FILTER = 32
"""A conv of the image stays float if its filters read fewer values: int8 has little to multiply there, and
the image to convert."""
DEFAULT = Recipe()
MOVES = ("Reshape", "Transpose", "Split", "Slice", "Squeeze", "Unsqueeze", "Flatten")
"""Operations that only move values."""


ELEMENTWISE = ("Add", "Sub", "Mul", "Div")


def _comes_from(name: str, op_type: str, producer: Mapping[str, onnx.NodeProto]) -> bool:
    """Whether a tensor is made from the output of such an operation by moves and elementwise arithmetic
    alone."""
    node = producer.get(name)
    if node is None or node.op_type == op_type:
        return node is not None
    return node.op_type in (*MOVES, *ELEMENTWISE) and any(
        _comes_from(i, op_type, producer) for i in node.input
    )


def inner_depthwise(model: onnx.ModelProto) -> set[str]:
    """Names of depthwise convs that read a dense conv and are read by one alone, with activations and a scale
    and shift between."""
    producer = {output: node for node in model.graph.node for output in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    made = {i.name for i in model.graph.initializer}

    def dense_before(name: str) -> bool:
        node = producer.get(name)
        if node is None or len(readers[name]) != 1:
            return False
        values = [i for i in node.input if i not in made]
        return is_dense(node) or (node.op_type in BETWEEN and len(values) == 1 and dense_before(values[0]))

    def dense_after(name: str) -> bool:
        if len(readers.get(name, [])) != 1:
            return False
        (node,) = readers[name]
        return is_dense(node) or (node.op_type in BETWEEN and dense_after(node.output[0]))

    def scaled(name: str) -> bool:
        shift = producer.get(name)
        scale = next((producer[i] for i in shift.input if i in producer), None) if shift is not None else None
        return all(
            node is not None and node.op_type == kind and any(i in made for i in node.input)
            for node, kind in ((shift, "Add"), (scale, "Mul"))
        )

    return {
        n.name
        for n in model.graph.node
        if is_depthwise(n) and scaled(n.input[0]) and dense_before(n.input[0]) and dense_after(n.output[0])
    }


BETWEEN = ("Gelu", "Relu", "Mul", "Add")


def _filter_size(weight: onnx.TensorProto | None) -> int:
    """How many values one filter reads."""
    return SMALL_FILTER if weight is None else math.prod(weight.dims[1:])


def is_dense(node: onnx.NodeProto) -> bool:
    """Whether ``node`` is a conv whose filters read all channels."""
    return node.op_type == "Conv" and not is_depthwise(node)


def is_depthwise(node: onnx.NodeProto) -> bool:
    """Whether ``node`` is a grouped conv (in these families every grouped conv is depthwise)."""
    return node.op_type == "Conv" and any(a.name == "group" and a.i > 1 for a in node.attribute)
