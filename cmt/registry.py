"""The table of models: every command and every parametrised test reads it.

A family adds its variants with :func:`register` in its own file; nothing else in the project knows a model by
name.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module, resources
from typing import Any

import torch
from torch import nn

from cmt_edge.deploy.errors import InputError, UnknownNameError

from .rewrites import Rewrite

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

FAMILIES = (
    "cmt_edge.cmt.families.cmt",
    "cmt_edge.cmt.families.cvt",
    "cmt_edge.cmt.families.convit",
    "cmt_edge.cmt.families.mvit",
    "cmt_edge.cmt.families.xformer",
)
"""Modules or packages that register models when imported: one entry a family."""


@dataclass(frozen=True)
class Pretrained:
    """Where published weights come from.

    ``resource`` names a file shipped in ``cmt/data``; ``url`` a release file that is downloaded on request.
    ``size`` (bytes) and ``sha256`` are checked where they are known.
    """

    url: str | None = None
    resource: str | None = None
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class ModelSpec:
    """One registry entry.

    Attributes:
        name: registry name, e.g. ``"cmt_xs"``.
        family: human-readable family name.
        build: ``build(config, img_size=..., num_classes=...) -> nn.Module`` in training mode.
        config: the family's config dataclass for this variant.
        img_size: default input height and width in pixels.
        num_classes: default number of classes.
        size_multiple: the input size must be a multiple of this.
        rewrites: the exact rewrites the family subscribes to, see :mod:`cmt_edge.cmt.rewrites`; applied in
            this order.
        rename: maps a published state-dict key to ours.
        adapt: ``adapt(state_dict) -> state_dict``, under our keys, where published values have another
            layout.
        resize: ``(model, state_dict) -> (state_dict, keys)`` for another resolution; ``keys`` are those it
            changed.
        head_keys: our keys whose shape depends on the class count.
        crop_ratio: evaluation resizes the short side to ``int(img_size / crop_ratio)`` and crops the centre;
            ``None`` resizes to exactly ``img_size`` x ``img_size``.
        interpolation: how evaluation resizes, ``"bicubic"`` or ``"bilinear"``.
        labels: file of class labels in ``cmt/data`` for the default class count.
        strides: of the maps that the model's ``features(x)`` gives, in input pixels; empty where it has none.
        params, macs: published figures at the default size (MACs at batch 1; conv, linear and matmul only).
        top1: published ImageNet-1k top-1 in percent, as printed, and ``source`` of these figures.
    """

    name: str
    family: str
    build: Callable[..., nn.Module]
    config: Any
    img_size: int
    rewrites: tuple[Rewrite, ...]
    num_classes: int = 1000
    size_multiple: int = 32
    rename: Callable[[str], str] = str
    adapt: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None
    resize: Callable[..., tuple[dict[str, torch.Tensor], list[str]]] | None = None
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
    """Whether ``build`` returns the weights that "pretrained" means."""
    published_state: Callable[[], dict[str, torch.Tensor]] | None = None
    """Asks another library for the published state dict, of the default size and class count."""


_REGISTRY: dict[str, ModelSpec] = {}


def register(spec: ModelSpec) -> ModelSpec:
    """Add one variant; a name can be taken only once."""
    if spec.name in _REGISTRY:
        raise ValueError(f"model {spec.name!r} is registered twice")
    _REGISTRY[spec.name] = spec
    return spec


@lru_cache(maxsize=1)
def _load_families() -> None:
    for module in FAMILIES:
        import_module(module)


def list_models() -> list[str]:
    """Names of all models, in the order of :data:`FAMILIES` and as each registers them."""
    _load_families()
    order = {module: i for i, module in enumerate(FAMILIES)}

    def place(name: str) -> int:
        module = _REGISTRY[name].build.__module__.split(".")
        return order.get(".".join(module[:4]), len(order))  # a family may be a package

    return sorted(_REGISTRY, key=place)


def model_spec(name: str) -> ModelSpec:
    """The registry entry of ``name``, or one for ``module:factory`` and ``timm:NAME`` (see
    :mod:`cmt_edge.cmt.outside`).

    Raises :class:`~cmt_edge.deploy.errors.UnknownNameError` with the closest names.
    """
    from .outside import custom_spec, is_custom

    if is_custom(name):
        return custom_spec(name)
    _load_families()
    try:
        return _REGISTRY[name]
    except KeyError:
        close = difflib.get_close_matches(name, _REGISTRY, n=3, cutoff=0.4)
        raise UnknownNameError("model", name, close, list(_REGISTRY)) from None


def create_model(
    name: str,
    *,
    img_size: int | None = None,
    num_classes: int | None = None,
    seed: int | None = None,
    **overrides: Any,
) -> nn.Module:
    """Build a reference model with random weights, in eval mode.

    Args:
        name: a name of :func:`list_models`.
        img_size: input height and width in pixels (default: the published size); a multiple of
            ``size_multiple``.
        num_classes: number of logits (default: the published number).
        seed: seeds the initialisation without touching the global generator; ``None`` draws from the global
            one.
        overrides: fields of the family's config dataclass, e.g. ``drop_path=0.1`` for training.

    Returns:
        A module mapping float32 ``(N, 3, img_size, img_size)`` to logits ``(N, num_classes)``; its registry
        entry is its attribute ``spec``.

    Raises:
        UnknownNameError: no such model.
        InputError: ``img_size`` or ``num_classes`` is impossible.
    """
    from dataclasses import replace

    spec = model_spec(name)
    img_size = spec.img_size if img_size is None else img_size
    num_classes = spec.num_classes if num_classes is None else num_classes
    check_size(spec, img_size)
    if num_classes < 1:
        raise InputError(
            f"{num_classes} classes were asked of {name}",
            where="num_classes",
            remedy="ask for 1 class or more",
        )
    config = replace(spec.config, **overrides)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        model = spec.build(config, img_size=img_size, num_classes=num_classes)
    model.spec = spec  # type: ignore[assignment]
    return model.eval()


def check_size(spec: ModelSpec, img_size: int) -> None:
    """Raise :class:`~cmt_edge.deploy.errors.InputError` unless the model can be built for ``img_size``
    pixels."""
    m = spec.size_multiple
    if img_size < m or img_size % m:
        below = max(m, img_size // m * m)
        raise InputError(
            f"image size {img_size} is not a multiple of {m}, which {spec.name} needs",
            where="img_size",
            remedy=f"use {below} or {below + m} (published size: {spec.img_size})",
        )


def labels_of(spec: ModelSpec, num_classes: int) -> list[tuple[str, str]] | None:
    """``[(class id, readable name), ...]`` of the published classes, or ``None`` where the class count
    differs.

    The id is what a data set's class folder is called (an ImageNet synset such as ``n01440764``); where a
    data set has no ids, both are the name.
    """
    if spec.labels is None or num_classes != spec.num_classes:
        return None
    lines = (
        resources.files("cmt_edge.cmt").joinpath("data", spec.labels).read_text(encoding="utf-8").splitlines()
    )
    pairs = [line.split(" ", 1) for line in lines if line]
    return [(p[0], p[-1]) for p in pairs]
