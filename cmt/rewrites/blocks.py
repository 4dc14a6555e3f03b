"""Rewrites of what surrounds an attention: shortcuts, class tokens, pooling."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from ..folding import GlobalMean, fold_identity
from ..layers import ResidualDepthwise
from ..spec import Rewrite
from .places import replace_each


def fold_shortcut() -> Rewrite:
    """``x + conv(x)`` of a depthwise conv becomes one depthwise conv."""

    def plain(module: nn.Module) -> nn.Module:
        old = cast(ResidualDepthwise, module)
        kernel = old.kernel_size[0]
        conv = nn.Conv2d(
            old.in_channels,
            old.out_channels,
            kernel,
            padding=kernel // 2,
            groups=old.groups,
        )
        conv.load_state_dict(old.state_dict())
        return fold_identity(conv.double())

    return replace_each(
        "shortcut into depthwise conv",
        "DW x + x == (DW + I) x",
        ResidualDepthwise,
        plain,
    )


def keep_class_token() -> Rewrite:
    """The last block computes the class token alone, because the head reads nothing else.

    For models that have the switch ``class_only``.
    """

    def apply(module: nn.Module) -> int:
        places = [m for m in module.modules() if getattr(m, "class_only", None) is False]
        for place in places:
            cast(Any, place).class_only = True
        return len(places)

    return Rewrite(
        "class token only in the last block",
        "(X + f(A X))[0] == X[0] + f(A[0] X)",
        apply,
    )


def replace_global_pools() -> Rewrite:
    """``AdaptiveAvgPool2d(1)`` becomes a mean.

    For a channels-last map torch.onnx writes the pooling with a gather by computed indices, and the mean as
    one operation. The rewrite can be pickled, as models from outside the registry can.
    """
    return Rewrite("global pooling as mean", "pool(x) == sum(x) / (H W)", _replace_pools_by_means)


def _replace_pools_by_means(module: nn.Module) -> int:
    places = [
        (parent, name)
        for parent in module.modules()
        for name, child in parent.named_children()
        if type(child) is nn.AdaptiveAvgPool2d and child.output_size in (1, (1, 1))
    ]
    for parent, name in places:
        setattr(parent, name, GlobalMean())
    return len(places)
