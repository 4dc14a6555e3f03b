"""Models from outside the registry: ``package.module:factory``, and ``timm:NAME`` where timm is installed.

A factory is any callable without required arguments that returns an image classifier, an ``nn.Module`` from
float32 ``(N, 3, S, S)`` to logits ``(N, classes)``. Where it takes ``num_classes`` or ``img_size`` it gets
them when they are asked for. Preprocessing comes from the model's ``pretrained_cfg`` or ``default_cfg`` (the
names timm uses: ``input_size``, ``crop_pct``, ``crop_mode``, ``interpolation``, ``mean``, ``std``) and from
flags. Importing the module runs its code: name only code you trust.

"Pretrained" weights are those the factory returns; timm's are asked of timm, which downloads them.
"""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmt_edge.deploy.errors import (
    CmtEdgeError,
    InputError,
    RuntimeMissingError,
    UnknownNameError,
    WeightsError,
)

from .registry import IMAGENET_MEAN, IMAGENET_STD, ModelSpec
from .rewrites import Rewrite, global_pool_as_mean

DEFAULT_SIZE = 224
DEFAULT_CROP = 0.875
TIMM = "timm"


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
    of_timm = module == TIMM
    factory = _timm_factory(attribute) if of_timm else _factory(module, attribute)
    prototype = _call(factory, name)
    settings = _settings(prototype)
    size = int(settings.get("input_size", (3, DEFAULT_SIZE, DEFAULT_SIZE))[-1])
    classes = _count_classes(prototype, size, name)
    return ModelSpec(
        name=name,
        family="timm" if of_timm else "custom",
        build=_builder(factory, name),
        config=NoConfig(),
        img_size=size,
        num_classes=classes,
        size_multiple=1,
        rewrites=_rewrites(prototype),
        head_keys=_head_keys(settings),
        crop_ratio=_crop_ratio(settings, name),
        interpolation=str(settings.get("interpolation", "bicubic")),
        mean=tuple(settings.get("mean", IMAGENET_MEAN)),
        std=tuple(settings.get("std", IMAGENET_STD)),
        labels="imagenet_labels.txt" if of_timm and classes == 1000 else None,
        strides=_strides(prototype, size),
        published_state=partial(_timm_state, attribute) if of_timm else None,
        built_with_weights=not of_timm,
        source="from outside the registry",
    )


def _builder(factory: Callable[..., Any], name: str) -> Callable[..., nn.Module]:
    def build(_: Any, *, img_size: int, num_classes: int) -> nn.Module:
        spec = custom_spec(name)
        asked = {"img_size": (img_size, spec.img_size), "num_classes": (num_classes, spec.num_classes)}
        accepted = inspect.signature(factory).parameters
        changed = {key: value for key, (value, default) in asked.items() if value != default}
        if "num_classes" in changed and "num_classes" not in accepted:
            raise InputError(
                f"{name} takes no num_classes", remedy="leave --num-classes out, or let the factory take it"
            )
        model = _call(factory, name, **{key: value for key, value in changed.items() if key in accepted})
        made = _count_classes(model, img_size, name)
        if made != num_classes:
            raise InputError(
                f"{name} has {made} classes, not the {num_classes} asked for", remedy="mend the factory"
            )
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
            f"there is no module {module!r}",
            why=exc,
            remedy="install it, or run the command in the folder that holds it",
        ) from exc
    except Exception as exc:  # the user's code: anything may happen
        raise InputError(
            f"module {module!r} cannot be imported",
            why=f"{type(exc).__name__}: {exc}",
            remedy="mend it, then try again",
        ) from exc
    factory = getattr(found, attribute, None)
    if not callable(factory):
        public = [n for n in dir(found) if callable(getattr(found, n)) and not n.startswith("_")]
        raise UnknownNameError(
            f"factory in {module}",
            attribute,
            difflib.get_close_matches(attribute, public, n=3, cutoff=0.4),
            public[:20],
        )
    return factory


def _timm() -> Any:
    try:
        return import_module(TIMM)
    except ImportError as exc:
        raise RuntimeMissingError("timm cannot be imported", why=exc, remedy="pip install timm") from exc
    except Exception as exc:  # a torchvision built for another torch raises RuntimeError
        raise RuntimeMissingError(
            "timm cannot be imported",
            why=f"{type(exc).__name__}: {exc}",
            remedy="install the torchvision that fits torch",
        ) from exc


