"""Attentions are counted by what a softmax is used for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cmt_edge.export.attentions import count_attentions
from cmt_edge.export.to_onnx import export_onnx, simplify


class Attention(nn.Module):
    """One attention over the pixels, with what may stand beside or behind its softmax."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.qkv = nn.Linear(8, 24)
        self.choice = nn.Linear(8, 16)
        self.gate = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.stem(x)
        if self.kind == "choice":  # of one of two branches, by a softmax
            weights = self.choice(found.mean((2, 3))).reshape(-1, 2, 8, 1, 1).softmax(1)
            found = weights[:, 0] * found + weights[:, 1] * found.relu()
        tokens = found.flatten(2).transpose(1, 2)
        if self.kind != "none":
            q, k, v = self.qkv(tokens).chunk(3, -1)
            weights = (q @ k.transpose(1, 2)).softmax(-1)
            if self.kind == "gate":
                weights = weights * self.gate.sigmoid()
                weights = weights / weights.sum(-1, keepdim=True)
            tokens = tokens + weights @ v
        logits = self.head(tokens.mean(1))
        return logits if self.kind == "plain" else logits.softmax(-1)


@pytest.mark.parametrize(("kind", "count"), [("plain", 1), ("gate", 1), ("choice", 1), ("none", 0)])
def test_only_attentions_are_counted(kind, count):
    graph = simplify(export_onnx(Attention(kind).eval(), 16, 20))
    assert any(node.op_type == "Softmax" for node in graph.graph.node)
    assert count_attentions(graph) == count
