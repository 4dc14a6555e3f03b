"""What the project knows about a model: its entry in the registry, and the class that families derive from.

This module imports no other module of ``cmt``, so that families, the registry and the models from outside can
all read it.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cmt_edge.deploy.errors import InputError

LOADED = time.time()
"""When the code of the models began to be loaded, seconds since 1970: a source file that is younger may hold
other code."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of the red, green and blue values of ImageNet, with values from 0 to 1."""

IMAGENET_STD = (0.229, 0.224, 0.225)
"""Standard deviation of the red, green and blue values of ImageNet, with values from 0 to 1."""

StateDict = dict[str, Tensor]
"""Parameters and buffers of a model by name."""

KeyRenames = list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]]
"""What turns a key of a published checkpoint into ours: patterns, each with the text that replaces it."""


@dataclass(frozen=True)
class Rewrite:
    """One exact change of a model.

    Attributes:
        name: what it is called in tables and in ``fuse(model, without=...)``.
        algebra: why it is exact, in one line.
        apply: changes a float64 copy in place and returns the number of places; raises ``ValueError`` where
            the change would not be exact.
    """

    name: str
    algebra: str
    apply: Callable[[nn.Module], int]


CPU, RTX = "cpu", "rtx"
"""What the rewrites of a graph are chosen for: the runtimes on a CPU, or the compiler of TensorRT for RTX.
TensorRT gets those for a CPU: nothing has shown yet which ones it prefers."""
TARGETS = (CPU, RTX)
"""Everything that rewrites can be chosen for."""


@dataclass(frozen=True)
class Pretrained:
    """Where published weights come from.

    Attributes:
        url: a release file, which is downloaded on request.
        resource: a file shipped in ``cmt/data``.
        size: length of the file in bytes, checked where it is known.
        sha256: hex digest of the file, checked where it is known.
    """

    url: str | None = None
    resource: str | None = None
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class ModelSpec:
    """The registry's entry of one variant of a model.

    Attributes:
        name: name in the registry, e.g. ``"cmt_xs"``.
        family: human-readable name of the family.
        constructor: ``constructor(config, img_size=..., num_classes=...)`` returns the model in training
            mode.
        config: the family's config dataclass for this variant.
        img_size: default height and width of the input in pixels.
        rewrites: the exact rewrites of the family, see :mod:`cmt_edge.cmt.rewrites`; ``fuse`` applies them in
            this order.
        rtx_rewrites: those for TensorRT for RTX, where its compiler showed that others pay; ``None`` for the
            same.
        num_classes: default number of classes.
        size_multiple: the input size must be a multiple of this number of pixels.
        rename: maps a published state-dict key to ours.
        adapt: ``adapt(state) -> state``, under our keys, where published values have another layout.
        resize: ``resize(model, state) -> (state, keys)`` for another resolution; ``keys`` are those it
            changed.
        head_keys: our keys whose shape depends on the number of classes.
        crop_ratio: evaluation resizes the short side to ``int(img_size / crop_ratio)`` and crops the centre;
            ``None`` resizes to exactly ``img_size`` x ``img_size``.
        interpolation: how evaluation resizes, ``"bicubic"`` or ``"bilinear"``.
        mean: subtracted from red, green and blue, with values from 0 to 1.
        std: divides red, green and blue after that.
        labels: file in ``cmt/data`` with the labels of the default number of classes.
        strides: strides of the maps that the model's ``features(x)`` returns, in input pixels; empty for a
            model without feature maps.
        pretrained: where published weights come from; ``None`` where no file has an address.
        params: number of parameters at the default size.
        macs: multiply-accumulates of one image at the default size (convolutions, linears and matrix
            products).
        top1: published ImageNet-1k top-1 in percent, as printed.
        source: where ``params``, ``macs`` and ``top1`` come from.
        built_with_weights: whether ``constructor`` already returns the weights that "pretrained" means.
        published_state: asks another library for the published state dict, of the default size and number of
            classes.
    """

    name: str
    family: str
    constructor: Callable[..., nn.Module]
    config: Any
    img_size: int
    rewrites: tuple[Rewrite, ...]
    num_classes: int = 1000
    size_multiple: int = 32
    rename: Callable[[str], str] = str
    adapt: Callable[[StateDict], StateDict] | None = None
    resize: Callable[[nn.Module, StateDict], tuple[StateDict, list[str]]] | None = None
    head_keys: tuple[str, ...] = ()
    crop_ratio: float | None = 0.875
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    labels: str | None = "imagenet_labels.txt"
    strides: tuple[int, ...] = (4, 8, 16, 32)
    pretrained: Pretrained | None = None
    params: int | None = None
    macs: int | None = None
    top1: str | None = None
    source: str = ""
    built_with_weights: bool = False
    published_state: Callable[[], StateDict] | None = None
    rtx_rewrites: tuple[Rewrite, ...] | None = None

    def choose_rewrites(self, target: str = CPU) -> tuple[Rewrite, ...]:
        """The exact rewrites for one of :data:`TARGETS`, in the order in which they apply."""
        if target == RTX and self.rtx_rewrites is not None:
            return self.rtx_rewrites
        return self.rewrites


class Classifier(nn.Module):
    """An image classifier: float32 ``(N, 3, img_size, img_size)`` -> logits ``(N, num_classes)``.

    The families derive from this class. A model from outside the registry does not, but
    :func:`cmt_edge.cmt.create_model` gives it the same three attributes, and a type checker sees this class.

    Attributes:
        img_size: height and width of the input in pixels.
        num_classes: number of logits.
        spec: the registry's entry, set by :func:`cmt_edge.cmt.create_model`.
    """

    img_size: int
    num_classes: int
    spec: ModelSpec

    def require_size(self, images: Tensor) -> None:
        """Raise ``ValueError`` unless ``images`` (B, 3, H, W) have the size that this model was built for."""
        if images.shape[-2:] != (self.img_size, self.img_size):
            raise ValueError(
                f"this model was built for {self.img_size} pixels, the input is {tuple(images.shape)}"
            )


def make_rename(renames: KeyRenames) -> Callable[[str], str]:
    """The function for ``ModelSpec.rename`` that applies ``renames`` in order; our own keys match none, so
    they stay."""
    return functools.partial(_rename_key, renames)


def _rename_key(renames: KeyRenames, key: str) -> str:
    for pattern, replacement in renames:
        key = pattern.sub(replacement, key)
    return key


def check_size(spec: ModelSpec, img_size: int) -> None:
    """Raise :class:`~cmt_edge.deploy.errors.InputError` unless the model can be built for ``img_size``
    pixels."""
    multiple = spec.size_multiple
    if img_size >= multiple and img_size % multiple == 0:
        return
    below = max(multiple, img_size // multiple * multiple)
    raise InputError(
        f"image size {img_size} is not a multiple of {multiple}, which {spec.name} needs",
        where="img_size",
        remedy=f"use {below} or {below + multiple} (published size: {spec.img_size})",
    )
