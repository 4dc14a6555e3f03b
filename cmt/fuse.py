"""Exact algebraic rewrites: a reference model becomes a new deployment model with the same logits.

Written for inference (eval mode). ``s`` and ``t`` are a norm's scale and shift, folded in float64 and rounded once:

* batch norm after a conv or linear:  ``s * (W x + b) + t  ==  (s W) x + (s b + t)``.
* affine before a conv or linear:  ``W (s x + t) + b  ==  (W s) x + (b + sum(W) t)``; for a conv only without padding, since
  zeros of the padding would become ``t``. LayerNorm's affine goes into q, into the unpadded reduction and into the IRFFN's
  first 1x1 conv; the stem's last batch norm into the first patch embedding; the IRFFN's second one into its last conv.
* a shortcut around a depthwise conv:  ``DW x + x  ==  (DW + I) x``: one is added to the centre tap.
* attention scale:  ``(q k^T) c  ==  (c q) k^T``: folded into the query projection.

Not rewritten, because it would not be exact: a batch norm between an activation and a zero-padded conv (stem, IRFFN
expansion). It stays as one scale-and-shift, which a runtime attaches to the conv before it. Merging the products for
queries, keys and values was measured and left out: splitting the result again cost what the larger product saved. Dropout and stochastic depth
are the identity in eval mode and disappear.
"""

from __future__ import annotations

import copy
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deploy.errors import InputError

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


def fuse(model: nn.Module) -> nn.Module:
    """A new module with the logits of ``model`` (difference below 1e-5) and fewer operations; ``model`` is untouched.

    Raises:
        InputError: the model is in training mode (batch statistics cannot be folded) or its family has no rewrite.
    """
    spec = getattr(model, "spec", None)
    if spec is None:
        raise InputError(f"{type(model).__name__} has no registered rewrite", remedy="build it with cmt.create_model")
    if getattr(model, "fused", False):
        raise InputError("the model is fused already", remedy="keep the reference model and fuse that")
    if model.training:
        raise InputError(
            "a model in training mode cannot be fused",
            why="its batch norms use the statistics of each batch",
            remedy="call model.eval()",
        )
    with torch.no_grad():
        fused = spec.fuse(model).eval()
    fused.fused, fused.spec, fused.img_size, fused.num_classes = True, spec, model.img_size, model.num_classes
    return fused.to(next(model.parameters()).dtype)


# --- rewrites of single layers: each returns a new float64 module --------------------------------------------------


def norm_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift, both ``(C,)`` float64, of a batch norm in eval mode or of a layer norm's affine part."""
    weight, bias = cast(Tensor, norm.weight).double(), cast(Tensor, norm.bias).double()
    if isinstance(norm, nn.BatchNorm2d):
        scale = weight / (cast(Tensor, norm.running_var).double() + norm.eps).sqrt()
        return scale, bias - cast(Tensor, norm.running_mean).double() * scale
    return weight, bias


def with_weights(layer: Layer, weight: Tensor, bias: Tensor) -> Layer:
    """A copy of ``layer`` with new weights (float64)."""
    new = copy.deepcopy(layer)
    new.weight, new.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    return new


def doubled(layer: nn.Conv2d | nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias in float64; a missing bias is zero."""
    weight = layer.weight.double()
    return weight, weight.new_zeros(weight.shape[0]) if layer.bias is None else layer.bias.double()


def unchanged(layer: Layer) -> Layer:
    """A copy in float64."""
    return with_weights(layer, *doubled(layer))


def affine_after(layer: Layer, scale: Tensor, shift: Tensor) -> Layer:
    """``scale * layer(x) + shift`` as one layer."""
    weight, bias = doubled(layer)
    return with_weights(layer, weight * scale.reshape(-1, *[1] * (weight.ndim - 1)), bias * scale + shift)


def affine_before(layer: Layer, scale: Tensor, shift: Tensor) -> Layer:
    """``layer(scale * x + shift)`` as one layer; refuses a zero-padded conv, where it would be wrong at the borders."""
    weight: Tensor
    weight, bias = doubled(layer)
    per_channel = [1, -1, *[1] * (weight.ndim - 2)]
    if isinstance(layer, nn.Conv2d):
        if layer.padding != (0, 0) and bool(shift.any()):
            raise ValueError("an affine before a zero-padded conv cannot be folded exactly")
        if is_depthwise(layer):
            per_channel = [-1, 1, 1, 1]  # such a filter reads the one input channel of its own number
        elif layer.groups > 1:
            raise ValueError("only dense and depthwise convs are folded")
    constant = (weight * shift.reshape(per_channel)).flatten(1).sum(1)
    return with_weights(layer, weight * scale.reshape(per_channel), bias + constant)


def is_depthwise(conv: nn.Conv2d) -> bool:
    """One filter a channel."""
    return conv.groups == conv.in_channels == conv.out_channels


def with_identity(depthwise: nn.Conv2d) -> nn.Conv2d:
    """``depthwise(x) + x`` as one depthwise conv (odd kernel, stride 1, same padding)."""
    kh, kw = depthwise.kernel_size
    same = depthwise.stride == (1, 1) and depthwise.padding == (kh // 2, kw // 2) and depthwise.dilation == (1, 1)
    if not (is_depthwise(depthwise) and same and kh % 2 and kw % 2):
        raise ValueError("the shortcut can be folded only into a depthwise conv of stride 1 with same padding")
    weight, bias = doubled(depthwise)
    weight = weight.clone()
    weight[:, 0, kh // 2, kw // 2] += 1
    return with_weights(depthwise, weight, bias)


class ScaleShift(nn.Module):
    """A batch norm that could not be folded: ``x * scale + shift`` per channel of ``(B, C, H, W)``."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        scale, shift = norm_affine(norm)
        self.scale, self.shift = (nn.Parameter(t.reshape(1, -1, 1, 1)) for t in (scale, shift))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class PlainNorm(nn.Module):
    """Layer norm over the last axis without an affine part."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.shape, self.eps = norm.normalized_shape, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.shape, eps=self.eps)
