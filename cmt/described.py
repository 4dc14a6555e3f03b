"""What a checkpoint says of its model, so that it can be exported from the file alone."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import read_content, read_metadata
from .registry import list_models

ABOUT = ("settings", "args", "config", "hyper_parameters")
"""Entries of a checkpoint that hold the settings of its training, in the order in which they are asked."""
MODEL = ("model", "arch", "model_name")
"""Names of a setting that names the model."""
SIZE = ("imgsz", "img_size", "image_size", "input_size", "size")
"""Names of a setting that holds the height and width of the input, pixels."""
COUNT = ("num_classes", "nb_classes")
"""Names of a setting that holds the number of classes."""
CLASS_NAME_SETTINGS = ("classes", "class_names")
"""Names of a setting that lists the names of the classes."""


@dataclass(frozen=True)
class Description:
    """What a checkpoint says of its model; ``None`` where it says nothing.

    Attributes:
        model: name in the registry.
        img_size: height and width of the input, pixels.
        num_classes: number of classes.
        mean: of red, green and blue, with values from 0 to 1.
        std: the same for the standard deviation.
    """

    model: str | None = None
    img_size: int | None = None
    num_classes: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def describe_checkpoint(path: Path) -> Description:
    """What the settings in a checkpoint, or the metadata of a safetensors file, say of its model.

    Only models of the registry are believed: a name such as ``module:factory`` makes Python import code, so
    it must come from the user and never from a file.

    Raises:
        WeightsError: the file is missing, unreadable or unsafe.
    """
    content = read_content(path)
    if not isinstance(content, Mapping):
        return Description()
    content = read_metadata(path) or content
    for settings in (
        *map(_settings, map(content.get, ABOUT)),
        _settings(content),
    ):
        model = _first(settings, MODEL, str)
        if model in list_models():
            return Description(
                model,
                _read_size(settings),
                _count_classes(settings, content),
                _read_triple(settings.get("mean")),
                _read_triple(settings.get("std")),
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


def _read_size(settings: Mapping[Any, Any]) -> int | None:
    """The size as a number, or the last one of ``(3, S, S)``."""
    for name in SIZE:
        value = settings.get(name)
        if isinstance(value, (list, tuple)) and value and set(value[-2:]) == {value[-1]}:
            value = value[-1]
        if type(value) is int and value > 0:
            return value
    return None


def _read_triple(value: Any) -> tuple[float, ...] | None:
    """Three numbers as a list, or as text with commas."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or len(parts) != 3:
        return None
    try:
        return tuple(float(part) for part in parts)
    except (TypeError, ValueError):
        return None


def _count_classes(settings: Mapping[Any, Any], content: Mapping[Any, Any]) -> int | None:
    for source in (settings, content):
        for names in map(source.get, CLASS_NAME_SETTINGS):
            if isinstance(names, (list, tuple)) and names:
                return len(names)
    return _positive(_first(settings, COUNT, int))
