"""What follows the placing of Q/DQ pairs: scales, rounded weights and biases by the errors of the layers.

Every choice is made on rows of calibration images (:mod:`cmt_edge.calib.sampling`), for one layer at a time,
against what the layer gives in float:

* the **scale** of what it reads is that part of the range which leaves the smallest error of its output;
* its **weights** are rounded one column after the other, and what rounding one of them costs is made up for
  by those that follow, as far as the layer's inputs go together (GPTQ, Frantar et al., ICLR 2023);
* its **bias** takes the mean error that is left.

Nothing is added to the graph: only constants change.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from .factors import HIGHEST, LOWEST, PARTS, choose_part, round_values
from .graph import (
    DEQUANTIZE,
    QUANTIZE,
    count_readers,
    find_producer,
    find_readers,
    find_source,
    get_input,
    get_node_name,
    is_constant,
    open_view,
    read_constant,
    read_constant_dims,
    set_constant,
    write_model,
)
from .recipe import INT8_OPS
from .sampling import Layer, Rows, describe_layer

DAMPING = 0.01
"""What is added to the diagonal of the second moments of a layer's inputs, relative to their mean: directions
in which the sampled rows hardly vary must not count as free."""

MOST_COLUMNS = 2048
"""The largest number of inputs of a layer whose weights are rounded anew. The sampled rows tell little about
more of them, and the time grows with the third power."""

BLOCK = 64
"""The number of columns whose corrections are gathered before they are applied to all that follow."""


@dataclass(frozen=True)
class Place:
    """An int8 layer of a Q/DQ graph, and where its constants are.

    Attributes:
        node: the conv or product.
        layer: the same layer in the float graph.
        quantizer: of what it reads.
        dequantizer: of its weights.
        weights: in float, ``(outputs, K)``, or ``(C, taps)`` of a depthwise conv.
        transposed: whether the graph stores weights as ``(K, outputs)``.
        bias: the constant that is added to its output; ``None`` if there is none.
    """

    node: ir.Node
    layer: Layer
    quantizer: ir.Node
    dequantizer: ir.Node
    weights: np.ndarray
    transposed: bool
    bias: ir.Value | None


def refine(
    quantized: onnx.ModelProto,
    source: onnx.ModelProto,
    rows: Rows,
    *,
    search: bool = True,
    rounding: bool = True,
    biases: bool = True,
) -> onnx.ModelProto:
    """A copy of ``quantized`` with better constants.

    Args:
        quantized: the Q/DQ graph that was made from ``source``, with biases as they are there.
        source: the float graph.
        rows: of what the layers read, of all of :func:`list_layers`.
        search: whether ranges are reduced where that leaves a smaller error.
        rounding: whether weights are rounded anew.
        biases: whether biases are corrected.
    """
    with open_view(source) as original, open_view(quantized) as view:
        places = find_places(view.graph, original.graph)
        scales = _choose_scales(places, rows, search)
        for place in places:
            values = rows[place.layer.name]
            rounded = round_values(values, scales[get_input(place.quantizer, 1)]).astype(np.float32)
            corrects = biases and place.bias is not None
            if rounding and _can_round(place):
                _round_anew(place, rounded - rounded.mean(axis=0) if corrects else rounded)
            if corrects:
                _correct_bias(place, values, rounded)
        return write_model(view)


def list_layers(source: onnx.ModelProto, floats: Collection[str] = ()) -> list[Layer]:
    """The layers of a float graph of which rows may be needed, in the graph's order: those with constant
    weights, besides the nodes ``floats``."""
    with open_view(source) as view:
        nodes = [
            node for node in view.graph if node.op_type in INT8_OPS and get_node_name(node) not in floats
        ]
        layers = [
            describe_layer(node, get_input(node, 0))
            for node in nodes
            if is_constant(node.inputs[1]) and not is_constant(node.inputs[0])
        ]
    return [layer for layer in layers if layer is not None]


def find_places(graph: ir.Graph, original: ir.Graph) -> list[Place]:
    """The int8 layers with constant weights, in the graph's order."""
    floats = {get_node_name(node): node for node in original}
    places = (
        _find_place(node, floats[get_node_name(node)])
        for node in graph
        if node.op_type in INT8_OPS and get_node_name(node) in floats
    )
    return [place for place in places if place is not None]


