"""MViT and MViTv2 as a family: published weights, other resolutions, deployment rewrites, variants.

The model is in :mod:`cmt_edge.cmt.families.mvit.model`.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...folding import (
    PlainNorm,
    affine_after,
    affine_before,
    doubled,
    norm_affine,
    with_weights,
    without_bias,
)
from ...rewrites import affine_into, class_token_only, having, replaced
from ...spec import ModelSpec, Pretrained, Rewrite, StateDict
from .model import Attention, Block, MViT, MViTConfig, Pooling, RelativePositions, SplitHeads, on_map

_RENAMES: list[tuple[re.Pattern[str], str]] = [
    (re.compile(r"^patch_embed\.proj\."), "embed."),
    (re.compile(r"^pos_embed$"), "position_embedding"),
    (re.compile(r"^cls_token$"), "class_token"),
    (re.compile(r"^(blocks\.\d+)\.proj\."), r"\1.shortcut."),
    (re.compile(r"\.attn\.pool_([qkv])\.weight$"), r".attn.pool_\1.conv.weight"),
    (re.compile(r"\.attn\.norm_([qkv])\."), r".attn.pool_\1.norm."),
    (re.compile(r"\.attn\.rel_pos_h$"), ".attn.relative.rows"),
    (re.compile(r"\.attn\.rel_pos_w$"), ".attn.relative.columns"),
    (re.compile(r"^head\.projection\."), "head."),
]
"""Published key -> ours; ``attn.qkv`` keeps its name until :func:`adapt` takes it apart."""


def published_key(key: str) -> str:
    """Our name of a key in the official state dict, e.g. ``blocks.0.attn.norm_q.bias``; our own keys stay."""
    for pattern, replacement in _RENAMES:
        key = pattern.sub(replacement, key)
    return key


def adapt(state: StateDict) -> StateDict:
    """``state`` with ``attn.qkv`` taken apart into ``q``, ``k``, ``v``, and with 4-D convs.

    The official code of MViTv1 is that of the video model, whose convs are 5-D; for images their third axis,
    time, has length 1.
    """
    result: StateDict = {}
    for key, value in state.items():
        stacked = re.fullmatch(r"(.*\.attn\.)qkv(\.weight|\.bias)", key)
        if stacked and value.ndim and value.shape[0] and value.shape[0] % 3 == 0:
            for name, part in zip("qkv", value.chunk(3), strict=True):
                result[f"{stacked[1]}{name}{stacked[2]}"] = part
        elif value.ndim == 5 and value.shape[2] == 1:
            result[key] = value.squeeze(2)
        else:
            result[key] = value
    return result


def resize_relative(table: Tensor, rows: int) -> Tensor:
    """Resize ``(L, d)`` to ``(rows, d)``: linear along the distances, as facebookresearch/SlowFast does.

    Equal sizes return the same tensor object.
    """
    if len(table) == rows:
        return table
    return F.interpolate(table.T[None], rows, mode="linear", align_corners=False)[0].T.contiguous()


def resize_position_embedding(embedding: Tensor, tokens: int) -> Tensor:
    """Resize ``(1, 1 + H*W, C)`` to ``(1, tokens, C)``: bilinear over the square grid.

    The class token's row is kept. The official code interpolates over time, height and width, which is the
    same for one frame. Equal sizes return the same tensor object.
    """
    _, old, dim = embedding.shape
    if old == tokens:
        return embedding
    side, new = math.isqrt(old - 1), math.isqrt(tokens - 1)
    grid = embedding[:, 1:].reshape(1, side, side, dim).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (new, new), mode="bilinear", align_corners=False)
    return torch.cat((embedding[:, :1], grid.permute(0, 2, 3, 1).reshape(1, new * new, dim)), 1)


def resize(model: nn.Module, state: StateDict) -> tuple[StateDict, list[str]]:
    """Move all positions of ``state`` (our keys) to the size that ``model`` was built for.

    Returns the new state and the changed keys.
    """
    state, changed = dict(state), []
    for key, target in model.state_dict().items():
        old, new = state[key].shape if key in state else torch.Size(), target.shape
        if old == new or len(old) != len(new) or old[-1] != new[-1]:
            continue
        if re.search(r"\.relative\.(rows|columns)$", key) and old[0] > 0:
            state[key] = resize_relative(state[key].float(), new[0])
            changed.append(key)
        elif key == "position_embedding" and old[0] == 1 and _is_square(old[1] - 1):
            state[key] = resize_position_embedding(state[key].float(), new[1])
            changed.append(key)
    return state, changed


def _is_square(count: int) -> bool:
    """Whether ``count`` patches make a square grid."""
    return count > 0 and math.isqrt(count) ** 2 == count


# --- deployment rewrites of this family -----------------------------------------------------------


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
        x = on_map(self.conv, x, self.size, self.prefix)  # (B, N', C)
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


def _attentions(module: nn.Module, norm: str) -> list[Attention]:
    """The attentions whose ``norm`` still has its affine part."""
    found = [cast(Attention, m) for m in having(module, norm, "heads")]
    return [a for a in found if isinstance(a.get_submodule(norm), nn.LayerNorm)]


def _scale_into_keys(module: nn.Module) -> int:
    """The scale goes into the affine part of the keys' norm, because relative positions and residual pooling
    read the unscaled queries."""
    places = [a for a in _attentions(module, "pool_k.norm") if a.scale != 1.0]
    for attn in places:
        norm = attn.pool_k.norm
        norm.weight = nn.Parameter(norm.weight.detach() * attn.scale)
        norm.bias = nn.Parameter(norm.bias.detach() * attn.scale)
        attn.scale = 1.0
    return len(places)


def _key_shift_dropped(module: nn.Module) -> int:
    """The keys' norm loses its shift: it adds the same number to all scores of a query."""
    places = _attentions(module, "pool_k.norm")
    for attn in places:
        without_bias(attn.pool_k.norm)
    return len(places)


