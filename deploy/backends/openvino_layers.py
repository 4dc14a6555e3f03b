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
    """The layers of some kinds with int8 weights that read int8 values, in the graph's order."""
    for layer in model.get_ordered_ops():
        if layer.get_type_name() in kinds and all(map(is_dequantized, layer.input_values())):
            yield layer


def find_start(dequantized: ov.Output) -> ov.Node:
    """The node that gives the integers of a Q/DQ pair, by its last value: a ``FakeQuantize``, if OpenVINO
    merges the quantizer so."""
    node = dequantized.get_node()
    while node.get_type_name() in ("Multiply", "Subtract", "Convert"):
        node = node.input_value(0).get_node()
    return node


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
    """The sum of the weights of each output of a conv or a product, float64."""
    weights = compute_constant(layer.input_value(1)).astype(np.float64)
    if layer.get_type_name() != "MatMul":
        return np.asarray(weights.reshape(len(weights), -1).sum(axis=1))
    return np.asarray(weights.sum(axis=-1 if layer.get_attributes()["transpose_b"] else -2))


def add_to_bias(layer: ov.Node, correction: np.ndarray) -> None:
    """Make all readers of a conv or a product read its sum with ``correction``, one value for each output;
    OpenVINO merges that with the bias that follows."""
    if layer.get_type_name() != "MatMul":
        correction = correction.reshape(1, -1, *[1] * (len(layer.get_output_partial_shape(0)) - 2))
    readers = layer.output(0).get_target_inputs()
    corrected = ops.add(layer, ops.constant(correction.astype(np.float32)))
    for reader in readers:
        reader.replace_source_output(corrected.output(0))
