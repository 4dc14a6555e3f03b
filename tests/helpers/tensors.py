"""Random batches, and how far two answers lie apart."""

from __future__ import annotations

import torch


def images(count: int, size: int, seed: int = 0, *, width: int | None = None) -> torch.Tensor:
    """A batch like normalised images, float32 ``(count, 3, size, width)``; or square."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, width or size, generator=generator)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference of two tensors of equal shape."""
    assert a.shape == b.shape
    return float((a - b).abs().max())


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference of two tensors of equal shape, relative to max(1, largest value of ``b``)."""
    return difference(a, b) / max(1.0, float(b.abs().max()))
