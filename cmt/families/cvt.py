"""CvT: Introducing Convolutions to Vision Transformers (Wu et al., ICCV 2021, arXiv 2103.15808).

Epsilons, paddings and the order of layers follow the official code (microsoft/CvT, commit f851e68). Where it
surprises: attention is scaled by the *whole* width, ``dim ** -0.5``, not by that of a head; the first token
embedding pads a 7x7 conv by 2, not 3; the activation is ``x * sigmoid(1.702 x)``; only the last stage has a
class token, which skips the convolutional projections. There is no position embedding: the same weights serve
every resolution.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..folding import fold_affine_after, fold_affine_before
from ..layers import (
    DropPath,
    apply_scale,
    merge_heads,
    split_heads,
    to_map,
    to_tokens,
)
from ..rewrites import (
    drop_key_bias,
    fold_affine,
    fold_batch_norm,
    fold_scale,
    fold_value_bias,
    keep_class_token,
    replace_each,
)
from ..spec import Classifier, KeyRenames, ModelSpec, make_rename


@dataclass(frozen=True)
class CvTConfig:
    """Widths and depths of one variant (paper, Table 2); the tuples have one entry a stage."""

    dims: tuple[int, int, int]
    depths: tuple[int, int, int]
    heads: tuple[int, int, int]
    mlp_ratio: int = 4
    drop_path: float = 0.0


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)``, close to GELU but not equal."""

    SLOPE = 1.702
    """Factor of the sigmoid's argument."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.SLOPE * x)


class MLP(nn.Module):
    """Two linears with an activation between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act: nn.Module = QuickGELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.fc2(self.act(self.fc1(x)))
        return mixed


class Projection(nn.Module):
    """Convolutional projection (paper, section 3.2): depthwise conv and batch norm on the map, then a linear
    on the tokens."""

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            dim,
            dim,
            3,
            stride=stride,
            padding=1,
            groups=dim,
            bias=False,
        )
        self.norm = nn.BatchNorm2d(dim)
        self.linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor, class_token: Tensor | None) -> Tensor:
        """``x`` (B, C, H, W), ``class_token`` (B, 1, C) -> (B, [1 +] H/stride * W/stride, C).

        The class token skips the conv.
        """
        tokens = to_tokens(self.norm(self.conv(x)))
        if class_token is not None:
            tokens = torch.cat((class_token, tokens), 1)
        projected: Tensor = self.linear(tokens)
        return projected


