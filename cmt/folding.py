"""The algebra of single layers: scales and shifts are folded into convs and linears.

Each function returns a new layer with float64 weights and leaves its argument as it is. The rewrites of
:mod:`cmt_edge.cmt.rewrites` are made of these.
"""

from __future__ import annotations

import copy
from typing import TypeVar, cast

from torch import Tensor, nn
from torch.nn import functional as F

Foldable = TypeVar("Foldable", nn.Conv2d, nn.Linear)
"""A layer that can take a scale and a shift."""


def read_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift, both ``(C,)`` float64, of a batch norm in eval mode or of a layer norm's affine
    part."""
    weight = cast(Tensor, norm.weight).double()
    bias = cast(Tensor, norm.bias).double()
    if not isinstance(norm, nn.BatchNorm2d):
        return weight, bias
    mean = cast(Tensor, norm.running_mean).double()
    variance = cast(Tensor, norm.running_var).double()
    scale = weight / (variance + norm.eps).sqrt()
    return scale, bias - mean * scale


def read_weights(layer: nn.Conv2d | nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias in float64; a missing bias is zero."""
    weight = layer.weight.double()
    if layer.bias is None:
        return weight, weight.new_zeros(weight.shape[0])
    return weight, layer.bias.double()


def replace_weights(layer: Foldable, weight: Tensor, bias: Tensor) -> Foldable:
    """A copy of ``layer`` with new weights (float64)."""
    new = copy.deepcopy(layer)
    new.weight = nn.Parameter(weight.detach())
    new.bias = nn.Parameter(bias.detach())
    return new


def remove_bias(layer: nn.Conv2d | nn.Linear | nn.LayerNorm) -> None:
    """Take the bias of ``layer`` away, in place."""
    layer.register_parameter("bias", None)


def fold_affine_after(layer: Foldable, scale: Tensor, shift: Tensor) -> Foldable:
    """``scale * layer(x) + shift`` as one layer."""
    weight, bias = read_weights(layer)
    rows = scale.reshape(-1, *[1] * (weight.ndim - 1))
    return replace_weights(layer, weight * rows, bias * scale + shift)


def fold_affine_before(layer: Foldable, scale: Tensor, shift: Tensor) -> Foldable:
    """``layer(scale * x + shift)`` as one layer.

    Raises:
        ValueError: the conv pads with zeros, where the result would be wrong at the borders; or it is neither
            dense nor depthwise.
    """
    weight: Tensor
    weight, bias = read_weights(layer)
    per_channel = [1, -1, *[1] * (weight.ndim - 2)]
    if isinstance(layer, nn.Conv2d):
        if layer.padding != (0, 0) and bool(shift.any()):
            raise ValueError("an affine before a zero-padded conv cannot be folded exactly")
        if is_depthwise(layer):
            per_channel = [
                -1,
                1,
                1,
                1,
            ]  # such a filter reads the one input channel of its own number
        elif layer.groups > 1:
            raise ValueError("only dense and depthwise convs are folded")
    constant = (weight * shift.reshape(per_channel)).flatten(1).sum(1)
    return replace_weights(layer, weight * scale.reshape(per_channel), bias + constant)


def is_depthwise(conv: nn.Conv2d) -> bool:
    """Whether ``conv`` has one filter for each channel."""
    return conv.groups == conv.in_channels == conv.out_channels


def fold_identity(depthwise: nn.Conv2d) -> nn.Conv2d:
    """``depthwise(x) + x`` as one depthwise conv (odd kernel, stride 1, same padding)."""
    height, width = depthwise.kernel_size
    odd = height % 2 == 1 and width % 2 == 1
    plain = depthwise.stride == (1, 1) and depthwise.dilation == (1, 1)
    same = depthwise.padding == (height // 2, width // 2)
    if not (is_depthwise(depthwise) and odd and plain and same):
        raise ValueError(
            "the shortcut can be folded only into a depthwise conv of stride 1 with same padding"
        )
    weight, bias = read_weights(depthwise)
    weight = weight.clone()
    weight[:, 0, height // 2, width // 2] += 1
    return replace_weights(depthwise, weight, bias)


class ScaleShift(nn.Module):
    """A batch norm that could not be folded: ``x * scale + shift`` for each channel of ``(B, C, H, W)``."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        scale, shift = read_affine(norm)
        self.scale = nn.Parameter(scale.reshape(1, -1, 1, 1))
        self.shift = nn.Parameter(shift.reshape(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class GlobalMean(nn.Module):
    """Mean over the map: ``(B, C, H, W)`` -> ``(B, C, 1, 1)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


class PlainNorm(nn.Module):
    """Layer norm over the last axis without an affine part; the number ``shift`` is added to all values."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.shape = norm.normalized_shape
        self.eps = norm.eps
        self.shift = 0.0

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x, self.shape, eps=self.eps)
        return normed + self.shift if self.shift else normed
