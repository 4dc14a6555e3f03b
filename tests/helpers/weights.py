"""Checkpoints of cmt_nano with random weights."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from cmt_edge.cmt import create_model, load_weights
from cmt_edge.cmt.weights import randomize

NANO = "cmt_nano"


def nano(seed: int = 0, **options):
    return create_model(NANO, seed=seed, **options)


def state_of(seed: int, **options) -> dict[str, torch.Tensor]:
    model = nano(**options)
    randomize(model, seed)
    return model.state_dict()


def holds(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def release(model, ema) -> dict:
    """The container of the official training code."""
    args = argparse.Namespace(lr=1e-3, model="cmt", opt_betas=None, output_dir="out")
    return {
        "model": model,
        "model_ema": ema,
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "lr_scheduler": {"last_epoch": 3},
        "epoch": 300,
        "args": args,
    }


def saved(tmp_path: Path, content, name: str = "model.pth") -> Path:
    path = tmp_path / name
    if name.endswith(".safetensors"):
        save_file({k: v.contiguous() for k, v in content.items()}, path)
    else:
        torch.save(content, path)
    return path


GOOD = state_of(1)
"""The weights that every container must give."""

NAMES = tuple("abcdefghij")
"""Names of the ten classes of cmt_nano."""


def result_of(tmp_path: Path, content, name: str = "model.pth", **options):
    """What is told of a checkpoint that holds ``GOOD`` in some form, after it was loaded."""
    model = nano()
    loaded = load_weights(model, saved(tmp_path, content, name), **options)
    assert holds(model, GOOD | {k: v for k, v in model.state_dict().items() if "num_batches" in k})
    return loaded


OTHER = state_of(2)
"""Weights that a container holds beside those."""


class Enclosing(nn.Module):
    """A trainer's module around a model."""

    def __init__(self, **parts) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def trained() -> nn.Module:
    """A cmt_nano with :data:`GOOD`."""
    model = nano()
    model.load_state_dict(GOOD)
    return model
