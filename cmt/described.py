"""What a checkpoint says of its model, so that it can be exported from the file alone."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import read_content
from .registry import list_models

ABOUT = ("settings", "args", "config", "hyper_parameters")
"""Entries of a checkpoint that hold the settings of its training, in the order in which they are asked."""
MODEL = ("model", "arch", "model_name")
"""Names of a setting that names the model."""
SIZE = ("imgsz", "img_size", "input_size")
"""Names of a setting that holds the height and width of the input, pixels."""
COUNT = ("num_classes", "nb_classes")
"""Names of a setting that holds the number of classes."""


@dataclass(frozen=True)
class Description:
    """What a checkpoint says of its model; ``None`` where it says nothing.

    Attributes:
        model: name in the registry.
        img_size: height and width of the input, pixels.
        num_classes: number of classes.
    """

    model: str | None = None
    img_size: int | None = None
    num_classes: int | None = None


def describe_checkpoint(path: Path) -> Description:
    """What the settings in a checkpoint say of its model.

    Only models of the registry are believed: a name such as ``module:factory`` makes Python import code, so
    it must come from the user and never from a file.

    Raises:
        WeightsError: the file is missing, unreadable or unsafe.
    """
    content = read_content(path)
    if not isinstance(content, Mapping):
        return Description()
    for settings in (
        *map(_settings, map(content.get, ABOUT)),
        _settings(content),
    ):
        model = _first(settings, MODEL, str)
        if model in list_models():
            return Description(
                model,
                _positive(_first(settings, SIZE, int)),
                _count_classes(settings, content),
            )
    return Description()


def _settings(value: Any) -> Mapping[Any, Any]:
    if isinstance(value, argparse.Namespace):
        return vars(value)
    return value if isinstance(value, Mapping) else {}


def _first(settings: Mapping[Any, Any], names: Iterable[str], kind: type) -> Any:
    """The first setting of these names that has the type ``kind``."""
    return next(
        (settings[name] for name in names if type(settings.get(name)) is kind),
        None,
    )


def _positive(value: int | None) -> int | None:
    return value if value is not None and value > 0 else None


def _count_classes(settings: Mapping[Any, Any], content: Mapping[Any, Any]) -> int | None:
    for names in (settings.get("classes"), content.get("classes")):
        if isinstance(names, (list, tuple)) and names:
            return len(names)
    return _positive(_first(settings, COUNT, int))
