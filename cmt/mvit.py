"""MViT (Fan et al., ICCV 2021, arXiv 2104.11227) and MViTv2 (Li et al., CVPR 2022, arXiv 2112.01526): multiscale transformers.

Epsilons, paddings and the order of layers follow the official code: for the image model of MViTv1 (``MVIT_B_16_CONV``) that of
facebookresearch/SlowFast, commit 287ec00; for MViTv2 that of facebookresearch/mvit, commit dfbdfdf. Where it surprises:

* Queries, keys and values are pooled *after* their linears, by a 3x3 depthwise conv whose filters all heads share, then a layer
  norm over the channels of a head. The class token skips the conv but not that norm. A stride of 1 still pools.
* Where the width changes, the shortcut is a linear of the *normalised* tokens: of norm1 in MViTv2-T, S and B, which widen in
  the attention; of norm2 in MViTv1 and MViTv2-L, which widen in the last MLP of the stage before.
* Only the product of queries and keys is scaled. Relative positions and residual pooling read the unscaled queries.
* The official models return probabilities in evaluation; these return the logits.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .fuse import (
    PlainNorm,
    Rewrite,
    affine_after,
    affine_before,
    affine_into,
    class_token_only,
    doubled,
    having,
    norm_affine,
    replaced,
    with_weights,
)
from .layers import DropPath, merge_heads, scaled, split_heads, to_map, to_tokens
from .registry import ModelSpec, Pretrained, register


@dataclass(frozen=True)
class MViTConfig:
    """Widths and depths of one variant; the tuples have one entry a stage.

    Attributes:
        version: 1 has a class token and absolute positions, and pools queries only where the map shrinks; 2 has relative
            positions and residual pooling, pools every query, and averages all tokens.
        widen_in_attention: the width changes in the first attention of a stage, not in the last MLP of the stage before.
        kv_stride: stride of the keys' and values' pooling in the first stage; halves with the map, down to 1.
    """

    dims: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    heads: tuple[int, int, int, int] = (1, 2, 4, 8)
    version: Literal[1, 2] = 2
    widen_in_attention: bool = True
    kv_stride: int = 4
    mlp_ratio: int = 4
    drop_path: float = 0.0


@dataclass(frozen=True)
class BlockShape:
    """Widths of one block's input, attention and output, the side of its input map, and its pooling strides."""

    in_dim: int
    dim: int
    out_dim: int
    heads: int
    size: int
    q_stride: int
    kv_stride: int

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


def block_shapes(config: MViTConfig, img_size: int) -> list[BlockShape]:
    """All blocks of all stages; the first block of each but stage 0 halves the map by pooling its queries with stride 2."""
    shapes, size = [], img_size // 4
    for stage, (dim, depth, heads) in enumerate(zip(config.dims, config.depths, config.heads, strict=True)):
        for i in range(depth):
            in_dim = out_dim = dim
            shrinks = stage > 0 and i == 0
            if shrinks and config.widen_in_attention:
                in_dim = config.dims[stage - 1]
            if not config.widen_in_attention and i == depth - 1 and stage + 1 < len(config.dims):
                out_dim = config.dims[stage + 1]
            stride = 2 if shrinks else 1
            shapes.append(BlockShape(in_dim, dim, out_dim, heads, size, stride, max(config.kv_stride >> stage, 1)))
            size //= stride
    return shapes


def on_map(layer: nn.Module, x: Tensor, size: int, prefix: int) -> Tensor:
    """``layer`` on the map (B, C, size, size) that tokens (B, prefix + size**2, C) make; ``prefix`` class tokens pass by."""
    if not prefix:
        return to_tokens(layer(to_map(x, size, size)))
    return torch.cat((x[:, :prefix], to_tokens(layer(to_map(x[:, prefix:], size, size)))), 1)


class SplitHeads(nn.Module):
    """No pooling: the queries of MViTv1 between the stages' first blocks."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, heads, N, d)."""
        return split_heads(x, self.heads)


