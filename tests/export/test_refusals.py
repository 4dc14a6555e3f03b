"""Models that no graph can hold: the message names the operator or the branch, and the user's own line."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cmt_edge.deploy.errors import InputError
from cmt_edge.export.config import OPSET
from cmt_edge.export.to_onnx import export_onnx


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
