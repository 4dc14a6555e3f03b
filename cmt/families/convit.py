"""ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases (d'Ascoli et al., ICML 2021,
arXiv 2103.10697).

Order of layers, epsilons and initialisation follow the official code (facebookresearch/convit, commit
0a9340a). Where it surprises: the two softmaxes of gated positional self-attention are mixed *after* they are
normalised, and the mixture is normalised once more; the class token joins before the first block without
positions, so that the first ten blocks see patches only; queries, keys and values have no bias.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import (
    DropPath,
    apply_scale,
    merge_heads,
    split_heads,
    to_tokens,
)
from ..rewrites import (
    chain_rewrites,
    drop_key_bias,
    fold_affine,
    fold_scale,
    fold_value_bias,
    keep_class_token,
    remove_attention_biases,
    replace_each,
)
from ..spec import Classifier, KeyRenames, ModelSpec, Pretrained, StateDict, make_rename


@dataclass(frozen=True)
class ConViTConfig:
    """Sizes of one variant (paper, Table 1); a head has 48 channels."""

    heads: int
    depth: int = 12
    local_depth: int = 10
    head_dim: int = 48
    mlp_ratio: int = 4
    patch: int = 16
    drop_path: float = 0.0


def make_patch_offsets(side: int) -> Tensor:
    """``(N, N, 3)`` float, ``N = side**2``: (dx, dy, dx**2 + dy**2) from each query to each key.

    The unit is a patch; patches are numbered row by row.
    """
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    row, column = rows.flatten(), columns.flatten()
    dx, dy = (
        column - column[:, None],
        row - row[:, None],
    )  # (query, key)
    return torch.stack((dx, dy, dx**2 + dy**2), -1).float()


class PositionAttention(nn.Module):
    """The part of gated attention that does not depend on the image (paper, section 3)."""

    offsets: Tensor
    """See :func:`make_patch_offsets`."""

    def __init__(self, heads: int, side: int) -> None:
        super().__init__()
        self.proj = nn.Linear(3, heads)
        self.gate = nn.Parameter(torch.ones(heads))
        self.register_buffer("offsets", make_patch_offsets(side), persistent=False)

    def forward(self) -> tuple[Tensor, Tensor]:
        """``1 - s`` (heads, 1, 1), the share of the content attention, and ``s * P`` (heads, N, N), the
        weighted position attention."""
        share = self.gate.sigmoid().reshape(-1, 1, 1)
        scores = self.proj(self.offsets).permute(2, 0, 1)  # (heads, N, N)
        return 1 - share, share * scores.softmax(-1)


class RowsToOne(nn.Module):
    """Divides each row by its sum."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.sum(-1, keepdim=True)


