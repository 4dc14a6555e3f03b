"""What follows the placing of Q/DQ pairs: scales, rounded weights and biases by the errors of the layers.

Every choice is made on rows of calibration images (:mod:`cmt_edge.calib.sampling`), for one layer at a time,
against what the layer gives in float:

* the **scale** of what it reads is that part of the range which leaves the smallest error of its output.
  Values that reach farther to one side are **shifted** before they are rounded, so that all integers stand
  for something (:mod:`cmt_edge.calib.shifts`);
* its **weights** are rounded one column after the other, and what rounding one of them costs is made up for
  by those that follow, as far as the layer's inputs go together (GPTQ, Frantar et al., ICLR 2023);
* its **bias** takes the mean error that is left.

Nothing but the shifts is added to the graph: only constants change.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from cmt_edge.deploy.backends.pair_limits import LARGEST_SUM, find_factors

from .factors import HIGHEST, LOWEST, Grid, list_grids, measure_costs
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
from .pair_sums import find_partners, order_products
from .recipe import INT8_OPS
from .sampling import DEPTHWISE_PART, ROWS, Layer, Rows, describe_layer, limit_rows, spread
from .shifts import insert_shift
from .statistics import Measured, Request, Statistics, merge

DAMPING = 0.05
"""What is added to the diagonal of the second moments of a layer's inputs, relative to their mean: directions
in which the sampled rows hardly vary must not count as free."""

MOST_COLUMNS = 2048
"""The largest number of inputs of a layer whose weights are rounded anew. The sampled rows tell little about
more of them, and the time grows with the third power."""

MOST_IMAGES = 64
"""The largest number of images that give rows for every layer. Layers with small maps read more images."""

ROWS_AN_IMAGE = 64
"""The number of rows that an image gives for each layer."""

ROW_BYTES = 256 << 20
"""The largest size of the rows of all layers together, in bytes, and once more of those of further images for
layers with small maps. Small models read more rows than the least number, :data:`.sampling.ROWS`: more rows
and images mean weights and biases that suit other images better."""

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
    statistics: Statistics,
    reach: Mapping[str, tuple[float, float]] | None = None,
    *,
    search: bool = True,
    rounding: bool = True,
    biases: bool = True,
    fits_16_bits: bool = False,
) -> onnx.ModelProto:
    """A copy of ``quantized`` with better constants.

    Args:
        quantized: the Q/DQ graph that was made from ``source``, with biases as they are there.
        source: the float graph.
        statistics: measures on the calibration images. How many of them are read depends on the size of the
            model.
        reach: tensor of ``source`` -> its lowest and its highest value; only such tensors are shifted.
        search: whether ranges are reduced, and values shifted, where that leaves a smaller error.
        rounding: whether weights are rounded anew.
        biases: whether biases are corrected.
        fits_16_bits: whether sums of two products must fit 16 bits (:mod:`cmt_edge.calib.pair_sums`).
    """
    with open_view(source) as original, open_view(quantized) as view:
        places = find_places(view.graph, original.graph)
        rows = _take_rows(source, places, statistics)
        grids = _choose_grids(places, rows, reach or {}) if search else {}
        for place in places:
            values = rows.pop(place.layer.name)
            scale = get_input(place.quantizer, 1)
            grid = grids.get(scale) or Grid(float(read_constant(scale)))
            rounded = grid.round(values).astype(np.float32)
            corrects = biases and place.bias is not None
            partners = _grow_steps(place) if fits_16_bits else None
            if rounding and _can_round(place):
                _round_anew(place, rounded - rounded.mean(axis=0) if corrects else rounded, partners)
            if corrects:
                _add_to_bias(place, _measure_missing(place, values, rounded))
            if grid.shift:
                _add_to_bias(place, -grid.move * _read_weights(place).sum(axis=1, dtype=np.float64))
        _write_grids(view.graph, places, grids)
        return write_model(view)


def _take_rows(source: onnx.ModelProto, places: list[Place], statistics: Statistics) -> Rows:
    """Rows of what each layer reads."""
    wanted = _count_rows(places)
    possible = spread(len(statistics), MOST_IMAGES)
    sampled = tuple(possible[i] for i in spread(len(possible), wanted // ROWS_AN_IMAGE))
    layers = tuple(place.layer for place in places)
    rows = statistics.measure(Request(source, layers=layers, sampled=sampled, wanted=wanted)).rows
    few = tuple(layer for layer in layers if _gave_all(layer, len(rows[layer.name]), wanted, len(sampled)))
    return rows | _take_more_rows(source, {layer: rows[layer.name] for layer in few}, sampled, statistics)


def _gave_all(layer: Layer, rows: int, wanted: int, images: int) -> bool:
    """Whether a layer has no more ``rows`` on its sampled images: its maps are small."""
    return rows < images * limit_rows(layer, wanted, images)


def _take_more_rows(
    source: onnx.ModelProto,
    few: Mapping[Layer, np.ndarray],
    sampled: Collection[int],
    statistics: Statistics,
) -> Rows:
    """The rows of layers with small maps, together with those of other images than the ``sampled`` ones.

    The last layers have most inputs and the smallest maps: weights that were rounded by fewer rows than
    inputs would suit these rows alone.
    """
    image_bytes = sum(rows.nbytes for rows in few.values()) / len(sampled)
    others = [number for number in range(len(statistics)) if number not in sampled]
    fitting = int(ROW_BYTES // max(image_bytes, 1))
    chosen = tuple(others[i] for i in spread(len(others), fitting))
    if not few or not chosen:
        return {}
    request = Request(source, layers=tuple(few), sampled=chosen, wanted=ROWS_AN_IMAGE * len(chosen))
    known = Measured(rows={layer.name: rows for layer, rows in few.items()})
    return merge([known, statistics.measure(request)]).rows


def _count_rows(places: list[Place]) -> int:
    """How many rows of what each layer reads are taken."""
    inputs = (
        place.weights.size / DEPTHWISE_PART if place.layer.depthwise else place.weights.shape[1]
        for place in places
    )
    row_bytes = math.ceil(sum(inputs)) * np.dtype(np.float32).itemsize
    fitting = ROW_BYTES // max(row_bytes, 1)
    return min(max(fitting, ROWS), MOST_IMAGES * ROWS_AN_IMAGE)


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


def _choose_grids(
    places: list[Place],
    rows: Mapping[str, np.ndarray],
    reach: Mapping[str, tuple[float, float]],
) -> dict[ir.Value, Grid]:
    """Constant with a scale -> how what is divided by it is rounded. Quantizers that share a constant go on
    doing so: runtimes merge those that read the same tensor with the same scale."""
    readers: dict[ir.Value, list[Place]] = {}
    for place in places:
        readers.setdefault(get_input(place.quantizer, 1), []).append(place)
    chosen = {}
    for constant, group in readers.items():
        grids = list_grids(float(read_constant(constant)), _find_reach(group, reach))
        chosen[constant] = grids[int(_measure_errors(group, rows, grids).argmin())]
    return chosen


def _find_reach(
    group: list[Place],
    reach: Mapping[str, tuple[float, float]],
) -> tuple[float, float] | None:
    """The lowest and the highest value of what a group reads; ``None`` where it may not be shifted."""
    known = [reach[place.layer.tensor] for place in group if place.layer.tensor in reach]
    if len(known) < len(group) or not all(map(_can_shift, group)):
        return None
    return min(low for low, _ in known), max(high for _, high in known)


def _can_shift(place: Place) -> bool:
    """Whether what is added to the values of this layer's pair can be taken back in its bias: no zeros of a
    padding are among them, and no other layer reads the pair."""
    attributes = place.node.attributes
    plain = place.node.op_type != "Gemm" or (
        attributes.get_float("alpha", 1.0) == attributes.get_float("beta", 1.0) == 1
        and not attributes.get_int("transA", 0)
    )
    pair = find_producer(place.node.inputs[0])
    values = (place.quantizer.outputs[0], *(pair.outputs if pair is not None else ()))
    alone = all(count_readers(value) == 1 for value in values)
    direct = pair is not None and pair.inputs[0] is place.quantizer.outputs[0]
    return plain and alone and direct and place.bias is not None and not any(place.layer.pads)


def _measure_errors(
    group: list[Place],
    rows: Mapping[str, np.ndarray],
    grids: list[Grid],
) -> np.ndarray:
    """The error that each grid leaves of all layers that read it, relative to what each gives."""
    errors = np.zeros(len(grids))
    for place in group:
        powers = np.square(place.weights)
        powers = powers if place.layer.depthwise else powers.sum(axis=0)
        errors += measure_costs(rows[place.layer.name], powers, grids)
    return errors


def _write_grids(graph: ir.Graph, places: list[Place], grids: Mapping[ir.Value, Grid]) -> None:
    """Give every quantizer its scale and its shift."""
    for quantizer in dict.fromkeys(place.quantizer for place in places):
        grid = grids.get(get_input(quantizer, 1))
        if grid is not None and grid.shift:
            insert_shift(graph, quantizer, grid.move)
    for constant, grid in grids.items():
        set_constant(constant, np.array(grid.scale, np.float32))


def _multiply(row: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What a layer gives for one row, ``(outputs,)``, without a bias."""
    product: np.ndarray = np.einsum("ck,ck->c", row, weights) if row.ndim == 2 else weights @ row
    return product


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


