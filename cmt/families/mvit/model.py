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
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...layers import (
    DropPath,
    apply_scale,
    merge_heads,
    split_heads,
    to_map,
    to_tokens,
)
from ...spec import Classifier


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
    """Sizes of one block.

    Attributes:
        in_dim, dim, out_dim: channels of the input, of the attention and of the output.
        heads: number of attention heads.
        size: side of the input map in tokens.
        q_stride: stride of the queries' pooling.
        kv_stride: stride of the keys' and values' pooling.
    """

    in_dim: int
    dim: int
    out_dim: int
    heads: int
    size: int
    q_stride: int
    kv_stride: int

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.dim // self.heads


def list_block_shapes(config: MViTConfig, img_size: int) -> list[BlockShape]:
    """All blocks of all stages.

    The first block of each stage but the first halves the map: it pools its queries with stride 2.
    """
    shapes = []
    size = img_size // 4
    for stage, (dim, depth, heads) in enumerate(zip(config.dims, config.depths, config.heads, strict=True)):
        kv_stride = max(config.kv_stride >> stage, 1)
        for i in range(depth):
            in_dim = out_dim = dim
            shrinks = stage > 0 and i == 0
            if shrinks and config.widen_in_attention:
                in_dim = config.dims[stage - 1]
            if not config.widen_in_attention and i == depth - 1 and stage + 1 < len(config.dims):
                out_dim = config.dims[stage + 1]
            stride = 2 if shrinks else 1
            shapes.append(BlockShape(in_dim, dim, out_dim, heads, size, stride, kv_stride))
            size //= stride
    return shapes


def apply_on_map(
    layer: nn.Module,
    x: Tensor,
    size: int,
    prefix: int,
) -> Tensor:
    """``layer`` on the map (B, C, size, size) that tokens (B, prefix + size**2, C) make.

    The first ``prefix`` tokens are class tokens, which skip the layer.
    """
    if not prefix:
        return to_tokens(layer(to_map(x, size, size)))
    skipping = x[:, :prefix]
    tokens = to_tokens(layer(to_map(x[:, prefix:], size, size)))
    return torch.cat((skipping, tokens), 1)


class SplitHeads(nn.Module):
    """No pooling: the queries of MViTv1 between the stages' first blocks."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, heads, N, d)."""
        return split_heads(x, self.heads)


class Pooling(nn.Module):
    """Pooling of queries, keys or values.

    One small depthwise conv that all heads share, then a layer norm over a head's channels.
    """

    def __init__(self, shape: BlockShape, stride: int, prefix: int) -> None:
        super().__init__()
        self.heads = shape.heads
        self.size = shape.size
        self.prefix = prefix
        d = shape.head_dim
        self.conv = nn.Conv2d(d, d, 3, stride=stride, padding=1, groups=d, bias=False)
        self.norm = nn.LayerNorm(d, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, prefix + size**2, C) -> (B, heads, prefix + (size / stride)**2, d)."""
        _, n, c = x.shape
        x = split_heads(x, self.heads).reshape(-1, n, c // self.heads)  # (B * heads, N, d)
        x = self.norm(apply_on_map(self.conv, x, self.size, self.prefix))
        return x.reshape(-1, self.heads, x.shape[1], x.shape[2])


def make_relative_index(queries: int, keys: int) -> Tensor:
    """Row of the position table for each pair along one side: int64 ``(queries, keys)``.

    Rows go from 0 to ``2 * max(queries, keys) - 2``. Distances are counted on the finer of the two grids; the
    side of one is a multiple of the other's.
    """
    per_query = max(keys // queries, 1)
    per_key = max(queries // keys, 1)
    return torch.arange(queries)[:, None] * per_query + (keys - 1 - torch.arange(keys)) * per_key


class RelativePositions(nn.Module):
    """Decomposed relative positions (MViTv2).

    The score of ``q`` with a key gains ``q . R_rows[dy] + q . R_columns[dx]``.
    """

    def __init__(self, dim: int, queries: int, keys: int) -> None:
        super().__init__()
        self.queries = queries
        self.keys = keys
        distances = 2 * max(queries, keys) - 1
        self.rows = nn.Parameter(torch.zeros(distances, dim))
        self.columns = nn.Parameter(torch.zeros(distances, dim))

    def tables(self) -> tuple[Tensor, Tensor]:
        """The tables of rows and of columns, (queries, d, keys) each."""
        index = make_relative_index(self.queries, self.keys).to(self.rows.device)
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
    """Pooling attention of MViT, in MViTv2 with relative positions and residual pooling."""

    def __init__(self, shape: BlockShape, version: int) -> None:
        super().__init__()
        self.heads = shape.heads
        self.scale = shape.head_dim**-0.5
        prefix = 1 if version == 1 else 0
        self.q, self.k, self.v = (nn.Linear(shape.in_dim, shape.dim) for _ in range(3))
        self.pool_q: nn.Module = SplitHeads(shape.heads)
        if version == 2 or shape.q_stride > 1:
            self.pool_q = Pooling(shape, shape.q_stride, prefix)
        self.pool_k, self.pool_v = (Pooling(shape, shape.kv_stride, prefix) for _ in range(2))
        self.relative: RelativePositions | None = None
        if version == 2:
            queries = shape.size // shape.q_stride
            keys = shape.size // shape.kv_stride
            self.relative = RelativePositions(shape.head_dim, queries, keys)
        self.proj = nn.Linear(shape.dim, shape.dim)

    def forward(self, x: Tensor, class_only: bool = False) -> Tensor:
        """(B, N, C_in) -> (B, N / q_stride**2, C), or (B, 1, C) for ``class_only``.

        There the class token makes the only query.
        """
        q = self.pool_q(self.q(x[:, :1] if class_only else x))  # (B, heads, Nq, d)
        k, v = (
            self.pool_k(self.k(x)),
            self.pool_v(self.v(x)),
        )  # (B, heads, Nk, d)
        scores = apply_scale(q @ k.transpose(-2, -1), self.scale)
        if self.relative is None:
            mixed = scores.softmax(-1) @ v
        else:
            mixed = self.relative(q, scores).softmax(-1) @ v + q  # residual pooling
        projected: Tensor = self.proj(merge_heads(mixed))
        return projected


class TokenMaxPool(nn.Module):
    """3x3 max-pooling with stride 2 of the shortcut beside pooled queries."""

    def __init__(self, size: int, prefix: int) -> None:
        super().__init__()
        self.size = size
        self.prefix = prefix
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, prefix + size**2, C) -> (B, prefix + (size / 2)**2, C)."""
        return apply_on_map(self.pool, x, self.size, self.prefix)