class Pooling(nn.Module):
    """Pooling of queries, keys or values: one small depthwise conv that all heads share, layer norm over a head's channels."""

    def __init__(self, shape: BlockShape, stride: int, prefix: int) -> None:
        super().__init__()
        self.heads, self.size, self.prefix = shape.heads, shape.size, prefix
        d = shape.head_dim
        self.conv = nn.Conv2d(d, d, 3, stride=stride, padding=1, groups=d, bias=False)
        self.norm = nn.LayerNorm(d, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, prefix + size**2, C) -> (B, heads, prefix + (size / stride)**2, d)."""
        _, n, c = x.shape
        x = split_heads(x, self.heads).reshape(-1, n, c // self.heads)  # (B * heads, N, d)
        x = self.norm(on_map(self.conv, x, self.size, self.prefix))
        return x.reshape(-1, self.heads, x.shape[1], x.shape[2])


def relative_index(queries: int, keys: int) -> Tensor:
    """Row of the position table for each pair along one side: (queries, keys), from 0 to ``2 * max(queries, keys) - 2``.

    Distances are counted on the finer of the two grids, one side length of which is a multiple of the other.
    """
    per_query, per_key = max(keys // queries, 1), max(queries // keys, 1)
    return torch.arange(queries)[:, None] * per_query + (keys - 1 - torch.arange(keys)) * per_key


class RelativePositions(nn.Module):
    """Decomposed relative positions (MViTv2): the score of q with a key gains ``q . R_rows[dy] + q . R_columns[dx]``."""

    def __init__(self, dim: int, queries: int, keys: int) -> None:
        super().__init__()
        self.queries, self.keys = queries, keys
        self.rows, self.columns = (nn.Parameter(torch.zeros(2 * max(queries, keys) - 1, dim)) for _ in range(2))

    def tables(self) -> tuple[Tensor, Tensor]:
        """Of rows and of columns: (queries, d, keys)."""
        index = relative_index(self.queries, self.keys).to(self.rows.device)
        return self.rows[index].transpose(1, 2), self.columns[index].transpose(1, 2)

    def forward(self, q: Tensor, scores: Tensor) -> Tensor:
        """``q`` (B, heads, Nq, d), unscaled, ``scores`` (B, heads, Nq, Nk) -> ``scores`` with positions."""
        _, heads, n, d = q.shape
        rows, columns = self.tables()
        q = q.reshape(-1, heads, self.queries, self.queries, d)
        by_row = (q @ rows).reshape(-1, heads, n, self.keys, 1)
        by_column = (q.transpose(2, 3) @ columns).transpose(2, 3).reshape(-1, heads, n, 1, self.keys)
        scores = scores.reshape(-1, heads, n, self.keys, self.keys) + by_row + by_column
        return scores.reshape(-1, heads, n, self.keys**2)


class Attention(nn.Module):
    """Pooling attention of MViT, in MViTv2 with relative positions and residual pooling; published weights stack q, k, v."""

    def __init__(self, shape: BlockShape, version: int) -> None:
        super().__init__()
        self.heads, self.scale = shape.heads, shape.head_dim**-0.5
        prefix = 1 if version == 1 else 0
        self.q, self.k, self.v = (nn.Linear(shape.in_dim, shape.dim) for _ in range(3))
        pools_queries = version == 2 or shape.q_stride > 1
        self.pool_q: nn.Module = Pooling(shape, shape.q_stride, prefix) if pools_queries else SplitHeads(shape.heads)
        self.pool_k, self.pool_v = (Pooling(shape, shape.kv_stride, prefix) for _ in range(2))
        self.relative: RelativePositions | None = None
        if version == 2:
            self.relative = RelativePositions(shape.head_dim, shape.size // shape.q_stride, shape.size // shape.kv_stride)
        self.proj = nn.Linear(shape.dim, shape.dim)

    def forward(self, x: Tensor, class_only: bool = False) -> Tensor:
        """(B, N, C_in) -> (B, N / q_stride**2, C), or (B, 1, C) if the class token alone asks."""
        q = self.pool_q(self.q(x[:, :1] if class_only else x))  # (B, heads, Nq, d)
        k, v = self.pool_k(self.k(x)), self.pool_v(self.v(x))  # (B, heads, Nk, d)
        scores = scaled(q @ k.transpose(-2, -1), self.scale)
        if self.relative is None:
            return self.proj(merge_heads(scores.softmax(-1) @ v))
        return self.proj(merge_heads(self.relative(q, scores).softmax(-1) @ v + q))  # residual pooling


class TokenMaxPool(nn.Module):
    """3x3 max-pooling with stride 2 of the shortcut beside pooled queries."""

    def __init__(self, size: int, prefix: int) -> None:
        super().__init__()
        self.size, self.prefix, self.pool = size, prefix, nn.MaxPool2d(3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, prefix + size**2, C) -> (B, prefix + (size / 2)**2, C)."""
        return on_map(self.pool, x, self.size, self.prefix)


