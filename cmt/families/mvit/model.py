"""MViT (Fan et al., ICCV 2021, arXiv 2104.11227) and MViTv2 (Li et al., CVPR 2022, arXiv 2112.01526):
multiscale transformers.

Epsilons, paddings and the order of layers follow the official code: for the image model of MViTv1
(``MVIT_B_16_CONV``) that of facebookresearch/SlowFast, commit 287ec00; for MViTv2 that of
facebookresearch/mvit, commit dfbdfdf. Where it surprises:

* Queries, keys and values are pooled *after* their linears, by a 3x3 depthwise conv whose filters all heads
  share, then a layer norm over the channels of a head. The class token skips the conv but not that norm. A
  stride of 1 still pools.
* Where the width changes, the shortcut is a linear of the *normalised* tokens: of norm1 in MViTv2-T, S and B,
  which widen in the attention; of norm2 in MViTv1 and MViTv2-L, which widen in the last MLP of the stage
  before.
* Only the product of queries and keys is scaled. Relative positions and residual pooling read the unscaled
queries.
* The official models return probabilities in evaluation; these return the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...layers import DropPath, merge_heads, scaled, split_heads, to_map, to_tokens


@dataclass(frozen=True)
class MViTConfig:
    """Widths and depths of one variant; the tuples have one entry a stage.

    Attributes:
        version: 1 has a class token and absolute positions, and pools queries only where the map shrinks; 2
            has relative positions and residual pooling, pools every query, and averages all tokens.
        widen_in_attention: the width changes in the first attention of a stage, not in the last MLP of the
            stage before.
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
    """Widths of one block's input, attention and output, the side of its input map, and its pooling
    strides."""

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
    """All blocks of all stages; the first block of each but stage 0 halves the map by pooling its queries
    with stride 2."""
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
            shapes.append(
                BlockShape(in_dim, dim, out_dim, heads, size, stride, max(config.kv_stride >> stage, 1))
            )
            size //= stride
    return shapes


def on_map(layer: nn.Module, x: Tensor, size: int, prefix: int) -> Tensor:
    """``layer`` on the map (B, C, size, size) that tokens (B, prefix + size**2, C) make; ``prefix`` class
    tokens pass by."""
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
    """Pooling of queries, keys or values: one small depthwise conv that all heads share, layer norm over a
    head's channels."""

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
    """Row of the position table for each pair along one side: (queries, keys), from 0 to ``2 * max(queries,
    keys) - 2``.

    Distances are counted on the finer of the two grids, one side length of which is a multiple of the other.
    """
    per_query, per_key = max(keys // queries, 1), max(queries // keys, 1)
    return torch.arange(queries)[:, None] * per_query + (keys - 1 - torch.arange(keys)) * per_key


class RelativePositions(nn.Module):
    """Decomposed relative positions (MViTv2): the score of q with a key gains ``q . R_rows[dy] + q .
    R_columns[dx]``."""

    def __init__(self, dim: int, queries: int, keys: int) -> None:
        super().__init__()
        self.queries, self.keys = queries, keys
        self.rows, self.columns = (
            nn.Parameter(torch.zeros(2 * max(queries, keys) - 1, dim)) for _ in range(2)
        )

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
    """Pooling attention of MViT, in MViTv2 with relative positions and residual pooling; published weights
    stack q, k, v."""

    def __init__(self, shape: BlockShape, version: int) -> None:
        super().__init__()
        self.heads, self.scale = shape.heads, shape.head_dim**-0.5
        prefix = 1 if version == 1 else 0
        self.q, self.k, self.v = (nn.Linear(shape.in_dim, shape.dim) for _ in range(3))
        pools_queries = version == 2 or shape.q_stride > 1
        self.pool_q: nn.Module = (
            Pooling(shape, shape.q_stride, prefix) if pools_queries else SplitHeads(shape.heads)
        )
        self.pool_k, self.pool_v = (Pooling(shape, shape.kv_stride, prefix) for _ in range(2))
        self.relative: RelativePositions | None = None
        if version == 2:
            self.relative = RelativePositions(
                shape.head_dim, shape.size // shape.q_stride, shape.size // shape.kv_stride
            )
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
    """Pooling attention and MLP, each with a shortcut; ``shortcut`` is the linear in one of the two where the
    width changes."""

    def __init__(self, shape: BlockShape, config: MViTConfig, drop_path: float) -> None:
        super().__init__()
        self.shrinks, self.widens_in_attention = shape.q_stride > 1, shape.in_dim != shape.dim
        self.norm1 = nn.LayerNorm(shape.in_dim, eps=1e-6)
        self.attn = Attention(shape, config.version)
        self.pool_skip: nn.Module = (
            TokenMaxPool(shape.size, 2 - config.version) if self.shrinks else nn.Identity()
        )
        self.norm2 = nn.LayerNorm(shape.dim, eps=1e-6)
        self.mlp = MLP(shape.dim, shape.dim * config.mlp_ratio, shape.out_dim)
        widens = shape.in_dim != shape.out_dim
        self.shortcut = nn.Linear(shape.in_dim, shape.out_dim) if widens else None
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, class_only: bool = False) -> Tensor:
        """(B, N, C_in) -> (B, N / q_stride**2, C_out), or its first row (B, 1, C_out) if nothing else is
        read."""
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
        """Tokens (B, [1 +] N, C) after each stage; with ``class_only`` the class token (B, 1, C) after the
        last."""
        if x.shape[-2:] != (self.img_size, self.img_size):
            raise ValueError(
                f"this model was built for {self.img_size} pixels, the input is {tuple(x.shape)}"
            )
        tokens, done, last = to_tokens(self.embed(x)), [], len(self.blocks) - 1
        if self.class_token is not None and self.position_embedding is not None:
            tokens = (
                torch.cat((self.class_token.expand(x.shape[0], -1, -1), tokens), 1) + self.position_embedding
            )
        for i, block in enumerate(cast("list[Block]", list(self.blocks))):
            if block.shrinks:
                done.append(tokens)
            tokens = block(tokens, class_only and i == last)
        return [*done, tokens]


def _init(module: nn.Module) -> None:
    """Truncated normal of 0.02 for linears and everything about positions, biases 0, PyTorch's own for
    convs."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, (RelativePositions, MViT)):
        for parameter in module.parameters(recurse=False):
            nn.init.trunc_normal_(parameter, std=0.02)
