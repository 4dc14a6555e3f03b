"""What a checkpoint says of its model."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from safetensors.torch import save_file

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


CLASSES = ["a", "b", "c"]


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"model": "cmt_nano"}, Description("cmt_nano")),
        (
            {"model": "cmt_nano", "imgsz": "96", "classes": json.dumps(CLASSES)},
            Description("cmt_nano", 96, 3),
        ),
        ({"model": "cmt_nano", "size": "96", "classes": str(CLASSES)}, Description("cmt_nano", 96, 3)),
        ({"arch": "cvt_13", "num_classes": "7"}, Description("cvt_13", None, 7)),
        (
            {"model": "cmt_nano", "input_size": "[3, 96, 96]", "mean": "0.5,0.4,0.3", "std": "[0.2, 0.2, 1]"},
            Description("cmt_nano", 96, None, (0.5, 0.4, 0.3), (0.2, 0.2, 1.0)),
        ),
        ({"model": "cmt_nano", "mean": "0.5", "std": "a,b,c", "imgsz": "large"}, Description("cmt_nano")),
        ({"model": "os:system", "imgsz": "96"}, Description()),
        ({"format": "pt"}, Description()),
        (None, Description()),
    ],
)
def test_what_a_safetensors_file_says(tmp_path, metadata, said):
    save_file(STATE, tmp_path / "c.safetensors", metadata)
    assert describe_checkpoint(tmp_path / "c.safetensors") == said


def test_settings_may_hold_a_mean(tmp_path):
    settings = {"model": "cmt_nano", "mean": [0.5, 0.5, 0.5], "std": None}
    torch.save({"model": STATE, "settings": settings}, tmp_path / "c.pt")
    assert describe_checkpoint(tmp_path / "c.pt") == Description("cmt_nano", mean=(0.5, 0.5, 0.5))
