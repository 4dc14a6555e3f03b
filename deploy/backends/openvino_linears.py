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

from .openvino_constants import compute_constant, is_dequantized
from .openvino_layers import add_to_bias, find_rounded, is_shift, iterate_int8, read_scalar, sum_inputs


def read_floats(model: ov.Model) -> int:
    """Let int8 linears read floats, with float32 weights; changes ``model`` and returns their number.

    What reads the same pair otherwise keeps it. A linear stays int8 where the pair does more than round
    (:func:`.openvino_layers.find_rounded`), as in some graphs of other tools.
    """
    linears = [
        (linear, rounded)
        for linear in iterate_int8(model, ("MatMul",))
        if (rounded := find_rounded(linear.input_value(0))) is not None
    ]
    for linear, rounded in linears:
        source, shift = rounded, rounded.get_node()
        if is_shift(shift):
            source = shift.input_value(0)
            add_to_bias(linear, read_scalar(shift.input_value(1)) * sum_inputs(linear))
        linear.input(0).replace_source_output(source)
        weights = linear.input_value(1)
        if is_dequantized(weights):  # for all their readers: OpenVINO (2026.4) may crash on such a mixture
            floats = compute_constant(weights).astype(np.float32)
            weights.replace(ops.constant(floats).output(0))
    if linears:
        model.validate_nodes_and_infer_types()
    return len(linears)
