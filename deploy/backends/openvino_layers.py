"""Int8 layers of a graph that OpenVINO has read: what they read, and their biases."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from .openvino_constants import compute_constant, is_dequantized

LAYERS = ("Convolution", "MatMul")
"""OpenVINO's operations that may multiply int8 values, but for depthwise convs (``GroupConvolution``)."""


def iterate_int8(model: ov.Model, kinds: Collection[str]) -> Iterator[ov.Node]:
    """The layers of some kinds that read int8 values and have constant int8 weights, in the graph's order."""
    for layer in model.get_ordered_ops():
        if (
            layer.get_type_name() in kinds
            and all(map(is_dequantized, layer.input_values()))
            and find_start(layer.input_value(1)).get_type_name() == "Constant"
        ):
            yield layer


def find_start(dequantized: ov.Output) -> ov.Node:
    """The node that gives the integers of a Q/DQ pair, by its last value: a ``FakeQuantize``, if OpenVINO
    merges the quantizer so."""
    node = dequantized.get_node()
    while node.get_type_name() in ("Multiply", "Subtract", "Convert"):
        node = node.input_value(0).get_node()
    return node


def find_quantizer(dequantized: ov.Output) -> tuple[ov.Node, np.ndarray] | None:
    """The ``FakeQuantize`` of a Q/DQ pair and the scale of the ``DequantizeLinear``, float64, by the pair's
    last value; ``None`` where something lies between, where an end is computed, or where the integers are
    read with a zero point."""
    if not is_dequantized(dequantized):
        return None
    multiply = dequantized.get_node()
    subtract = multiply.input_value(0).get_node()
    to_int8 = subtract.input_value(0).get_node().input_value(0).get_node()
    quantizer = to_int8.input_value(0).get_node() if to_int8.get_type_name() == "Convert" else to_int8
    if quantizer.get_type_name() != "FakeQuantize":
        return None
    constants = (multiply.input_value(1), subtract.input_value(1), *quantizer.input_values()[1:5])
    if any(find_start(value).get_type_name() != "Constant" for value in constants):
        return None
    scale, zero = (compute_constant(value).astype(np.float64) for value in constants[:2])
    return None if zero.any() else (quantizer, scale)


def find_rounded(dequantized: ov.Output) -> ov.Output | None:
    """What a Q/DQ pair rounds, by the pair's last value; ``None`` if the pair does anything else to it but
    round, and cut off what lies far out on either side."""
    found = find_quantizer(dequantized)
    if found is None:
        return None
    quantizer, scale = found
    low, high, least, most = (
        compute_constant(end).astype(np.float64) for end in quantizer.input_values()[1:5]
    )
    is_same = is_close(low, least * scale) and is_close(high, most * scale)
    is_even = bool((least <= -most).all())  # else it may cut off all negative values
    return quantizer.input_value(0) if is_same and is_even else None


def is_close(ours: np.ndarray | float, theirs: np.ndarray | float) -> bool:
    """Whether two ranges are the same but for float32's rounding."""
    return bool(np.allclose(ours, theirs, rtol=1e-4, atol=0))


def is_shift(node: ov.Node) -> bool:
    """Whether a node adds one constant without any dimension, which leaves the shape of what it is added
    to."""
    if node.get_type_name() != "Add":
        return False
    moved = node.input_value(1)
    return count_elements(moved) == 1 and len(moved.get_partial_shape()) == 0


def count_elements(value: ov.Output) -> int:
    """Number of elements of a constant; 0 where the value is computed."""
    return int(value.get_node().data.size) if value.get_node().get_type_name() == "Constant" else 0


def read_scalar(value: ov.Output) -> float:
    """A constant of one element."""
    return float(value.get_node().data.reshape(()))


def sum_inputs(layer: ov.Node) -> np.ndarray:
    """The sum of the weights of each output of a conv or a product, float64 ``(outputs,)``; for a product
    with weights of more than two dimensions, as it is added to the result."""
    weights = compute_constant(layer.input_value(1)).astype(np.float64)
    if layer.get_type_name() != "MatMul":
        return np.asarray(weights.reshape(len(weights), -1).sum(axis=1))
    is_last = layer.get_attributes()["transpose_b"] or weights.ndim == 1
    sums = np.asarray(weights.sum(axis=-1 if is_last else -2))
    return sums if sums.ndim < 2 else np.expand_dims(sums, -2)


def add_to_bias(layer: ov.Node, correction: np.ndarray) -> None:
    """Make all readers of a conv or a product read its sum with ``correction``, one value for each output;
    OpenVINO merges that with the bias that follows."""
    if layer.get_type_name() != "MatMul":
        correction = correction.reshape(1, -1, *[1] * (len(layer.get_output_partial_shape(0)) - 2))
    readers = layer.output(0).get_target_inputs()
    corrected = ops.add(layer, ops.constant(correction.astype(np.float32)))
    for reader in readers:
        reader.replace_source_output(corrected.output(0))
