"""XFormer, our reading of *Lightweight Vision Transformer with Cross Feature Attention* (Zhao et al., arXiv
2207.07268).

Of this paper only the abstract is public to us: no official code, checkpoint, formula or stage table could be
read. So this is **not** a re-implementation that could be checked against the authors' numbers; the registry
calls it ``xformer_reading``.

The paper's (abstract):

* "cross feature attention (XFA)" brings down the cost of the transformer part;
* with efficient mobile CNN blocks it makes a light CNN-transformer hybrid of local and global
  representations;
* 5.5 million parameters. (Its ImageNet top-1, 78.5 %, is that of the authors' model; nothing is known about
  the accuracy of this one.)

Ours, everything else: what XFA computes (:class:`CrossFeatureAttention`), the transformer layer and the XF
block around it, MobileNetV3's inverted residual (Howard et al., ICCV 2019) as the mobile block, all widths,
depths and kernel sizes, the input size and the initialisation. Attention between features instead of tokens,
with normalised queries and keys, is also what XCiT (El-Nouby et al., NeurIPS 2021) does, there with a
softmax.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..folding import replace_weights
from ..layers import (
    DropPath,
    merge_heads,
    split_heads,
    to_map,
    to_tokens,
)
from ..rewrites import fold_affine, fold_batch_norm, fold_scale
from ..spec import Classifier, ModelSpec, Rewrite


@dataclass(frozen=True)
class XFormerConfig:
    """Widths and depths (all ours); the tuples have one entry a stage.

    Attributes:
        stem: channels of the stem, at stride 2.
        widths: channels of the maps that :meth:`XFormer.features` returns.
        blocks: inverted residuals in each stage; the first one halves the map.
        kernels: kernel sizes of their depthwise convs.
        excite: whether they have squeeze-and-excitation.
        dims: token widths of the XF blocks; 0 means that the stage has none.
        layers: transformer layers in each XF block.
        expand: hidden channels of an inverted residual, as a multiple of its input.
        head_dim: features an attention head compares with one another.
    """

    stem: int
    widths: tuple[int, int, int, int]
    blocks: tuple[int, int, int, int]
    kernels: tuple[int, int, int, int]
    excite: tuple[bool, bool, bool, bool]
    dims: tuple[int, int, int, int]
    layers: tuple[int, int, int, int]
    expand: int = 4
    mlp_ratio: int = 2
    head_dim: int = 32
    fc_dim: int = 1088
    head_dropout: float = 0.1
    drop_path: float = 0.0


class ConvNorm(nn.Sequential):
    """Conv without bias, batch norm, then hard-swish unless ``act`` is false (MobileNetV3's order, our
    choice).

    Every batch norm of the model stands here, after a conv.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        act: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_dim,
            dim,
            kernel,
            stride=stride,
            padding=kernel // 2,
            groups=groups,
            bias=False,
        )
        self.norm = nn.BatchNorm2d(dim)
        self.act = nn.Hardswish() if act else nn.Identity()


