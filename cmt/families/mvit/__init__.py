"""MViT and MViTv2 as a family: the model, its published weights, its deployment rewrites and its variants."""

from __future__ import annotations

from ...spec import ModelSpec, Pretrained, make_rename
from .model import MViT, MViTConfig
from .published import RENAMES, adapt, resize
from .rewrites import choose_rewrites, choose_rtx_rewrites

_FIGURES = {
    1: "MViT paper Table 17, top-1 of the SlowFast MODEL_ZOO (paper: 83.0); "
    "MACs and parameters counted on the official code",
    2: "facebookresearch/mvit README; MACs and parameters counted on the official code",
}
"""Where the figures of each version come from."""

_RELEASE = "https://dl.fbaipublicfiles.com/mvit/mvitv2_models/"
"""Where the official weights lie."""

_NARROW = (96, 192, 384, 768)
"""Channels of the stages of all variants but the largest."""


def _make_spec(
    name: str,
    params: int,
    macs: int,
    top1: str,
    file: str | None,
) -> ModelSpec:
    """One variant; ``file`` is the name of its official weights."""
    config = _CONFIGS[name]
    return ModelSpec(
        name=name,
        family=f"MViTv{config.version}",
        constructor=MViT,
        config=config,
        img_size=224,
        rewrites=choose_rewrites(config),
        rtx_rewrites=choose_rtx_rewrites(config),
        rename=make_rename(RENAMES),
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
_CONFIGS = {
    "mvitv1_b16": MViTConfig(_NARROW, (1, 2, 11, 2), version=1, widen_in_attention=False),
    "mvitv2_t":   MViTConfig(_NARROW, (1, 2, 5, 2)),
    "mvitv2_s":   MViTConfig(_NARROW, (1, 2, 11, 2)),
    "mvitv2_b":   MViTConfig(_NARROW, (2, 3, 16, 3)),
    "mvitv2_l":   MViTConfig((144, 288, 576, 1152), (2, 6, 36, 4), (2, 4, 8, 16), widen_in_attention=False),
}
"""The configuration of each variant: widths and depths of the stages, then what differs."""

SPECS = (
    #     name          params            macs  top-1   weights
    _make_spec("mvitv1_b16", 36_982_600,  7_809_333_696, "82.9", None),  # published on Google Drive only
    _make_spec("mvitv2_t",   24_173_320,  4_676_957_952, "82.3", "MViTv2_T_in1k.pyth"),
    _make_spec("mvitv2_s",   34_870_216,  6_959_715_072, "83.6", "MViTv2_S_in1k.pyth"),
    _make_spec("mvitv2_b",   51_472_744, 10_102_438_656, "84.4", "MViTv2_B_in1k.pyth"),
    _make_spec("mvitv2_l",  217_992_952, 43_711_209_216, "85.3", "MViTv2_L_in1k.pyth"),
)
"""The variants of both versions, each from the smallest to the largest."""
# fmt: on
