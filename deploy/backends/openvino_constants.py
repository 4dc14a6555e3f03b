"""Constants of a graph that OpenVINO has read: whether they are int8, and what they are."""

from __future__ import annotations

import numpy as np
import openvino as ov

from .openvino_core import open_core

CONSTANT_OPERATIONS = ("Convert", "Reshape", "Subtract", "Multiply")
"""What OpenVINO computes the weights of an int8 conv with."""


def is_dequantized(value: ov.Output) -> bool:
    """Whether ``value`` is what OpenVINO reads a ``DequantizeLinear`` as: int8 values converted, less a zero
    point, times a scale."""
    node = value.get_node()
    for kind in ("Multiply", "Subtract", "Convert"):
        if node.get_type_name() != kind:
            return False
        node = node.input_value(0).get_node()
    return bool(node.get_output_element_type(0) == ov.Type.i8)


def compute_constant(value: ov.Output) -> np.ndarray:
    """The value of what is computed from constants alone.

    A ``DequantizeLinear`` of weights consists of the operations that are known here. Anything else is left to
    the runtime, which takes ten times as long for it.
    """
    node = value.get_node()
    kind = node.get_type_name()
    if kind == "Constant":
        return np.asarray(node.data)
    if kind not in CONSTANT_OPERATIONS:
        model = ov.Model([value], [])  # pyright: ignore  # its stubs disagree with themselves
        compiled = open_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return np.array(compiled([])[0])
    first = compute_constant(node.input_value(0))
    if kind == "Convert":
        return np.asarray(first.astype(value.get_element_type().to_dtype()))
    if kind == "Reshape":
        return first.reshape(tuple(value.get_shape()))
    second = compute_constant(node.input_value(1))
    return np.asarray(first - second if kind == "Subtract" else first * second)