def _grow_steps(place: Place) -> np.ndarray | None:
    """Give outputs whose sums of two products could exceed 16 bits larger steps, and round their weights to
    the nearest.

    Returns the columns that are neighbours in these sums, ``None`` where the layer has no such sums, or its
    constants are not its own: :func:`.pair_sums.limit_sums` sees to those.
    """
    stored, scale = (get_input(place.dequantizer, position) for position in (0, 1))
    if place.layer.depthwise or max(map(count_readers, (stored, scale))) > 1:
        return None
    columns = place.weights.shape[1]
    inputs = read_constant(stored).shape[1] if place.node.op_type == "Conv" else columns
    order = order_products(columns // inputs, inputs)
    steps = _read_steps(place)
    factors = find_factors(_round_nearest(place.weights / steps)[:, order], 0, 1)
    if factors is not None:
        present = read_constant(scale)
        factors = factors if present.size > 1 else factors.max()
        set_constant(scale, (present * factors.reshape(present.shape)).astype(present.dtype))
        _set_weights(place, _round_nearest(place.weights / _read_steps(place)))
    return find_partners(order)


def _round_nearest(weights: np.ndarray) -> np.ndarray:
    """The nearest integers of int8 without its lowest, float64."""
    rounded: np.ndarray = np.clip(np.rint(weights), LOWEST + 1, HIGHEST)
    return rounded


def _set_weights(place: Place, rounded: np.ndarray) -> None:
    """Set the int8 weights of a layer, given in the form of ``place.weights``."""
    stored = get_input(place.dequantizer, 0)
    matrix = rounded.T if place.transposed else rounded
    set_constant(stored, matrix.astype(np.int8).reshape(read_constant_dims(stored) or ()))


def _round_anew(place: Place, rows: np.ndarray, partners: np.ndarray | None = None) -> None:
    """Set the int8 weights of a layer. What a bias will correct is left out of ``rows``; ``partners`` as
    :func:`round_columns` takes it."""
    weights = place.weights / _read_steps(place)
    if place.layer.depthwise:
        by_channel = rows.transpose(1, 0, 2)
        rounded = round_columns(weights[:, None], by_channel.transpose(0, 2, 1) @ by_channel)[:, 0]
    else:
        rounded = round_columns(weights[None], (rows.T @ rows)[None], partners)[0]
    _set_weights(place, rounded)


def round_columns(weights: np.ndarray, moments: np.ndarray, partners: np.ndarray | None = None) -> np.ndarray:
    """Integers near ``weights`` whose products with the layer's inputs stay near.

    One column is rounded after the other, and those that follow make up for its error.

    With second moments ``H == (I + U) D (I + U)^T``, ``U`` strictly upper triangular, the error ``e H e^T``
    is the sum of ``D_k (e_k + sum_j<k e_j U_jk)^2``: column ``k`` is best rounded after ``sum_j<k e_j U_jk``
    was added to it (LDLQ: Chee et al., QuIP, NeurIPS 2023, who show that GPTQ does the same).

    Args:
        weights: ``(groups, outputs, K)``, in steps of their scales.
        moments: second moments of the inputs, ``(groups, K, K)``.
        partners: column -> another one, or -1: the sum of both integers stays within
            :data:`cmt_edge.deploy.backends.pair_limits.LARGEST_SUM`. Without it sums may be any.
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
            result[:, column] = np.clip(np.rint(block[:, i]), *_find_bounds(result, column, partners))
            errors[:, i] = exact[:, column] - result[:, column]
            block[:, i + 1 :] += feedback[:, column, column + 1 : end, None] * errors[:, None, i]
        wanted[:, end:] += feedback[:, start:end, end:].transpose(0, 2, 1) @ errors
    rounded: np.ndarray = result.transpose(0, 2, 1)
    return rounded


def _find_bounds(result: np.ndarray, column: int, partners: np.ndarray | None) -> tuple[Any, Any]:
    """The lowest and the highest integers of a column, where those before it are known."""
    low, high = LOWEST + 1, HIGHEST
    if partners is None or not 0 <= partners[column] < column:
        return low, high
    other = result[:, partners[column]]
    return np.maximum(low, -LARGEST_SUM - other), np.minimum(high, LARGEST_SUM - other)


def _factor_moments(moments: np.ndarray) -> np.ndarray:
    """``U`` of :func:`round_columns`, with a diagonal of ones, ``(groups, K, K)``."""
    damped = moments.astype(np.float64)
    diagonal = np.einsum("gkk->gk", damped)
    diagonal += DAMPING * diagonal.mean(axis=1, keepdims=True) + 1e-12
    turned = np.linalg.cholesky(damped[:, ::-1, ::-1])
    upper = turned[:, ::-1, ::-1]
    unit: np.ndarray = upper / np.einsum("gkk->gk", upper)[:, None]
    return unit


def _measure_missing(place: Place, values: np.ndarray, rounded: np.ndarray) -> np.ndarray:
    """What the layer gives too little on average, float64 ``(outputs,)``."""
    pairs = ((values, place.weights), (rounded, _read_weights(place)))
    expected, given = (_multiply(rows.mean(axis=0, dtype=np.float64), weights) for rows, weights in pairs)
    missing: np.ndarray = expected - given
    return missing


def _add_to_bias(place: Place, change: np.ndarray) -> None:
    """Change a bias by float64 ``(outputs,)``."""
    bias = place.bias
    if bias is None:
        return
    present = read_constant(bias)
    set_constant(bias, (present + change.reshape(present.shape)).astype(np.float32))