class MLP(nn.Module):
    """Two linears with GELU between them."""

    def __init__(self, dim: int, hidden: int, out_dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = (
            nn.Linear(dim, hidden),
            nn.Linear(hidden, out_dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return mixed


class Block(nn.Module):
    """Pooling attention and MLP, each with a shortcut.

    Where the width changes, the shortcut of one of the two has the linear ``shortcut``.
    """

    def __init__(
        self,
        shape: BlockShape,
        config: MViTConfig,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.shrinks = shape.q_stride > 1
        self.widens_in_attention = shape.in_dim != shape.dim
        self.norm1 = nn.LayerNorm(shape.in_dim, eps=1e-6)
        self.attn = Attention(shape, config.version)
        self.pool_skip: nn.Module = nn.Identity()
        if self.shrinks:
            self.pool_skip = TokenMaxPool(shape.size, 2 - config.version)
        self.norm2 = nn.LayerNorm(shape.dim, eps=1e-6)
        self.mlp = MLP(shape.dim, shape.dim * config.mlp_ratio, shape.out_dim)
        widens = shape.in_dim != shape.out_dim
        self.shortcut = nn.Linear(shape.in_dim, shape.out_dim) if widens else None
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, class_only: bool = False) -> Tensor:
        """(B, N, C_in) -> (B, N / q_stride**2, C_out), or only its first row (B, 1, C_out) for
        ``class_only``."""
        y = self.norm1(x)
        if self.shortcut is not None and self.widens_in_attention:
            x = self.shortcut(y)
        x = self.pool_skip(x[:, :1] if class_only else x) + self.drop_path(self.attn(y, class_only))
        y = self.norm2(x)
        if self.shortcut is not None and not self.widens_in_attention:
            x = self.shortcut(y)
        branch: Tensor = self.drop_path(self.mlp(y))
        return x + branch


class MViT(Classifier):
    """MViT classifier: float32 ``(N, 3, S, S)`` -> logits ``(N, num_classes)``, ``S = img_size``.

    The positions fix the input size; ``load_weights(..., resize=True)`` moves them to another one.
    """

    def __init__(self, config: MViTConfig, *, img_size: int, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.img_size = img_size
        self.num_classes = num_classes
        self.class_only = False
        """Whether the last block computes the class token alone in :meth:`forward`: a deployment rewrite."""
        self.embed = nn.Conv2d(3, config.dims[0], 7, stride=4, padding=3)
        self.class_token: nn.Parameter | None = None
        self.position_embedding: nn.Parameter | None = None
        if config.version == 1:
            self.class_token = nn.Parameter(torch.zeros(1, 1, config.dims[0]))
            self.position_embedding = nn.Parameter(torch.zeros(1, 1 + (img_size // 4) ** 2, config.dims[0]))
        shapes = list_block_shapes(config, img_size)
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
        return [to_map(t[:, prefix:], side >> i, side >> i) for i, t in enumerate(self._run_stages(x))]

    def forward(self, x: Tensor) -> Tensor:
        tokens = self._run_stages(x, self.class_only)[-1]
        if self.class_token is None:
            pooled = self.norm(tokens).mean(1)
            return self._compute_logits(pooled)
        return self._compute_logits(self.norm(tokens[:, 0]))

    def _compute_logits(self, features: Tensor) -> Tensor:
        """(B, C) -> (B, num_classes)."""
        logits: Tensor = self.head(features)
        return logits

    def _run_stages(self, x: Tensor, class_only: bool = False) -> list[Tensor]:
        """Tokens (B, [1 +] N, C) after each stage; with ``class_only`` the last are the class token (B, 1,
        C)."""
        self.require_size(x)
        tokens = to_tokens(self.embed(x))
        if self.class_token is not None and self.position_embedding is not None:
            classes = self.class_token.expand(x.shape[0], -1, -1)
            tokens = torch.cat((classes, tokens), 1) + self.position_embedding
        done: list[Tensor] = []
        last = len(self.blocks) - 1
        for i, block in enumerate(cast("list[Block]", list(self.blocks))):
            if block.shrinks:
                done.append(tokens)
            tokens = block(tokens, class_only and i == last)
        return [*done, tokens]


def _init(module: nn.Module) -> None:
    """Initialisation of the official code.

    Truncated normal of 0.02 for linears, positions and the class token; biases 0; PyTorch's own for convs.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, (RelativePositions, MViT)):
        for parameter in module.parameters(recurse=False):
            nn.init.trunc_normal_(parameter, std=0.02)
