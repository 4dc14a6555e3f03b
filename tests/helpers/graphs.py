"""ONNX graphs: running one for its logits, and changing a copy of one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir

from cmt_edge.calib.graph import open_view, write_model
from cmt_edge.export.to_onnx import compute_outputs


def compute_logits(graph: onnx.ModelProto, batch: np.ndarray, step: str) -> np.ndarray:
    """The first output of ``graph`` in ONNX Runtime: float32 ``(N, 3, S, S)`` -> ``(N, classes)``."""
    return compute_outputs(graph, batch, step)[0]


def rewrite_copy(model: onnx.ModelProto, change: Callable[[ir.Graph], object]) -> onnx.ModelProto:
    """A copy of ``model`` that ``change`` has rewritten."""
    with open_view(model) as view:
        change(view.graph)
        return write_model(view)
