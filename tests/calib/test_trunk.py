"""Layers that nothing leads around read floats, and their weights are int8."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from cmt_edge.calib.generated import generate
from cmt_edge.calib.graph import open_view
from cmt_edge.calib.groups import MODULE
from cmt_edge.calib.lint import lint, list_half_int8_nodes
from cmt_edge.calib.restore import list_int8_nodes
from cmt_edge.calib.trunk import list_trunk, read_floats
from cmt_edge.deploy.preprocessing import preprocess
from cmt_edge.export.to_onnx import export_onnx, simplify
from helpers.calibration import SPEC
from helpers.graphs import compute_logits, rewrite_copy


class Around(nn.Module):
    """A block that the stream leads around."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) + self.depthwise(x)


def make_head(channels: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, 24, 1), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5)]


STAGES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "two stages": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 4, stride=4), Around(8), nn.Conv2d(8, 16, 2, stride=2), Around(16), *make_head(16)
        ),
        3,
    ),
    "no stride": (lambda: nn.Sequential(Around(3), nn.Conv2d(3, 8, 1), Around(8), *make_head(8)), 2),
    "patches that overlap": (
        lambda: nn.Sequential(Around(3), nn.Conv2d(3, 8, 3, stride=2, padding=1), Around(8), *make_head(8)),
        2,
    ),
    "no block": (lambda: nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.GELU(), *make_head(8)), 0),
    "depthwise between": (
        lambda: nn.Sequential(
            Around(3), nn.Conv2d(3, 3, 2, stride=2, groups=3), Around(3), nn.Flatten(), nn.Linear(3072, 5)
        ),
        1,
    ),
    "a block at the end": (lambda: nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), Around(8), nn.Flatten()), 0),
}
"""Networks, and how many layers of each nothing leads around."""


@pytest.mark.parametrize("name", STAGES)
def test_layers_that_nothing_leads_around(name):
    make, count = STAGES[name]
    model = simplify(export_onnx(make().eval(), 64, 20))
    found = list_trunk(model)
    assert len(found) == count
    kinds = {node.name: node for node in model.graph.node}
    assert all(kinds[name].op_type in ("Conv", "Gemm", "MatMul") for name in found)


def test_stages_and_head_of_a_cmt(graph):
    with open_view(graph) as view:
        modules = {node.name: node.metadata_props.get(MODULE, "") for node in view.graph}
    found = [modules[name].split(".") for name in list_trunk(graph)]
    assert [name[:3] for name in found[:3]] == [["stages", str(i), "embed"] for i in (1, 2, 3)]
    assert [name[0] for name in found[3:]] == ["head", "head"]


def test_only_their_weights_are_int8(graph, freed, fitting):
    trunk = list_trunk(graph)
    assert list_half_int8_nodes(freed.model) == trunk
    assert set(list_int8_nodes(freed.model)) == set(list_int8_nodes(fitting.model))
    assert lint(freed.model, trunk) == []
    assert len(lint(freed.model)) == len(trunk)
    sizes = [len(one.model.SerializeToString()) for one in (freed, fitting)]
    assert sizes[0] < 1.01 * sizes[1]


def test_answers_are_nearer_to_float(graph, freed, fitting):
    x = np.stack([preprocess(blob, SPEC) for blob in generate(48, 64, seed=1)])
    exact, ours, before = (compute_logits(g, x, "test") for g in (graph, freed.model, fitting.model))
    off, off_before = (np.abs(one - exact).std() for one in (ours, before))
    assert off < 0.95 * off_before


def test_reading_floats_where_the_rules_do_not_say_so_is_a_finding(graph, fitting):
    trunk = list_trunk(graph)
    (another, *_) = set(list_int8_nodes(fitting.model)) - set(trunk)
    changed = rewrite_copy(fitting.model, lambda view: read_floats(view, [another]))
    assert lint(changed, trunk) == [f"{another}: one side int8, the other float"]
    assert list_half_int8_nodes(changed) == [another]


def test_what_reads_no_pair_is_left_alone(fitting):
    with open_view(fitting.model) as view:
        float_already = next(node.name for node in view.graph if node.op_type == "Gelu")
    changed = rewrite_copy(fitting.model, lambda view: read_floats(view, [float_already]))
    assert changed.graph.node == fitting.model.graph.node
