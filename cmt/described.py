"""What a checkpoint says of its model, so that it can be exported from the file alone."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import read_content, read_metadata
from .class_names import SETTINGS, count_class_names
from .recognition import recognise
from .registry import list_models

MODEL = ("model", "arch", "model_name")
"""Names of a setting that names the model."""
SIZE = ("imgsz", "img_size", "image_size", "input_size", "size")
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
    for settings in _collect_settings(content):
        model = _find_first(settings, MODEL, str)
        if model in list_models():
            return _describe(model, settings, _count_classes(settings, content))
    return Description()


def describe_by_shapes(path: Path) -> list[Description]:
    """The models of the registry that have the names and shapes of the weights in a checkpoint, at their
    published sizes; see :func:`cmt_edge.cmt.recognition.recognise`.

    Size, mean and deviation are what the settings in the file say, where they say it.

    Raises:
        WeightsError: the file is missing, unreadable or unsafe.
    """
    content = read_content(path)
    said = read_metadata(path) or content
    settings: dict[Any, Any] = {}
    for part in _collect_settings(said if isinstance(said, Mapping) else {}):
        settings = {**part, **settings}
    return [_describe(model.name, settings, model.num_classes) for model in recognise(content)]


def _describe(model: str, settings: Mapping[Any, Any], num_classes: int | None) -> Description:
    return Description(
        model,
        _read_size(settings),
        num_classes,
        _read_triple(settings.get("mean")),
        _read_triple(settings.get("std")),
    )


def _collect_settings(content: Mapping[Any, Any]) -> list[Mapping[Any, Any]]:
    """The settings in a checkpoint, and the checkpoint itself, which may hold some."""
    return [*map(_view_as_settings, map(content.get, SETTINGS)), content]


def _view_as_settings(value: Any) -> Mapping[Any, Any]:
    if isinstance(value, argparse.Namespace):
        return vars(value)
    return value if isinstance(value, Mapping) else {}


def _find_first(settings: Mapping[Any, Any], names: Iterable[str], kind: type) -> Any:
    """The first setting of these names that has the type ``kind``."""
    return next(
        (settings[name] for name in names if type(settings.get(name)) is kind),
        None,
    )


def _parse_positive(value: int | None) -> int | None:
    return value if value is not None and value > 0 else None


def _read_size(settings: Mapping[Any, Any]) -> int | None:
    """The size as a number, or the last one of ``(3, S, S)``."""
    for name in SIZE:
        value = settings.get(name)
        if isinstance(value, (list, tuple)) and value and set(value[-2:]) == {value[-1]}:
            value = value[-1]
        if isinstance(value, str) and value.isdecimal():
            value = int(value)
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
    """The number of names of classes, or the number that a setting gives."""
    named = count_class_names(settings) or count_class_names(content)
    return named or _parse_positive(_find_first(settings, COUNT, int))
