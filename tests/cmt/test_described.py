"""What a checkpoint says of its model."""

from __future__ import annotations

import argparse

import pytest
import torch

from cmt_edge.cmt.described import Description, describe_checkpoint

STATE = {"w": torch.zeros(2)}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            {"model": STATE, "settings": {"model": "cmt_nano", "imgsz": 96}, "classes": ["a", "b"]},
            Description("cmt_nano", 96, 2),
        ),
        ({"model": STATE, "settings": {"model": "cmt_nano", "imgsz": None}}, Description("cmt_nano")),
        (
            {"model": STATE, "args": argparse.Namespace(model="cmt_xs", input_size=192, nb_classes=5)},
            Description("cmt_xs", 192, 5),
        ),
        ({"state_dict": STATE, "arch": "cvt_13", "num_classes": 7}, Description("cvt_13", None, 7)),
        ({"model": "cvt_13", "state_dict": STATE}, Description("cvt_13")),
        ({"model": STATE, "settings": {"model": "os:system"}}, Description()),
        ({"model": STATE, "settings": {"model": "timm:resnet18"}}, Description()),
        ({"model": STATE, "settings": {"model": "cmt_nano", "imgsz": -3}}, Description("cmt_nano")),
        ({"model": STATE, "settings": {"model": "cmt_nano", "imgsz": True}}, Description("cmt_nano")),
        ({"model": STATE}, Description()),
        (STATE, Description()),
    ],
)
def test_what_is_said(tmp_path, content, said):
    torch.save(content, tmp_path / "c.pt")
    assert describe_checkpoint(tmp_path / "c.pt") == said
