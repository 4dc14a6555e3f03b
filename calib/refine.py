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
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from .factors import HIGHEST, LOWEST, Grid, list_grids, measure_costs
from .graph import (
    count_readers,
    find_producer,
    get_input,
    open_view,
    read_constant,
    read_constant_dims,
    set_constant,
    write_model,
)
from .pair_sums import find_growth, limit_sums, list_partners
from .places import Place, find_places
from .rounding import round_columns
from .sampling import DEPTHWISE_PART, ROWS, Layer, Rows, limit_rows, spread
from .shifts import insert_shift
from .statistics import Measured, Request, Statistics, merge

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
        if fits_16_bits:
            _limit_sums(view.graph, places)
        rows = _take_rows(source, places, statistics)
        grids = _choose_grids(places, rows, reach or {}) if search else {}
        for place in places:
            values = rows.pop(place.layer.name)
            grid = _find_grid(place, grids)
            rounded = values if grid is None else grid.round(values).astype(np.float32)
            corrects = biases and place.bias is not None
            partners = _list_partners(place) if fits_16_bits else []
            if rounding and _can_round(place):
                _round_anew(place, rounded - rounded.mean(axis=0) if corrects else rounded, partners)
            if corrects:
                _add_to_bias(place, _measure_missing(place, values, rounded))
            if grid is not None and grid.shift:
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
        if place.quantizer is not None:
            readers.setdefault(get_input(place.quantizer, 1), []).append(place)
    chosen = {}
    for constant, group in readers.items():
        grids = list_grids(float(read_constant(constant)), _find_reach(group, reach))
        chosen[constant] = grids[int(_measure_errors(group, rows, grids).argmin())]
    return chosen


def _find_grid(place: Place, grids: Mapping[ir.Value, Grid]) -> Grid | None:
    """How what a layer reads is rounded; ``None`` where it reads floats."""
    if place.quantizer is None:
        return None
    scale = get_input(place.quantizer, 1)
    return grids.get(scale) or Grid(float(read_constant(scale)))


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
    quantized = () if place.quantizer is None else place.quantizer.outputs
    values = (*quantized, *(pair.outputs if pair is not None else ()))
    alone = all(count_readers(value) == 1 for value in values)
    direct = pair is not None and pair.inputs[0] in quantized
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
    quantizers = dict.fromkeys(place.quantizer for place in places if place.quantizer is not None)
    for quantizer in quantizers:
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


def _limit_sums(graph: ir.Graph, places: list[Place]) -> None:
    """Give outputs whose sums of two products could exceed 16 bits larger steps.

    Weights that no other layer shares are rounded to these steps from their floats; those that are shared,
    from the integers that they already were.
    """
    for place in places:
        stored, scale = (get_input(place.dequantizer, position) for position in (0, 1))
        if _sums_pairs(place) and max(map(count_readers, (stored, scale))) == 1:
            _grow_steps(place, scale)
    limit_sums(graph)


def _grow_steps(place: Place, scale: ir.Value) -> None:
    """The same for one layer; the constant ``scale`` holds its steps."""
    factors = find_growth(_round_nearest(place.weights / _read_steps(place)), _count_inputs(place))
    if factors is not None:
        present = read_constant(scale)
        factors = factors if present.size > 1 else factors.max()
        set_constant(scale, (present * factors.reshape(present.shape)).astype(present.dtype))
        _set_weights(place, _round_nearest(place.weights / _read_steps(place)))


def _count_inputs(place: Place) -> int:
    """The number of input channels."""
    is_conv = place.node.op_type == "Conv"
    weights = read_constant(get_input(place.dequantizer, 0)) if is_conv else place.weights
    return int(weights.shape[1])


def _sums_pairs(place: Place) -> bool:
    """Whether CPUs without VNNI add products of this layer in 16 bits."""
    return place.quantizer is not None and not place.layer.depthwise


def _list_partners(place: Place) -> list[np.ndarray]:
    """The columns of a layer that are neighbours in sums of two products; none where it has no such sums."""
    if not _sums_pairs(place):
        return []
    inputs = _count_inputs(place)
    return list_partners(place.weights.shape[1] // inputs, inputs)


def _round_nearest(weights: np.ndarray) -> np.ndarray:
    """The nearest integers of int8 without its lowest, float64."""
    rounded: np.ndarray = np.clip(np.rint(weights), LOWEST + 1, HIGHEST)
    return rounded


def _set_weights(place: Place, rounded: np.ndarray) -> None:
    """Set the int8 weights of a layer, given in the form of ``place.weights``."""
    stored = get_input(place.dequantizer, 0)
    matrix = rounded.T if place.transposed else rounded
    set_constant(stored, matrix.astype(np.int8).reshape(read_constant_dims(stored) or ()))


def _round_anew(place: Place, rows: np.ndarray, partners: Sequence[np.ndarray] = ()) -> None:
    """Set the int8 weights of a layer. What a bias will correct is left out of ``rows``; ``partners`` as
    :func:`round_columns` takes it."""
    weights = place.weights / _read_steps(place)
    if place.layer.depthwise:
        by_channel = rows.transpose(1, 0, 2)
        rounded = round_columns(weights[:, None], by_channel.transpose(0, 2, 1) @ by_channel)[:, 0]
    else:
        rounded = round_columns(weights[None], (rows.T @ rows)[None], partners)[0]
    _set_weights(place, rounded)


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