class SqueezeExcitation(nn.Module):
    """Multiplies each channel by a hard-sigmoid gate that reads the whole map (MobileNetV3, section 5.3; our
    choice)."""

    def __init__(self, dim: int, squeezed: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(dim, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        pooled = x.mean((2, 3), keepdim=True)  # (B, C, 1, 1)
        return x * F.hardsigmoid(self.excite(F.relu(self.squeeze(pooled))))


class InvertedResidual(nn.Module):
    """Expand, depthwise conv, squeeze-and-excitation, project (MobileNetV3, section 3).

    A block whose input and output have the same shape has a shortcut. To take these blocks is our choice: the
    paper's abstract says "efficient mobile CNNs".
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        hidden: int,
        kernel: int,
        stride: int,
        excite: bool,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.expand = ConvNorm(in_dim, hidden, 1)
        self.depthwise = ConvNorm(hidden, hidden, kernel, stride=stride, groups=hidden)
        self.excite = SqueezeExcitation(hidden, hidden // 4) if excite else nn.Identity()
        self.project = ConvNorm(hidden, dim, 1, act=False)
        self.drop_path = DropPath(drop_path)
        self.shortcut = stride == 1 and in_dim == dim

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C, H / stride, W / stride)."""
        y: Tensor = self.project(self.excite(self.depthwise(self.expand(x))))
        return x + self.drop_path(y) if self.shortcut else y


class CrossFeatureAttention(nn.Module):
    """XFA, our reading: features attend to features, so that the cost is linear in the number N of tokens.

    In every head, with queries, keys and values (N, d) and columns of q and k scaled to length 1 *along the
    tokens*::

        S = k^T q               (d, d): cosines between features
        y = temperature * v S   (N, d): each feature becomes a mixture of the head's features

    That takes 2 N d^2 multiply-accumulates a head, attention between tokens 2 N^2 d. The temperature is
    learned, one a head. The name, and that it lowers the cost, are the paper's; the formula is ours. There is
    no softmax over S: cosines are bounded as they are, nothing is exponentiated in float16, and since all
    that follows S is linear, the temperature folds into the value projection.

    Float16: queries and keys are divided by 32 before they are squared. The sum over 1024 tokens is then
    their *mean* square, which overflows only beyond a root mean square of 256; ``EPS`` is a normal float16
    number.
    """

    EPS = 1e-4
    """Added to the squared length; float16 is normal down to 6.1e-5.

    A feature that nearly vanishes stays small and does not become noise.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.temperature: nn.Parameter | None
        self.temperature = nn.Parameter(torch.full((heads,), heads / dim))  # at first y is a mean
        self.q_scale = self.k_scale = 1 / 32  # exact, as a power of two, and it cancels except for EPS
        self.divide_scores = False
        """Whether the lengths divide the scores and not the features: a deployment rewrite."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        q, k, v = (split_heads(t, self.heads) for t in (self.q(x), self.k(x), self.v(x)))
        q = q if self.q_scale == 1 else q * self.q_scale
        k = k if self.k_scale == 1 else k * self.k_scale
        y = v @ self.cosines(k.mT, q)  # (B, heads, N, d)
        if self.temperature is not None:
            y = y * self.temperature[:, None, None]
        mixed: Tensor = self.proj(merge_heads(y))
        return mixed

    def cosines(self, k: Tensor, q: Tensor) -> Tensor:
        """``k`` (B, heads, d, N), ``q`` (B, heads, N, d) -> (B, heads, d, d)."""
        k_factor = self._compute_inverse_length(k, -1)  # (B, heads, d, 1)
        q_factor = self._compute_inverse_length(q, -2)  # (B, heads, 1, d)
        if self.divide_scores:
            return k @ q * k_factor * q_factor
        return (k * k_factor) @ (q * q_factor)

    def _compute_inverse_length(self, x: Tensor, tokens: int) -> Tensor:
        """1 / length along the axis ``tokens``; the axis stays, with length 1."""
        return torch.rsqrt((x * x).sum(tokens, keepdim=True) + self.EPS)


class TransformerLayer(nn.Module):
    """Transformer layer (ours): attention, then an MLP with hard-swish.

    Each has a layer norm before it and a shortcut around it.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = CrossFeatureAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, hidden)
        self.project = nn.Linear(hidden, dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        hidden = F.hardswish(self.expand(self.norm2(x)))
        branch: Tensor = self.drop_path(self.project(hidden))
        return x + branch


class XFBlock(nn.Module):
    """XF block (ours): local conv, transformer layers over all positions, fusion with the input map.

    The fusion is a 1x1 conv and a sum. Attention between features does not see the place of a token; the
    depthwise convs around it do.
    """

    def __init__(
        self,
        width: int,
        dim: int,
        heads: int,
        hidden: int,
        kernel: int,
        drop_paths: list[float],
    ) -> None:
        super().__init__()
        self.local = ConvNorm(width, width, kernel, groups=width)
        self.embed = nn.Conv2d(width, dim, 1)
        self.layers = nn.ModuleList(TransformerLayer(dim, heads, hidden, rate) for rate in drop_paths)
        self.fuse = ConvNorm(dim, width, 1, act=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        tokens = to_tokens(self.embed(self.local(x)))  # (B, H * W, dim)
        for layer in self.layers:
            tokens = layer(tokens)
        fused: Tensor = self.fuse(to_map(tokens, x.shape[2], x.shape[3]))
        return x + fused


class Head(nn.Module):
    """1x1 conv, global average pooling and the classifier (ours)."""

    def __init__(
        self,
        dim: int,
        fc_dim: int,
        num_classes: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.conv = ConvNorm(dim, fc_dim, 1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(fc_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, num_classes)."""
        pooled = self.conv(x).mean((2, 3))
        logits: Tensor = self.fc(self.dropout(pooled))
        return logits


class XFormer(Classifier):
    """Classifier of our reading: float32 ``(N, 3, S, S)`` -> logits ``(N, num_classes)``.

    No weight depends on the input size: one checkpoint serves every multiple of 32.
    """

    def __init__(
        self,
        config: XFormerConfig,
        *,
        img_size: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.img_size = img_size
        self.num_classes = num_classes
        self.stem = ConvNorm(3, config.stem, 3, stride=2)
        count = sum(config.blocks) + sum(config.layers)
        rates = iter(torch.linspace(0, config.drop_path, count).tolist())  # linear in depth
        self.stages = nn.ModuleList(
            _build_stage(config, i, [next(rates) for _ in range(n)])
            for i, n in enumerate(_count_depths(config))
        )
        self.head = Head(
            config.widths[-1],
            config.fc_dim,
            num_classes,
            config.head_dropout,
        )
        self.apply(_init)

    def features(self, x: Tensor) -> list[Tensor]:
        """Four maps ``(B, widths[i], S/4 >> i, S/4 >> i)``: strides 4, 8, 16 and 32."""
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x)[-1])
        return logits


def _count_depths(config: XFormerConfig) -> list[int]:
    """Residual branches of each stage: inverted residuals and transformer layers."""
    return [blocks + layers for blocks, layers in zip(config.blocks, config.layers, strict=True)]


def _build_stage(
    config: XFormerConfig,
    i: int,
    drop_paths: list[float],
) -> nn.Sequential:
    """Inverted residuals, the first of stride 2, then the XF block if there is one."""
    width, kernel, blocks, dim = (
        config.widths[i],
        config.kernels[i],
        config.blocks[i],
        config.dims[i],
    )
    in_dims = [(config.stem, *config.widths)[i]] + [width] * (blocks - 1)
    stage = nn.Sequential()
    for j, in_dim in enumerate(in_dims):
        stride = 2 if j == 0 else 1
        hidden = in_dim * config.expand
        stage.append(
            InvertedResidual(
                in_dim,
                width,
                hidden,
                kernel,
                stride,
                config.excite[i],
                drop_paths[j],
            )
        )
    if dim:
        heads, hidden = dim // config.head_dim, dim * config.mlp_ratio
        stage.append(XFBlock(width, dim, heads, hidden, kernel, drop_paths[blocks:]))
    return stage


def _init(module: nn.Module) -> None:
    """Truncated normal for linears, He (fan-out of one group) for convs."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.weight[0, 0].numel() * module.out_channels / module.groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
    if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
        nn.init.zeros_(module.bias)


# --- deployment rewrites of this family -----------------------------------------------------------


def _find_attentions(model: nn.Module) -> list[CrossFeatureAttention]:
    return [m for m in model.modules() if isinstance(m, CrossFeatureAttention)]


def _fold_temperature(model: nn.Module) -> int:
    """Scale the rows of the value projection; every head has its own temperature."""
    attentions = [attn for attn in _find_attentions(model) if attn.temperature is not None]
    for attn in attentions:
        assert attn.temperature is not None
        scale = attn.temperature.detach().repeat_interleave(attn.v.out_features // attn.heads)
        attn.v = replace_weights(attn.v, attn.v.weight * scale[:, None], attn.v.bias * scale)
        attn.temperature = None
    return len(attentions)


def _divide_scores(model: nn.Module) -> int:
    """Divide the d x d scores by the lengths, and not the N x d features."""
    attentions = [attn for attn in _find_attentions(model) if not attn.divide_scores]
    for attn in attentions:
        attn.divide_scores = True
    return len(attentions)


REWRITES = (
    fold_batch_norm("conv", "norm"),
    fold_affine("norm1", "attn.q", "attn.k", "attn.v"),
    fold_affine("norm2", "expand"),
    fold_scale("q", "q_scale"),
    fold_scale("k", "k_scale"),
    Rewrite(
        "temperature into values",
        "t (v S) == (t v) S: no softmax stands between",
        _fold_temperature,
    ),
    Rewrite(
        "lengths onto the scores",
        "(k a)^T (q b) == a^T (k^T q) b: d x d products, not N x d",
        _divide_scores,
    ),
)
"""The exact rewrites of this family, in the order in which they apply."""

_FIGURES = (
    "our reading of XFormer (arXiv 2207.07268): only the abstract is public, formula and layout are ours; "
    "not the authors' model, its 78.5 % top-1 is not claimed; MACs and parameters counted here"
)
"""Where the figures come from."""

# fmt: off
_READING = XFormerConfig(
    stem=16,
    # stage    1      2     3     4
    widths= (   32,   64,  112,  160),
    blocks= (    2,    2,    2,    2),
    kernels=(    3,    5,    3,    5),
    excite= (False, True, True, True),
    dims=   (    0,  128,  192,  256),
    layers= (    0,    2,    4,    3),
)
"""The configuration of the one variant."""
# fmt: on

SPECS = (
    ModelSpec(
        name="xformer_reading",
        family="XFormer (our reading)",
        constructor=XFormer,
        config=_READING,
        img_size=256,
        rewrites=REWRITES,
        head_keys=("head.fc.weight", "head.fc.bias"),
        params=5_516_128,
        macs=976_622_080,
        source=_FIGURES,
    ),
)
"""The one variant."""
