"""What is rewritten, exactly, in a graph that OpenVINO has read from an ONNX file.

**Unsigned inputs of int8 convs.** Signed int8 activations are what every runtime of ours reads, and
processors without AMX multiply unsigned by signed bytes only: there OpenVINO (2026.4) shifts them by 128 and
takes the shift back, as a zero point, in every conv. A conv without padding needs no taking back::

    x = q s,  q in -128 .. 127                                      # what the pair before the conv leaves
    W * x + b = W * (x + 128 s) + (b - 128 s sum(W))                # sum over all of an output channel's
    weights

``x + 128 s = (q + 128) s`` is an unsigned value without zero point, and the new bias is a constant. Padded
convs are left alone: the zeros around the map are zeros of ``x``, not of ``x + 128 s``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as ops


def read(path: Path) -> ov.Model:
    """The model in ``path``: an ONNX file as rewritten above, an IR as it is."""
    model = ov.Core().read_model(path)
    return model if path.suffix == ".xml" else unsigned(model)


def unsigned(model: ov.Model) -> ov.Model:
    """``model`` with the inputs of int8 convs made unsigned, where no padding forbids it. In place.

    Convs whose input or weights are not quantized, or whose pair others read too, stay as they are.
    """
    found = [(conv, pair) for conv in model.get_ordered_ops() if (pair := _pair_before(conv)) is not None]
    sums = _channel_sums([conv.input_value(1) for conv, _ in found])
    for (conv, (quantizer, dequantized)), weights in zip(found, sums, strict=True):
        low, high = (_scalar(quantizer.input_value(i)) for i in (1, 2))
        edges = [ops.constant(np.float32(v)) for v in (low, high, 0.0, high - low)]
        shifted = ops.fake_quantize(quantizer.input_value(0), *edges, quantizer.get_attributes()["levels"])
        dequantized.output(0).replace(shifted.output(0))
        correction = (low * weights).reshape(1, -1, *[1] * (len(conv.get_output_partial_shape(0)) - 2))
        _add_to_bias(conv, correction)
    model.validate_nodes_and_infer_types()
    return model


def _pair_before(conv: ov.Node) -> tuple[ov.Node, ov.Node] | None:
    """Quantizer and end of the signed pair that only this conv reads, if its input may be shifted."""
    if conv.get_type_name() != "Convolution" or _padded(conv) or not _dequantized(conv.input_value(1)):
        return None
    end = conv.input_value(0)
    if not _dequantized(end) or len(end.get_target_inputs()) != 1:
        return None
    node = end.get_node()
    while node.get_type_name() in ("Multiply", "Subtract", "Convert"):
        node = node.input_value(0).get_node()
    if node.get_type_name() != "FakeQuantize" or any(_size(node.input_value(i)) != 1 for i in (1, 2)):
        return None
    return (node, end.get_node()) if _scalar(node.input_value(1)) < 0 else None


def _padded(conv: ov.Node) -> bool:
    attributes = conv.get_attributes()
    return attributes["auto_pad"] not in ("explicit", "valid") or any(
        (*attributes["pads_begin"], *attributes["pads_end"])
    )


def _dequantized(value: ov.Output) -> bool:
    """Whether ``value`` is what OpenVINO reads a ``DequantizeLinear`` as: int8 values converted, less a zero
    point, times a scale."""
    node = value.get_node()
    for kind in ("Multiply", "Subtract", "Convert"):
        if node.get_type_name() != kind:
            return False
        node = node.input_value(0).get_node()
    return node.get_output_element_type(0) == ov.Type.i8


def _size(value: ov.Output) -> int:
    return int(value.get_node().data.size) if value.get_node().get_type_name() == "Constant" else 0


def _scalar(value: ov.Output) -> float:
    return float(value.get_node().data.reshape(()))


def _channel_sums(weights: list[ov.Output]) -> list[np.ndarray]:
    """The sum of each output channel's weights."""
    if not weights:
        return []
    values = ov.Core().compile_model(ov.Model(weights, []), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([])
    return [values[i].reshape(len(values[i]), -1).sum(axis=1, dtype=np.float64) for i in range(len(weights))]


def _add_to_bias(conv: ov.Node, correction: np.ndarray) -> None:
    """Have all readers of ``conv`` read its sum with ``correction``, which OpenVINO adds to the bias behind
    it."""
    readers = conv.output(0).get_target_inputs()
    corrected = ops.add(conv, ops.constant(correction.astype(np.float32)))
    for reader in readers:
        reader.replace_source_output(corrected.output(0))
