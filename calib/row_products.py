"""Int8 linears as products of all rows, for ONNX Runtime.

A linear of a map of tokens, ``(batch, tokens, K)``, is ``MatMul -> Add``. ONNX Runtime makes a ``Gemm`` of
all rows of it, ``(batch * tokens, K)``, which is one integer kernel, but only where it knows the batch size.
Elsewhere it multiplies in integers, and scales and adds the bias in operations of their own.

Linears that read one pair become one product, whose columns are divided among them. ONNX Runtime makes
activations unsigned only where a single layer reads them, and its ``Gemm`` of signed ones took 6.5 times as
long on a processor without VNNI. It merges equal pairs, so that pairs of their own would not help.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    make_node,
    name_value,
    read_constant,
    read_constant_dims,
)


@dataclass(frozen=True)
class _Linear:
    """``product`` of an activation and weights, and the ``addition`` of its bias, both dequantized."""

    product: ir.Node
    addition: ir.Node

    @property
    def name(self) -> str:
        return get_node_name(self.product)

    @property
    def weights(self) -> ir.Value:
        """Dequantized, ``(K, outputs)``."""
        return get_input(self.product, 1)

    @property
    def bias(self) -> ir.Value:
        """Dequantized, ``(outputs,)``."""
        position = 1 if self.addition.inputs[0] is self.product.outputs[0] else 0
        return get_input(self.addition, position)

    @property
    def sizes(self) -> list[int]:
        """See :func:`_list_sizes`, of the result."""
        return _list_sizes(self.addition.outputs[0])


def multiply_rows(graph: ir.Graph, sums: Mapping[ir.Node, ir.Node]) -> None:
    """Replace linears of more than one dimension of rows by products of all rows.

    Those stay as they are whose sizes, but the batch's, are not all known, those with another reader of what
    they read, and those whose weights are no matrix.

    Args:
        graph: is changed in place; replaced operations stay in it, unread.
        sums: product of a linear -> the addition of its bias. Weights and bias are dequantized, with scales
            of each output or one.
    """
    by_pair: dict[ir.Node, list[_Linear]] = {}
    for product, addition in sums.items():
        pair, weights = (find_producer(value) for value in product.inputs)
        dims = read_constant_dims(weights.inputs[0]) if weights is not None else None
        if pair is not None and dims is not None and len(dims) == 2:
            by_pair.setdefault(pair, []).append(_Linear(product, addition))
    for pair, linears in by_pair.items():
        quantizer = find_producer(pair.inputs[0])
        columns = _list_sizes(pair.outputs[0])[-1:]
        alone = count_readers(pair.outputs[0]) == len(linears)
        if quantizer is None or count_readers(quantizer.outputs[0]) != 1 or not alone:
            continue
        if columns and all(linear.sizes for linear in linears):
            _flatten_rows(graph, quantizer, columns)
            _replace(graph, linears)


def _list_sizes(value: ir.Value) -> list[int]:
    """All sizes of a tensor but the first, the batch's, if there are several and all of them are known."""
    sizes = [] if value.shape is None else list(value.shape[1:])
    known = [size for size in sizes if isinstance(size, int)]
    return known if len(known) == len(sizes) > 1 else []


def _flatten_rows(graph: ir.Graph, quantizer: ir.Node, columns: Sequence[int]) -> None:
    """Let ``quantizer`` read its values as a matrix."""
    name = f"{get_node_name(quantizer)}_rows"
    shape = add_constant(graph, f"{name}_shape", np.array([-1, *columns], np.int64))
    move = make_node("Reshape", [get_input(quantizer, 0), shape], name, name)
    graph.insert_before(quantizer, move)
    quantizer.replace_input_with(0, move.outputs[0])


def _replace(graph: ir.Graph, linears: Sequence[_Linear]) -> None:
    """Replace linears that read the same matrix by one product, whose results get their dimensions back."""
    first, additions = linears[0], {linear.addition for linear in linears}
    weights = _join(graph, [linear.weights for linear in linears], 1, f"{first.name}_joined")
    bias = _join(graph, [linear.bias for linear in linears], 0, f"{first.name}_bias_joined")
    product = make_node("Gemm", [first.product.inputs[0], weights, bias], f"{first.name}_of_rows", first.name)
    product.metadata_props.update(first.product.metadata_props)
    makers = [find_producer(value) for value in (weights, bias)]
    new = [node for node in makers if node is not None and node.graph is None]
    new.append(product)
    parts = [product.outputs[0]]
    if len(linears) > 1:
        split = _make_split(graph, product.outputs[0], [linear.sizes[-1] for linear in linears])
        new.append(split)
        parts = list(split.outputs)
    for part, linear in zip(parts, linears, strict=True):
        shape = np.array([-1, *linear.sizes], np.int64)
        constant = add_constant(graph, f"{linear.name}_shape", shape)
        result = detach_readers(linear.addition.outputs[0], f"{linear.name}_sum")
        new.append(ir.node("Reshape", [part, constant], outputs=[result], name=f"{linear.name}_rows_back"))
    graph.insert_before(next(node for node in graph if node in additions), new)


def _join(graph: ir.Graph, values: Sequence[ir.Value], axis: int, name: str) -> ir.Value:
    """Dequantized constants of several layers as one along ``axis``, which is that of their scales. The node
    that dequantizes them is not in the graph yet."""
    if len(values) == 1:
        return values[0]
    parts = [_read_parts(value, axis) for value in values]
    joined = [np.concatenate(same, axis=min(axis, same[0].ndim - 1)) for same in zip(*parts, strict=True)]
    names = (f"{name}_steps", f"{name}_scale", f"{name}_zero")
    constants = [add_constant(graph, *one) for one in zip(names, joined, strict=True)]
    return make_node(DEQUANTIZE, constants, name, name, {"axis": axis}).outputs[0]


def _read_parts(value: ir.Value, axis: int) -> list[np.ndarray]:
    """Integers, and the scale and the zero point of each of them along ``axis``."""
    node = value.producer()
    if node is None:
        raise TypeError(f"{name_value(value)} is not dequantized")
    steps, scale, zero = (read_constant(get_input(node, position)) for position in range(3))
    return [steps, *(np.broadcast_to(one.reshape(-1), steps.shape[axis : axis + 1]) for one in (scale, zero))]


def _make_split(graph: ir.Graph, value: ir.Value, sizes: Sequence[int]) -> ir.Node:
    """A division of the columns of ``value``."""
    name = f"{name_value(value)}_split"
    constant = add_constant(graph, f"{name}_sizes", np.array(sizes, np.int64))
    outputs = [ir.val(f"{name}_{i}") for i in range(len(sizes))]
    return ir.node("Split", [value, constant], {"axis": 1}, outputs=outputs, name=name)
