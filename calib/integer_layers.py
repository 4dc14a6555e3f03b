"""Where ONNX Runtime needs further pairs and scales, so that it computes int8 layers in integers.

It turns ``DQ -> Conv`` into integers only where a quantizer follows, and ``DQ -> MatMul -> Add`` only where
it does not make a ``Gemm`` of both or where the bias is an integer, too. It computes everything else in
float32 from dequantized weights, which takes longer than the float graph. :func:`place_for_integers` changes
a calibrated graph accordingly:

* The result of every int8 conv is rounded by a pair of its own, unless only quantizers read it. Scales are
  symmetric, as everywhere in :mod:`cmt_edge.calib.recipe`.
* Linears of tokens get biases of as many dimensions, and those that read one pair, which nothing else reads,
  become one (:mod:`.joined_linears`).
* The bias of every other int8 linear becomes int32, with the scale of the products that it is added to. That
  rounds it by less than a product's own step.
* Weights get a larger scale where sums of their products would exceed 16 bits (:mod:`.pair_sums`), so that
  processors without VNNI compute them exactly by their fast kernels.
* The int8 weights of layers that read floats (:mod:`.trunk`) become floats by a cast and a multiplication,
  which ONNX Runtime computes once, when it opens the graph. It would dequantize them in every inference, or
  round what a MatMul reads.

OpenVINO and TensorRT need none of that, so that only graphs for ONNX Runtime are changed.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir

from .graph import (
    DEQUANTIZE,
    QUANTIZE,
    add_constant,
    detach_readers,
    find_producer,
    find_readers,
    find_source,
    get_input,
    get_node_name,
    is_constant,
    make_node,
    name_value,
    open_view,
    read_constant,
    remove_unread,
    write_model,
)
from .joined_linears import find_addition, find_position, join_linears
from .recipe import INT8_OPS
from .statistics import Request, Statistics

LARGEST = np.float32(127)
"""The largest magnitude of a signed byte."""

BIAS_LIMIT = 2**31 - 1
"""The largest magnitude of an int32 bias."""

PLACEMENT = "integers-5"
"""Names these rules where a recipe is recorded; the number is increased when they change."""

Ranges = dict[str, float]
"""Name of a conv -> the magnitude up to which its results are represented."""


def measure_conv_ranges(quantized: onnx.ModelProto, statistics: Statistics) -> Ranges:
    """The magnitude that the results of each int8 conv reach: the mean over images of each one's extreme.

    What a rare image exceeds is clipped, so that all others are rounded more finely.

    Args:
        quantized: the calibrated graph.
        statistics: measures on the calibration images.

    Raises:
        StepError: ONNX Runtime cannot run the graph.
    """
    with open_view(quantized) as view:
        names = {get_node_name(node): name_value(node.outputs[0]) for node in _find_convs(view.graph)}
    if not names:
        return {}
    observed = tuple(range(len(statistics)))
    request = Request(quantized, whole=tuple(names.values()), observed=observed)
    extremes = statistics.measure(request).extremes
    return {name: _find_magnitude(*extremes[tensor]) for name, tensor in names.items()}


def _find_magnitude(lows: np.ndarray, highs: np.ndarray) -> float:
    """The mean over images of the largest magnitude, from extremes ``(images, 1)``."""
    return float(np.maximum(-lows, highs).mean())


def place_for_integers(quantized: onnx.ModelProto, ranges: Mapping[str, float]) -> onnx.ModelProto:
    """A copy of ``quantized`` whose int8 layers ONNX Runtime computes in integers.

    Args:
        quantized: a calibrated graph, possibly with groups taken back to float.
        ranges: of :func:`measure_conv_ranges`; a conv without a range, or of zeros alone, stays as it is.
    """
    with open_view(quantized, types=True) as view:
        graph = view.graph
        for conv in _find_convs(graph):
            magnitude = ranges.get(get_node_name(conv), 0.0)
            if magnitude > 0 and not _is_quantized_next(conv):
                _insert_pair_after(graph, conv, np.float32(magnitude) / LARGEST)
        products: list[ir.Node] = []
        for layer in list(graph):
            if layer.op_type == "Gemm" and _is_int8(layer):
                _quantize_bias(graph, layer, layer, 2)
            elif layer.op_type == "MatMul" and _is_int8(layer):
                products.append(layer)
            elif layer.op_type in INT8_OPS and _has_int8_weights_alone(layer):
                _convert_weights_once(graph, layer)
        for product in join_linears(graph, products):
            _quantize_added_bias(graph, product)
        remove_unread(graph)
        result = write_model(view)
    del result.graph.value_info[:]
    return result


def _find_convs(graph: ir.Graph) -> list[ir.Node]:
    """The convs that compute in int8."""
    return [node for node in graph if node.op_type == "Conv" and _is_int8(node)]


def _is_int8(layer: ir.Node) -> bool:
    """Whether a layer reads a dequantized activation and dequantized weights."""
    activation, weights = (find_producer(value) for value in layer.inputs[:2])
    if activation is None or weights is None:
        return False
    both = activation.op_type == weights.op_type == DEQUANTIZE
    return both and is_constant(weights.inputs[0]) and not is_constant(activation.inputs[0])


def _has_int8_weights_alone(layer: ir.Node) -> bool:
    """Whether a layer reads floats and dequantized weights."""
    source, weights = find_source(layer.inputs[0]), find_producer(layer.inputs[1])
    if weights is None or weights.op_type != DEQUANTIZE or not is_constant(weights.inputs[0]):
        return False
    return source is None or source.op_type != DEQUANTIZE


def _convert_weights_once(graph: ir.Graph, layer: ir.Node) -> None:
    """Let ``layer`` read its weights, which have no zero point, from a cast and a multiplication."""
    dequantizer = find_producer(layer.inputs[1])
    assert dequantizer is not None  # _has_int8_weights_alone has said so
    name, scale = f"{get_node_name(layer)}_weights", _read_scale(dequantizer)
    if scale.size > 1:
        shape = [1] * len(read_constant(get_input(dequantizer, 0)).shape)
        shape[dequantizer.attributes.get_int("axis", 1)] = -1
        scale = scale.reshape(shape)
    as_float = {"to": int(ir.DataType.FLOAT)}
    cast = make_node("Cast", [get_input(dequantizer, 0)], f"{name}_cast", f"{name}_cast", as_float)
    factor = add_constant(graph, f"{name}_factor", scale.astype(np.float32))
    product = make_node("Mul", [cast.outputs[0], factor], f"{name}_scaled", f"{name}_scaled")
    graph.insert_before(layer, [cast, product])
    layer.replace_input_with(1, product.outputs[0])


def _is_quantized_next(layer: ir.Node) -> bool:
    """Whether only quantizers read the result of ``layer``."""
    value = layer.outputs[0]
    readers = find_readers(value)
    return not value.is_graph_output() and all(reader.op_type == QUANTIZE for reader in readers)


def _insert_pair_after(graph: ir.Graph, layer: ir.Node, step: np.float32) -> None:
    """Round the result of ``layer`` to multiples of ``step``."""
    name, value = get_node_name(layer), layer.outputs[0]
    rounded = detach_readers(value, f"{name}_result")
    scale = add_constant(graph, f"{name}_result_scale", np.array(step, np.float32))
    zero = add_constant(graph, f"{name}_result_zero", np.array(0, np.int8))
    quantizer = make_node(
        QUANTIZE,
        [value, scale, zero],
        f"{name}_result_quantized",
        f"{name}_result_quantized",
    )
    dequantizer = ir.node(
        DEQUANTIZE,
        [quantizer.outputs[0], scale, zero],
        outputs=[rounded],
        name=f"{name}_result_dequantized",
    )
    graph.insert_after(layer, [quantizer, dequantizer])


def _quantize_added_bias(graph: ir.Graph, product: ir.Node) -> None:
    """Make the bias of a linear an integer: the constant that one addition alone adds to ``product``."""
    addition = find_addition(product)
    if addition is not None:
        _quantize_bias(graph, product, addition, 1 - find_position(addition, product))


def _quantize_bias(graph: ir.Graph, layer: ir.Node, reader: ir.Node, position: int) -> None:
    """Let ``reader`` read its float bias as int32 with the scale of the products of ``layer``.

    A bias that int32 cannot hold, or that is no vector of the layer's channels, stays float.
    """
    value = reader.inputs[position] if position < len(reader.inputs) else None
    if value is None or not is_constant(value):
        return
    bias = read_constant(value)
    activation, weights = (find_producer(operand) for operand in layer.inputs[:2])
    assert activation is not None  # _is_int8 has said so
    assert weights is not None
    scales = np.asarray(_read_scale(activation) * _read_scale(weights), np.float32).reshape(-1)
    if bias.ndim != 1 or scales.size not in (1, bias.size):
        return
    scales = np.broadcast_to(scales, bias.shape).copy()
    steps = np.rint(bias.astype(np.float64) / scales)
    if np.abs(steps).max(initial=0) > BIAS_LIMIT:
        return
    name = f"{get_node_name(layer)}_bias"
    parts = (
        add_constant(graph, f"{name}_steps", steps.astype(np.int32)),
        add_constant(graph, f"{name}_scale", scales),
        add_constant(graph, f"{name}_zero", np.zeros(bias.shape, np.int32)),
    )
    dequantizer = make_node(DEQUANTIZE, parts, f"{name}_dequantized", f"{name}_dequantized", {"axis": 0})
    graph.insert_before(reader, dequantizer)
    reader.replace_input_with(position, dequantizer.outputs[0])


def _read_scale(quantizer: ir.Node) -> np.ndarray:
    return read_constant(get_input(quantizer, 1))
