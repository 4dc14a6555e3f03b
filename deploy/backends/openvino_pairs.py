"""Int8 weights rounded so that no sum of two products exceeds 16 bits, for x86 processors without VNNI.

Kernels for such processors add the products of two neighbouring input channels in 16 bits, which saturate
(:mod:`.pair_limits`). Where two neighbours of an output channel exceed the limit, all weights of that channel
get a larger scale. Integers are exact then, as they are with VNNI; what it costs is the rounding of those
channels, in place of sums that are wrong.

Int8 bundles for CPUs have weights that fit (``calibration.fits_16_bits`` of the manifest), and nothing is
changed in them. Those of other graphs are rounded here, when they are read.

It applies to convs that read all channels and to linears, where they read int8: those with int8 weights alone
compute in float. OpenVINO's kernels for depthwise convs add in 32
bits. Which weights are added was found by ``benchmarks/saturation.py``: neighbouring channels at the same
place of the filter, for filters of any size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from .openvino_constants import compute_constant
from .openvino_layers import LAYERS, iterate_int8
from .pair_limits import find_factors


def limit_pairs(model: ov.Model) -> int:
    """Give every output channel whose sums could exceed 16 bits weights with a larger scale.

    Changes ``model``, and returns the number of layers that got other weights.
    """
    found = {}
    for layer in iterate_int8(model, LAYERS):
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
    shifted = dequantized.input_value(0).get_node()
    values = compute_constant(shifted.input_value(0).get_node().input_value(0))
    zeros = shifted.input_value(1)
    if compute_constant(zeros).any():
        return False  # no bundle has zero points; the integers would not be the weights
    factors = find_factors(values, outputs, inputs)
    if factors is None:
        return False
    rounded = np.rint(values / factors).astype(np.int8)
    scales = (compute_constant(scale) * factors).astype(np.float32)
    converted: Any = ops.convert(ops.constant(rounded), "f32")
    less_zeros: Any = ops.subtract(converted, zeros)  # so that it is still known as dequantized weights
    replacement = ops.multiply(less_zeros, ops.constant(scales))
    replacement.set_friendly_name(dequantized.get_friendly_name())
    dequantized.output(0).replace(replacement.output(0))
    return True
