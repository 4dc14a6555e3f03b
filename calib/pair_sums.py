"""Int8 weights whose sums of two products fit 16 bits, for ONNX Runtime on x86 processors without VNNI.

Its fast kernels for such processors saturate where two neighbouring products exceed 16 bits
(:mod:`cmt_edge.deploy.backends.pair_limits`). Its setting against that (``session.x64quantprecision``) takes
kernels that widen every value first, which are slower than float32 (``docs/peers.md``). Weights that keep the
limit need no such setting: integers are exact in the fast kernels, as they are with VNNI.

Neighbours are consecutive products of one sum: the input channels of one place of the filter, then those of
the next place. Where the number of input channels is odd, the last of one place and the first of the next
are neighbours (``tests/calib/test_pair_sums.py`` compares all of it with exact integers). Depthwise convs
have kernels of their own, which add in 32 bits.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from cmt_edge.deploy.backends.pair_limits import find_factors

from .graph import (
    DEQUANTIZE,
    add_constant,
    find_producer,
    get_input,
    get_node_name,
    is_constant,
    read_constant,
)
from .recipe import INT8_OPS, count_groups, is_depthwise_node


def order_products(taps: int, inputs: int) -> np.ndarray:
    """In which order ONNX Runtime adds the products of a layer whose weights are stored ``(outputs, inputs,
    taps)``: indices of the columns of ``(outputs, inputs * taps)``."""
    order: np.ndarray = np.arange(inputs * taps).reshape(inputs, taps).T.reshape(-1)
    return order


def find_partners(order: np.ndarray) -> np.ndarray:
    """Column -> the column whose product is added to its own in 16 bits, -1 for none."""
    pairs = order[: len(order) // 2 * 2].reshape(-1, 2)
    partners = np.full(len(order), -1)
    partners[pairs[:, 0]] = pairs[:, 1]
    partners[pairs[:, 1]] = pairs[:, 0]
    return partners


def limit_sums(graph: ir.Graph) -> int:
    """Give the output channels of int8 layers whose sums could exceed 16 bits a larger scale.

    Changes ``graph``, and returns the number of layers that got other weights. Biases that are integers have
    the scale of the weights, so they are made afterwards.
    """
    return sum(_limit_layer(graph, node) for node in graph if node.op_type in INT8_OPS)


def _limit_layer(graph: ir.Graph, layer: ir.Node) -> bool:
    """Replace the weights of a layer by such that keep the limit; ``False`` where they already do."""
    dequantizer = find_producer(layer.inputs[1])
    if dequantizer is None or dequantizer.op_type != DEQUANTIZE or not is_constant(dequantizer.inputs[0]):
        return False
    values = read_constant(dequantizer.inputs[0])
    if is_depthwise_node(layer) and values.shape[:2] == (count_groups(layer), 1):
        return False
    factors = _find_factors(layer, values)
    if factors is None:
        return False
    scale = read_constant(get_input(dequantizer, 1))
    if scale.size == 1:  # one for all channels
        factors = factors.max()
    rounded = np.rint(values / factors).astype(np.int8)
    grown = (scale * factors.reshape(scale.shape)).astype(scale.dtype)
    name = f"{get_node_name(layer)}_limited"
    dequantizer.replace_input_with(0, add_constant(graph, f"{name}_steps", rounded))
    dequantizer.replace_input_with(1, add_constant(graph, f"{name}_scale", grown))
    return True


def _find_factors(layer: ir.Node, values: np.ndarray) -> np.ndarray | None:
    """By how much the scale of each output channel grows, of the rank of ``values``; ``None`` where none has
    to."""
    if layer.op_type == "Conv":
        columns = values.reshape(len(values), -1)
        inputs = values.shape[1]
        factors = find_factors(columns[:, order_products(columns.shape[1] // inputs, inputs)], 0, 1)
        return None if factors is None else factors.reshape(-1, *[1] * (values.ndim - 1))
    transposed = layer.op_type == "Gemm" and layer.attributes.get_int("transB", 0) != 0
    return find_factors(values, *((0, 1) if transposed else (-1, -2)))
