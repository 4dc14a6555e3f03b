"""Models that no graph can hold: the message names the operator or the branch, and the user's own line."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cmt_edge.deploy.errors import InputError
from cmt_edge.export.config import OPSET
from cmt_edge.export.to_onnx import export_onnx
from helpers.paths import ROOT


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)

    def mid(self, x):
        return x

    def forward(self, x):
        return self.mid(self.stem(x)).mean((2, 3))


class AdaptiveMax(Base):
    def mid(self, x):
        return F.adaptive_max_pool2d(x, 5)


class Branch(Base):
    def mid(self, x):
        return x if x.mean() > 0 else -x


class Loop(Base):
    def mid(self, x):
        for _ in range(int(x.abs().sum())):
            x = x + 1
        return x


CASES = [
    (AdaptiveMax, "no operator for aten.adaptive_max_pool2d", "F.adaptive_max_pool2d(x, 5)", "divides"),
    (Branch, "decides by the values", "return x if x.mean() > 0 else -x", "torch.where"),
    (Loop, "decides by the values", "for _ in range(int(x.abs().sum())):", "torch.where"),
]


@pytest.mark.parametrize(("model", "what", "code", "remedy"), CASES)
def test_the_users_line_is_named(model, what, code, remedy):
    with pytest.raises(InputError, match=what) as error:
        export_onnx(model().eval(), 32, OPSET)
    assert error.value.exit_code == 2
    assert "test_refusals.py:" in error.value.where
    assert code in error.value.where
    assert remedy in error.value.remedy


def test_a_pool_that_divides_its_map_is_exported():
    model = Base()
    model.mid = lambda x: F.adaptive_avg_pool2d(x, 4)
    assert export_onnx(model.eval(), 32, OPSET).graph.node


def test_other_errors_stay_what_they_are():
    from cmt_edge.export.refusals import explaining

    with pytest.raises(KeyError), explaining(Base(), torch.zeros(1, 3, 8, 8)):
        raise KeyError("x")


def test_a_branch_on_values_gives_one_message_and_no_log_of_torch(tmp_path):
    """In a process of its own: torch's log handlers hold the standard error of their first use."""
    (tmp_path / "branching.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def forward(self, x):\n"
        "        x = x.mean((2, 3))\n"
        "        return x if x.mean() > 0 else -x\n"
        "def build():\n"
        "    return Net()\n"
    )
    model = f"{tmp_path / 'branching.py'}:build"
    argv = ["--model", model, "--weights", "random", "--imgsz", "32", "--format", "onnx", "-q"]
    done = subprocess.run(
        [sys.executable, "-m", "cmt_edge", "export", *argv, "-o", str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
