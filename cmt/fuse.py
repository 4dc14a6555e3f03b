"""Exact algebraic rewrites: a reference model becomes a new deployment model with the same logits.

Written for inference (eval mode). ``s`` and ``t`` are a norm's scale and shift, folded in float64 and rounded once:

* batch norm after a conv or linear:  ``s * (W x + b) + t  ==  (s W) x + (s b + t)``.
* affine before a conv or linear:  ``W (s x + t) + b  ==  (W s) x + (b + sum(W) t)``; for a conv only without padding, since
  zeros of the padding would become ``t``. LayerNorm's affine goes into q, into the unpadded reduction and into the IRFFN's
  first 1x1 conv; the stem's last batch norm into the first patch embedding; the IRFFN's second one into its last conv.
* a shortcut around a depthwise conv:  ``DW x + x  ==  (DW + I) x``: one is added to the centre tap.
* attention scale:  ``(q k^T) c  ==  (c q) k^T``: folded into the query projection.
* keys and values (queries too where they read the same tokens) become one matrix product, split along the last axis.

Not rewritten, because it would not be exact: a batch norm between an activation and a zero-padded conv (stem, IRFFN
expansion). It stays as one scale-and-shift, which a runtime attaches to the conv before it. Dropout and stochastic depth
are the identity in eval mode and disappear.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deploy.errors import InputError

from .layers import merge_heads, split_heads, to_map, to_tokens


def fuse(model: nn.Module) -> nn.Module:
    """A new module with the logits of ``model`` (difference below 1e-5) and fewer operations; ``model`` is untouched.

    Raises:
        InputError: the model is in training mode (batch statistics cannot be folded) or its family has no rewrite.
    """
    spec = getattr(model, "spec", None)
    if spec is None:
        raise InputError(f"{type(model).__name__} has no registered rewrite", remedy="build it with cmt.create_model")
    if model.training:
        raise InputError(
            "a model in training mode cannot be fused",
            why="its batch norms use the statistics of each batch",
            remedy="call model.eval()",
        )
    with torch.no_grad():
        fused = spec.fuse(model).eval()
    fused.spec, fused.img_size, fused.num_classes = spec, model.img_size, model.num_classes
    return fused.to(next(model.parameters()).dtype)


# --- rewrites of single layers: each takes float64 and returns new float64 modules ---------------------------------


def norm_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift, both ``(C,)`` float64, of a batch norm in eval mode or of a layer norm's affine part."""
    weight, bias = cast(Tensor, norm.weight).double(), cast(Tensor, norm.bias).double()
    if isinstance(norm, nn.BatchNorm2d):
        scale = weight / (cast(Tensor, norm.running_var).double() + norm.eps).sqrt()
        return scale, bias - cast(Tensor, norm.running_mean).double() * scale
    return weight, bias


def _like(layer: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    """A layer with the geometry of ``layer`` and new weights (float64)."""
    new: nn.Module
    if isinstance(layer, nn.Conv2d):
        new = nn.Conv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
            layer.groups,
        )  # type: ignore[arg-type]  # fmt: skip
    else:
        new = nn.Linear(weight.shape[1], weight.shape[0])
    new.weight, new.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    return new


def _parts(layer: nn.Module) -> tuple[Tensor, Tensor]:
    weight = cast(Tensor, layer.weight).double()
    bias = layer.bias
    return weight, torch.zeros(weight.shape[0], dtype=torch.float64) if bias is None else cast(Tensor, bias).double()


def affine_after(layer: nn.Module, scale: Tensor, shift: Tensor) -> nn.Module:
    """``scale * layer(x) + shift`` as one layer."""
    weight, bias = _parts(layer)
    return _like(layer, weight * scale.reshape(-1, *[1] * (weight.ndim - 1)), bias * scale + shift)


def affine_before(layer: nn.Module, scale: Tensor, shift: Tensor) -> nn.Module:
    """``layer(scale * x + shift)`` as one layer; refuses a zero-padded conv, where it would be wrong at the borders."""
    if isinstance(layer, nn.Conv2d) and any(layer.padding) and bool(shift.any()):  # type: ignore[arg-type]
        raise ValueError("an affine before a zero-padded conv cannot be folded exactly")
    weight, bias = _parts(layer)
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        if layer.groups != layer.in_channels or layer.groups != layer.out_channels:
            raise ValueError("only dense and depthwise convs are folded")
        return _like(
            layer, weight * scale.reshape(-1, 1, 1, 1), bias + weight.sum((1, 2, 3)) * shift
        )  # one input channel an output
    columns = (1, -1, *[1] * (weight.ndim - 2))
    summed = (weight * shift.reshape(columns)).flatten(1).sum(1)
    return _like(layer, weight * scale.reshape(columns), bias + summed)


