"""A family in one file, as docs/families.md describes it: a hybrid with one conv and one attention block in
each stage.

``tests/test_example_family.py`` adds it as a user would, with one more entry in ``cmt.registry.FAMILIES``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from cmt_edge.cmt.layers import apply_scale, merge_heads, split_heads, to_map, to_tokens
from cmt_edge.cmt.rewrites import drop_key_bias, fold_affine, fold_batch_norm, fold_scale, fold_value_bias
from cmt_edge.cmt.spec import Classifier, ModelSpec


@dataclass(frozen=True)
class ExampleConfig:
    """Widths and heads; the tuples have one entry a stage."""

    dims: tuple[int, ...]
    heads: tuple[int, ...]
    mlp_ratio: int = 2


class Block(nn.Module):
    """Attention and MLP over the positions of a map, each behind a layer norm and with a shortcut."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        y = self.norm1(x)
        q, k, v = (split_heads(linear(y), self.heads) for linear in (self.q, self.k, self.v))
        scores = apply_scale(q @ k.transpose(-2, -1), self.scale)  # (B, heads, N, N)
        x = x + self.proj(merge_heads(scores.softmax(-1) @ v))
        branch: Tensor = self.mlp(self.norm2(x))
        return x + branch


class Stage(nn.Module):
    """A conv that shrinks the map by 4 with its batch norm, then one block."""

    def __init__(self, in_dim: int, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, 5, stride=4, padding=2, bias=False)
        self.norm = nn.BatchNorm2d(dim)
        self.block = Block(dim, heads, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, 4H, 4W) -> (B, C, H, W)."""
        x = self.norm(self.conv(x))
        return to_map(self.block(to_tokens(x)), x.shape[2], x.shape[3])


class Example(Classifier):
    """Example classifier: float32 ``(N, 3, S, S)`` -> logits ``(N, num_classes)``.

    No weight depends on ``S``.
    """

    def __init__(self, config: ExampleConfig, *, img_size: int, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.img_size = img_size
        self.num_classes = num_classes
        in_dims = (3, *config.dims)
        self.stages = nn.ModuleList(
            Stage(in_dims[i], dim, config.heads[i], dim * config.mlp_ratio)
            for i, dim in enumerate(config.dims)
        )
        self.norm = nn.LayerNorm(config.dims[-1])
        self.head = nn.Linear(config.dims[-1], num_classes)

    def features(self, x: Tensor) -> list[Tensor]:
        """The map of each stage, ``(B, dims[i], S/4 >> 2i, S/4 >> 2i)``."""
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        tokens = to_tokens(self.features(x)[-1])
        logits: Tensor = self.head(self.norm(tokens).mean(1))
        return logits


def rename_key(key: str) -> str:
    """Our name of a key of the (imagined) authors, e.g. ``layers.0.conv.weight``; our own keys stay."""
    return key.replace("layers.", "stages.", 1) if key.startswith("layers.") else key


REWRITES = (
    fold_batch_norm("conv", "norm"),
    fold_scale("q"),
    fold_affine("norm1", "q", "k", "v"),
    drop_key_bias("k"),
    fold_value_bias("v", "proj"),
    fold_affine("norm2", "mlp.0"),
    fold_affine("norm", "head"),
)


def _spec(name: str, img_size: int, config: ExampleConfig, params: int, macs: int) -> ModelSpec:
    return ModelSpec(
        name=name,
        family="Example",
        constructor=Example,
        config=config,
        img_size=img_size,
        num_classes=10,
        size_multiple=16,
        rewrites=REWRITES,
        rename=rename_key,
        head_keys=("head.weight", "head.bias"),
        strides=(4, 16),
        labels="cifar10_labels.txt",
        params=params,
        macs=macs,
        source="counted here; an example, not a published model",
    )


# fmt: off
SPECS = (
    #     name          size                dims      heads    params       MACs
    _spec("example_tiny", 64, ExampleConfig((32, 64), (2, 4)), 96_586, 8_282_752),
)
# fmt: on
