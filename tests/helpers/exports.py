"""Exports of cmt_nano, with each model traced once a run."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .made_once import make_once
from .measuring import brief_exports

if TYPE_CHECKING:
    from cmt_edge.export import ExportConfig


@contextmanager
def traced_once(kept: Path):
    """Equal models are traced once a run, since torch.onnx takes seconds for each, and exports measure
    briefly.

    Args:
        kept: the folder of the traced graphs.
    """
    import onnx

    from cmt_edge.export.steps import graph
    from cmt_edge.export.to_onnx import export_onnx as trace

    def export_onnx(model, img_size, opset, outputs, check):
        file = kept / f"{_fingerprint(model)}-{img_size}-{opset}-{'-'.join(outputs)}.onnx"
        make_once(file, lambda path: onnx.save(trace(model, img_size, opset, outputs), path))
        loaded = onnx.load(file)
        check(loaded)
        return loaded

    with brief_exports() as patch:
        patch.setattr(graph, "export_onnx", export_onnx)
        yield patch


def _fingerprint(model) -> str:
    """Of the modules and the weights."""
    from cmt_edge.cmt import compute_weights_fingerprint

    modules = hashlib.sha256(repr(model).encode()).hexdigest()[:16]
    return f"{modules}-{compute_weights_fingerprint(model)[:32]}"


NAME = "cmt_nano_fp32_openvino"
"""What an export of cmt_nano is called unless it is told otherwise."""
OWN = """
from torch import nn
def small():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
"""
"""A module of a user's own, whose model is traced in a moment."""


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


def saved_nano(path: Path, classes: list[str] | None = None, seed: int = 0) -> Path:
    """A checkpoint of a nano, as a training of ours writes it."""
    import torch

    from cmt_edge.cmt import create_model

    model = create_model("cmt_nano", num_classes=len(classes) if classes else None, seed=seed)
    torch.save({"model": model.state_dict()} | ({"classes": classes} if classes else {}), path)
    return path