class Attention(nn.Module):
    """Multi-head self-attention over convolutional projections.

    Keys and values come from a map of half the size.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = dim**-0.5  # of the whole width, as in the official code
        self.q, self.k, self.v = (Projection(dim, stride) for stride in (1, 2, 2))
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        class_token: Tensor | None,
        class_only: bool = False,
    ) -> Tensor:
        """``x`` (B, C, H, W), ``class_token`` (B, 1, C) -> (B, [1 +] H*W, C), or (B, 1, C) for
        ``class_only``, where the class token makes the only query."""
        q = self.q.linear(class_token) if class_only else self.q(x, class_token)
        q, k, v = (split_heads(t, self.heads) for t in (q, self.k(x, class_token), self.v(x, class_token)))
        scores = apply_scale(q @ k.transpose(-2, -1), self.scale)  # (B, heads, Nq, Nk)
        mixed: Tensor = self.proj(merge_heads(scores.softmax(-1) @ v))
        return mixed


class Block(nn.Module):
    """Attention and MLP, each with a shortcut."""

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, hidden)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        x: Tensor,
        size: tuple[int, int],
        prefix: int,
        class_only: bool = False,
    ) -> Tensor:
        """(B, prefix + H*W, C) -> (B, prefix + H*W, C), or only its first row (B, 1, C) for ``class_only``.

        ``prefix`` is the number of class tokens, 0 or 1.
        """
        y = self.norm1(x)
        classes, grid = (y[:, :1], y[:, 1:]) if prefix else (None, y)
        x = x[:, :1] if class_only else x
        x = x + self.drop_path(self.attn(to_map(grid, *size), classes, class_only))
        branch: Tensor = self.drop_path(self.mlp(self.norm2(x)))
        return x + branch


class Stage(nn.Module):
    """Convolutional token embedding, then blocks; the last stage prepends a class token."""

    def __init__(
        self,
        in_dim: int,
        dim: int,
        heads: int,
        hidden: int,
        *,
        first: bool,
        last: bool,
        drop_paths: list[float],
    ) -> None:
        super().__init__()
        kernel, stride, padding = (7, 4, 2) if first else (3, 2, 1)
        self.embed = nn.Conv2d(in_dim, dim, kernel, stride=stride, padding=padding)
        self.norm = nn.LayerNorm(dim)
        self.class_token: nn.Parameter | None = None
        if last:
            self.class_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        self.blocks = nn.ModuleList(Block(dim, heads, hidden, rate) for rate in drop_paths)

    def forward(
        self,
        x: Tensor,
        class_only: bool = False,
    ) -> tuple[Tensor, tuple[int, int]]:
        """(B, C_in, ..) -> tokens (B, [1 +] H*W, C), or the class token (B, 1, C) alone; and (H, W)."""
        x = self.embed(x)
        size = (x.shape[2], x.shape[3])
        prefix = 0
        x = self.norm(to_tokens(x))
        if self.class_token is not None:
            prefix = 1
            x = torch.cat((self.class_token.expand(x.shape[0], -1, -1), x), 1)
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x, size, prefix)
        return last(x, size, prefix, class_only), size


class CvT(Classifier):
    """CvT classifier: float32 ``(N, 3, S, S)`` -> logits ``(N, num_classes)``.

    No weight depends on ``S``; ``img_size`` is only the usual one.
    """

    def __init__(self, config: CvTConfig, *, img_size: int, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.img_size = img_size
        self.num_classes = num_classes
        self.class_only = False
        """Whether the last block computes the class token alone in :meth:`forward`: a deployment rewrite."""
        in_dims, last = (3, *config.dims), len(config.dims) - 1
        self.stages = nn.ModuleList(
            Stage(
                in_dims[i],
                dim,
                config.heads[i],
                dim * config.mlp_ratio,
                first=i == 0,
                last=i == last,
                drop_paths=torch.linspace(
                    0,
                    config.drop_path if i == last else 0,
                    config.depths[i],
                ).tolist(),
            )
            for i, dim in enumerate(config.dims)
        )
        self.norm = nn.LayerNorm(config.dims[-1])
        self.head = nn.Linear(config.dims[-1], num_classes)
        self.apply(_init)

    def features(self, x: Tensor) -> list[Tensor]:
        """The map of each stage, ``(B, dims[i], S/4 >> i, S/4 >> i)``; the class token is not part of it."""
        maps = self._compute_first_maps(x)
        tokens, size = self.stages[-1](maps[-1])
        return [*maps, to_map(tokens[:, 1:], *size)]

    def forward(self, x: Tensor) -> Tensor:
        tokens, _ = self.stages[-1](self._compute_first_maps(x)[-1], self.class_only)
        logits: Tensor = self.head(self.norm(tokens[:, 0]))
        return logits

    def _compute_first_maps(self, x: Tensor) -> list[Tensor]:
        """The maps of all stages but the last."""
        *stages, _ = self.stages
        maps = []
        for stage in stages:
            tokens, size = stage(x)
            x = to_map(tokens, *size)
            maps.append(x)
        return maps


def _init(module: nn.Module) -> None:
    """Initialisation of the official code: truncated normal for linears, PyTorch's own for convs."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


_RENAMES: KeyRenames = [
    (re.compile(r"^stage(\d)\."), r"stages.\1."),
    (re.compile(r"\.patch_embed\.proj\."), ".embed."),
    (re.compile(r"\.patch_embed\.norm\."), ".norm."),
    (re.compile(r"\.cls_token$"), ".class_token"),
    (re.compile(r"\.conv_proj_([qkv])\.conv\."), r".\1.conv."),
    (re.compile(r"\.conv_proj_([qkv])\.bn\."), r".\1.norm."),
    (re.compile(r"\.proj_([qkv])\."), r".\1.linear."),
]
"""Published key -> ours."""


