"""Parameters and multiply-accumulates of a model."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_params(model: nn.Module) -> int:
    """Number of learnable parameters (buffers are not counted)."""
    return sum(p.numel() for p in model.parameters())


def macs(model: nn.Module, img_size: int | None = None) -> int:
    """Multiply-accumulates of one image: convolutions, linears and matrix products only.

    Biases, norms, softmax, activations and pooling are not counted; papers print this figure under the name
    FLOPs. The model is traced on the ``meta`` device, so nothing is computed and the size does not matter.
    """
    size = img_size or int(model.img_size)  # type: ignore[arg-type]
    meta = copy.deepcopy(model).to("meta", torch.float32).eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        meta(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() // 2
