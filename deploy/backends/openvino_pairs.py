"""Int8 weights rounded so that no sum of two products exceeds 16 bits, for x86 processors without VNNI.

Kernels for such processors multiply unsigned by signed bytes, and add the products of two neighbouring input
channels in 16 bits, which saturate (``vpmaddubsw``). An activation reaches 255 there, so that the sum of the
two weights must stay within 128: ``255 * 128 < 2 ** 15``. Where two neighbours of an output channel exceed
it, all weights of that channel get a larger scale. Integers are exact then, as they are with VNNI; what it
costs is the rounding of those channels, in place of sums that are wrong.

It applies to convs that read all channels and to linears. OpenVINO's kernels for depthwise convs add in 32
bits. Which weights are added was found by ``benchmarks/saturation.py``: neighbouring channels at the same
place of the filter, for filters of any size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from .openvino_constants import compute_constant, is_dequantized

LARGEST_SUM = 128
"""The largest magnitude of the sum of two neighbouring weights whose products with 255 fit 16 bits."""

LARGEST_WEIGHT = 127
"""To this magnitude the largest sum of a channel is reduced. Rounding each of both weights adds at most a
half."""

LAYERS = ("Convolution", "MatMul")
"""OpenVINO's operations that such kernels compute. Those of depthwise convs are ``GroupConvolution``."""


def limit_pairs(model: ov.Model) -> int:
    """Give every output channel whose sums could exceed 16 bits weights with a larger scale.

    Changes ``model``, and returns the number of layers that got other weights.
    """
    found = {}
    for layer in model.get_ordered_ops():
        if layer.get_type_name() in LAYERS and is_dequantized(layer.input_value(1)):
            weights = layer.input_value(1).get_node()
            found[weights.get_friendly_name()] = (weights, _find_axes(layer))
    return sum(_limit_weights(weights, *axes) for weights, axes in found.values())


def _find_axes(layer: ov.Node) -> tuple[int, int]:
    """The axes of the output channels and of the input channels of a layer's weights."""
    if layer.get_type_name() == "Convolution":
        return 0, 1
    return (-2, -1) if layer.get_attributes()["transpose_b"] else (-1, -2)


def _limit_weights(dequantized: ov.Node, outputs: int, inputs: int) -> bool:
    """Replace weights by such that keep the limit; ``False`` where they already do."""
    scale = dequantized.input_value(1)
    zeros = dequantized.input_value(0).get_node()
    values = compute_constant(zeros.input_value(0).get_node().input_value(0))
    if compute_constant(zeros.input_value(1)).any():
        return False  # no bundle has zero points; the integers would not be the weights
    factors = find_factors(values, outputs, inputs)
    if factors is None:
        return False
    rounded = np.rint(values / factors).astype(np.int8)
    scales = (compute_constant(scale) * factors).astype(np.float32)
    converted: Any = ops.convert(ops.constant(rounded), "f32")
    replacement = ops.multiply(converted, ops.constant(scales))
    replacement.set_friendly_name(dequantized.get_friendly_name())
    dequantized.output(0).replace(replacement.output(0))
    return True


def find_factors(values: np.ndarray, outputs: int, inputs: int) -> np.ndarray | None:
    """By how much the scale of each output channel grows, float64, of the rank of ``values``; ``None`` where
    none has to.

    Args:
        values: int8 weights.
        outputs: the axis of the output channels.
        inputs: the axis of the input channels, neighbours of which are added.
    """
    columns = np.moveaxis(values, (outputs, inputs), (0, 1)).astype(np.int16)  # (outputs, inputs, ...)
    count = columns.shape[1] // 2 * 2
    sums = np.abs(columns[:, :count:2] + columns[:, 1:count:2]).reshape(len(columns), -1)
    largest = sums.max(axis=1, initial=0)
    if (largest <= LARGEST_SUM).all():
        return None
    shape = [1] * values.ndim
    shape[outputs] = -1
    factors = np.where(largest > LARGEST_SUM, largest / LARGEST_WEIGHT, 1.0)
    return factors.reshape(shape)