# --- deployment rewrites of this family -----------------------------------------------------------


def _use_silu(module: nn.Module) -> nn.Module:
    """The slope of the activation goes into the linears around it."""
    mlp = cast(MLP, copy.deepcopy(module))
    hidden = mlp.fc2.in_features
    slope = torch.tensor(QuickGELU.SLOPE, dtype=torch.float64)
    mlp.fc1 = fold_affine_after(mlp.fc1, slope, slope * 0)
    mlp.fc2 = fold_affine_before(mlp.fc2, (1 / slope).expand(hidden), torch.zeros(hidden))
    mlp.act = nn.SiLU()
    return mlp


# norm1 keeps its affine part: the zero-padded convs of q, k and v read it, and so does the class token, which
# skips them.
REWRITES = (
    fold_batch_norm("conv", "norm"),
    fold_scale("q.linear"),
    drop_key_bias("k.linear"),
    fold_value_bias("v.linear", "proj"),
    fold_affine("norm2", "mlp.fc1"),
    replace_each(
        "quick GELU as SiLU",
        "x sigmoid(c x) == silu(c x) / c",
        MLP,
        _use_silu,
    ),
    fold_affine("norm", "head"),
    keep_class_token(),
)
"""The exact rewrites of CvT, in the order in which they apply."""

_FIGURES = "official README; MACs and parameters counted on the official code"
"""Where the figures come from."""


def _make_spec(
    name: str,
    img_size: int,
    config: CvTConfig,
    params: int,
    macs: int,
    top1: str,
    data: str,
) -> ModelSpec:
    """One variant; ``data`` is what its published weights were pre-trained on."""
    return ModelSpec(
        name=name,
        family="CvT",
        constructor=CvT,
        config=config,
        img_size=img_size,
        size_multiple=16,  # maps of exactly S/4, S/8 and S/16; keys and values round an odd map up
        rewrites=REWRITES,
        rename=make_rename(_RENAMES),
        head_keys=("head.weight", "head.bias"),
        strides=(4, 8, 16),
        crop_ratio=0.875 if img_size == 224 else None,
        pretrained=None,  # the files are in a shared OneDrive folder, where none has an address of its own
        params=params,
        macs=macs,
        top1=top1,
        source=f"{_FIGURES}; top-1 of the weights pre-trained on {data}",
    )


# fmt: off
_CONFIGS = {
    "cvt_13": CvTConfig((64, 192, 384),   (1, 2, 10), (1, 3, 6)),
    "cvt_21": CvTConfig((64, 192, 384),   (1, 4, 16), (1, 3, 6)),
    "cvt_w24": CvTConfig((192, 768, 1024), (2, 2, 20), (3, 12, 16)),
}
"""Widths, depths and heads of the variants, one number for each stage."""

SPECS = (
    #     name        size  config   params             macs  top-1   pre-trained on
    _make_spec("cvt_13",     224, _CONFIGS["cvt_13"],  19_997_480,   4_566_089_216, "81.6", "IN-1k"),
    _make_spec("cvt_21",     224, _CONFIGS["cvt_21"],  31_622_696,   7_177_985_024, "82.5", "IN-1k"),
    _make_spec("cvt_13_384", 384, _CONFIGS["cvt_13"],  19_997_480,  16_269_359_616, "83.0", "IN-1k"),
    _make_spec("cvt_21_384", 384, _CONFIGS["cvt_21"],  31_622_696,  24_849_091_584, "83.3", "IN-1k"),
    _make_spec("cvt_w24",    384, _CONFIGS["cvt_w24"], 277_196_392, 194_221_654_016, "87.6", "IN-22k"),
)
"""The variants of CvT: at 224 pixels, at 384 pixels, and the widest."""
# fmt: on
