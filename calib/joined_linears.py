"""Int8 linears in the form that ONNX Runtime computes fastest.

It has two integer kernels for them. A ``Gemm`` with a bias of int32 becomes ``QGemm``, which first writes the
bias into every row of the result. A product of tokens, ``(batch, tokens, K)``, becomes
``MatMulIntegerToFloat``, and the bias is added in float: CvT-13 takes 0.93 to 0.98 of the time so. But where
the bias is a vector and the batch size is known, ONNX Runtime makes a ``Gemm`` of product and addition, which
it computes in float32, because the bias is no integer. So the bias gets as many dimensions as the product.

Linears that read one pair become one product, whose columns are divided among them. ONNX Runtime makes
activations unsigned only where a single layer reads them. Signed ones it does not multiply in integers but in
a ``Gemm``, which took 6.5 times as long on a processor without VNNI. It merges equal pairs, so that pairs of
their own would not help.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .graph import (
    DEQUANTIZE,
    add_constant,
    count_readers,
    detach_readers,
    find_producer,
    get_input,
    get_node_name,
    is_constant,
    make_node,
    read_constant,
    read_constant_dims,
)

TOKENS = 3
"""The least number of dimensions of a map of tokens. Products of fewer are made a ``Gemm`` with any bias."""


@dataclass(frozen=True)
class _Linear:
    """``product`` of an activation and weights, both dequantized, and the ``addition`` of its bias, if it has
    one: a constant with a value for each output."""

    product: ir.Node
    addition: ir.Node | None
    outputs: int

    @property
    def name(self) -> str:
        return get_node_name(self.product)

    @property
    def result(self) -> ir.Value:
        return (self.addition or self.product).outputs[0]

    @property
    def bias(self) -> np.ndarray | None:
        """Float32, ``(outputs,)``."""
        if self.addition is None:
            return None
        found = self.addition.inputs[1 - find_position(self.addition, self.product)]
        return read_constant(found).reshape(-1)


def find_position(reader: ir.Node, node: ir.Node) -> int:
    """Which input of ``reader``, an operation with two of them, is the result of ``node``."""
    return 0 if reader.inputs[0] is node.outputs[0] else 1


def find_addition(product: ir.Node) -> ir.Node | None:
    """The operation that adds a constant to the result of ``product``, if nothing else reads that."""
    value = product.outputs[0]
    readers = [use.node for use in value.uses()]
    if count_readers(value) != 1 or not readers or readers[0].op_type != "Add":
        return None
    (addition,) = readers
    if addition.graph is not product.graph:
        return None
    return addition if is_constant(addition.inputs[1 - find_position(addition, product)]) else None


def join_linears(graph: ir.Graph, products: Iterable[ir.Node]) -> list[ir.Node]:
    """Give int8 linears of tokens the form above, in place; replaced operations stay in ``graph``, unread.

    Returns: the products that stay as they are: those of fewer dimensions than tokens have, or of an unknown
    number; those with another reader of what they read; and those whose weights are no matrix with scales
    of its columns.
    """
    by_pair: dict[ir.Node, list[ir.Node]] = {}
    for product in products:
        pair = find_producer(product.inputs[0])
        assert pair is not None  # it is an int8 layer
        by_pair.setdefault(pair, []).append(product)
    left: list[ir.Node] = []
    for pair, group in by_pair.items():
        linears = [linear for product in group if (linear := _describe(product)) is not None]
        if len(linears) < len(group) or not _is_alone(pair, len(group)):
            left += group
            continue
        if len(linears) > 1:
            _join(graph, linears)
        elif linears[0].bias is not None:
            _widen_bias(graph, linears[0])
    return left


def _describe(product: ir.Node) -> _Linear | None:
    """``product`` and its bias; ``None`` where it is none of tokens with a matrix."""
    weights, shape = find_producer(product.inputs[1]), product.outputs[0].shape
    dims = read_constant_dims(weights.inputs[0]) if weights is not None else None
    if weights is None or dims is None or len(dims) != 2 or shape is None or len(shape) < TOKENS:
        return None
    if len(weights.inputs) != 3 or weights.attributes.get_int("axis", 1) not in (1, -1):
        return None
    addition = find_addition(product)
    if addition is not None:
        added = read_constant_dims(addition.inputs[1 - find_position(addition, product)]) or ()
        is_bias = added[-1:] == (dims[1],) and math.prod(added) == dims[1] and len(added) <= len(shape)
        addition = addition if is_bias else None
    return _Linear(product, addition, dims[1])


def _is_alone(pair: ir.Node, count: int) -> bool:
    """Whether ``count`` layers are all that read a pair."""
    quantizer = find_producer(pair.inputs[0])
    alone = quantizer is not None and count_readers(quantizer.outputs[0]) == 1
    return alone and count_readers(pair.outputs[0]) == count


def _widen_bias(graph: ir.Graph, linear: _Linear) -> None:
    """Let the bias have as many dimensions as the product."""
    addition, bias = linear.addition, linear.bias
    assert addition is not None
    assert bias is not None
    wide = add_constant(graph, f"{linear.name}_bias_wide", _add_dimensions(bias, linear))
    addition.replace_input_with(1 - find_position(addition, linear.product), wide)


def _add_dimensions(bias: np.ndarray, linear: _Linear) -> np.ndarray:
    """A vector as a tensor of as many dimensions as the result of ``linear``."""
    shape = linear.product.outputs[0].shape
    assert shape is not None  # _describe has looked
    return bias.reshape([1] * (len(shape) - 1) + [-1])


def _join(graph: ir.Graph, linears: Sequence[_Linear]) -> None:
    """Replace linears that read the same tensor by one product, whose columns are divided among them."""
    first = linears[0]
    name = f"{first.name}_joined"
    weights = _join_weights(graph, linears, f"{name}_weights")
    product = make_node("MatMul", [first.product.inputs[0], weights.outputs[0]], name, first.name)
    product.metadata_props.update(first.product.metadata_props)
    new = [weights, product]
    if any(linear.bias is not None for linear in linears):
        biases = [np.zeros(n.outputs, np.float32) if n.bias is None else n.bias for n in linears]
        wide = add_constant(graph, f"{name}_bias", _add_dimensions(np.concatenate(biases), first))
        new.append(make_node("Add", [product.outputs[0], wide], f"{name}_sum", f"{name}_sum"))
    sizes = add_constant(graph, f"{name}_sizes", np.array([linear.outputs for linear in linears], np.int64))
    ends = {linear.result.producer() for linear in linears}
    parts = [detach_readers(linear.result, f"{linear.name}_apart") for linear in linears]
    split = ir.node("Split", [new[-1].outputs[0], sizes], {"axis": -1}, outputs=parts, name=f"{name}_split")
    graph.insert_before(next(node for node in graph if node in ends), [*new, split])


def _join_weights(graph: ir.Graph, linears: Sequence[_Linear], name: str) -> ir.Node:
    """The weights of several linears side by side, dequantized by a node that is not in the graph yet."""
    parts = [_read_weights(linear) for linear in linears]
    joined = [np.concatenate(same, axis=-1) for same in zip(*parts, strict=True)]
    names = (f"{name}_steps", f"{name}_scale", f"{name}_zero")
    constants = [add_constant(graph, *one) for one in zip(names, joined, strict=True)]
    return make_node(DEQUANTIZE, constants, name, name, {"axis": 1})


def _read_weights(linear: _Linear) -> list[np.ndarray]:
    """Integers ``(K, outputs)``, and the scale and the zero point of each output."""
    node = find_producer(linear.product.inputs[1])
    assert node is not None  # it is an int8 layer
    steps, scale, zero = (read_constant(get_input(node, position)) for position in range(3))
    return [steps, *(np.broadcast_to(one.reshape(-1), (linear.outputs,)) for one in (scale, zero))]
