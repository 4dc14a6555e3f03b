"""Models from outside the registry: ``package.module:factory``, and ``timm:NAME`` where timm is installed.

A factory is any callable without required arguments that returns an image classifier, an ``nn.Module`` from float32 ``(N, 3, S, S)`` to
logits ``(N, classes)``. Where it takes ``num_classes`` or ``img_size`` it gets them when they are asked for. Preprocessing comes from the
model's ``pretrained_cfg`` or ``default_cfg`` (the names timm uses: ``input_size``, ``crop_pct``, ``mean``, ``std``) and from flags.
Importing the module runs its code: name only code you trust.
"""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deploy.errors import CmtEdgeError, InputError, RuntimeMissingError, UnknownNameError

from .registry import IMAGENET_MEAN, IMAGENET_STD, ModelSpec

DEFAULT_SIZE = 224
TIMM = "timm"
RESIZED_EXACTLY = 1.0
"""timm's crop share that crops nothing."""


@dataclass(frozen=True)
class NoConfig:
    """A model from outside has no configuration of ours."""


def is_custom(name: str) -> bool:
    """Whether ``name`` is ``module:factory`` or ``timm:NAME``."""
    return ":" in name


@lru_cache(maxsize=8)
def custom_spec(name: str) -> ModelSpec:
    """A registry entry for ``module:factory`` or ``timm:NAME``.

    Raises:
        InputError: no such module or factory, or what it returns is no image classifier.
        RuntimeMissingError: timm is not installed.
    """
    module, _, attribute = name.partition(":")
    factory = _timm_factory(attribute) if module == TIMM else _factory(module, attribute)
    prototype = _call(factory, name)
    settings = _settings(prototype)
    size = int(settings.get("input_size", (3, DEFAULT_SIZE, DEFAULT_SIZE))[-1])
    classes = _count_classes(prototype, size, name)
    crop = float(settings.get("crop_pct") or 0.875)
    return ModelSpec(
        name=name,
        family="timm" if module == TIMM else "custom",
        build=_builder(factory, name),
        config=NoConfig(),
        img_size=size,
        num_classes=classes,
        size_multiple=1,
        rewrites=(),
        crop_ratio=None if crop >= RESIZED_EXACTLY else crop,
        mean=tuple(settings.get("mean", IMAGENET_MEAN)),
        std=tuple(settings.get("std", IMAGENET_STD)),
        labels="imagenet_labels.txt" if module == TIMM and classes == 1000 else None,
        strides=_strides(prototype, size),
        built_with_weights=True,
        source="from outside the registry",
    )


def _builder(factory: Callable[..., Any], name: str) -> Callable[..., nn.Module]:
    def build(_: Any, *, img_size: int, num_classes: int) -> nn.Module:
        spec = custom_spec(name)
        asked = {"img_size": (img_size, spec.img_size), "num_classes": (num_classes, spec.num_classes)}
        accepted = inspect.signature(factory).parameters
        changed = {key: value for key, (value, default) in asked.items() if value != default}
        refused = [key for key in changed if key not in accepted and key == "num_classes"]
        if refused:
            raise InputError(f"{name} takes no num_classes", remedy="leave --num-classes out, or let the factory take it")
        model = _call(factory, name, **{key: value for key, value in changed.items() if key in accepted})
        _count_classes(model, img_size, name)
        model.img_size, model.num_classes = img_size, num_classes  # type: ignore[assignment]
        return model

    return build


def _factory(module: str, attribute: str) -> Callable[..., Any]:
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)  # users name modules of the folder they work in
    try:
        found = import_module(module)
    except ModuleNotFoundError as exc:
        raise InputError(
            f"there is no module {module!r}", why=exc, remedy="install it, or run the command in the folder that holds it"
        ) from exc
    except Exception as exc:  # the user's code: anything may happen
        raise InputError(
            f"module {module!r} cannot be imported", why=f"{type(exc).__name__}: {exc}", remedy="mend it, then try again"
        ) from exc
    factory = getattr(found, attribute, None)
    if not callable(factory):
        public = [n for n in dir(found) if callable(getattr(found, n)) and not n.startswith("_")]
        raise UnknownNameError(
            f"factory in {module}", attribute, difflib.get_close_matches(attribute, public, n=3, cutoff=0.4), public[:20]
        )
    return factory


def _timm_factory(name: str) -> Callable[..., Any]:
    try:
        timm = import_module(TIMM)
    except ImportError as exc:
        raise RuntimeMissingError("timm cannot be imported", why=exc, remedy="pip install timm") from exc
    if name not in timm.list_models():
        close = timm.list_models(f"*{name}*")[:3] or difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
        raise UnknownNameError("timm model", name, close, ["see timm.list_models()"])

    def create(num_classes: int | None = None) -> nn.Module:
        return timm.create_model(name, **({} if num_classes is None else {"num_classes": num_classes}))

    return create


def _call(factory: Callable[..., Any], name: str, **options: Any) -> nn.Module:
    try:
        model = factory(**options)
    except CmtEdgeError:
        raise
    except Exception as exc:  # the user's code: anything may happen
        raise InputError(f"{name} did not build a model", why=f"{type(exc).__name__}: {exc}",
                         remedy="it must work without required arguments") from exc  # fmt: skip
    if not isinstance(model, nn.Module):
        raise InputError(f"{name} returned a {type(model).__name__}, not an nn.Module", remedy="return the model")
    return model.eval()


def _settings(model: nn.Module) -> dict[str, Any]:
    """The model's own evaluation settings, empty where it has none."""
    found: dict[str, Any] = {}
    for attribute in ("default_cfg", "pretrained_cfg"):
        config = getattr(model, attribute, None)
        if isinstance(config, Mapping):
            found |= {key: value for key, value in config.items() if value is not None}
    size = getattr(model, "img_size", None)
    return ({"input_size": (3, size, size)} if isinstance(size, int) else {}) | found


def _strides(model: nn.Module, size: int) -> tuple[int, ...]:
    """Strides of what a method ``features`` of the model gives: a list of maps ``(N, C, H, W)``; empty where it has no such method."""
    method = getattr(model, "features", None)
    if method is None or isinstance(method, nn.Module):  # many models call their convs so
        return ()
    try:
        with torch.inference_mode():
            maps = method(torch.zeros(1, 3, size, size))
    except Exception:  # the user's code: anything may happen, and nobody asked for feature maps yet
        return ()
    if not isinstance(maps, (list, tuple)) or not all(isinstance(m, torch.Tensor) and m.ndim == 4 for m in maps):
        return ()
    return tuple(size // m.shape[-1] for m in maps)


def _count_classes(model: nn.Module, size: int, name: str) -> int:
    """Number of logits; raises :class:`InputError` where ``model`` is no classifier of images of ``size`` pixels."""
    try:
        with torch.inference_mode():
            logits = model(torch.zeros(2, 3, size, size))
    except Exception as exc:  # the user's code: anything may happen
        raise InputError(f"{name} does not take images of {size} pixels", why=f"{type(exc).__name__}: {exc}",
                         remedy="set the attribute img_size, an int, on the model") from exc  # fmt: skip
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or logits.shape[0] != 2:
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise InputError(
            f"{name} returns {got} for two images, not logits (2, classes)", remedy="wrap it so that it returns its logits"
        )
    return int(logits.shape[1])