def _find_place(node: ir.Node, original: ir.Node) -> Place | None:
    pair, dequantizer = find_source(node.inputs[0]), find_producer(node.inputs[1])
    quantizer = find_producer(pair.inputs[0]) if pair is not None and pair.op_type == DEQUANTIZE else None
    if (
        quantizer is None
        or quantizer.op_type != QUANTIZE
        or dequantizer is None
        or dequantizer.op_type != DEQUANTIZE
        or not is_constant(dequantizer.inputs[0])
        or not is_constant(original.inputs[1])
        or read_constant_dims(quantizer.inputs[1]) != ()
    ):
        return None
    layer = describe_layer(original, get_input(original, 0))
    weights = read_constant(original.inputs[1])
    if layer is None or (node.op_type != "Conv" and weights.ndim != 2):
        return None
    transposed = node.op_type == "MatMul" or (
        node.op_type == "Gemm" and not node.attributes.get_int("transB", 0)
    )
    matrix = weights.T if transposed else weights.reshape(len(weights), -1)
    return Place(node, layer, quantizer, dequantizer, matrix, transposed, _find_bias(node, len(matrix)))


def _find_bias(node: ir.Node, outputs: int) -> ir.Value | None:
    """The constant of one value an output that is added to what ``node`` gives, if nothing else reads it."""
    if node.op_type == "MatMul":
        readers = find_readers(node.outputs[0])
        if len(readers) != 1 or readers[0].op_type != "Add" or node.outputs[0].is_graph_output():
            return None
        found = [value for value in readers[0].inputs if is_constant(value)]
    else:
        found = [value for value in node.inputs[2:3] if is_constant(value)]
    bias = found[0] if found else None
    dims = read_constant_dims(bias)
    if bias is None or not dims or count_readers(bias) != 1:
        return None
    return bias if dims[-1] == math.prod(dims) == outputs else None


# --- scales ---------------------------------------------------------------------------------------


def _choose_scales(
    places: list[Place],
    rows: Mapping[str, np.ndarray],
    search: bool,
) -> dict[ir.Value, float]:
    """Constant -> the scale that it gets. Quantizers that share a constant go on doing so: runtimes merge
    those that read the same tensor with the same scale."""
    readers: dict[ir.Value, list[Place]] = {}
    for place in places:
        readers.setdefault(get_input(place.quantizer, 1), []).append(place)
    scales = {}
    for constant, group in readers.items():
        largest = float(read_constant(constant))
        scales[constant] = _search_scale(group, rows, largest) if search else largest
    for constant, scale in scales.items():
        set_constant(constant, np.array(scale, np.float32))
    return scales


def _search_scale(group: list[Place], rows: Mapping[str, np.ndarray], largest: float) -> float:
    """The part of a scale that leaves the smallest error of all layers that read it, relative to what each
    gives."""
    errors = np.zeros(len(PARTS))
    for place in group:
        powers = np.square(place.weights)
        powers = powers if place.layer.depthwise else powers.sum(axis=0)
        errors += choose_part(rows[place.layer.name], powers, largest)
    return largest * PARTS[int(errors.argmin())]


