"""Values of checkpoints: their types, masks and fingerprints, and models that PyTorch itself has wrapped."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from cmt_edge.cmt import compute_weights_fingerprint, load_weights
from cmt_edge.deploy.errors import WeightsError
from helpers.weights import GOOD, OTHER, Enclosing, nano, result_of, saved, trained


class Masked(nn.Module):
    """A model with a causal mask among its weights."""

    def __init__(self, mask) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)
        self.register_buffer("mask", mask)


def masked(mask) -> nn.Module:
    model = Masked(mask)
    model.spec, model.num_classes = nano().spec, 2
    return model


CAUSAL = torch.full((4, 4), float("-inf")).triu(1)


@pytest.mark.parametrize("made", [CAUSAL, torch.zeros(4, 4)], ids=["made", "loaded"])
def test_a_mask_is_no_divergence(tmp_path, made):
    model = masked(made.clone())
    path = saved(tmp_path, masked(CAUSAL.clone()).state_dict())
    load_weights(model, path)
    assert torch.equal(model.mask, CAUSAL)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_other_values_in_a_mask_are_a_divergence(tmp_path, value):
    state = masked(CAUSAL.clone()).state_dict()
    state["mask"][0, 1] = value
    with pytest.raises(WeightsError, match="1 not finite: mask"):
        load_weights(masked(CAUSAL.clone()), saved(tmp_path, state))


def test_values_beyond_the_models_type_are_a_divergence(tmp_path):
    state = {k: v.double() if v.is_floating_point() else v for k, v in GOOD.items()}
    state["head.fc.weight"][0, 0] = 1e39
    with pytest.raises(WeightsError, match=r"not finite: head\.fc\.weight"):
        load_weights(nano(), saved(tmp_path, state))


TYPES = [
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.complex64,
    torch.bool,
    torch.uint8,
    torch.uint16,
    torch.float8_e4m3fn,
    torch.int8,
]


@pytest.mark.parametrize("dtype", TYPES)
def test_a_fingerprint_of_any_type(dtype):
    hashes = set()
    for value in (0, 1):
        model = nn.Linear(2, 2)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        model.register_buffer("t", torch.full((3,), float(value)).to(dtype))
        model.register_buffer("scalar", torch.tensor(float(value)).to(dtype))
        hashes.add(compute_weights_fingerprint(model))
    assert len(hashes) == 2


def test_a_fingerprint_is_the_one_of_earlier_bundles():
    """Bundles hold it: it must not change for the types that they have."""
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
        model.bias.zero_()
    assert compute_weights_fingerprint(model).startswith(FINGERPRINT)


FINGERPRINT = "c78fe3e46a1e585c"
"""First digits of the hash that the first release gives."""


def test_averaged_model_of_torch(tmp_path):
    """What torchvision's reference training saves as ``model_ema``, and swa_utils alone."""
    average = torch.optim.swa_utils.AveragedModel(trained(), use_buffers=True)
    average.update_parameters(trained())
    assert result_of(tmp_path, average.state_dict()).ema
    assert result_of(tmp_path, {"model": OTHER, "model_ema": average.state_dict()}).ema


def test_compiled_model(tmp_path):
    compiled = torch.compile(trained(), backend="eager")
    result_of(tmp_path, compiled.state_dict())
    result_of(tmp_path, {"state_dict": Enclosing(net=compiled, criterion=nn.BCELoss()).state_dict()})


def test_data_parallel_model(tmp_path):
    result_of(tmp_path, nn.DataParallel(trained()).state_dict())


def test_a_pickled_model_keeps_its_answers(tmp_path):
    model = trained()
    torch.save(model, tmp_path / "whole.pt")
    other = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert compute_weights_fingerprint(other) == compute_weights_fingerprint(model)
    assert pickle.loads(pickle.dumps(model)).spec is model.spec
