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

import ast
import copy
import difflib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from cmt_edge.deploy.errors import (
    CmtEdgeError,
    InputError,
    RuntimeMissingError,
    UnknownNameError,
    WeightsError,
)

from .outputs import PROBED, settle_output
from .rewrites import replace_global_pools
from .spec import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Classifier,
    ModelSpec,
    Rewrite,
    StateDict,
)
from .user_files import import_file

FILE_FORM = "PATH/FILE.py:FACTORY"
"""How a factory in a file is named."""

DEFAULT_SIZE = 224
"""Height and width, in pixels, of the input of a model that does not tell its own."""

DEFAULT_CROP = 0.875
"""Share of the resized image that the centre crop keeps, for a model that does not tell its own."""

TIMM = "timm"
"""Name of the library, and what stands before the colon of its models."""

MANY_CALLS = 64
"""How often a model that draws random numbers is asked before its answers count as equal."""

SAME = 1e-5
"""Difference of answers to equal batches, as a share of the largest logit, that rounding explains."""

ALIKE = 1e-3
"""The same for batches of different sizes, for which libraries choose other kernels."""

OTHER_CONTRAST = 5.0
"""The contrast of the other image beside which an image is asked about again, in that of the first one."""

NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
)
"""Modules that use statistics of the batch where they track none."""

MAX_SUSPECTS = 4
"""Number of modules that a message names."""

CUSTOM = "custom"
"""Family of the users' own models."""

OUTSIDE_FAMILIES = (CUSTOM, TIMM)
"""Families of the models that are no models of the registry."""

Factory = Callable[..., Any]
"""A user's callable that returns a model, and timm's behind the same interface."""


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
    constructor = Constructor(name, described["img_size"], described["num_classes"])
    if library == TIMM:
        labels = "imagenet_labels.txt" if described["num_classes"] == 1000 else None
        return ModelSpec(
            **described,
            constructor=constructor,
            family=TIMM,
            labels=labels,
            published_state=partial(_load_timm_state, model),
        )
    return ModelSpec(
        **described,
        constructor=constructor,
        family=CUSTOM,
        built_with_weights=True,
        labels=None,
    )


def describe_factory(factory: Factory, name: str, img_size: int | None) -> dict[str, Any]:
    """The fields of a :class:`ModelSpec` that a model made by ``factory`` tells."""
    prototype = _call_factory(factory, name)
    settings = _read_settings(prototype)
    default = img_size or DEFAULT_SIZE
    size = int(settings.get("input_size", (3, default, default))[-1])
    classes = _count_classes(prototype, size, name)
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

    def __call__(self, _: NoConfig, *, img_size: int, num_classes: int) -> nn.Module:
        factory = self.factory()
        model = _call_factory(factory, self.name, **self._choose_options(factory, img_size, num_classes))
        made = _count_classes(model, img_size, self.name)
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

    def _choose_options(self, factory: Factory, img_size: int, num_classes: int) -> dict[str, int]:
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


def require_no_file(name: str) -> None:
    """Raise :class:`InputError` for the path of a Python file without the name of a factory in it.

    The file is read and not run.
    """
    path = Path(name).expanduser()
    if path.suffix != ".py":
        return
    if not path.is_file():
        raise InputError("there is no such file", where=path, remedy=f"give {FILE_FORM}")
    found = _list_definitions(path)
    shown = ", ".join(f"{name}:{attribute}" for attribute in found[:MAX_SUSPECTS])
    raise InputError(
        "a file of your own needs the name of the factory in it",
        where=path,
        remedy=f"give {FILE_FORM}" + (f", for example {shown}" if shown else ""),
    )


def _list_definitions(path: Path) -> list[str]:
    """Names of the public functions and classes of a Python file, the last one first: a factory mostly comes
    after the classes that it builds. Empty for a file that cannot be read."""
    try:
        body = ast.parse(path.read_bytes()).body
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    made = [node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return [name for name in reversed(made) if not name.startswith("_")]


def find_factory(name: str) -> Factory:
    """The factory that ``module:factory``, ``folder/file.py:factory`` or ``timm:NAME`` names."""
    library, _, model = name.partition(":")
    if library == TIMM:
        return _find_timm_factory(model)
    module, _, attribute = name.rpartition(":")  # a path on Windows has a colon of its own
    return _find_in_module(module, attribute)


def _find_in_module(module: str, attribute: str) -> Factory:
    found = _import(module)
    factory: Factory | None = getattr(found, attribute, None)
    if isinstance(factory, nn.Module):  # a module object of the file, which is callable too
        return partial(copy.deepcopy, factory)
    if callable(factory):
        return factory
    public = [name for name in dir(found) if callable(getattr(found, name)) and not name.startswith("_")]
    close = difflib.get_close_matches(attribute, public, n=3, cutoff=0.4)
    raise UnknownNameError(f"factory in {module}", attribute, close, public[:20])


def _import(module: str) -> ModuleType:
    """The user's module, by name (also from the folder that the command runs in) or by its file."""
    if module.endswith(".py"):
        return import_file(Path(module).expanduser())
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        return import_module(module)
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
            remedy="correct it, then try again",
        ) from exc


def _import_timm() -> Any:
    try:
        return import_module(TIMM)
    except ImportError as exc:
        raise RuntimeMissingError(
            "timm cannot be imported",
            why=exc,
            remedy="pip install timm",
        ) from exc
    except Exception as exc:  # torchvision raises RuntimeError if it was built for another torch
        raise RuntimeMissingError(
            "timm cannot be imported",
            why=f"{type(exc).__name__}: {exc}",
            remedy="install the torchvision that fits torch",
        ) from exc


