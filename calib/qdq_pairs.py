"""What follows calibration: the signs of quantizers, and where their pairs stand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TypeVar

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .recipe import INT8_OPS, MOVES

Message = TypeVar("Message", onnx.NodeProto, onnx.TensorProto, onnx.ValueInfoProto)


def signed(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` with every unsigned quantizer (of values that are never negative) made a signed one of the
    same range.

    That costs one bit there; TensorRT reads nothing else, and one kind of activation serves every runtime. In
    place.
    """
    constants = {i.name: i for i in model.graph.initializer}
    unsigned = [
        n.input[1:3]
        for n in model.graph.node
        if n.op_type in ("QuantizeLinear", "DequantizeLinear")
        and len(n.input) == 3
        and _unsigned(constants.get(n.input[2]))
    ]
    outputs = {
        n.output[0]
        for n in model.graph.node
        if n.op_type == "QuantizeLinear" and len(n.input) == 3 and _unsigned(constants.get(n.input[2]))
    }
    for value in model.graph.value_info:
        if value.name in outputs:
            value.type.tensor_type.elem_type = onnx.TensorProto.INT8
    for name in {scale for scale, _ in unsigned if scale in constants}:
        wider = numpy_helper.to_array(constants[name]) * np.float32(255 / 127)
        constants[name].CopyFrom(numpy_helper.from_array(wider, name))
    for name in {zero for _, zero in unsigned}:
        constants[name].CopyFrom(
            numpy_helper.from_array(numpy_helper.to_array(constants[name]).astype(np.int8), name)
        )
    return model


def _unsigned(zero: onnx.TensorProto | None) -> bool:
    return (
        zero is not None
        and zero.data_type == onnx.TensorProto.UINT8
        and not numpy_helper.to_array(zero).any()
    )


def at_layers(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` with every pair that a conv or linear reads through moves standing directly before that layer
    instead. In place.

    The same values, where one scale serves the whole tensor; other pairs stay, and so do those that several
    read. OpenVINO moves int8 values more slowly than floats (a transposition of heads took twice as long),
    and 2026.4 answers otherwise where a pair stands before a transposition and any ``Concat`` is in the
    graph: int8 CvT was two to four times farther from PyTorch there than in ONNX Runtime.
    """
    graph = model.graph
    producer = {output: node for node in graph.node for output in node.output}
    readers: dict[str, int] = defaultdict(int)
    for name in (*(i for node in graph.node for i in node.input), *(o.name for o in graph.output)):
        readers[name] += 1
    scalars = {i.name for i in graph.initializer if not i.dims}
    constants = {i.name for i in graph.initializer}
    pairs: dict[str, list[onnx.NodeProto]] = {}
    for layer in (n for n in graph.node if n.op_type in INT8_OPS and _has_weight(n, producer, constants)):
        name, first = layer.input[0], None
        while (
            (node := producer.get(name)) is not None
            and node.op_type in MOVES
            and readers[name] == len(node.output) == 1
        ):
            name, first = node.input[0], node
        source = producer.get(node.input[0]) if first is not None and node is not None else None
        if (
            first is not None
            and source is not None
            and source.op_type == "QuantizeLinear"
            and source.input[1] in scalars
        ):
            first.input[0] = source.input[0]
            pairs[layer.name] = _pair(layer, source)
    if pairs:
        ordered = [n for node in graph.node for n in (*pairs.get(node.name, ()), node)]
        replace_nodes(graph, ordered)
    return model


def _has_weight(node: onnx.NodeProto, producer: dict[str, onnx.NodeProto], constants: set[str]) -> bool:
    """Whether the second operand of a conv or product is a constant, quantized or not."""
    name = node.input[1]
    while (source := producer.get(name)) is not None and source.op_type in ("DequantizeLinear", *MOVES):
        name = source.input[0]
    return name in constants


def _pair(layer: onnx.NodeProto, quantizer: onnx.NodeProto) -> list[onnx.NodeProto]:
    """A pair like that of ``quantizer`` between ``layer`` and what it reads."""
    names = [f"{layer.name}_input_{end}" for end in ("quantized", "dequantized")]
    nodes = [
        helper.make_node(kind, [source, *quantizer.input[1:]], [name], name)
        for kind, source, name in zip(
            ("QuantizeLinear", "DequantizeLinear"), (layer.input[0], names[0]), names, strict=True
        )
    ]
    layer.input[0] = names[1]
    return nodes


def replace_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """``nodes`` in this order instead of the graph's own, without what nobody reads (any more)."""
    needed, kept = {o.name for o in graph.output}, []
    for node in reversed(list(nodes)):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(_copy(node))
    del graph.node[:]
    graph.node.extend(reversed(kept))
    made = {o for node in kept for o in node.output}
    for field, wanted in ((graph.initializer, needed), (graph.value_info, made)):
        remaining = [_copy(item) for item in field if item.name in wanted]
        del field[:]
        field.extend(remaining)


def _copy(item: Message) -> Message:
    """Protobuf's containers own their items: an item that is to survive their clearing has to be copied."""
    return type(item).FromString(item.SerializeToString())