def _key_affine_into_queries(module: nn.Module) -> int:
    """The shift of the keys' norm cancels, and its scale goes into the layer that made the queries.

    This is exact where only the product with the keys reads the queries.
    """
    places = _attentions(module, "pool_k.norm")
    for attn in places:
        if attn.relative is not None:
            raise ValueError("relative positions and residual pooling read the queries as they are")
        scale, _ = norm_affine(attn.pool_k.norm)  # (d,)
        if isinstance(attn.pool_q, SplitHeads):
            every_head = scale.repeat(attn.heads)
            attn.q = affine_after(attn.q, every_head, torch.zeros_like(every_head))
        else:
            norm = cast(nn.LayerNorm, attn.pool_q.norm)
            norm.weight = nn.Parameter((norm.weight.double() * scale).detach())
            norm.bias = nn.Parameter((norm.bias.double() * scale).detach())
        _make_plain(attn.pool_k)
    return len(places)


def _make_plain(pooling: Pooling) -> None:
    """Take away the affine part of the norm."""
    cast(Any, pooling).norm = PlainNorm(pooling.norm)


def _value_affine_into_proj(module: nn.Module) -> int:
    """The affine part of the values' norm goes into ``proj``.

    This is exact where nothing is added between the attention's product with the values and ``proj``.
    """
    places = _attentions(module, "pool_v.norm")
    for attn in places:
        if attn.relative is not None:
            raise ValueError("residual pooling adds queries to the values: their scale cannot pass")
        scale, shift = (t.repeat(attn.heads) for t in norm_affine(attn.pool_v.norm))
        attn.proj = affine_before(attn.proj, scale, shift)
        _make_plain(attn.pool_v)
    return len(places)


def _value_shift_into_proj(module: nn.Module) -> int:
    """The shift of the values' norm goes into ``proj``: it is the same for all values, and the rows of the
    attention sum to 1."""
    places = _attentions(module, "pool_v.norm")
    for attn in places:
        weight, bias = doubled(attn.proj)
        shift = norm_affine(attn.pool_v.norm)[1].repeat(attn.heads)
        attn.proj = with_weights(attn.proj, weight, bias + weight @ shift)
        without_bias(attn.pool_v.norm)
    return len(places)


def _class_only(module: nn.Module) -> int:
    """:func:`cmt_edge.cmt.rewrites.class_token_only` for models whose last block has a class token in its
    first row."""
    for model in (m for m in module.modules() if isinstance(m, MViT)):
        if model.class_token is None or cast(Block, model.blocks[-1]).shrinks:
            raise ValueError(
                "the head must read a class token alone, and the last block must not pool its queries"
            )
    return class_token_only().apply(module)


_JOINT = replaced(
    "one pooling conv for all heads",
    "[DW x_1 .. DW x_h] == [DW .. DW] [x_1 .. x_h]",
    Pooling,
    lambda m: JointPooling(cast(Pooling, m)),
)
_CONSTANT = replaced(
    "relative positions gathered",
    "R[index(i, j)] == constant",
    RelativePositions,
    lambda m: ConstantPositions(cast(RelativePositions, m)),
)
_SCALE = Rewrite("scale into pool_k.norm", "c q (s k + t) == q (c s k + c t)", _scale_into_keys)
_KEY_AFFINE = "softmax_j(q (s k_j + t)) == softmax_j((s q) k_j)"
_VALUE_AFFINE = "P (A (s V + 1 t)) + b == (P s) A V + (P t + b), as A 1 == 1"

