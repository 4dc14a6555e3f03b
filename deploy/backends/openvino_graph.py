"""Exact rewrites of a graph that OpenVINO has read from an ONNX file.

**Unsigned inputs of int8 convs.** Bundles hold signed int8 activations, because every runtime reads those.
But processors without AMX only multiply unsigned by signed bytes: there OpenVINO (2026.4) shifts the
activations by 128, and takes the shift back, as a zero point, in every conv. A conv without padding does not
need this::

    x = q s,  q in -128 .. 127                         # what the Q/DQ pair before the conv gives
    W * x + b = W * (x + 128 s) + (b - 128 s sum(W))   # the sum of all weights of an output channel

``x + 128 s = (q + 128) s`` is an unsigned value without a zero point, and the new bias is a constant. Convs
with padding are left alone: the zeros around the map are zeros of ``x``, not of ``x + 128 s``.

**Shifts before a quantizer.** Bundles move some values by a constant before they are rounded
(:mod:`cmt_edge.calib.shifts`). OpenVINO rounds what lies between two ends, so that the addition becomes part
of these ends: rounding ``x + c`` between ``low`` and ``high`` is rounding ``x`` between ``low - c`` and
``high - c``, with the same integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from openvino.frontend import FrontEndManager

from ..bundle.onnx_caps import MAX_MADE, ExcessiveGraph
from .openvino_constants import is_dequantized
from .openvino_layers import (
    LAYERS,
    add_to_bias,
    count_elements,
    find_quantizer,
    find_start,
    is_close,
    is_shift,
    iterate_int8,
    read_scalar,
    sum_inputs,
)
from .openvino_linears import read_floats
from .openvino_pairs import limit_pairs
from .overflow import multiplies_matrices_slowly, saturates_in_openvino

MAX_RATIO = 64
"""The largest number of elements of a tensor for each element of the input, where that is above
:data:`.onnx_caps.MAX_MADE`. Convolutional models have about 6."""

BODIES = {
    "If": ("get_then_body", "get_else_body"),
    "Loop": ("get_function",),
    "TensorIterator": ("get_function",),
}
"""Operation -> its methods that give a model inside it."""


def read(
    path: Path,
    prepare: Callable[[ov.Model], object] | None = None,
    device: str = "CPU",
    keep_linears: bool = False,
) -> ov.Model:
    """The model in the ONNX file ``path``, rewritten as above; ``prepare`` changes it before that.

    For the CPU, int8 linears read floats where that is faster on it (:mod:`.openvino_linears`), unless
    ``keep_linears`` says that the model may run on another one; and int8 weights are rounded as its
    instructions need it (:mod:`.openvino_pairs`).

    ``Core.read_model`` chooses a reader by the content of a file. One that is ONNX to another runtime may be
    another model to it, so that only the reader of ONNX is asked.

    Raises:
        ExcessiveGraph: the graph makes a tensor larger than it may. The rewriting computes constants, so this
            is found out before.
    """
    frontend = FrontEndManager().load_by_framework("onnx")
    model = frontend.convert(frontend.load(path))
    _require_modest(model)
    if prepare is not None:
        prepare(model)
    if device == "CPU" and saturates_in_openvino():
        if not keep_linears and multiplies_matrices_slowly():
            read_floats(model)
        limit_shifted(model)
    return make_unsigned(take_in_shifts(model))


def _require_modest(model: ov.Model) -> None:
    """Raise :class:`ExcessiveGraph` where a graph, or one inside it, makes a tensor larger than it may.

    OpenVINO has inferred the shapes and has computed nothing yet. What has no fixed shape is not looked at.
    """
    images = sum(_count(port.get_shape()) for port in model.inputs if port.get_partial_shape().is_static)
    cap = max(MAX_MADE, MAX_RATIO * images)
    for node in _iterate_nodes(model):
        for output in node.outputs():
            shape = output.get_partial_shape()
            if shape.is_static and _count(output.get_shape()) > cap:
                raise ExcessiveGraph(
                    f"{node.get_type_name()} makes {shape} elements, more than the cap of {cap}"
                )


def _count(shape: ov.Shape) -> int:
    """The number of elements. To iterate over a shape of OpenVINO takes ten times as long as to index it."""
    return math.prod([shape[i] for i in range(len(shape))])


def _iterate_nodes(model: ov.Model) -> Iterator[ov.Node]:
    """The operations of a model and of the models inside them: the bodies of loops and the branches of
    conditions."""
    pending = [model]
    while pending:
        for node in pending.pop().get_ops():
            yield node
            pending += [getattr(node, name)() for name in BODIES.get(node.get_type_name(), ())]


def limit_shifted(model: ov.Model) -> None:
    """:func:`.openvino_pairs.limit_pairs`, where inputs of layers may be shifted: their biases take the shift
    back with the sums of the weights, so that they have to follow when these are rounded otherwise."""
    shifted = [(layer, move, sum_inputs(layer)) for layer, move in _find_shifted(model)]
    limit_pairs(model)
    for layer, move, before in shifted:
        correction = move * (before - sum_inputs(layer))
        if correction.any():
            add_to_bias(layer, correction)
    model.validate_nodes_and_infer_types()


def _find_shifted(model: ov.Model) -> Iterator[tuple[ov.Node, float]]:
    """Layers with int8 weights that read a shifted pair, and by how much it is shifted."""
    for layer in iterate_int8(model, LAYERS):
        start = find_start(layer.input_value(0))
        addition = start.input_value(0).get_node() if start.get_type_name() == "FakeQuantize" else start
        if is_shift(addition):
            yield layer, read_scalar(addition.input_value(1))


def take_in_shifts(model: ov.Model) -> ov.Model:
    """Make the addition of one constant before a quantizer part of the ends between which it rounds; changes
    ``model`` and returns it."""
    is_changed = False
    for node in model.get_ordered_ops():
        if node.get_type_name() != "FakeQuantize" or any(
            count_elements(node.input_value(i)) != 1 for i in range(1, 5)
        ):
            continue
        addition = node.input_value(0).get_node()
        if not is_shift(addition):
            continue
        move = read_scalar(addition.input_value(1))
        ends = [read_scalar(node.input_value(i)) - move for i in (1, 2)]
        values = addition.input_value(0)
        for position, value in enumerate(
            (values, *(ops.constant(np.float32(end)).output(0) for end in ends))
        ):
            node.input(position).replace_source_output(value)
        is_changed = True
    if is_changed:
        model.validate_nodes_and_infer_types()
    return model


def make_unsigned(model: ov.Model) -> ov.Model:
    """Make the inputs of int8 convs unsigned, where no padding forbids it; changes ``model`` and returns it.

    A conv stays as it is if its input or its weights are not quantized, or if others read its pair too.
    """
    found = [
        (conv, pair) for conv in model.get_ordered_ops() if (pair := _find_pair_before(conv)) is not None
    ]
    for conv, (quantizer, dequantized) in found:
        low, high, least, most = (read_scalar(quantizer.input_value(i)) for i in range(1, 5))
        edges = [ops.constant(np.float32(v)) for v in (low, high, 0.0, high - low)]
        shifted = ops.fake_quantize(
            quantizer.input_value(0),
            *edges,
            quantizer.get_attributes()["levels"],
        )
        dequantized.output(0).replace(shifted.output(0))
        lowest = least * (high - low) / (most - least)  # what the pair gives for the least integer
        add_to_bias(conv, lowest * sum_inputs(conv))
    if found:
        model.validate_nodes_and_infer_types()
    return model


def _find_pair_before(conv: ov.Node) -> tuple[ov.Node, ov.Node] | None:
    """Quantizer and last node of the signed Q/DQ pair that only this conv reads, if its input may be
    shifted."""
    if conv.get_type_name() != "Convolution" or _is_padded(conv) or not is_dequantized(conv.input_value(1)):
        return None
    if find_start(conv.input_value(1)).get_type_name() != "Constant":
        return None
    end = conv.input_value(0)
    if not is_dequantized(end) or len(end.get_target_inputs()) != 1:
        return None
    found = find_quantizer(end)
    if found is None or any(count_elements(value) != 1 for value in found[0].input_values()[1:5]):
        return None
    quantizer, scale = found
    low, high, least, most = (read_scalar(value) for value in quantizer.input_values()[1:5])
    if least >= 0 or not is_close(high - low, (most - least) * scale):
        return None  # the pair rescales, too
    return quantizer, end.get_node()


def _is_padded(conv: ov.Node) -> bool:
    attributes = conv.get_attributes()
    pads = (*attributes["pads_begin"], *attributes["pads_end"])
    return attributes["auto_pad"] not in ("explicit", "valid") or any(pads)