def _multiply(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What a layer gives for rows, ``(rows, outputs)``, without a bias."""
    if rows.ndim == 3:
        product: np.ndarray = np.einsum("rck,ck->rc", rows, weights)
        return product
    result: np.ndarray = rows @ weights.T
    return result


# --- weights and biases ---------------------------------------------------------------------------


def _can_round(place: Place) -> bool:
    """Whether the weights are those of this layer alone, and few enough for each output."""
    return count_readers(place.dequantizer.outputs[0]) == 1 and place.weights.shape[1] <= MOST_COLUMNS


def _read_steps(place: Place) -> np.ndarray:
    """The size of a step of the weights of each output, float64 ``(outputs, 1)``."""
    scale = read_constant(place.dequantizer.inputs[1]).astype(np.float64)
    return np.maximum(scale.reshape(-1, 1), 1e-30)


def _read_weights(place: Place) -> np.ndarray:
    """The weights as int8 leaves them, float32, in the form of ``place.weights``."""
    integers = read_constant(place.dequantizer.inputs[0])
    matrix = integers.T if place.transposed else integers.reshape(len(integers), -1)
    weights: np.ndarray = (matrix * _read_steps(place)).astype(np.float32)
    return weights


def _round_anew(place: Place, rows: np.ndarray) -> None:
    """Set the int8 weights of a layer. What a bias will correct is left out of ``rows``."""
    stored = get_input(place.dequantizer, 0)
    weights = place.weights / _read_steps(place)
    if place.layer.depthwise:
        by_channel = rows.transpose(1, 0, 2)
        rounded = round_columns(weights[:, None], by_channel.transpose(0, 2, 1) @ by_channel)[:, 0]
    else:
        rounded = round_columns(weights[None], (rows.T @ rows)[None])[0]
    matrix = rounded.T if place.transposed else rounded
    set_constant(stored, matrix.astype(np.int8).reshape(read_constant_dims(stored) or ()))


def round_columns(weights: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """Integers near ``weights`` whose products with the layer's inputs stay near.

    One column is rounded after the other, and those that follow make up for its error.

    With second moments ``H == (I + U) D (I + U)^T``, ``U`` strictly upper triangular, the error ``e H e^T``
    is the sum of ``D_k (e_k + sum_j<k e_j U_jk)^2``: column ``k`` is best rounded after ``sum_j<k e_j U_jk``
    was added to it (LDLQ: Chee et al., QuIP, NeurIPS 2023, who show that GPTQ does the same).

    Args:
        weights: ``(groups, outputs, K)``, in steps of their scales.
        moments: second moments of the inputs, ``(groups, K, K)``.
    """
    exact = np.ascontiguousarray(weights.transpose(0, 2, 1), np.float64)  # (groups, K, outputs)
    wanted, result = exact.copy(), np.empty_like(exact)
    feedback = _factor_moments(moments)
    count = exact.shape[1]
    for start in range(0, count, BLOCK):
        end = min(start + BLOCK, count)
        block, errors = wanted[:, start:end], np.empty_like(wanted[:, start:end])
        for i in range(end - start):
            column = start + i
            result[:, column] = np.clip(np.rint(block[:, i]), LOWEST + 1, HIGHEST)
            errors[:, i] = exact[:, column] - result[:, column]
            block[:, i + 1 :] += feedback[:, column, column + 1 : end, None] * errors[:, None, i]
        wanted[:, end:] += feedback[:, start:end, end:].transpose(0, 2, 1) @ errors
    rounded: np.ndarray = result.transpose(0, 2, 1)
    return rounded


def _factor_moments(moments: np.ndarray) -> np.ndarray:
    """``U`` of :func:`round_columns`, with a diagonal of ones, ``(groups, K, K)``."""
    damped = moments.astype(np.float64)
    diagonal = np.einsum("gkk->gk", damped)
    diagonal += DAMPING * diagonal.mean(axis=1, keepdims=True) + 1e-12
    turned = np.linalg.cholesky(damped[:, ::-1, ::-1])
    upper = turned[:, ::-1, ::-1]
    unit: np.ndarray = upper / np.einsum("gkk->gk", upper)[:, None]
    return unit


def _correct_bias(place: Place, values: np.ndarray, rounded: np.ndarray) -> None:
    """Add to a bias what the layer gives too little on average."""
    bias = place.bias
    if bias is None:
        return
    missing = _multiply(values, place.weights) - _multiply(rounded, _read_weights(place))
    present = read_constant(bias)
    corrected = present + missing.mean(axis=0, dtype=np.float64).reshape(present.shape)
    set_constant(bias, corrected.astype(np.float32))
