"""CMT: Convolutional Neural Networks Meet Vision Transformers (Guo et al., CVPR 2022, arXiv 2107.06263).

Layer order, norm epsilons and the shared spatial reduction follow the official code (ggjy/CMT.pytorch, commit
07e72b7), which differs from the paper's text in places: the keys and values come from *one* reduced map, the
position bias is a dense table shared by all blocks of a stage, and the batch norms of the stem and the IRFFN
stand *after* the activation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import (
    DropPath,
    ResidualDepthwise,
    apply_scale,
    merge_heads,
    split_heads,
    to_map,
    to_tokens,
)
from ..rewrites import (
    attend_over_keys,
    attend_with_tokens,
    fold_affine,
    fold_batch_norm,
    fold_scale,
    fold_shortcut,
    merge_keys_and_values,
    pad_heads,
    remove_attention_biases,
    replace_batch_norms,
)
from ..spec import Classifier, KeyRenames, ModelSpec, Pretrained, Rewrite, StateDict, make_rename


@dataclass(frozen=True)
class CMTConfig:
    """Widths and depths of one variant (paper, Table 1); the tuples have one entry a stage."""

    dims: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    mlp_ratio: float
    stem: int
    head_dropout: float = 0.1
    fc_dim: int = 1280
    heads: tuple[int, int, int, int] = (1, 2, 4, 8)
    reductions: tuple[int, int, int, int] = (8, 4, 2, 1)
    drop_path: float = 0.0


class Attention(nn.Module):
    """Lightweight multi-head self-attention (paper, section 3.3).

    Queries come from all tokens, keys and values from a map reduced by ``reduction`` in each direction.
    """

    def __init__(self, dim: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads = heads
        self.reduction = reduction
        self.scale = (dim // heads) ** -0.5
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        if reduction > 1:
            self.reduce = nn.Conv2d(dim, dim, reduction, stride=reduction, groups=dim)
            self.reduce_norm = nn.BatchNorm2d(dim)
        self.proj = nn.Linear(dim, dim)
        self.kv: nn.Linear | None = None
        """Keys and values as one product, after a rewrite."""
        self.over_keys = False
        """Whether a rewrite has put q into k, and proj into v."""

    def forward(self, x: Tensor, size: tuple[int, int], position_bias: Tensor) -> Tensor:
        """``x`` (B, N, C), ``position_bias`` (heads, N, N / reduction**2) -> (B, N, C)."""
        reduced = x
        if self.reduction > 1:
            reduced = to_tokens(self.reduce_norm(self.reduce(to_map(x, *size))))  # (B, Nk, C)
        if self.over_keys:
            return self._attend_over_keys(x, reduced, position_bias)
        q = split_heads(self.q(x), self.heads)
        k, v = self._compute_keys_values(reduced)
        scores = apply_scale(q @ k.transpose(-2, -1), self.scale) + position_bias  # (B, heads, N, Nk)
        mixed: Tensor = self.proj(merge_heads(scores.softmax(-1) @ v))
        return mixed

    def _compute_keys_values(self, reduced: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, Nk, C)`` -> keys and values, ``(B, heads, Nk, d)`` each."""
        if self.kv is None:
            return split_heads(self.k(reduced), self.heads), split_heads(self.v(reduced), self.heads)
        both = split_heads(self.kv(reduced), 2 * self.heads)
        return both[:, : self.heads], both[:, self.heads :]

    def _attend_over_keys(self, x: Tensor, reduced: Tensor, position_bias: Tensor) -> Tensor:
        """Attention in which only the keys' tokens are projected; a key has a row of C channels for each
        head.

        ``x`` (B, N, C), ``reduced`` (B, Nk, C), ``position_bias`` (Nk * heads, N) -> (B, N, C). The scores
        have a row for each key: a softmax over rows works on all queries side by side, whereas one along rows
        of a few keys works on few numbers at a time.
        """
        nk, n, c = reduced.shape[1], x.shape[1], x.shape[2]
        if self.kv is None:
            k, v = self.k(reduced), self.v(reduced)
        else:
            both = self.kv(reduced)  # cut by slices, because torch.onnx takes twice as long for ``chunk``
            k, v = (
                both[..., : self.heads * c],
                both[..., self.heads * c :],
            )
        k = k.reshape(-1, nk * self.heads, c)
        v = v.reshape(-1, nk * self.heads, c)
        scores = apply_scale(k @ x.transpose(1, 2), self.scale) + position_bias  # (B, Nk * heads, N)
        weights = scores.reshape(-1, nk, self.heads * n).softmax(1).reshape(-1, nk * self.heads, n)
        mixed: Tensor = weights.transpose(1, 2) @ v
        return mixed


