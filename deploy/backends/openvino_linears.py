"""Int8 linears that read floats, for x86 processors with neither VNNI nor AVX-512.

OpenVINO (2026.4) has no fast int8 products of matrices for AVX2 alone: models of linears took 1.1 to 1.3
times as long in int8 as in float32 there, whereas int8 convs gain. So linears read there what their
quantizers read, and their int8 weights are made float32 once, when the graph is read. A shift before the
quantizer (:mod:`cmt_edge.calib.shifts`) goes into the bias::

    W (x + c) + b == W x + (b + c sum(W))          # sum(W): over the weights of each output

The answers are nearer to the float model's than those of int8. Weights that OpenVINO converts in each call
took longer again (``docs/int8.md`` has the figures).
"""

from __future__ import annotations

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from .openvino_constants import compute_constant
from .openvino_layers import add_to_bias, find_start, is_shift, iterate_int8, read_scalar, sum_inputs


def read_floats(model: ov.Model) -> int:
    """Let int8 linears read floats, with float32 weights; changes ``model`` and returns their number.

    What reads the same pair otherwise keeps it. A product of two activations and one of integers that no
    quantizer of the graph has made stay as they are.
    """
    known: dict[str, ov.Output] = {}  # weights that several linears share are made once
    linears = [
        layer
        for layer in iterate_int8(model, ("MatMul",))
        if find_start(layer.input_value(0)).get_type_name() == "FakeQuantize"
        and find_start(layer.input_value(1)).get_type_name() == "Constant"
    ]
    for linear in linears:
        source = find_start(linear.input_value(0)).input_value(0)
        shift = source.get_node()
        if is_shift(shift) and len(linear.get_input_partial_shape(1)) == 2:  # else the addition stays
            source = shift.input_value(0)
            add_to_bias(linear, read_scalar(shift.input_value(1)) * sum_inputs(linear))
        weights = linear.input_value(1)
        name = weights.get_node().get_friendly_name()
        if name not in known:
            known[name] = ops.constant(compute_constant(weights).astype(np.float32)).output(0)
        linear.input(0).replace_source_output(source)
        linear.input(1).replace_source_output(known[name])
    if linears:
        model.validate_nodes_and_infer_types()
    return len(linears)
