"""Parameters and multiply-accumulates of a model."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .spec import Classifier


def count_params(model: nn.Module) -> int:
    """Number of learnable parameters (buffers are not counted)."""
    return sum(p.numel() for p in model.parameters())


def macs(model: nn.Module, img_size: int | None = None) -> int:
    """Multiply-accumulates of one image: convolutions, linears and matrix products only.

    Biases, norms, softmax, activations and pooling are not counted; papers print this figure under the name
    FLOPs. The model runs on the ``meta`` device, where nothing is computed, so that even a large one is fast.

    Args:
        model: takes float32 ``(N, 3, S, S)``; it stays as it is.
        img_size: ``S`` in pixels (default: the model's ``img_size``).
    """
    size = img_size or cast(Classifier, model).img_size
    meta = copy.deepcopy(model).to("meta", torch.float32).eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        meta(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() // 2