class InvertedResidualFFN(nn.Module):
    """IRFFN (paper, section 3.4): expand, depthwise conv with its shortcut *before* the activation,
    project."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(dim, hidden, 1)
        self.expand_norm = nn.BatchNorm2d(hidden)
        self.depthwise = ResidualDepthwise(hidden)
        self.depthwise_norm = nn.BatchNorm2d(hidden)
        self.project = nn.Conv2d(hidden, dim, 1)
        self.project_norm = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = self.expand_norm(F.gelu(self.expand(x)))
        x = self.depthwise_norm(F.gelu(self.depthwise(x)))
        projected: Tensor = self.project_norm(self.project(x))
        return projected


class Block(nn.Module):
    """LPU, attention, IRFFN, each with a shortcut (paper, equations 1 to 3)."""

    def __init__(
        self,
        dim: int,
        heads: int,
        reduction: int,
        hidden: int,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.lpu = ResidualDepthwise(dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, reduction)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = InvertedResidualFFN(dim, hidden)
        self.drop_path = DropPath(drop_path)
        self.on_map = False
        """Whether a rewrite has put the shortcut of the attention on the map."""

    def forward(self, x: Tensor, position_bias: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        size = (x.shape[2], x.shape[3])
        if self.on_map:
            return self._add_on_map(self.lpu(x), size, position_bias)
        tokens = to_tokens(self.lpu(x))  # (B, N, C)
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens), size, position_bias))
        # The shortcut is the second operand: OpenVINO overwrites the first one, and would have to copy tokens
        # that another operation reads.
        branch: Tensor = self.drop_path(self.ffn(to_map(self.norm2(tokens), *size)))
        return branch + to_map(tokens, *size)

    def _add_on_map(self, x: Tensor, size: tuple[int, int], position_bias: Tensor) -> Tensor:
        """Attention and IRFFN with both shortcuts on the map, (B, C, H, W)."""
        attended = self.attn(self.norm1(to_tokens(x)), size, position_bias)
        x = x + to_map(attended, *size)
        branch: Tensor = self.ffn(to_map(self.norm2(to_tokens(x)), *size))
        return branch + x


class Stage(nn.Module):
    """2x2 patch embedding, then blocks that share one position bias."""

    def __init__(
        self,
        in_dim: int,
        dim: int,
        heads: int,
        reduction: int,
        hidden: int,
        size: int,
        drop_paths: list[float],
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(in_dim, dim, 2, stride=2)
        self.norm = nn.LayerNorm(dim)  # eps 1e-5, unlike the blocks
        keys = (size // reduction) ** 2
        self.position_bias = nn.Parameter(torch.randn(heads, size**2, keys))
        self.blocks = nn.ModuleList(Block(dim, heads, reduction, hidden, rate) for rate in drop_paths)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, 2H, 2W) -> (B, C, H, W)."""
        x = self.embed(x)
        x = to_map(self.norm(to_tokens(x)), x.shape[2], x.shape[3])
        for block in self.blocks:
            x = block(x, self.position_bias)
        return x


class StemLayer(nn.Module):
    """3x3 conv, GELU, then batch norm: the norm follows the activation."""

    def __init__(self, in_dim: int, dim: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, 3, stride=stride, padding=1)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(F.gelu(self.conv(x)))
        return normed


class Head(nn.Module):
    """1x1 conv, batch norm, swish, *then* global average pooling and the classifier."""

    def __init__(self, dim: int, fc_dim: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, fc_dim, 1)
        self.norm = nn.BatchNorm2d(fc_dim)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(fc_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, num_classes)."""
        pooled = F.silu(self.norm(self.conv(x))).mean((2, 3))
        logits: Tensor = self.fc(self.dropout(pooled))
        return logits


class CMT(Classifier):
    """CMT classifier: float32 ``(N, 3, S, S)`` -> logits ``(N, num_classes)``, ``S = img_size``.

    The position biases fix the input size; ``load_weights(..., resize=True)`` moves them to another one.
    """

    def __init__(self, config: CMTConfig, *, img_size: int, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.img_size = img_size
        self.num_classes = num_classes
        widths = (3, config.stem, config.stem, config.stem)
        self.stem = nn.Sequential(
            *(StemLayer(widths[i], widths[i + 1], 2 if i == 0 else 1) for i in range(3))
        )
        rates = iter(torch.linspace(0, config.drop_path, sum(config.depths)).tolist())
        in_dims = (config.stem, *config.dims)
        self.stages = nn.ModuleList(
            Stage(
                in_dims[i],
                dim,
                config.heads[i],
                config.reductions[i],
                int(dim * config.mlp_ratio),
                img_size // 4 >> i,
                [next(rates) for _ in range(config.depths[i])],
            )
            for i, dim in enumerate(config.dims)
        )
        self.head = Head(
            config.dims[-1],
            config.fc_dim,
            num_classes,
            config.head_dropout,
        )
        self.apply(_init)

    def features(self, x: Tensor) -> list[Tensor]:
        """The map of each stage, ``(B, dims[i], S/4 >> i, S/4 >> i)``."""
        self.require_size(x)
        x = self.stem(x)  # (B, stem, S/2, S/2)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x)[-1])
        return logits


def _init(module: nn.Module) -> None:
    """Initialisation of the official code: truncated normal for linears, He (fan-out) for convs."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _rename_stage(match: re.Match[str]) -> str:
    """``stages.0`` for the published letter ``a``."""
    return f"stages.{'abcd'.index(match[1])}"


