"""Layers that nothing leads around, between stages and behind the last block: they read floats.

What int8 costs inside a block is added to the stream that leads around the block, which keeps its values.
Between two stages, and from the last block to the answer, there is no way around: a layer that reads int8
there rounds the whole stream. In CMT these are the convs that halve the map and the two layers of the head.
They are few and cheap, but two thirds of the variance that int8 left in CMT-XS's logits came from them
(``docs/int8.md``). Their weights stay int8, so that the file keeps its size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx
import onnx_ir as ir

from .graph import (
    DEQUANTIZE,
    QUANTIZE,
    find_producer,
    get_input,
    get_node_name,
    is_constant,
    open_view,
    read_constant_dims,
    remove_unread,
)
from .recipe import INT8_OPS, is_depthwise_node


def list_trunk(model: onnx.ModelProto) -> list[str]:
    """:func:`find_trunk` of a model: names, in the graph's order."""
    with open_view(model) as view:
        return [get_node_name(node) for node in find_trunk(view.graph)]


def find_trunk(graph: ir.Graph) -> list[ir.Node]:
    """Convs and linears that every way from the image to the last output leads through.

    They come after the first layer that something leads around, since the convs before it read large maps;
    and they are convs of patches that do not overlap, or no layer after them has a way around it. Convs of
    overlapping patches, such as CvT's, multiply several times as often, and are not among them; nor are
    depthwise convs.
    """
    order = _list_computed(graph)
    passed = set(_find_passed(order))
    layers = [node for node in order if node.op_type in INT8_OPS]
    around = [position for position, layer in enumerate(layers) if layer not in passed]
    if not around:
        return []
    return [
        layer
        for layer in layers[around[0] :]
        if layer in passed
        and is_constant(layer.inputs[1])
        and not is_depthwise_node(layer)
        and (_divides_map(layer) or layer in layers[around[-1] :])
    ]


def _list_computed(graph: ir.Graph) -> list[ir.Node]:
    """The nodes between the graph's input and its last output, in the graph's order. What is made of sizes
    alone, such as of the batch's, is not among them."""
    computed: set[ir.Node] = set()
    for node in graph:
        if node.op_type != "Shape" and any(
            value.is_graph_input() or value.producer() in computed for value in _iterate_values(node)
        ):
            computed.add(node)
    producers = [value.producer() for value in graph.outputs]
    last = next((node for node in reversed(graph) if node in producers), None)
    needed: set[ir.Node] = set() if last is None else {last}
    for node in reversed(graph):
        if node in needed:
            needed.update(producer for v in _iterate_values(node) if (producer := v.producer()) in computed)
    return [node for node in graph if node in needed]


def _iterate_values(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads."""
    return (value for value in node.inputs if value is not None)


def _find_passed(order: Collection[ir.Node]) -> Iterator[ir.Node]:
    """The nodes that no tensor passes by, which is made before them and read after them."""
    last_read: dict[ir.Node | None, int] = {}
    for position, node in enumerate(order):
        for value in _iterate_values(node):
            if value.producer() is not None or value.is_graph_input():
                last_read[value.producer()] = position
    farthest = last_read.get(None, 0)
    for position, node in enumerate(order):
        if farthest <= position:
            yield node
        farthest = max(farthest, last_read.get(node, position))


def _divides_map(layer: ir.Node) -> bool:
    """Whether it is a conv of patches that do not overlap."""
    dims, strides = read_constant_dims(layer.inputs[1]), layer.attributes.get_ints("strides", ())
    return (
        layer.op_type == "Conv"
        and max(strides, default=1) > 1
        and dims is not None
        and dims[2:] == tuple(strides)
    )


def read_floats(graph: ir.Graph, names: Collection[str]) -> None:
    """Let layers read what their Q/DQ pairs read, in place. Their weights stay int8.

    A layer that does not read a pair directly stays as it is.
    """
    for node in graph:
        pair = find_producer(node.inputs[0]) if node.name in names else None
        if pair is None or pair.op_type != DEQUANTIZE:
            continue
        quantizer = find_producer(pair.inputs[0])
        if quantizer is not None and quantizer.op_type == QUANTIZE:
            node.replace_input_with(0, get_input(quantizer, 0))
    remove_unread(graph)
