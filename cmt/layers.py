"""Blocks that more than one family uses.

Every reshape leaves the batch to ``-1``, so that an exported graph holds no batch size but that of its input.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def to_tokens(x: Tensor) -> Tensor:
    """``(B, C, H, W)`` -> ``(B, H*W, C)``, row-major.

    A runtime that keeps the map channel-last sees a view in this permutation and reshape. ``flatten``
    followed by ``transpose`` made OpenVINO reorder and transpose in every block.
    """
    _, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).reshape(-1, h * w, c)


def to_map(x: Tensor, height: int, width: int) -> Tensor:
    """``(B, H*W, C)`` -> ``(B, C, H, W)``; the inverse of :func:`to_tokens`."""
    c = x.shape[2]
    return x.reshape(-1, height, width, c).permute(0, 3, 1, 2)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``(B, N, C)`` -> ``(B, heads, N, C // heads)``."""
    _, n, c = x.shape
    return x.reshape(-1, n, heads, c // heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """``(B, heads, N, d)`` -> ``(B, N, heads * d)``; the inverse of :func:`split_heads`."""
    _, heads, n, d = x.shape
    return x.transpose(1, 2).reshape(-1, n, heads * d)


class DropPath(nn.Module):
    """Stochastic depth: drops a residual branch for whole samples in training (Huang et al., ECCV 2016)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        mask = (
            torch.rand(
                x.shape[0],
                *[1] * (x.ndim - 1),
                device=x.device,
                dtype=x.dtype,
            )
            < keep
        )
        return x * mask / keep


class ResidualDepthwise(nn.Conv2d):
    """A depthwise conv with a shortcut: ``x + conv(x)``, stride 1, same padding."""

    def __init__(self, channels: int, kernel_size: int = 3) -> None:
        super().__init__(
            channels,
            channels,
            kernel_size,
            padding=kernel_size // 2,
            groups=channels,
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def apply_scale(x: Tensor, scale: float) -> Tensor:
    """``x * scale``, without the multiplication by a scale that has been folded away."""
    return x if scale == 1.0 else x * scale