_RENAMES: KeyRenames = [
    (
        re.compile(r"^stem_(conv|norm)(\d)\."),
        lambda m: f"stem.{int(m[2]) - 1}.{m[1]}.",
    ),
    (
        re.compile(r"^relative_pos_([a-d])$"),
        lambda m: f"{_rename_stage(m)}.position_bias",
    ),
    (
        re.compile(r"^patch_embed_([a-d])\.proj\."),
        lambda m: f"{_rename_stage(m)}.embed.",
    ),
    (
        re.compile(r"^patch_embed_([a-d])\.norm\."),
        lambda m: f"{_rename_stage(m)}.norm.",
    ),
    (
        re.compile(r"^blocks_([a-d])\."),
        lambda m: f"{_rename_stage(m)}.blocks.",
    ),
    (re.compile(r"(blocks\.\d+)\.proj\."), r"\1.lpu."),
    (re.compile(r"\.attn\.sr\.0\."), ".attn.reduce."),
    (re.compile(r"\.attn\.sr\.1\."), ".attn.reduce_norm."),
    (re.compile(r"\.mlp\.conv1\.0\."), ".ffn.expand."),
    (re.compile(r"\.mlp\.conv1\.2\."), ".ffn.expand_norm."),
    (re.compile(r"\.mlp\.proj\."), ".ffn.depthwise."),
    (re.compile(r"\.mlp\.proj_bn\."), ".ffn.depthwise_norm."),
    (re.compile(r"\.mlp\.conv2\.0\."), ".ffn.project."),
    (re.compile(r"\.mlp\.conv2\.1\."), ".ffn.project_norm."),
    (re.compile(r"^_fc\."), "head.conv."),
    (re.compile(r"^_bn\."), "head.norm."),
    (re.compile(r"^head\.(weight|bias)$"), r"head.fc.\1"),
]
"""Published key -> ours. Stages have the letters a to d, and three modules of a published block are all
called `proj`."""


def resize_position_bias(bias: Tensor, queries: int, keys: int) -> Tensor:
    """Resize ``(heads, Hq*Wq, Hk*Wk)`` to ``(heads, queries, keys)``: bicubic over the query grid, then the
    key grid.

    Both grids are square. The paper says only ``B' = Bicubic(B)``; interpolating each grid keeps its 2-D
    geometry, which one bicubic over the flattened matrix would not. Equal sizes return the same tensor
    object.
    """
    heads, old_queries, old_keys = bias.shape

    def grid(table: Tensor, size: int) -> Tensor:  # (L, n*n) -> (L, size)
        side, new = round(table.shape[1] ** 0.5), round(size**0.5)
        table = table.reshape(-1, 1, side, side)
        return F.interpolate(table, (new, new), mode="bicubic", align_corners=False).reshape(-1, size)

    if queries != old_queries:
        columns = bias.transpose(1, 2).reshape(heads * old_keys, old_queries)
        bias = grid(columns, queries).reshape(heads, old_keys, queries).transpose(1, 2).contiguous()
    if keys != old_keys:
        bias = grid(bias.reshape(heads * queries, old_keys), keys).reshape(heads, queries, keys)
    return bias


def _is_resizable(old: torch.Size, new: torch.Size) -> bool:
    """Whether two position biases differ only in the sizes of their (square) grids."""
    square = len(old) == 3 and all(round(n**0.5) ** 2 == n for n in old[1:])
    return square and old != new and old[0] == new[0]


def resize(model: nn.Module, state: StateDict) -> tuple[StateDict, list[str]]:
    """Move every position bias of ``state`` (our keys) to the size that ``model`` was built for.

    Returns the new state and the changed keys.
    """
    state, changed = dict(state), []
    for key, target in model.state_dict().items():
        if key.endswith("position_bias") and key in state and _is_resizable(state[key].shape, target.shape):
            state[key] = resize_position_bias(state[key].float(), *target.shape[1:])
            changed.append(key)
    return state, changed


