"""What a model gives: class logits, or the feature maps of its stages for detection and segmentation."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cmt_edge.deploy.errors import InputError

HEADS = ("logits", "features")


class FeatureMaps(nn.Module):
    """A hierarchical model without its head: float32 ``(N, 3, S, S)`` -> the map of each stage, ``(N, C, S /
    stride, S / stride)``.

    Strides are ``model.spec.strides``; the maps come before any norm that belongs to the head.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.img_size = model.img_size

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.features(x))  # type: ignore[operator]


def with_head(model: nn.Module, head: str) -> nn.Module:
    """``model`` as it is for ``"logits"``, or as :class:`FeatureMaps`.

    Raises:
        InputError: the model has no stages of different resolution.
    """
    require_head(model.spec, head)
    return FeatureMaps(model).eval() if head == "features" else model


def require_head(spec: Any, head: str) -> None:
    """Raise :class:`~cmt_edge.deploy.errors.InputError` unless models of a
    :class:`~cmt_edge.cmt.registry.ModelSpec` can have this head."""
    if head == "features" and not spec.strides:
        raise InputError(
            f"{spec.name} has no feature maps: it is not hierarchical, or has no method features(x) -> list"
            " of maps",
            remedy="--head logits, or a model of another family (cmt, cvt, mvit, xformer)",
        )
