"""Which model a state dict belongs to, told by its names and shapes."""

from __future__ import annotations

import pytest
import torch

from cmt_edge.cmt import create_model
from cmt_edge.cmt.recognition import Recognised, recognise
from helpers.weights import state_of


def test_one_model_fits():
    assert recognise({"model": state_of(1), "epoch": 3}) == [Recognised("cmt_nano", 10)]


def test_the_classes_are_counted_behind_a_prefix():
    state = {f"model.{key}": value for key, value in state_of(1, num_classes=7).items()}
    content = {"state_dict": state | {"ce.weight": torch.ones(7)}}
    assert recognise(content) == [Recognised("cmt_nano", 7)]


def test_two_models_fit():
    state = create_model("cvt_13", num_classes=5).state_dict()
    assert [model.name for model in recognise(state)] == ["cvt_13", "cvt_13_384"]


@pytest.mark.parametrize(
    "changed",
    [
        lambda state: {key: value for key, value in state.items() if not key.startswith("stages.3")},
        lambda state: state | {"more.weight": torch.ones(3, 3)},
        lambda state: {key: value.reshape(-1) for key, value in state.items()},
        lambda state: {"w": torch.ones(2)},
    ],
)
def test_no_model_fits(changed):
    assert recognise(changed(state_of(1))) == []