class MLP(nn.Module):
    """Two linears with GELU between them."""

    def __init__(self, dim: int, hidden: int, out_dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pooling attention and MLP, each with a shortcut; ``shortcut`` is the linear in one of the two where the width changes."""

    def __init__(self, shape: BlockShape, config: MViTConfig, drop_path: float) -> None:
        super().__init__()
        self.shrinks, self.widens_in_attention = shape.q_stride > 1, shape.in_dim != shape.dim
        self.norm1 = nn.LayerNorm(shape.in_dim, eps=1e-6)
        self.attn = Attention(shape, config.version)
        self.pool_skip: nn.Module = TokenMaxPool(shape.size, 2 - config.version) if self.shrinks else nn.Identity()
        self.norm2 = nn.LayerNorm(shape.dim, eps=1e-6)
        self.mlp = MLP(shape.dim, shape.dim * config.mlp_ratio, shape.out_dim)
        widens = shape.in_dim != shape.out_dim
        self.shortcut = nn.Linear(shape.in_dim, shape.out_dim) if widens else None
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, class_only: bool = False) -> Tensor:
        """(B, N, C_in) -> (B, N / q_stride**2, C_out), or its first row (B, 1, C_out) if nothing else is read."""
        y = self.norm1(x)
        if self.shortcut is not None and self.widens_in_attention:
            x = self.shortcut(y)
        x = self.pool_skip(x[:, :1] if class_only else x) + self.drop_path(self.attn(y, class_only))
        y = self.norm2(x)
        if self.shortcut is not None and not self.widens_in_attention:
            x = self.shortcut(y)
        return x + self.drop_path(self.mlp(y))


class MViT(nn.Module):
    """MViT classifier: float32 ``(N, 3, S, S)`` -> logits ``(N, num_classes)``, ``S = img_size``.

    The positions fix the input size; ``load_weights(..., resize=True)`` moves them to another one.
    """

    spec: ClassVar[Any]

    def __init__(self, config: MViTConfig, *, img_size: int, num_classes: int) -> None:
        super().__init__()
        self.config, self.img_size, self.num_classes = config, img_size, num_classes
        self.class_only = False
        """Whether the last block computes the class token alone in :meth:`forward`: a deployment rewrite."""
        self.embed = nn.Conv2d(3, config.dims[0], 7, stride=4, padding=3)
        self.class_token: nn.Parameter | None = None
        self.position_embedding: nn.Parameter | None = None
        if config.version == 1:
            self.class_token = nn.Parameter(torch.zeros(1, 1, config.dims[0]))
            self.position_embedding = nn.Parameter(torch.zeros(1, 1 + (img_size // 4) ** 2, config.dims[0]))
        shapes = block_shapes(config, img_size)
        rate = config.drop_path / (len(shapes) - 1)  # of stochastic depth, from 0 in the first block
        self.blocks = nn.ModuleList(Block(shape, config, rate * i) for i, shape in enumerate(shapes))
        self.norm = nn.LayerNorm(config.dims[-1], eps=1e-6)
        self.head = nn.Linear(config.dims[-1], num_classes)
        self.apply(_init)

    def features(self, x: Tensor) -> list[Tensor]:
        """The map of each stage, ``(B, C, S/4 >> i, S/4 >> i)``; the class token is not part of it.

        C is ``dims[i]``, or that of the next stage where an MLP has widened it already (MViTv1, MViTv2-L).
        """
        side, prefix = self.img_size // 4, 2 - self.config.version
        return [to_map(t[:, prefix:], side >> i, side >> i) for i, t in enumerate(self._stages(x))]

    def forward(self, x: Tensor) -> Tensor:
        tokens = self._stages(x, self.class_only)[-1]
        if self.class_token is not None:
            return self.head(self.norm(tokens[:, 0]))
        return self.head(self.norm(tokens).mean(1))

    def _stages(self, x: Tensor, class_only: bool = False) -> list[Tensor]:
        """Tokens (B, [1 +] N, C) after each stage; with ``class_only`` the class token (B, 1, C) after the last."""
        if x.shape[-2:] != (self.img_size, self.img_size):
            raise ValueError(f"this model was built for {self.img_size} pixels, the input is {tuple(x.shape)}")
        tokens, done, last = to_tokens(self.embed(x)), [], len(self.blocks) - 1
        if self.class_token is not None and self.position_embedding is not None:
            tokens = torch.cat((self.class_token.expand(x.shape[0], -1, -1), tokens), 1) + self.position_embedding
        for i, block in enumerate(cast("list[Block]", list(self.blocks))):
            if block.shrinks:
                done.append(tokens)
            tokens = block(tokens, class_only and i == last)
        return [*done, tokens]


def _init(module: nn.Module) -> None:
    """Truncated normal of 0.02 for linears and everything about positions, biases 0, PyTorch's own for convs."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, (RelativePositions, MViT)):
        for parameter in module.parameters(recurse=False):
            nn.init.trunc_normal_(parameter, std=0.02)


# Published key -> ours. What stays stacked in `attn.qkv` is taken apart by `adapt`.
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


def published_key(key: str) -> str:
    """Our name of a key in the official state dict, e.g. ``blocks.0.attn.norm_q.bias``; ours are left as they are."""
    for pattern, replacement in _RENAMES:
        key = pattern.sub(replacement, key)
    return key


def adapt(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with ``attn.qkv`` taken apart into ``q``, ``k``, ``v``, and with 4-D convs.

    The code is that of the video model, whose convs are 5-D; for images their third axis, time, has length 1.
    """
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        stacked = re.fullmatch(r"(.*\.attn\.)qkv(\.weight|\.bias)", key)
        if stacked and value.ndim and value.shape[0] and value.shape[0] % 3 == 0:
            result.update({f"{stacked[1]}{n}{stacked[2]}": part for n, part in zip("qkv", value.chunk(3), strict=True)})
        elif value.ndim == 5 and value.shape[2] == 1:
            result[key] = value.squeeze(2)
        else:
            result[key] = value
    return result


def resize_relative(table: Tensor, rows: int) -> Tensor:
    """Resize ``(L, d)`` to ``(rows, d)``: linear along the distances, as facebookresearch/SlowFast does.

    Equal sizes return the very same tensor.
    """
    if len(table) == rows:
        return table
    return F.interpolate(table.T[None], rows, mode="linear", align_corners=False)[0].T.contiguous()


def resize_position_embedding(embedding: Tensor, tokens: int) -> Tensor:
    """Resize ``(1, 1 + H*W, C)`` to ``(1, tokens, C)``: bilinear over the square grid, the class token's row is kept.

    The official code interpolates over time, height and width, which for one frame is this. Equal sizes return the same tensor.
    """
    _, old, dim = embedding.shape
    if old == tokens:
        return embedding
    side, new = math.isqrt(old - 1), math.isqrt(tokens - 1)
    grid = embedding[:, 1:].reshape(1, side, side, dim).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (new, new), mode="bilinear", align_corners=False)
    return torch.cat((embedding[:, :1], grid.permute(0, 2, 3, 1).reshape(1, new * new, dim)), 1)


def resize(model: nn.Module, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Move all positions of ``state`` (our keys) to the size ``model`` was built for; also the changed keys."""
    state, changed = dict(state), []
    for key, target in model.state_dict().items():
        old, new = state[key].shape if key in state else torch.Size(), target.shape
        if old == new or len(old) != len(new) or old[-1] != new[-1]:
            continue
        if re.search(r"\.relative\.(rows|columns)$", key) and old[0] > 0:
            state[key] = resize_relative(state[key].float(), new[0])
            changed.append(key)
        elif key == "position_embedding" and old[0] == 1 and old[1] > 1 and math.isqrt(old[1] - 1) ** 2 == old[1] - 1:
            state[key] = resize_position_embedding(state[key].float(), new[1])
            changed.append(key)
    return state, changed


# --- deployment rewrites of this family ------------------------------------------------------------------------------


class JointPooling(nn.Module):
    """:class:`Pooling` of all heads by one depthwise conv, so that heads never become a batch."""

    def __init__(self, pooling: Pooling) -> None:
        super().__init__()
        self.heads, self.size, self.prefix = pooling.heads, pooling.size, pooling.prefix
        old, dim = pooling.conv, pooling.conv.in_channels * pooling.heads
        self.conv = nn.Conv2d(dim, dim, 3, stride=cast(Any, old.stride), padding=1, groups=dim)
        weight = old.weight.detach().repeat(pooling.heads, 1, 1, 1)
        # A bias of zeros: for a conv without one, torch.onnx writes nodes that make it, at every inference.
        self.conv.weight, self.conv.bias = nn.Parameter(weight), nn.Parameter(weight.new_zeros(dim))
        self.norm = pooling.norm

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, heads, N', d)."""
        x = on_map(self.conv, x, self.size, self.prefix)  # (B, N', C)
        return self.norm(x.reshape(-1, x.shape[1], self.heads, x.shape[2] // self.heads)).transpose(1, 2)


class ConstantPositions(RelativePositions):
    """:class:`RelativePositions` with the tables gathered once: what is left are two products with the queries."""

    def __init__(self, positions: RelativePositions) -> None:
        nn.Module.__init__(self)
        self.queries, self.keys = positions.queries, positions.keys
        for name, table in zip(("row_table", "column_table"), positions.tables(), strict=True):
            self.register_buffer(name, table.detach().contiguous())

    def tables(self) -> tuple[Tensor, Tensor]:
        return cast(Tensor, self.row_table), cast(Tensor, self.column_table)


def _attentions(module: nn.Module, norm: str) -> list[Attention]:
    """The attentions whose ``norm`` still has its affine part."""
    found = [cast(Attention, m) for m in having(module, norm, "heads")]
    return [a for a in found if isinstance(a.get_submodule(norm), nn.LayerNorm)]


def _scale_into_keys(module: nn.Module) -> int:
    """Into the affine part of the keys' norm, as q is read unscaled by relative positions and residual pooling."""
    places = [a for a in _attentions(module, "pool_k.norm") if a.scale != 1.0]
    for attn in places:
        norm = cast(nn.LayerNorm, attn.pool_k.norm)
        norm.weight = nn.Parameter(norm.weight.detach() * attn.scale)
        norm.bias = nn.Parameter(norm.bias.detach() * attn.scale)
        attn.scale = 1.0
    return len(places)


def _key_shift_dropped(module: nn.Module) -> int:
    """All keys are shifted alike, which adds one number to all scores of a query."""
    places = _attentions(module, "pool_k.norm")
    for attn in places:
        attn.pool_k.norm.bias = cast(Any, None)
    return len(places)


def _key_affine_into_queries(module: nn.Module) -> int:
    """Where nothing but keys reads the queries; the shift cancels, the scale goes into whatever made the queries."""
    places = _attentions(module, "pool_k.norm")
    for attn in places:
        if attn.relative is not None:
            raise ValueError("relative positions and residual pooling read the queries as they are")
        scale = norm_affine(attn.pool_k.norm)[0]  # (d,)
        if isinstance(attn.pool_q, SplitHeads):
            attn.q = affine_after(attn.q, scale.repeat(attn.heads), torch.zeros_like(scale).repeat(attn.heads))
        else:
            norm = cast(nn.LayerNorm, attn.pool_q.norm)
            norm.weight, norm.bias = (nn.Parameter((p.double() * scale).detach()) for p in (norm.weight, norm.bias))
        attn.pool_k.norm = cast(Any, PlainNorm(attn.pool_k.norm))
    return len(places)


def _value_affine_into_proj(module: nn.Module) -> int:
    """Where nothing is added between the attention's product with the values and ``proj``."""
    places = _attentions(module, "pool_v.norm")
    for attn in places:
        if attn.relative is not None:
            raise ValueError("residual pooling adds queries to the values: their scale cannot pass")
        scale, shift = (t.repeat(attn.heads) for t in norm_affine(attn.pool_v.norm))
        attn.proj = affine_before(attn.proj, scale, shift)
        attn.pool_v.norm = cast(Any, PlainNorm(attn.pool_v.norm))
    return len(places)


def _value_shift_into_proj(module: nn.Module) -> int:
    """All values are shifted alike, and rows of the attention sum to 1."""
    places = _attentions(module, "pool_v.norm")
    for attn in places:
        weight, bias = doubled(attn.proj)
        shift = norm_affine(attn.pool_v.norm)[1].repeat(attn.heads)
        attn.proj = with_weights(attn.proj, weight, bias + weight @ shift)
        attn.pool_v.norm.bias = cast(Any, None)
    return len(places)


def _class_only(module: nn.Module) -> int:
    """:func:`cmt.fuse.class_token_only`, where a class token is what the last block's first row is."""
    for model in (m for m in module.modules() if isinstance(m, MViT)):
        if model.class_token is None or cast(Block, model.blocks[-1]).shrinks:
            raise ValueError("the head must read a class token alone, and the last block must not pool its queries")
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

_V1 = (
    _JOINT,
    _SCALE,
    Rewrite("affine of pool_k.norm into q", _KEY_AFFINE, _key_affine_into_queries),
    Rewrite("affine of pool_v.norm into proj", _VALUE_AFFINE, _value_affine_into_proj),
)
# The queries' norm keeps its affine part: keys, positions and the residual all read it. The values' norm keeps its scale: the
# residual is added before proj.
_V2 = (
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
    return (*_V1, *widening, _HEAD, _CLASS_ONLY) if config.version == 1 else (*_V2, *widening, _HEAD)


_V1_SOURCE = (
    "MViT paper Table 17, top-1 of the SlowFast MODEL_ZOO (paper: 83.0); MACs and parameters counted on the official code"
)
_V2_SOURCE = "facebookresearch/mvit README; MACs and parameters counted on the official code"
_RELEASE = "https://dl.fbaipublicfiles.com/mvit/mvitv2_models/"
_B16 = MViTConfig((96, 192, 384, 768), (1, 2, 11, 2), version=1, widen_in_attention=False)
_T, _S, _B = (MViTConfig((96, 192, 384, 768), depths) for depths in ((1, 2, 5, 2), (1, 2, 11, 2), (2, 3, 16, 3)))
_L = MViTConfig((144, 288, 576, 1152), (2, 6, 36, 4), heads=(2, 4, 8, 16), widen_in_attention=False)

# fmt: off
VARIANTS = [
    # name         config       params            macs  top-1   release file
    ("mvitv1_b16", _B16,    36_982_600,  7_809_333_696, "82.9", None),  # published on Google Drive only
    ("mvitv2_t",   _T,      24_173_320,  4_676_957_952, "82.3", "MViTv2_T_in1k.pyth"),
    ("mvitv2_s",   _S,      34_870_216,  6_959_715_072, "83.6", "MViTv2_S_in1k.pyth"),
    ("mvitv2_b",   _B,      51_472_744, 10_102_438_656, "84.4", "MViTv2_B_in1k.pyth"),
    ("mvitv2_l",   _L,     217_992_952, 43_711_209_216, "85.3", "MViTv2_L_in1k.pyth"),
]
# fmt: on

for _name, _config, _params, _macs, _top1, _file in VARIANTS:
    register(
        ModelSpec(
            name=_name,
            family=f"MViTv{_config.version}",
            build=MViT,
            config=_config,
            img_size=224,
            rewrites=rewrites_of(_config),
            rename=published_key,
            adapt=adapt,
            resize=resize,
            head_keys=("head.weight", "head.bias"),
            pretrained=Pretrained(f"{_RELEASE}{_file}") if _file else None,
            params=_params,
            macs=_macs,
            top1=_top1,
            source=_V1_SOURCE if _config.version == 1 else _V2_SOURCE,
        )
    )
