"""Models from outside the registry: ``package.module:factory``, ``folder/file.py:factory``, and ``timm:NAME``
where timm is installed.

A factory is any callable without required arguments that returns an image classifier: an ``nn.Module`` from
float32 ``(N, 3, S, S)`` to logits ``(N, classes)``, or to something that :mod:`cmt_edge.cmt.outputs` finds
them in. A factory that takes ``num_classes`` or ``img_size`` gets them when they are asked for. Preprocessing
comes from the model's ``pretrained_cfg`` or ``default_cfg`` (with the names that timm uses: ``input_size``,
``crop_pct``, ``crop_mode``, ``interpolation``, ``mean``, ``std``) and from flags. Importing a module runs its
code: name only code that you trust.

For a factory, "pretrained" means the weights that it returns; for timm, those that timm downloads.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from cmt_edge.deploy.errors import (
    InputError,
)

from .factories import TIMM, Factory, call_factory, find_factory, load_timm_state
from .rewrites import replace_global_pools
from .single_answers import count_classes
from .spec import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Classifier,
    ModelSpec,
    Rewrite,
)

DEFAULT_SIZE = 224
"""Height and width, in pixels, of the input of a model that does not tell its own."""

DEFAULT_CROP = 0.875
"""Share of the resized image that the centre crop keeps, for a model that does not tell its own."""

CUSTOM = "custom"
"""Family of the users' own models."""

OUTSIDE_FAMILIES = (CUSTOM, TIMM)
"""Families of the models that are no models of the registry."""


@dataclass(frozen=True)
class NoConfig:
    """A model from outside has no configuration of ours."""


def is_outside(name: str) -> bool:
    """Whether ``name`` is ``module:factory`` or ``timm:NAME``."""
    return ":" in name


@lru_cache(maxsize=8)
def make_outside_spec(name: str, img_size: int | None = None) -> ModelSpec:
    """A registry entry for ``module:factory`` or ``timm:NAME``.

    Args:
        name: of the model.
        img_size: height and width, in pixels, of the images that the model is tried with, where it does not
            tell its own.

    Raises:
        InputError: the module or factory does not exist, or does not return an image classifier that gives
            one answer to one image.
        RuntimeMissingError: timm is not installed.
    """
    library, _, model = name.partition(":")
    described = describe_factory(find_factory(name), name, img_size)
    constructor = Constructor(
        name,
        described["img_size"],
        described["num_classes"],
    )
    if library == TIMM:
        labels = "imagenet_labels.txt" if described["num_classes"] == 1000 else None
        return ModelSpec(
            **described,
            constructor=constructor,
            family=TIMM,
            labels=labels,
            published_state=partial(load_timm_state, model),
        )
    return ModelSpec(
        **described,
        constructor=constructor,
        family=CUSTOM,
        built_with_weights=True,
        labels=None,
    )


def describe_factory(
    factory: Factory,
    name: str,
    img_size: int | None,
) -> dict[str, Any]:
    """The fields of a :class:`ModelSpec` that a model made by ``factory`` tells."""
    prototype = call_factory(factory, name)
    settings = _read_settings(prototype)
    default = img_size or DEFAULT_SIZE
    size = int(settings.get("input_size", (3, default, default))[-1])
    classes = count_classes(prototype, size, name)
    return {
        "name": name,
        "config": NoConfig(),
        "img_size": size,
        "num_classes": classes,
        "size_multiple": 1,
        "rewrites": _find_applicable_rewrites(prototype),
        "head_keys": _list_head_keys(settings),
        "crop_ratio": _read_crop_ratio(settings, name),
        "interpolation": str(settings.get("interpolation", "bicubic")),
        "mean": tuple(settings.get("mean", IMAGENET_MEAN)),
        "std": tuple(settings.get("std", IMAGENET_STD)),
        "strides": _measure_strides(prototype, size),
        "source": "from outside the registry",
    }


