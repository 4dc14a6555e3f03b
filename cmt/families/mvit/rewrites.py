"""Exact rewrites of MViT for deployment."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...folding import (
    PlainNorm,
    fold_affine_after,
    fold_affine_before,
    read_affine,
    read_weights,
    remove_bias,
    replace_weights,
)
from ...rewrites import absorb_biases, find_modules, fold_affine, keep_class_token, replace_each
from ...spec import Rewrite
from .model import (
    Attention,
    Block,
    MViT,
    MViTConfig,
    Pooling,
    RelativePositions,
    SplitHeads,
    apply_on_map,
)


class JointPooling(nn.Module):
    """:class:`Pooling` of all heads by one depthwise conv, so that heads never become a batch."""

    def __init__(self, pooling: Pooling) -> None:
        super().__init__()
        self.heads = pooling.heads
        self.size = pooling.size
        self.prefix = pooling.prefix
        old = pooling.conv
        dim = old.in_channels * pooling.heads
        weight = old.weight.detach().repeat(pooling.heads, 1, 1, 1)
        self.conv = nn.Conv2d(dim, dim, 3, stride=old.stride[0], padding=1, groups=dim)
        self.conv.weight = nn.Parameter(weight)
        # For a conv without a bias torch.onnx writes nodes that make a bias of zeros at every inference.
        self.conv.bias = nn.Parameter(weight.new_zeros(dim))
        self.norm = pooling.norm

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, heads, N', d)."""
        x = apply_on_map(self.conv, x, self.size, self.prefix)  # (B, N', C)
        pooled: Tensor = self.norm(x.reshape(-1, x.shape[1], self.heads, x.shape[2] // self.heads))
        return pooled.transpose(1, 2)


class ConstantPositions(RelativePositions):
    """:class:`RelativePositions` whose tables are gathered once; two products with the queries are left."""

    row_table: Tensor
    column_table: Tensor

    def __init__(self, positions: RelativePositions) -> None:
        nn.Module.__init__(self)  # without the parameters of RelativePositions
        self.queries = positions.queries
        self.keys = positions.keys
        rows, columns = positions.tables()
        self.register_buffer("row_table", rows.detach().contiguous())
        self.register_buffer("column_table", columns.detach().contiguous())

    def tables(self) -> tuple[Tensor, Tensor]:
        return self.row_table, self.column_table


def _find_attentions(module: nn.Module, norm: str) -> list[Attention]:
    """The attentions whose ``norm`` still has its affine part."""
    found = [cast(Attention, m) for m in find_modules(module, norm, "heads")]
    return [a for a in found if isinstance(a.get_submodule(norm), nn.LayerNorm)]


def _fold_scale_into_keys(module: nn.Module) -> int:
    """The scale goes into the affine part of the keys' norm, because relative positions and residual pooling
    read the unscaled queries."""
    places = [a for a in _find_attentions(module, "pool_k.norm") if a.scale != 1.0]
    for attn in places:
        norm = attn.pool_k.norm
        norm.weight = nn.Parameter(norm.weight.detach() * attn.scale)
        norm.bias = nn.Parameter(norm.bias.detach() * attn.scale)
        attn.scale = 1.0
    return len(places)


def _drop_key_shift(module: nn.Module) -> int:
    """The keys' norm loses its shift: it adds the same number to all scores of a query."""
    places = _find_attentions(module, "pool_k.norm")
    for attn in places:
        remove_bias(attn.pool_k.norm)
    return len(places)


def _fold_key_affine_into_queries(module: nn.Module) -> int:
    """The shift of the keys' norm cancels, and its scale goes into the layer that made the queries.

    This is exact where only the product with the keys reads the queries.
    """
    places = _find_attentions(module, "pool_k.norm")
    for attn in places:
        if attn.relative is not None:
            raise ValueError("relative positions and residual pooling read the queries as they are")
        scale, _ = read_affine(attn.pool_k.norm)  # (d,)
        if isinstance(attn.pool_q, SplitHeads):
            every_head = scale.repeat(attn.heads)
            attn.q = fold_affine_after(attn.q, every_head, torch.zeros_like(every_head))
        else:
            norm = cast(nn.LayerNorm, attn.pool_q.norm)
            norm.weight = nn.Parameter((norm.weight.double() * scale).detach())
            norm.bias = nn.Parameter((norm.bias.double() * scale).detach())
        _make_plain(attn.pool_k)
    return len(places)


def _make_plain(pooling: Pooling) -> None:
    """Take away the affine part of the norm."""
    cast(Any, pooling).norm = PlainNorm(pooling.norm)


def _fold_value_affine_into_proj(module: nn.Module) -> int:
    """The affine part of the values' norm goes into ``proj``.

    This is exact where nothing is added between the attention's product with the values and ``proj``.
    """
    places = _find_attentions(module, "pool_v.norm")
    for attn in places:
        if attn.relative is not None:
            raise ValueError("residual pooling adds queries to the values: their scale cannot pass")
        scale, shift = (t.repeat(attn.heads) for t in read_affine(attn.pool_v.norm))
        attn.proj = fold_affine_before(attn.proj, scale, shift)
        _make_plain(attn.pool_v)
    return len(places)


def _fold_value_shift_into_proj(module: nn.Module) -> int:
    """The shift of the values' norm goes into ``proj``: it is the same for all values, and the rows of the
    attention sum to 1."""
    places = _find_attentions(module, "pool_v.norm")
    for attn in places:
        weight, bias = read_weights(attn.proj)
        shift = read_affine(attn.pool_v.norm)[1].repeat(attn.heads)
        attn.proj = replace_weights(attn.proj, weight, bias + weight @ shift)
        remove_bias(attn.pool_v.norm)
    return len(places)


def _keep_class_token(module: nn.Module) -> int:
    """:func:`cmt_edge.cmt.rewrites.keep_class_token` for models whose last block has a class token in its
    first row."""
    for model in (m for m in module.modules() if isinstance(m, MViT)):
        if model.class_token is None or cast(Block, model.blocks[-1]).shrinks:
            raise ValueError(
                "the head must read a class token alone, and the last block must not pool its queries"
            )
    return keep_class_token().apply(module)


ONE_CONV = replace_each(
    "one pooling conv for all heads",
    "[DW x_1 .. DW x_h] == [DW .. DW] [x_1 .. x_h]",
    Pooling,
    lambda m: JointPooling(cast(Pooling, m)),
)
"""All heads are pooled by one conv."""

SCALE = Rewrite(
    "scale into pool_k.norm",
    "c q (s k + t) == q (c s k + c t)",
    _fold_scale_into_keys,
)
"""The attention's scale goes into the keys' norm."""

VERSION_1 = (
    ONE_CONV,
    SCALE,
    Rewrite(
        "affine of pool_k.norm into q",
        "softmax_j(q (s k_j + t)) == softmax_j((s q) k_j)",
        _fold_key_affine_into_queries,
    ),
    Rewrite(
        "affine of pool_v.norm into proj",
        "P (A (s V + 1 t)) + b == (P s) A V + (P t + b), as A 1 == 1",
        _fold_value_affine_into_proj,
    ),
)
"""The attention of MViTv1."""

VERSION_2 = (
    ONE_CONV,
    replace_each(
        "relative positions gathered",
        "R[index(i, j)] == constant",
        RelativePositions,
        lambda m: ConstantPositions(cast(RelativePositions, m)),
    ),
    SCALE,
    Rewrite(
        "shift of pool_k.norm dropped",
        "softmax_j(q (k_j + t)) == softmax_j(q k_j)",
        _drop_key_shift,
    ),
    Rewrite(
        "shift of pool_v.norm into proj",
        "P (A (V + 1 t) + q) + b == P (A V + q) + (P t + b), as A 1 == 1",
        _fold_value_shift_into_proj,
    ),
)
"""The attention of MViTv2.

The queries' norm keeps its affine part, because keys, positions and the residual all read it. The values'
norm keeps its scale, because the residual is added before proj.
"""

WIDER_ATTENTION = (
    fold_affine("norm1", "attn.q", "attn.k", "attn.v", "shortcut"),
    fold_affine("norm1", "attn.q", "attn.k", "attn.v", unless="shortcut"),
    fold_affine("norm2", "mlp.fc1"),
)
"""The norms of variants whose width changes in the attention."""

WIDER_MLP = (
    fold_affine("norm1", "attn.q", "attn.k", "attn.v"),
    fold_affine("norm2", "mlp.fc1", "shortcut"),
    fold_affine("norm2", "mlp.fc1", unless="shortcut"),
)
"""The norms of variants whose width changes in the MLP."""

CLASS_ONLY = replace(keep_class_token(), apply=_keep_class_token)
"""The class token alone in the last block, with the check of :func:`_keep_class_token`."""


def choose_rewrites(config: MViTConfig) -> tuple[Rewrite, ...]:
    """The exact rewrites that a variant admits, in the order in which they apply."""
    widening = WIDER_ATTENTION if config.widen_in_attention else WIDER_MLP
    head = fold_affine("norm", "head")
    if config.version == 1:
        return (*VERSION_1, *widening, head, CLASS_ONLY)
    return (*VERSION_2, *widening, head)


def choose_rtx_rewrites(config: MViTConfig) -> tuple[Rewrite, ...]:
    """Those for TensorRT for RTX.

    In MViTv2 it has no use for joint pooling, and copies what a bias is added to before a pooling conv may
    read it. MViTv1 moves fewer bytes with the rewrites for CPUs.
    """
    if config.version == 1:
        return choose_rewrites(config)
    rewrites = [rewrite for rewrite in choose_rewrites(config) if rewrite is not ONE_CONV]
    behind = [absorb_biases("norm1", "attn.q", "attn.k", "attn.v")]
    if config.widen_in_attention:
        behind = [
            absorb_biases("norm1", "attn.q", "attn.k", "attn.v", "shortcut"),
            absorb_biases("norm1", "attn.q", "attn.k", "attn.v", unless="shortcut"),
        ]
    last = next(i for i, rewrite in enumerate(rewrites) if rewrite.name.startswith("affine of norm2"))
    return (*rewrites[:last], *behind, *rewrites[last:])
