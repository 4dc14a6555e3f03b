"""Factories of models from outside the registry: found by name, imported and called.

Importing a module runs its code: name only code that you trust.
"""

from __future__ import annotations

import ast
import copy
import difflib
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
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

from .spec import (
    StateDict,
)
from .user_files import import_file

FILE_FORM = "PATH/FILE.py:FACTORY"
"""How a factory in a file is named."""

MAX_EXAMPLES = 4
"""Number of factories that a message names."""

TIMM = "timm"
"""Name of the library, and what stands before the colon of its models."""

Factory = Callable[..., Any]
"""A user's callable that returns a model, and timm's behind the same interface."""


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
    shown = ", ".join(f"{name}:{attribute}" for attribute in found[:MAX_EXAMPLES])
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
    definitions = (ast.FunctionDef, ast.ClassDef)
    made = [node.name for node in body if isinstance(node, definitions)]
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
    callables = [name for name in dir(found) if callable(getattr(found, name))]
    public = [name for name in callables if not name.startswith("_")]
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


def _find_timm_factory(name: str) -> Factory:
    timm = _import_timm()
    if not timm.is_model(name):
        close = timm.list_models(f"*{name}*")[:3]
        if not close:
            close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
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


def load_timm_state(name: str) -> StateDict:
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


def call_factory(factory: Factory, name: str, **options: Any) -> nn.Module:
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