@dataclass(frozen=True)
class Constructor:
    """:attr:`ModelSpec.constructor` of a model from outside. It can be pickled: it knows the name of the
    factory, not the factory.

    Attributes:
        name: ``module:factory``, ``folder/file.py:factory`` or ``timm:NAME``.
        size: height and width, in pixels, that the factory itself chooses.
        classes: number of classes that the factory itself chooses.
    """

    name: str
    size: int
    classes: int

    def __call__(
        self,
        _: NoConfig,
        *,
        img_size: int,
        num_classes: int,
    ) -> nn.Module:
        factory = self.factory()
        model = call_factory(
            factory,
            self.name,
            **self._choose_options(factory, img_size, num_classes),
        )
        made = count_classes(model, img_size, self.name)
        if made != num_classes:
            raise InputError(
                f"{self.name} has {made} classes, not the {num_classes} asked for",
                remedy="correct the factory",
            )
        classifier = cast(Classifier, model)
        classifier.img_size = img_size
        classifier.num_classes = num_classes
        return classifier

    def factory(self) -> Factory:
        """The user's factory."""
        return find_factory(self.name)

    def _choose_options(
        self,
        factory: Factory,
        img_size: int,
        num_classes: int,
    ) -> dict[str, int]:
        """What the factory is told: size and number of classes, where they are not its own."""
        accepted = inspect.signature(factory).parameters
        if num_classes != self.classes and "num_classes" not in accepted:
            raise InputError(
                f"{self.name} takes no num_classes",
                remedy="leave --num-classes out, or let the factory take it",
            )
        options = {}
        if num_classes != self.classes:
            options["num_classes"] = num_classes
        if img_size != self.size and "img_size" in accepted:
            options["img_size"] = img_size
        return options


def _find_applicable_rewrites(model: nn.Module) -> tuple[Rewrite, ...]:
    """The rewrites for any model that find a place in this one; ``model`` is changed."""
    return tuple(rewrite for rewrite in (replace_global_pools(),) if rewrite.apply(model))


def _read_settings(model: nn.Module) -> dict[str, Any]:
    """The model's own evaluation settings, empty where it has none."""
    found: dict[str, Any] = {}
    for attribute in ("default_cfg", "pretrained_cfg"):
        config = getattr(model, attribute, None)
        if isinstance(config, Mapping):
            found |= {key: value for key, value in config.items() if value is not None}
    size = getattr(model, "img_size", None)
    if isinstance(size, int):
        found.setdefault("input_size", (3, size, size))
    return found


def _measure_strides(model: nn.Module, size: int) -> tuple[int, ...]:
    """Strides of the maps ``(N, C, H, W)`` that the model's method ``features`` returns as a list.

    Empty where the model has no such method, or where it returns something else.
    """
    method = getattr(model, "features", None)
    if method is None or isinstance(method, nn.Module):  # in many models, `features` is a module: the convs
        return ()
    try:
        with torch.inference_mode():
            maps = method(torch.zeros(1, 3, size, size))
    except Exception:  # the user's code: anything may happen, and nobody has asked for feature maps yet
        return ()
    if not isinstance(maps, (list, tuple)):
        return ()
    if not all(isinstance(x, Tensor) and x.ndim == 4 for x in maps):
        return ()
    return tuple(size // x.shape[-1] for x in maps)


def _list_head_keys(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """State-dict keys of the classifier; some models have two."""
    names = settings.get("classifier", ())
    if isinstance(names, str):
        names = (names,)
    return tuple(f"{name}.{kind}" for name in names for kind in ("weight", "bias"))


def _read_crop_ratio(settings: Mapping[str, Any], name: str) -> float | None:
    """:attr:`ModelSpec.crop_ratio` of timm's settings.

    timm's mode ``center`` always keeps the aspect ratio, even with a share of 1, which crops the long side
    only. Its mode ``squash`` does not keep it.
    """
    crop = float(settings.get("crop_pct") or DEFAULT_CROP)
    mode = settings.get("crop_mode", "center")
    if mode == "center":
        return crop
    if mode == "squash" and crop == 1:
        return None
    raise InputError(
        f"{name} crops in the mode {mode!r} with the share {crop}, which preprocessing does not know",
        remedy="name a factory of your own that changes the model's default_cfg",
    )