def _find_timm_factory(name: str) -> Factory:
    timm = _import_timm()
    if not timm.is_model(name):
        close = timm.list_models(f"*{name}*")[:3]
        close = close or difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
        raise UnknownNameError("timm model", name, close, ["see timm.list_models()"])
    fixed_size = getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False)

    def create(num_classes: int | None = None, img_size: int | None = None) -> Any:
        options = {}
        if num_classes is not None:
            options["num_classes"] = num_classes
        if img_size is not None and fixed_size:  # only these models of timm take an img_size
            options["img_size"] = img_size
        return timm.create_model(name, **options)

    return create


def _load_timm_state(name: str) -> StateDict:
    """The published weights; timm finds, downloads and converts them."""
    try:
        state: StateDict = _import_timm().create_model(name, pretrained=True).state_dict()
        return state
    except CmtEdgeError:
        raise
    except Exception as exc:  # no network, nothing published, a package missing
        raise WeightsError(
            f"timm did not load the published weights of {name}",
            why=f"{type(exc).__name__}: {exc}",
            remedy="give --weights PATH or --weights random",
        ) from exc


def _call_factory(factory: Factory, name: str, **options: Any) -> nn.Module:
    """The model that ``factory`` returns, in eval mode."""
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
            f"{name} returned a {type(model).__name__}, not an nn.Module",
            remedy="return the model",
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            f"{name} returned a TorchScript module ({model.original_name}), which torch.export does not read",
            remedy="return the nn.Module itself, without torch.jit.script or torch.jit.trace",
        )
    _detach(model)
    return model.eval()


def _detach(model: nn.Module) -> None:
    """Cut tensors that the model keeps from an earlier call out of their graph: a copy of the model could not
    be made with them."""
    for module in model.modules():
        for attribute, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                setattr(module, attribute, value.detach())


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


def _count_classes(model: nn.Module, size: int, name: str) -> int:
    """Number of logits, which ``model`` then returns as a float32 tensor.

    Raises:
        InputError: ``model`` does not classify images of ``size`` pixels, or an image has no single answer.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(PROBED, 3, size, size, generator=generator)
    before = torch.get_rng_state()
    try:
        classes = settle_output(model, images, name)
        with torch.inference_mode():
            logits: Tensor = model(images)
    except CmtEdgeError:
        raise
    except Exception as exc:  # the user's code: anything may happen
        raise InputError(
            f"{name} does not take images of {size} pixels",
            why=f"{type(exc).__name__}: {exc}",
            remedy="give its size with --imgsz, or set the attribute img_size, an int, on the model",
        ) from exc
    drawn = not torch.equal(before, torch.get_rng_state())
    _require_one_answer(model, images, logits, drawn, name)
    return classes


def _require_one_answer(
    model: nn.Module,
    images: Tensor,
    logits: Tensor,
    drawn: bool,
    name: str,
) -> None:
    """Raise :class:`InputError` where an answer depends on chance, on the calls before or on other images.

    ``drawn`` tells that the first call drew random numbers; the model is then asked more often, because a
    rare drop shows in few calls.
    """
    others = torch.cat([images[:1], OTHER_CONTRAST * images[1:].flip(-1) + 1])
    with torch.inference_mode():
        again = [model(images) for _ in range(MANY_CALLS if drawn else 1)]
        alone = model(images[:1])
        beside_others = model(others)
    if any(_differ(logits, other, SAME) for other in again):
        cause = "it draws random numbers" if drawn else "it keeps something from call to call"
        raise InputError(
            f"{name} answers differently when it is asked twice in eval mode",
            why=f"{cause}, though model.eval() was called: {_list_suspects(model)}",
            remedy="let it depend on self.training: F.dropout(x, p, self.training),"
            " dropout_p=p if self.training else 0.0",
        )
    if alone.shape != logits[:1].shape:
        raise InputError(
            f"{name} answers one image with the shape {tuple(alone.shape)}, not {tuple(logits[:1].shape)}",
            why="the batch axis is lost with a batch of one image, as squeeze() loses it",
            remedy="name the axes: flatten(1), or squeeze(-1) in place of squeeze()",
        )
    if _differ(logits[:1], beside_others[:1], SAME) or _differ(logits[:1], alone, ALIKE):
        raise InputError(
            f"{name} answers differently to one image alone and beside another one",
            why=f"it uses statistics of the batch in eval mode: {_list_suspects(model)}",
            remedy="use track_running_stats=True in batch norms, and take means over an image, not the batch",
        )


def _differ(first: Tensor, second: Tensor, share: float) -> bool:
    """Whether two answers differ by more than ``share`` of the largest value."""
    if first.shape != second.shape:
        return True
    one, other = first.double(), second.double()
    largest = float((one - other).nan_to_num(0.0).abs().max())
    return largest > share * max(float(one.nan_to_num(0.0).abs().max()), 1e-12)


def _list_suspects(model: nn.Module) -> str:
    """Modules that often are the cause, with their names in ``model``; dropout comes first."""
    found = [
        (name, type(module).__name__)
        for name, module in model.named_modules()
        if name and (module.training or (isinstance(module, NORMS) and module.running_mean is None))
    ]
    found.sort(key=lambda pair: "drop" not in pair[1].lower())
    shown = [f"{name} ({kind})" for name, kind in found[:MAX_SUSPECTS]]
    return ", ".join(shown) or f"look into {type(model).__name__}.forward"
