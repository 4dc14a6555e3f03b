"""What a checkpoint says of its model."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cmt_edge.cmt.described import Description, describe_checkpoint, describe_input
from cmt_edge.cmt.input_settings import InputSettings

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
        (
            {"model": "cmt_nano", "mean": "0.5", "std": "a,b,c", "imgsz": "large"},
            Description("cmt_nano", fault="std holds 'a', which is no number"),
        ),
        (
            {"model": "cmt_nano", "mean": "0.5", "std": "0.2"},
            Description("cmt_nano", mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2)),
        ),
        ({"model": "os:system", "imgsz": "96"}, Description()),
        ({"format": "pt"}, Description()),
        (None, Description()),
    ],
)
def test_what_a_safetensors_file_says(tmp_path, metadata, said):
    save_file(STATE, tmp_path / "c.safetensors", metadata)
    assert describe_checkpoint(tmp_path / "c.safetensors") == said


HALF, QUARTER = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def in_settings(mean, std) -> dict:
    return {"settings": {"model": "cmt_nano", "mean": mean, "std": std}}


UNDERSTOOD = {
    "a list": in_settings([0.5] * 3, [0.25] * 3),
    "arrays": in_settings(np.array(HALF), np.array(QUARTER, np.float32)),
    "tensors": in_settings(torch.tensor(HALF), torch.tensor(QUARTER).reshape(1, 3, 1, 1)),
    "one number": in_settings(0.5, 0.25),
    "a list of one number": in_settings([0.5], (0.25,)),
    "text with brackets": in_settings("(0.5, 0.5, 0.5)", "[0.25,0.25,0.25]"),
    "text with spaces": in_settings("0.5 0.5 0.5", "0.25 0.25 0.25"),
    "a list of each channel": in_settings([[[0.5]]] * 3, [[[0.25]]] * 3),
    "scalars of NumPy": in_settings([np.float32(0.5)] * 3, [np.float64(0.25)] * 3),
    "at the top": {"settings": {"model": "cmt_nano"}, "mean": HALF, "std": QUARTER},
    "in other settings": {
        "settings": {"model": "cmt_nano"},
        "args": argparse.Namespace(mean=[0.5], std=[0.25], model=None),
    },
    "under normalize": {"settings": {"model": "cmt_nano", "normalize": {"mean": HALF, "std": QUARTER}}},
    "under data_config": {"settings": {"model": "cmt_nano", "data_config": {"mean": HALF, "std": QUARTER}}},
    "under a name of two words": {"settings": {"model": "cmt_nano", "data_mean": HALF, "data_std": QUARTER}},
    "in capitals": {"settings": {"model": "cmt_nano", "DATA": {"MEAN": HALF, "STD": QUARTER}}},
    "the same twice": in_settings(HALF, QUARTER) | {"args": {"mean": 0.5, "std": 0.25}},
}
"""Checkpoints that say the same of the images."""


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_mean_and_std_are_read(tmp_path, name):
    torch.save({"model": STATE} | UNDERSTOOD[name], tmp_path / "c.pt")
    assert describe_checkpoint(tmp_path / "c.pt") == Description("cmt_nano", mean=HALF, std=QUARTER)


@pytest.mark.parametrize("value", [None, "", "None", []])
def test_a_mean_and_std_without_a_value_say_nothing(tmp_path, value):
    torch.save({"model": STATE} | in_settings(value, value), tmp_path / "c.pt")
    assert describe_checkpoint(tmp_path / "c.pt") == Description("cmt_nano")


NOT_UNDERSTOOD = {
    "mean alone": (in_settings(HALF, None), "gives mean without std"),
    "std alone": (in_settings(None, HALF), "gives std without mean"),
    "two numbers": (in_settings([0.5] * 2, QUARTER), "mean holds 2 numbers and not three"),
    "a picture": (in_settings(torch.ones(3, 8, 8), QUARTER), "mean holds 192 numbers"),
    "a name": (in_settings("imagenet", QUARTER), "'imagenet', which is no number"),
    "no number": (in_settings([float("nan")] * 3, QUARTER), "a number that is not finite"),
    "a mapping": (in_settings({"r": 0.5}, QUARTER), "mean holds a dict and no number"),
    "an object": (in_settings(torch.nn.Identity(), QUARTER), "mean is an object of the class"),
    "an object that normalises": (
        {"settings": {"model": "cmt_nano", "normalize": torch.nn.Identity()}},
        "normalize is an object of the class",
    ),
    "two means": (in_settings(HALF, QUARTER) | {"args": {"mean": 0.4}}, "different values of mean"),
}
"""Checkpoints with a mean or a deviation that cannot be used, and why."""


@pytest.mark.parametrize("name", NOT_UNDERSTOOD)
def test_a_mean_that_is_not_understood_is_told(tmp_path, name):
    content, fault = NOT_UNDERSTOOD[name]
    torch.save({"model": STATE} | content, tmp_path / "c.pt")
    said = describe_checkpoint(tmp_path / "c.pt")
    assert (said.mean, said.std) == (None, None)
    assert fault in said.fault


def test_the_buffers_of_a_state_dict_are_no_settings(tmp_path):
    state = {f"w{i}": torch.zeros(2) for i in range(9)} | {"mean": torch.ones(3), "std": torch.ones(3)}
    torch.save(state, tmp_path / "c.pt")
    assert describe_input(tmp_path / "c.pt") == InputSettings()


@pytest.mark.parametrize(("size", "read"), [(96, 96), (50_000, None), (3200, None), (100, None)])
def test_a_size_that_may_be_of_something_else(tmp_path, size, read):
    torch.save({"model": STATE, "settings": {"model": "cmt_nano", "size": size}}, tmp_path / "c.pt")
    assert describe_checkpoint(tmp_path / "c.pt").img_size == read