def _put_shortcuts_on_maps(model: nn.Module) -> int:
    """Let every block add its attention to the map that the LPU's conv gives, and not to its tokens."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        block.on_map = True
    return len(blocks)


_BEFORE = (
    fold_scale("q"),
    fold_batch_norm("reduce", "reduce_norm"),
    fold_affine("norm1", "attn.q", "attn.reduce"),
    fold_affine("norm1", "attn.q", "attn.k", "attn.v", unless="attn.reduce"),
)
"""What comes before the rewrites of the attention."""

_BEHIND = (
    fold_affine("norm2", "ffn.expand"),
    fold_shortcut(),
    fold_affine("depthwise_norm", "project"),
    fold_batch_norm("project", "project_norm"),
    fold_affine("stem.2.norm", "stages.0.embed"),  # 2x2, no padding: exact
    fold_batch_norm("head.conv", "head.norm"),
    replace_batch_norms(),  # stem and expand_norm: between an activation and a zero-padded conv
)
"""What comes behind them."""

REWRITES = (
    *_BEFORE,
    attend_over_keys("blocks", "norm1", "attn"),  # stages 1 and 2, which have the most tokens
    merge_keys_and_values(),
    *_BEHIND,
)
"""The exact rewrites of CMT, in the order in which they apply."""

# The compiler fuses an attention in the usual form if it has several heads. It reads queries, keys and values
# where their products leave them, if no bias comes between and a head's width is a multiple of 8; else a
# kernel copies each of them.
RTX_REWRITES = (
    *_BEFORE,
    attend_with_tokens("norm1", "attn"),  # stage 1, which has the most tokens
    remove_attention_biases("norm1", "attn"),
    pad_heads(),
    Rewrite(
        "shortcut of the attention on the map",
        "map(x + f(x)) == map(x) + map(f(x))",
        _put_shortcuts_on_maps,
    ),
    *_BEHIND,
)
"""The exact rewrites of CMT for TensorRT for RTX, in the order in which they apply."""

_RELEASE = "https://github.com/ggjy/CMT.pytorch/releases/download/release-v1/"
"""Where the official weights of the ImageNet models lie."""

_FIGURES = "paper Table 1 and official README; MACs and parameters counted on the official code"
"""Where the figures of the ImageNet models come from."""


def _make_spec(
    name: str,
    img_size: int,
    params: int,
    macs: int,
    top1: str | None,
    **settings: Any,
) -> ModelSpec:
    return ModelSpec(
        name=name,
        family="CMT",
        constructor=CMT,
        config=_CONFIGS[name],
        img_size=img_size,
        rewrites=REWRITES,
        rtx_rewrites=RTX_REWRITES,
        rename=make_rename(_RENAMES),
        resize=resize,
        head_keys=("head.fc.weight", "head.fc.bias"),
        params=params,
        macs=macs,
        top1=top1,
        **settings,
    )


def _describe_published(file: str) -> dict[str, Any]:
    """Settings of a model with official weights in the release file ``file``."""
    return {
        "pretrained": Pretrained(f"{_RELEASE}{file}"),
        "source": _FIGURES,
    }


_CIFAR: dict[str, Any] = {
    "num_classes": 10,
    "crop_ratio": None,
    "labels": "cifar10_labels.txt",
    "pretrained": Pretrained(resource="cmt_nano_cifar10.safetensors"),
    "source": "trained here on CIFAR-10 at 64 pixels",
}
"""Settings of the model that was trained on CIFAR-10."""

# fmt: off
_CONFIGS = {
    # name                 dims                  depths         mlp   stem
    "cmt_nano":  CMTConfig((24, 48, 96, 192),    (2, 2, 4, 2),  4.0,  16, fc_dim=512),
    "cmt_ti":    CMTConfig((46, 92, 184, 368),   (2, 2, 10, 2), 3.6,  16),
    "cmt_xs":    CMTConfig((52, 104, 208, 416),  (3, 3, 12, 3), 3.77, 16),
    "cmt_s":     CMTConfig((64, 128, 256, 512),  (3, 3, 16, 3), 4.0,  32),
    "cmt_b":     CMTConfig((76, 152, 304, 608),  (4, 4, 20, 4), 4.0,  38, head_dropout=0.3),
}
"""The configuration of each variant."""

SPECS = (
    #     name      size      params           macs   top-1
    _make_spec("cmt_nano",  64,  1_689_282,    23_922_176, None,   **_CIFAR),
    _make_spec("cmt_ti",   160,  9_492_426,   638_904_600, "79.1", **_describe_published("cmt_tiny.pth")),
    _make_spec("cmt_xs",   192, 15_247_208, 1_546_873_472, "81.8", **_describe_published("cmt_xs.pth")),
    _make_spec("cmt_s",    224, 26_256_160, 4_031_742_464, "83.5", **_describe_published("cmt_small.pth")),
    _make_spec("cmt_b",    256, 45_715_076, 9_317_124_096, "84.5", **_describe_published("cmt_base.pth")),
)
"""The variants of CMT, from the smallest to the largest."""
# fmt: on
