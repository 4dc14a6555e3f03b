"""Tensors inside a model that OpenVINO runs.

OpenVINO's CPU plugin computes what lies between the last heavy operation and an output in float32, also where
bfloat16 is asked for. A tensor that becomes an output would therefore be computed more precisely than in the
bundle as it runs. It becomes one of the asked type instead: the plugin leaves such outputs alone (OpenVINO
2026.4, ``Graph::EnforceInferencePrecision``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from ..bundle import Bundle
from .base import make_lacking_error

LOW_TYPES = {"bf16": ov.Type.bf16, "fp16": ov.Type.f16}
"""Precision below float32 -> OpenVINO's type."""


def add_results(model: ov.Model, bundle: Bundle, tensors: Sequence[str], precision: str) -> None:
    """Let ``model`` give ``tensors`` behind its outputs, in the type in which the runtime holds what is not
    quantized, ``precision``.

    Raises:
        BundleError: the graph of ``bundle`` does not have one of them.
    """
    made = {
        name: output for node in model.get_ops() for output in node.outputs() for name in output.get_names()
    }
    results = []
    for tensor in tensors:
        if tensor not in made:
            raise make_lacking_error(bundle, tensor)
        port = made[tensor]
        is_single = port.get_element_type() == ov.Type.f32
        low = LOW_TYPES.get(precision) if is_single else None
        results.append(ops.result(port if low is None else ops.convert(port, low.get_type_name())))
    model.add_results(results)


def read_values(tensor: ov.Tensor) -> np.ndarray:
    """A copy of a tensor's values, float32 where NumPy has no such type: bfloat16 is the upper half of
    float32."""
    if tensor.element_type != ov.Type.bf16:
        return np.array(tensor.data)
    halves = np.ascontiguousarray(tensor.data).view(np.uint16)
    return (halves.astype(np.uint32) << 16).view(np.float32)


def run_all(request: ov.InferRequest, batch: np.ndarray) -> list[np.ndarray]:
    """Every output of the model for ``batch``."""
    request.infer([batch])
    outputs: list[Any] = list(request.output_tensors)
    return [read_values(tensor) for tensor in outputs]
