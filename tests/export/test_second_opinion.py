"""A runtime that alone differs from the reference: the message says so and names the other format."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cmt_edge.deploy.backends.onnxruntime import OnnxRuntimeSession
from cmt_edge.deploy.backends.openvino import OpenVINOSession, has_bf16
from cmt_edge.deploy.errors import GateError
from cmt_edge.export import ExportConfig, run


class Net(nn.Module):
    """Convs, an operation, and a linear classifier."""

    img_size = 32

    def __init__(self, operation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.operation, self.fc = operation, nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.operation(self.norm(self.conv(x)))
        return self.fc((y * y.abs()).mean((2, 3)))


DIFFERENT = {
    "pooling with ceil_mode": lambda y: F.avg_pool2d(y, 3, 2, 1, ceil_mode=True),
    "resizing with antialias": lambda y: F.interpolate(y, size=(7, 7), mode="bilinear", antialias=True),
    "whole numbers of 64 bits": lambda y: ((y * 1e5).long() * 100_000).float() / 1e10,
}
"""Operations that OpenVINO 2026.4 computes otherwise than PyTorch and ONNX Runtime do."""


@pytest.mark.parametrize("name", DIFFERENT)
def test_graphs_that_openvino_computes_otherwise(tmp_path, name):
    """Real differences. Where a later OpenVINO agrees with PyTorch, its line is to be taken out."""
    with pytest.raises(GateError, match=r"openvino \S+ alone differs") as error:
        run(config(Net(DIFFERENT[name]), tmp_path, "openvino"))
    assert "--format onnx" in error.value.remedy
    assert re.search(r"openvino \S+ differs by [\d.]+, onnxruntime \S+ by \S+ \(allowed", error.value.why)
    made = run(config(Net(DIFFERENT[name]), tmp_path, "onnx"))
    assert made.manifest.verification.passed


def config(net: nn.Module, tmp_path, form: str, **changes) -> ExportConfig:
    return ExportConfig(net, format=form, output=str(tmp_path / "out"), **changes)


def shifted(session: type, monkeypatch) -> None:
    """A fault that is put into a runtime's answers."""
    real = session.run

    def wrong(self, batch: np.ndarray):
        return [output + 1 for output in real(self, batch)]

    monkeypatch.setattr(session, "run", wrong)


@pytest.mark.parametrize(
    ("form", "session", "ours", "remedy"),
    [
        ("openvino", OpenVINOSession, "openvino", "--format onnx"),
        ("onnx", OnnxRuntimeSession, "onnxruntime", "--format openvino"),
    ],
)
def test_a_wrong_answer_of_one_runtime(tmp_path, monkeypatch, form, session, ours, remedy):
    shifted(session, monkeypatch)
    with pytest.raises(GateError, match=f"{ours} .*alone differs") as error:
        run(config(Net(nn.Identity()), tmp_path, form))
    assert remedy in error.value.remedy
    assert "differs by 1, " in error.value.why
    assert error.value.exit_code == 1
    assert not [*(tmp_path / "out").glob("*")]


def test_a_graph_that_differs_in_both_has_no_other_format(tmp_path, monkeypatch):
    shifted(OpenVINOSession, monkeypatch)
    shifted(OnnxRuntimeSession, monkeypatch)
    with pytest.raises(GateError, match="the exported model differs") as error:
        run(config(Net(nn.Identity()), tmp_path, "openvino"))
    assert "--format" not in error.value.remedy


@pytest.mark.skipif(not has_bf16(), reason="needs a CPU with bfloat16, which bf16 bundles run on")
def test_a_precision_that_the_other_runtime_lacks(tmp_path, monkeypatch):
    shifted(OpenVINOSession, monkeypatch)
    with pytest.raises(GateError, match="the exported model differs"):
        run(replace(config(Net(nn.Identity()), tmp_path, "openvino"), precision="bf16", atol=0.5))
