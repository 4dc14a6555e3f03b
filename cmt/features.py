"""What a model returns: class logits, or the feature maps of its stages for detection and segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from cmt_edge.deploy.errors import InputError

from .outputs import PROBED, TwoLabels, is_one_probability
from .spec import Classifier, ModelSpec

HEADS = ("logits", "features")
"""What an exported model can return."""


class Hierarchical(Protocol):
    """A model with stages of different resolution."""

    def features(self, x: Tensor) -> Sequence[Tensor]:
        """The map of each stage, ``(N, C, S / stride, S / stride)``."""
        ...


class FeatureMaps(nn.Module):
    """A hierarchical model without its head.

    Maps float32 ``(N, 3, S, S)`` to the map of each stage, ``(N, C, S / stride, S / stride)``. The strides
    are ``model.spec.strides``; the maps come before any norm that belongs to the head.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.img_size = cast(Classifier, model).img_size

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(cast(Hierarchical, self.model).features(x))


def choose_head(model: nn.Module, head: str) -> nn.Module:
    """``model`` as it is for ``"logits"``, or as :class:`FeatureMaps` for ``"features"``.

    A classifier of one logit becomes one of two classes (:class:`~cmt_edge.cmt.outputs.TwoLabels`).

    Raises:
        InputError: the model has no stages of different resolution.
    """
    require_head(cast(Classifier, model).spec, head)
    if head == "features":
        return FeatureMaps(model).eval()
    return _answer_with_two_labels(model) if cast(Classifier, model).num_classes == 1 else model


def _answer_with_two_labels(model: nn.Module) -> nn.Module:
    """``model``, which has one output, as a classifier of two classes."""
    size = cast(Classifier, model).img_size
    example = torch.rand(
        PROBED,
        3,
        size,
        size,
        generator=torch.Generator().manual_seed(0),
    )
    return TwoLabels(model, is_one_probability(model, example)).eval()


def require_head(spec: ModelSpec, head: str) -> None:
    """Raise :class:`~cmt_edge.deploy.errors.InputError` unless models of ``spec`` can have this head."""
    if head == "features" and not spec.strides:
        raise InputError(
            f"{spec.name} has no feature maps: it is not hierarchical, or has no method features(x) -> list"
            " of maps",
            remedy="--head logits, or a model of another family (cmt, cvt, mvit, xformer)",
        )