class Attention(nn.Module):
    """Multi-head self-attention; queries, keys and values have no bias."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.proj = nn.Linear(dim, dim)

    def forward(self, queries: Tensor, x: Tensor) -> Tensor:
        """``queries`` (B, Nq, C), rows of ``x`` (B, N, C) -> (B, Nq, C)."""
        q, k, v = (split_heads(t, self.heads) for t in (self.q(queries), self.k(x), self.v(x)))
        scores = apply_scale(q @ k.transpose(-2, -1), self.scale)  # (B, heads, Nq, N)
        mixed: Tensor = self.proj(merge_heads(self.weights(scores) @ v))
        return mixed

    def weights(self, scores: Tensor) -> Tensor:
        """(B, heads, Nq, N) -> the same, rows of sum 1."""
        return scores.softmax(-1)


class GatedAttention(Attention):
    """Gated positional self-attention, GPSA (paper, section 3): a head's gate mixes content and position
    attention."""

    def __init__(self, dim: int, heads: int, side: int) -> None:
        super().__init__(dim, heads)
        self.position = PositionAttention(heads, side)
        self.rows_to_one: nn.Module = RowsToOne()

    def weights(self, scores: Tensor) -> Tensor:
        share, position = self.position()
        weights: Tensor = self.rows_to_one(share * scores.softmax(-1) + position)
        return weights


class MLP(nn.Module):
    """Two linears with GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = (
            nn.Linear(dim, hidden),
            nn.Linear(hidden, dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return mixed


class Block(nn.Module):
    """Attention and MLP, each with a shortcut."""

    def __init__(
        self,
        dim: int,
        attn: Attention,
        hidden: int,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, hidden)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, class_only: bool = False) -> Tensor:
        """(B, N, C) -> (B, N, C), or only its first row (B, 1, C) for ``class_only``."""
        y = self.norm1(x)
        x, queries = (x[:, :1], y[:, :1]) if class_only else (x, y)
        x = x + self.drop_path(self.attn(queries, y))
        branch: Tensor = self.drop_path(self.mlp(self.norm2(x)))
        return x + branch


class ConViT(Classifier):
    """ConViT classifier: float32 ``(N, 3, S, S)`` -> logits ``(N, num_classes)``, ``S = img_size``.

    The position embedding fixes the input size; ``load_weights(..., resize=True)`` moves it to another one.
    """

    def __init__(
        self,
        config: ConViTConfig,
        *,
        img_size: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.img_size = img_size
        self.num_classes = num_classes
        self.class_only = False
        """Whether the last block computes the class token alone: a deployment rewrite."""
        heads = config.heads
        dim = heads * config.head_dim
        side = img_size // config.patch
        self.embed = nn.Conv2d(3, dim, config.patch, stride=config.patch)
        self.position_embedding = nn.Parameter(torch.zeros(1, side**2, dim))
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        rates = torch.linspace(0, config.drop_path, config.depth).tolist()
        self.blocks = nn.ModuleList(
            Block(
                dim,
                GatedAttention(dim, heads, side) if i < config.local_depth else Attention(dim, heads),
                dim * config.mlp_ratio,
                rate,
            )
            for i, rate in enumerate(rates)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        for parameter in (self.position_embedding, self.class_token):
            nn.init.trunc_normal_(parameter, std=0.02)
        self.apply(_init)

    def forward(self, x: Tensor) -> Tensor:
        self.require_size(x)
        x = to_tokens(self.embed(x)) + self.position_embedding  # (B, N, C)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            if i == self.config.local_depth:
                x = torch.cat((self.class_token.expand(x.shape[0], -1, -1), x), 1)  # (B, 1 + N, C)
            x = block(x, self.class_only and i == last)
        logits: Tensor = self.head(self.norm(x[:, 0]))
        return logits


def _init(module: nn.Module) -> None:
    """Initialisation of the official code: truncated normal for linears; gated heads act as a convolution."""
    if isinstance(module, GatedAttention):
        nn.init.eye_(module.v.weight)
        _look_at_neighbours(module.position.proj)
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _look_at_neighbours(proj: nn.Linear) -> None:
    """Each head attends to one cell of a square kernel around the query (paper, section 3; locality strength
    1).

    A score is ``-|offset - cell|^2 = -d^2 + 2 dx cell_x + 2 dy cell_y`` and a constant, which the softmax
    does not see.
    """
    heads = proj.out_features
    kernel = math.isqrt(heads)
    middle = (kernel - 1) / 2
    cells = [(h % kernel - middle, h // kernel - middle) for h in range(kernel**2)]  # (dy, dx)
    with torch.no_grad():
        proj.weight[: kernel**2] = torch.tensor([[2 * dx, 2 * dy, -1] for dy, dx in cells])


_RENAMES: KeyRenames = [
    (re.compile(r"^patch_embed\.proj\."), "embed."),
    (re.compile(r"^pos_embed$"), "position_embedding"),
    (re.compile(r"^cls_token$"), "class_token"),
    (re.compile(r"\.attn\.pos_proj\."), ".attn.position.proj."),
    (re.compile(r"\.attn\.gating_param$"), ".attn.position.gate"),
]
"""Published key -> ours."""


def separate_projections(state: StateDict) -> StateDict:
    """``state`` with ``attn.q``, ``attn.k`` and ``attn.v`` in place of the published ``attn.qk`` and
    ``attn.qkv``, which stack them in one matrix."""
    result: StateDict = {}
    for key, value in state.items():
        stacked = re.fullmatch(r"(blocks\.\d+\.attn\.)(qkv?)\.weight", key)
        if stacked is None or value.ndim != 2:
            result[key] = value
            continue
        for name, part in zip(stacked[2], value.tensor_split(len(stacked[2])), strict=True):
            result[f"{stacked[1]}{name}.weight"] = part
    return result


def resize_position_embedding(embedding: Tensor, tokens: int) -> Tensor:
    """Resize ``(1, H*W, C)`` to ``(1, tokens, C)``: bicubic over the square grid, as DeiT does.

    Equal sizes return the same tensor object. The attention's positions need no resizing, because they are
    computed from patch distances.
    """
    _, old_tokens, dim = embedding.shape
    if tokens == old_tokens:
        return embedding
    side, new = math.isqrt(old_tokens), math.isqrt(tokens)
    grid = embedding.reshape(1, side, side, dim).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).reshape(1, tokens, dim)


def resize(
    model: nn.Module,
    state: StateDict,
) -> tuple[StateDict, list[str]]:
    """Move the position embedding of ``state`` (our keys) to the size that ``model`` was built for.

    Returns the new state and the changed keys.
    """
    key = "position_embedding"
    new = model.state_dict()[key].shape
    if key not in state or not _is_resizable(state[key].shape, new):
        return state, []
    return {
        **state,
        key: resize_position_embedding(state[key].float(), new[1]),
    }, [key]


def _is_resizable(old: torch.Size, new: torch.Size) -> bool:
    """Whether two position embeddings differ only in the size of their (square) grid."""
    if len(old) != 3 or old == new:
        return False
    square = 0 < math.isqrt(old[1]) ** 2 == old[1]
    return square and (old[0], old[2]) == (new[0], new[2])


# --- deployment rewrites of this family -----------------------------------------------------------


class PositionTable(nn.Module):
    """:class:`PositionAttention` with its two results computed once."""

    def __init__(self, position: PositionAttention) -> None:
        super().__init__()
        share, table = position()
        self.share = nn.Parameter(share.detach())
        self.table = nn.Parameter(table.detach())

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.share, self.table


# The share 1 - s could go into v as well, with s / (1 - s) P as the table. But a head that looks at positions
# only has a share near 0, and its table would overflow float16.
REWRITES = (
    replace_each(
        "position attention as a table",
        "s softmax(W offsets + b) == constant",
        PositionAttention,
        lambda m: PositionTable(cast(PositionAttention, m)),
    ),
    replace_each(
        "row sums dropped",
        "(1 - s) sum_j A_j + s sum_j P_j == (1 - s) + s == 1",
        RowsToOne,
        lambda _: nn.Identity(),
    ),
    fold_scale("q"),
    # The affine part makes biases; of these only the queries' stays in its place.
    chain_rewrites(
        fold_affine("norm1", "attn.q", "attn.k", "attn.v"),
        drop_key_bias("attn.k"),
        fold_value_bias("attn.v", "attn.proj"),
    ),
    fold_affine("norm2", "mlp.fc1"),
    fold_affine("norm", "head"),
    keep_class_token(),
)
"""The exact rewrites of ConViT, in the order in which they apply."""

_SCALE = fold_scale("q")
"""Left out for TensorRT for RTX, which then moves fewer bytes (37.9 MB instead of 41.0 in ConViT-Ti)."""

RTX_REWRITES = (
    *(rewrite for rewrite in REWRITES[:-3] if rewrite.name != _SCALE.name),
    remove_attention_biases("norm1", "attn"),  # between a product and an attention stands no bias
    *REWRITES[-3:],
)
"""The exact rewrites of ConViT for TensorRT for RTX, in the order in which they apply."""

_RELEASE = "https://dl.fbaipublicfiles.com/convit/"
"""Where the official weights lie."""

_FIGURES = "paper Table 1; MACs and parameters counted on the official code"
"""Where the figures come from."""


def _make_spec(
    name: str,
    heads: int,
    params: int,
    macs: int,
    top1: str,
) -> ModelSpec:
    return ModelSpec(
        name=name,
        family="ConViT",
        constructor=ConViT,
        config=ConViTConfig(heads),
        img_size=224,
        size_multiple=16,  # the patch size
        rewrites=REWRITES,
        rtx_rewrites=RTX_REWRITES,
        rename=make_rename(_RENAMES),
        adapt=separate_projections,
        resize=resize,
        head_keys=("head.weight", "head.bias"),
        strides=(),  # one resolution throughout
        pretrained=Pretrained(f"{_RELEASE}{name}.pth"),
        params=params,
        macs=macs,
        top1=top1,
        source=_FIGURES,
    )


# fmt: off
SPECS = (
    #     name          heads  params            macs  top-1
    _make_spec("convit_tiny",   4,  5_710_512,  1_252_360_320, "73.1"),
    _make_spec("convit_small",  9, 27_777_322,  5_746_563_360, "81.3"),
    _make_spec("convit_base",  16, 86_540_040, 17_505_452_544, "82.4"),
)
"""The variants of ConViT, from the smallest to the largest."""
# fmt: on
