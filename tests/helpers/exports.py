"""Exports of cmt_nano, with each model traced once a session."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from cmt_edge.export import ExportConfig

TRACED: dict[tuple, bytes] = {}


@contextmanager
def traced_once():
    """torch.onnx takes ten seconds: equal weights are traced once a session."""
    import onnx

    from cmt_edge.cmt import compute_weights_fingerprint
    from cmt_edge.export import steps

    real = steps.export_onnx

    def export_onnx(model, img_size, opset, outputs, check):
        key = compute_weights_fingerprint(model), img_size, opset, tuple(outputs)
        if key not in TRACED:
            TRACED[key] = real(model, img_size, opset, outputs).SerializeToString()
        graph = onnx.load_from_string(TRACED[key])
        check(graph)
        return graph

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "export_onnx", export_onnx)
        yield patch


NAME = "cmt_nano_fp32_openvino"


def content(folder: Path) -> dict[str, str]:
    """Everything below ``folder``, hidden files too, with hashes."""
    return {
        p.relative_to(folder).as_posix(): (
            hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
        )
        for p in folder.rglob("*")
    }


def nano(output: Path, **settings) -> ExportConfig:
    from cmt_edge.export import ExportConfig

    return ExportConfig("cmt_nano", output=str(output), **settings)
