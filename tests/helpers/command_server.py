"""The process that runs commands of cmt-edge with faults: see :class:`helpers.crashes.Attack`.

What takes seconds and touches no file is shortened: the model is traced once, and latencies are measured on a
few inferences. Its argument is the folder of the traced models.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nncf  # noqa: F401  # imported here, so that no command imports it
import onnx
import onnxruntime  # noqa: F401
import openvino  # noqa: F401
import torch._dynamo  # noqa: F401
import torch._inductor.compiler_bisector  # noqa: F401
import torch.onnx  # noqa: F401

import cmt_edge.__main__  # noqa: F401
from cmt_edge.deploy.cli import measuring
from cmt_edge.deploy.tensorrt import build
from cmt_edge.export import pipeline  # noqa: F401
from cmt_edge.export.steps import bundle, graph

from .forks import run_command, serve
from .measuring import BRIEF_EXPORT, Brief

KEPT = Path(sys.argv[1])
"""The folder of the traced models."""


def trace_once(model, img_size, opset, outputs, check):
    """As ``export_onnx``, from a file after the first time."""
    file = KEPT / f"{img_size}-{opset}-{'-'.join(outputs)}.onnx"
    if not file.exists():
        file.write_bytes(real(model, img_size, opset, outputs).SerializeToString())
    loaded = onnx.load_from_string(file.read_bytes())
    check(loaded)
    return loaded


real = graph.export_onnx
graph.export_onnx = trace_once
bundle.EXPORT_PROTOCOL = BRIEF_EXPORT
measuring.Protocol = Brief
build.POWER_SECONDS = 0.05
serve(run_command)
