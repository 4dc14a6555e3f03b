"""Int8 weights whose sums of two products fit 16 bits, for x86 processors without VNNI.

Fast kernels for such processors saturate where two neighbouring products exceed 16 bits
(:mod:`cmt_edge.deploy.backends.pair_limits`). ONNX Runtime has a setting against it
(``session.x64quantprecision``), which takes kernels that widen every value first and are slower than float32
(``docs/peers.md``); OpenVINO has none. Weights that keep the limit need no setting, and no program of ours
that opens the graph: integers are exact in the fast kernels, as they are with VNNI.

Neighbours differ between the two (:func:`list_neighbours`). ``tests/calib/test_pair_sums.py`` compares ONNX
Runtime with exact integers, ``benchmarks/saturation.py`` OpenVINO. Depthwise convs have kernels of their own,
which add in 32 bits.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from cmt_edge.deploy.backends.pair_limits import find_factors

from .graph import (
    DEQUANTIZE,
    add_constant,
    find_producer,
    find_source,
    get_input,
    get_node_name,
    is_constant,
    read_constant,
)
from .recipe import INT8_OPS, count_groups, is_depthwise_node


def list_neighbours(taps: int, inputs: int) -> list[np.ndarray]:
    """Which products of a layer are added to each other in 16 bits: for each way, columns ``(pairs, 2)``.

    The columns are those of ``(outputs, inputs * taps)``, where ``taps`` are the places of a filter. ONNX
    Runtime adds consecutive products: the channels of one place, then those of the next, so that the last of
    one place and the first of the next are neighbours where ``inputs`` is odd. OpenVINO adds neighbouring
    channels of the same place alone.
    """
    by_place = np.arange(inputs * taps).reshape(inputs, taps).T
    consecutive = by_place.reshape(-1)[: inputs * taps // 2 * 2].reshape(-1, 2)
    if inputs % 2 == 0 or taps == 1:
        return [consecutive]
    return [consecutive, by_place[:, : inputs // 2 * 2].reshape(-1, 2)]


def list_partners(taps: int, inputs: int) -> list[np.ndarray]:
    """For each way of :func:`list_neighbours`: column -> the column whose product is added to its own, -1 for
    none."""
    return [_find_partners(pairs, inputs * taps) for pairs in list_neighbours(taps, inputs)]


def _find_partners(pairs: np.ndarray, columns: int) -> np.ndarray:
    partners = np.full(columns, -1)
    partners[pairs[:, 0]] = pairs[:, 1]
    partners[pairs[:, 1]] = pairs[:, 0]
    return partners


def find_growth(columns: np.ndarray, inputs: int) -> np.ndarray | None:
    """By how much the scale of each output grows so that its sums fit, float64 ``(outputs, 1)``; ``None``
    where none has to.

    Args:
        columns: int8 weights, ``(outputs, inputs * taps)``.
        inputs: the number of input channels.
    """
    ways = list_neighbours(columns.shape[1] // inputs, inputs)
    found = [find_factors(columns[:, pairs.reshape(-1)], 0, 1) for pairs in ways]
    factors = [one for one in found if one is not None]
    return np.max(factors, axis=0) if factors else None


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
    activation = find_source(layer.inputs[0])
    if activation is None or activation.op_type != DEQUANTIZE:  # it computes in float
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
        factors = find_growth(values.reshape(len(values), -1), values.shape[1])
        return None if factors is None else factors.reshape(-1, *[1] * (values.ndim - 1))
    transposed = layer.op_type == "Gemm" and layer.attributes.get_int("transB", 0) != 0
    return find_factors(values, *((0, 1) if transposed else (-1, -2)))