def with_identity(depthwise: nn.Conv2d) -> nn.Conv2d:
    """``depthwise(x) + x`` as one depthwise conv (odd kernel, stride 1, same padding)."""
    kh, kw = depthwise.kernel_size
    if depthwise.groups != depthwise.in_channels or depthwise.stride != (1, 1) or depthwise.padding != (kh // 2, kw // 2):
        raise ValueError("the shortcut can be folded only into a depthwise conv of stride 1 with same padding")
    weight, bias = _parts(depthwise)
    weight = weight.clone()
    weight[:, 0, kh // 2, kw // 2] += 1
    return cast(nn.Conv2d, _like(depthwise, weight, bias))


def concatenate(*layers: nn.Module) -> nn.Module:
    """Linears over the same input as one, outputs stacked along the last axis."""
    weights, biases = zip(*map(_parts, layers), strict=True)
    return _like(layers[0], torch.cat(weights), torch.cat(biases))


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


# --- CMT ------------------------------------------------------------------------------------------------------------


class FusedAttention(nn.Module):
    """Attention of :class:`cmt.cmt.Attention` over plainly normalised tokens, everything before it folded in."""

    def __init__(self, attn: nn.Module, norm: nn.LayerNorm) -> None:
        super().__init__()
        scale, shift = norm_affine(norm)
        self.heads, self.reduction = attn.heads, attn.reduction
        self.dim = attn.q.in_features  # type: ignore[union-attr]
        c = torch.tensor((self.dim / attn.heads) ** -0.5, dtype=torch.float64)  # type: ignore[operator]
        q = affine_after(affine_before(attn.q, scale, shift), c, c * 0)
        if self.reduction > 1:  # type: ignore[operator]
            self.reduce = affine_after(affine_before(attn.reduce, scale, shift), *norm_affine(attn.reduce_norm))
            self.q, self.kv = q, concatenate(attn.k, attn.v)
        else:
            self.qkv = concatenate(q, affine_before(attn.k, scale, shift), affine_before(attn.v, scale, shift))
        self.proj = _like(attn.proj, *_parts(attn.proj))

    def forward(self, x: Tensor, size: tuple[int, int], position_bias: Tensor) -> Tensor:
        """``x`` (B, N, C) -> (B, N, C)."""
        if self.reduction > 1:  # type: ignore[operator]
            reduced = to_tokens(self.reduce(to_map(x, *size)))  # (B, Nk, C)
            parts = (self.q(x), *self.kv(reduced).split(self.dim, -1))
        else:
            parts = self.qkv(x).split(self.dim, -1)
        q, k, v = (split_heads(t, self.heads) for t in parts)  # type: ignore[arg-type]
        scores = q @ k.transpose(-2, -1) + position_bias  # (B, heads, N, Nk)
        return self.proj(merge_heads(scores.softmax(-1) @ v))


class FusedFFN(nn.Module):
    """IRFFN of :class:`cmt.cmt.InvertedResidualFFN` over plainly normalised input: three convs, one scale-and-shift."""

    def __init__(self, ffn: nn.Module, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.expand = affine_before(ffn.expand, *norm_affine(norm))
        self.expand_norm = ScaleShift(ffn.expand_norm)
        self.depthwise = with_identity(cast(nn.Conv2d, ffn.depthwise))
        project = affine_before(ffn.project, *norm_affine(ffn.depthwise_norm))
        self.project = affine_after(project, *norm_affine(ffn.project_norm))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = self.expand_norm(F.gelu(self.expand(x)))
        return self.project(F.gelu(self.depthwise(x)))


class FusedBlock(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.lpu = with_identity(cast(nn.Conv2d, block.lpu))
        norm1, norm2 = cast(nn.LayerNorm, block.norm1), cast(nn.LayerNorm, block.norm2)
        self.norm1, self.norm2 = PlainNorm(norm1), PlainNorm(norm2)
        self.attn = FusedAttention(cast(nn.Module, block.attn), norm1)
        self.ffn = FusedFFN(cast(nn.Module, block.ffn), norm2)

    def forward(self, x: Tensor, position_bias: Tensor) -> Tensor:
        size = (x.shape[2], x.shape[3])
        tokens = to_tokens(self.lpu(x))  # (B, N, C)
        tokens = tokens + self.attn(self.norm1(tokens), size, position_bias)
        return to_map(tokens, *size) + self.ffn(to_map(self.norm2(tokens), *size))


class FusedStage(nn.Module):
    def __init__(self, stage: nn.Module, embed: nn.Module) -> None:
        super().__init__()
        norm = cast(nn.LayerNorm, stage.norm)
        self.embed = embed
        self.norm = nn.LayerNorm(norm.normalized_shape, eps=norm.eps)
        self.norm.load_state_dict(norm.state_dict())
        self.position_bias = nn.Parameter(cast(Tensor, stage.position_bias).detach().clone())
        self.blocks = nn.ModuleList(FusedBlock(b) for b in cast(nn.ModuleList, stage.blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = to_map(self.norm(to_tokens(x)), x.shape[2], x.shape[3])
        for block in self.blocks:
            x = block(x, self.position_bias)
        return x


class FusedCMT(nn.Module):
    """Deployment form of :class:`cmt.cmt.CMT`; build it with :func:`fuse`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        first, second, third = cast(nn.Sequential, model.stem)
        self.stem = nn.Sequential(
            _like(first.conv, *_parts(first.conv)), nn.GELU(), ScaleShift(first.norm),
            _like(second.conv, *_parts(second.conv)), nn.GELU(), ScaleShift(second.norm),
            _like(third.conv, *_parts(third.conv)), nn.GELU(),
        )  # fmt: skip
        stages = list(cast(nn.ModuleList, model.stages))
        embeds = [affine_before(stages[0].embed, *norm_affine(third.norm))]  # 2x2, no padding: exact
        embeds += [_like(s.embed, *_parts(s.embed)) for s in stages[1:]]
        self.stages = nn.ModuleList(FusedStage(s, e) for s, e in zip(stages, embeds, strict=True))
        head = cast(nn.Module, model.head)
        self.conv = affine_after(head.conv, *norm_affine(head.norm))  # type: ignore[arg-type]
        self.fc = _like(head.fc, *_parts(head.fc))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.fc(F.silu(self.conv(x)).mean((2, 3)))


def fuse_cmt(model: nn.Module) -> nn.Module:
    """:func:`fuse` for the CMT family."""
    return FusedCMT(model)
