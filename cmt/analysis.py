"""Parameters and multiply-accumulates of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .spec import Classifier


def count_params(model: nn.Module) -> int:
    """Number of learnable parameters (buffers are not counted)."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, img_size: int | None = None) -> int:
    """Multiply-accumulates of one image: convolutions, linears and matrix products only.

    Biases, norms, softmax, activations and pooling are not counted; papers print this figure under the name
    FLOPs. The model runs on one real image, so that whatever its ``forward`` makes lies on the right device.

    Args:
        model: takes float32 ``(N, 3, S, S)``; it stays as it is.
        img_size: ``S`` in pixels (default: the model's ``img_size``).
    """
    size = img_size or cast(Classifier, model).img_size
    first = next(model.parameters(), torch.zeros(0))
    image = torch.zeros(1, 3, size, size, device=first.device)
    counter = FlopCounterMode(display=False)
    # Attention is counted as the two matrix products that it is made of.
    with (
        evaluating(model),
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        _plain_attention(),
        counter,
    ):
        model(image)
    return counter.get_total_flops() // 2


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Let ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` compute step by step: the counter does
    not know the operations in which they do everything at once in eval mode."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def try_macs(model: nn.Module) -> int | None:
    """:func:`count_macs`; ``None`` where it cannot be counted, because nothing else depends on it."""
    try:
        return count_macs(model)
    except Exception:  # the user's code under a counter: anything may happen
        return None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model`` in eval mode; afterwards each of its modules is in the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