_REWRITES_V1 = (
    _JOINT,
    _SCALE,
    Rewrite("affine of pool_k.norm into q", _KEY_AFFINE, _key_affine_into_queries),
    Rewrite("affine of pool_v.norm into proj", _VALUE_AFFINE, _value_affine_into_proj),
)
# The queries' norm keeps its affine part, because keys, positions and the residual all read it. The values'
# norm keeps its scale, because the residual is added before proj.
_REWRITES_V2 = (
    _JOINT,
    _CONSTANT,
    _SCALE,
    Rewrite("shift of pool_k.norm dropped", "softmax_j(q (k_j + t)) == softmax_j(q k_j)", _key_shift_dropped),
    Rewrite(
        "shift of pool_v.norm into proj",
        "P (A (V + 1 t) + q) + b == P (A V + q) + (P t + b), as A 1 == 1",
        _value_shift_into_proj,
    ),
)
_WIDE_ATTENTION = (
    affine_into("norm1", "attn.q", "attn.k", "attn.v", "shortcut"),
    affine_into("norm1", "attn.q", "attn.k", "attn.v", unless="shortcut"),
    affine_into("norm2", "mlp.fc1"),
)
_WIDE_MLP = (
    affine_into("norm1", "attn.q", "attn.k", "attn.v"),
    affine_into("norm2", "mlp.fc1", "shortcut"),
    affine_into("norm2", "mlp.fc1", unless="shortcut"),
)
_HEAD = affine_into("norm", "head")
_CLASS_ONLY = replace(class_token_only(), apply=_class_only)


def rewrites_of(config: MViTConfig) -> tuple[Rewrite, ...]:
    """The exact rewrites that a variant admits."""
    widening = _WIDE_ATTENTION if config.widen_in_attention else _WIDE_MLP
    if config.version == 1:
        return (*_REWRITES_V1, *widening, _HEAD, _CLASS_ONLY)
    return (*_REWRITES_V2, *widening, _HEAD)


_FIGURES = {
    1: "MViT paper Table 17, top-1 of the SlowFast MODEL_ZOO (paper: 83.0); "
    "MACs and parameters counted on the official code",
    2: "facebookresearch/mvit README; MACs and parameters counted on the official code",
}
"""Where the figures of each version come from."""

_RELEASE = "https://dl.fbaipublicfiles.com/mvit/mvitv2_models/"
"""Where the official weights lie."""

_WIDTHS = (96, 192, 384, 768)
_B16 = MViTConfig(_WIDTHS, (1, 2, 11, 2), version=1, widen_in_attention=False)
_TINY = MViTConfig(_WIDTHS, (1, 2, 5, 2))
_SMALL = MViTConfig(_WIDTHS, (1, 2, 11, 2))
_BASE = MViTConfig(_WIDTHS, (2, 3, 16, 3))
_LARGE = MViTConfig((144, 288, 576, 1152), (2, 6, 36, 4), heads=(2, 4, 8, 16), widen_in_attention=False)


def _spec(name: str, config: MViTConfig, params: int, macs: int, top1: str, file: str | None) -> ModelSpec:
    """One variant; ``file`` is the name of its official weights."""
    return ModelSpec(
        name=name,
        family=f"MViTv{config.version}",
        constructor=MViT,
        config=config,
        img_size=224,
        rewrites=rewrites_of(config),
        rename=published_key,
        adapt=adapt,
        resize=resize,
        head_keys=("head.weight", "head.bias"),
        pretrained=Pretrained(f"{_RELEASE}{file}") if file else None,
        params=params,
        macs=macs,
        top1=top1,
        source=_FIGURES[config.version],
    )


# fmt: off
SPECS = (
    #     name          config  params           macs            top-1   weights
    _spec("mvitv1_b16", _B16,    36_982_600,  7_809_333_696, "82.9", None),  # published on Google Drive only
    _spec("mvitv2_t",   _TINY,   24_173_320,  4_676_957_952, "82.3", "MViTv2_T_in1k.pyth"),
    _spec("mvitv2_s",   _SMALL,  34_870_216,  6_959_715_072, "83.6", "MViTv2_S_in1k.pyth"),
    _spec("mvitv2_b",   _BASE,   51_472_744, 10_102_438_656, "84.4", "MViTv2_B_in1k.pyth"),
    _spec("mvitv2_l",   _LARGE, 217_992_952, 43_711_209_216, "85.3", "MViTv2_L_in1k.pyth"),
)
"""The variants of both versions, each from the smallest to the largest."""
# fmt: on
