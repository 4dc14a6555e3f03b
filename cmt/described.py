"""What a checkpoint says of its model, so that it can be exported from the file alone."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import read_content, read_metadata
from .class_names import SETTINGS, count_class_names
from .input_settings import InputSettings, read_input_settings
from .recognition import recognise
from .registry import find_model, list_models

MODEL = ("model", "arch", "model_name")
"""Names of a setting that names the model."""
SIZE = ("imgsz", "img_size", "image_size", "input_size")
"""Names of a setting that holds the height and width of the input, pixels."""
PERHAPS_SIZE = "size"
"""Name of a setting that holds the same or something else, such as the number of images."""
MAX_PERHAPS_SIZE = 2048
"""The largest height and width, pixels, that such a setting is believed to hold."""
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
        std: the same for the standard deviation. There is never one without the other.
        fault: why a mean or a deviation that the checkpoint gives cannot be used.
    """

    model: str | None = None
    img_size: int | None = None
    num_classes: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    fault: str | None = None


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
            return _describe(
                model,
                settings,
                _count_classes(settings, content),
                read_input_settings(_collect_settings(content)),
            )
    return Description()


def describe_input(path: Path) -> InputSettings:
    """What the settings in a checkpoint say of the images, whichever model it belongs to.

    Raises:
        WeightsError: the file is missing, unreadable or unsafe.
    """
    content = read_metadata(path) or read_content(path)
    return read_input_settings(_collect_settings(content) if isinstance(content, Mapping) else [])


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
    parts = _collect_settings(said if isinstance(said, Mapping) else {})
    for part in parts:
        settings = {**part, **settings}
    images = read_input_settings(parts)
    return [_describe(model.name, settings, model.num_classes, images) for model in recognise(content)]


def _describe(
    model: str,
    settings: Mapping[Any, Any],
    num_classes: int | None,
    images: InputSettings,
) -> Description:
    return Description(
        model,
        _read_size(settings, find_model(model).size_multiple),
        num_classes,
        images.mean,
        images.std,
        images.fault,
    )


def _collect_settings(content: Mapping[Any, Any]) -> list[Mapping[Any, Any]]:
    """The settings in a checkpoint, and the checkpoint itself, which may hold some."""
    return [*map(_view_as_settings, map(content.get, SETTINGS)), content]


def _view_as_settings(value: Any) -> Mapping[Any, Any]:
    if isinstance(value, argparse.Namespace):
        return vars(value)
    return value if isinstance(value, Mapping) else {}


def _find_first(
    settings: Mapping[Any, Any],
    names: Iterable[str],
    kind: type,
) -> Any:
    """The first setting of these names that has the type ``kind``."""
    return next(
        (settings[name] for name in names if type(settings.get(name)) is kind),
        None,
    )


def _parse_positive(value: int | None) -> int | None:
    return value if value is not None and value > 0 else None


def _read_size(settings: Mapping[Any, Any], multiple: int) -> int | None:
    """The size as a number, or the last one of ``(3, S, S)``; :data:`PERHAPS_SIZE` only where the model can
    have it."""
    for name in (*SIZE, PERHAPS_SIZE):
        value = settings.get(name)
        sides = value[-2:] if isinstance(value, (list, tuple)) else ()
        if sides and all(isinstance(side, (int, str)) and side == sides[-1] for side in sides):
            value = sides[-1]
        if isinstance(value, str) and value.isdecimal():
            value = int(value)
        if type(value) is not int or value <= 0:
            continue
        if name != PERHAPS_SIZE or (value <= MAX_PERHAPS_SIZE and value % multiple == 0):
            return value
    return None


def _count_classes(
    settings: Mapping[Any, Any],
    content: Mapping[Any, Any],
) -> int | None:
    """The number of names of classes, or the number that a setting gives."""
    named = count_class_names(settings) or count_class_names(content)
    return named or _parse_positive(_find_first(settings, COUNT, int))
