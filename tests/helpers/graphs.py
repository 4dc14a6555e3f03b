"""ONNX graphs: running one for its logits, and changing a copy of one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import nn

from cmt_edge.calib.graph import open_view, write_model
from cmt_edge.cmt import fuse
from cmt_edge.export.to_onnx import compute_outputs, export_onnx, simplify
from helpers.tensors import images

INTEGER_KERNELS = ("QLinearConv", "QGemm", "MatMulIntegerToFloat")
"""What ONNX Runtime replaces int8 layers by, where it computes them in integers."""


def compute_logits(graph: onnx.ModelProto, batch: np.ndarray, step: str) -> np.ndarray:
    """The first output of ``graph`` in ONNX Runtime: float32 ``(N, 3, S, S)`` -> ``(N, classes)``."""
    return compute_outputs(graph, batch, step)[0]


def rewrite_copy(model: onnx.ModelProto, change: Callable[[ir.Graph], object]) -> onnx.ModelProto:
    """A copy of ``model`` that ``change`` has rewritten."""
    with open_view(model) as view:
        change(view.graph)
        return write_model(view)


def count_kernels(model: onnx.ModelProto, folder: Path) -> Counter[str]:
    """The operations of a graph after ONNX Runtime's optimisation; the optimised graph is written to
    ``optimised.onnx`` in ``folder``."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


def count_operations(model: nn.Module) -> tuple[Counter[str], Counter[str]]:
    """Operations by kind of the model's graph and of the rewritten model's graph for images of 64 x 64; both
    graphs must answer as PyTorch does, for batches of 1 and 3."""
    counts = []
    for form, module in (("reference", model), ("rewritten", fuse(model))):
        graph = simplify(export_onnx(module, 64, 20))
        counts.append(Counter(node.op_type for node in graph.graph.node))
        for batch in (1, 3):
            x = images(batch, 64, seed=batch)
            with torch.inference_mode():
                expected = model(x).numpy()
            np.testing.assert_allclose(compute_logits(graph, x.numpy(), form), expected, rtol=0, atol=1e-4)
    return counts[0], counts[1]