def _timm_factory(name: str) -> Callable[..., Any]:
    timm = _timm()
    if not timm.is_model(name):
        close = timm.list_models(f"*{name}*")[:3] or difflib.get_close_matches(
            name, timm.list_models(), n=3, cutoff=0.4
        )
        raise UnknownNameError("timm model", name, close, ["see timm.list_models()"])
    fixed_size = getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False)  # only these take img_size

    def create(num_classes: int | None = None, img_size: int | None = None) -> nn.Module:
        options = {"num_classes": num_classes, "img_size": img_size if fixed_size else None}
        return timm.create_model(name, **{key: value for key, value in options.items() if value is not None})

    return create


def _timm_state(name: str) -> dict[str, Tensor]:
    """The published weights; timm finds, downloads and converts them."""
    try:
        return _timm().create_model(name, pretrained=True).state_dict()
    except CmtEdgeError:
        raise
    except Exception as exc:  # no network, nothing published, a package missing
        raise WeightsError(
            f"timm did not load the published weights of {name}",
            why=f"{type(exc).__name__}: {exc}",
            remedy="give --weights PATH or --weights random",
        ) from exc


def _call(factory: Callable[..., Any], name: str, **options: Any) -> nn.Module:
    try:
        model = factory(**options)
    except CmtEdgeError:
        raise
    except Exception as exc:  # the user's code: anything may happen
        raise InputError(
            f"{name} did not build a model",
            why=f"{type(exc).__name__}: {exc}",
            remedy="it must work without required arguments",
        ) from exc
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{name} returned a {type(model).__name__}, not an nn.Module", remedy="return the model"
        )
    return model.eval()


def _rewrites(model: nn.Module) -> tuple[Rewrite, ...]:
    """Those of any model that find a place; ``model`` is changed."""
    return tuple(rewrite for rewrite in (global_pool_as_mean(),) if rewrite.apply(model))


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
    """Strides of what a method ``features`` of the model gives: a list of maps ``(N, C, H, W)``; empty where
    it has no such method."""
    method = getattr(model, "features", None)
    if method is None or isinstance(method, nn.Module):  # many models call their convs so
        return ()
    try:
        with torch.inference_mode():
            maps = method(torch.zeros(1, 3, size, size))
    except Exception:  # the user's code: anything may happen, and nobody asked for feature maps yet
        return ()
    if not isinstance(maps, (list, tuple)) or not all(
        isinstance(m, torch.Tensor) and m.ndim == 4 for m in maps
    ):
        return ()
    return tuple(size // m.shape[-1] for m in maps)


def _head_keys(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """State-dict keys of the classifier, of which some models have two."""
    names = settings.get("classifier", ())
    return tuple(
        f"{n}.{kind}" for n in ((names,) if isinstance(names, str) else names) for kind in ("weight", "bias")
    )


def _crop_ratio(settings: Mapping[str, Any], name: str) -> float | None:
    """timm's ``center`` keeps the aspect ratio, even where nothing but the long side is cropped; ``squash``
    does not."""
    crop, mode = float(settings.get("crop_pct") or DEFAULT_CROP), settings.get("crop_mode", "center")
    if mode == "center":
        return crop
    if mode == "squash" and crop == 1:
        return None
    raise InputError(
        f"{name} crops in the mode {mode!r} with the share {crop}, which preprocessing does not know",
        remedy="name a factory of your own that changes the model's default_cfg",
    )


def _count_classes(model: nn.Module, size: int, name: str) -> int:
    """Number of logits; raises :class:`InputError` where ``model`` is no classifier of images of ``size``
    pixels."""
    try:
        with torch.inference_mode():
            logits = model(torch.zeros(2, 3, size, size))
    except Exception as exc:  # the user's code: anything may happen
        raise InputError(
            f"{name} does not take images of {size} pixels",
            why=f"{type(exc).__name__}: {exc}",
            remedy="leave --imgsz out, or set the attribute img_size, an int, on the model",
        ) from exc
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(
            f"{name} returns {got} for two images, not logits (2, classes)",
            remedy="wrap it so that it returns its logits",
        )
    return int(logits.shape[1])
