"""What the settings in a checkpoint say of the images that its model was trained on: mean and deviation of
the values, and what an export does not take from a checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from .strangers import Stranger
from .unpickling import PlainArray

WHOSE = ("", "data_", "dataset_", "image_", "img_", "input_", "norm_", "normalize_", "pixel_")
"""Beginnings of the names of a mean or a deviation, in small letters."""
MEAN = tuple(f"{whose}{name}" for whose in WHOSE for name in ("mean", "means"))
"""Names of a setting that holds the mean of red, green and blue, in small letters."""
STD = tuple(f"{whose}{name}" for whose in WHOSE for name in ("std", "stds"))
"""Names of a setting that holds their standard deviation, in small letters."""
NORMALIZING = ("normalize", "normalise", "normalization", "normalisation")
"""Names of an entry that holds both, in small letters; an object there holds them too."""
INNER = (
    *NORMALIZING,
    "data",
    "data_config",
    "data_preprocessor",
    "dataset",
    "img_norm_cfg",
    "input",
    "preprocess",
    "preprocessing",
    "transform",
    "transforms",
)
"""Names of entries of settings that may hold settings of the images, in small letters."""
NOT_TAKEN = (
    "bgr_to_rgb",
    "channel_order",
    "color_order",
    "crop_pct",
    "crop_ratio",
    "interpolation",
    "to_rgb",
)
"""Names of settings of the images that an export does not take from a checkpoint, in small letters."""
NOTHING = ("", "none", "null")
"""Texts that say that a setting has no value."""
BETWEEN = re.compile(r"[\s,;()\[\]]+")
"""What stands between numbers in a text."""
MAX_DEPTH = 2
"""Number of entries inside each other, at most, in which settings of the images are looked for."""
MAX_NESTED = 4
"""Number of lists inside each other, at most, in which numbers are looked for; a mean may have three."""
MAX_NUMBERS = 16
"""Number of values, at most, of which the numbers are read; there should be one or three."""
MAX_TENSORS = 8
"""Number of tensors in a mapping, at most, that is settings and no state dict."""


@dataclass(frozen=True)
class InputSettings:
    """What a checkpoint says of the images.

    Attributes:
        mean: of red, green and blue; ``None`` where nothing is said, and where ``fault`` is set.
        std: the same for the standard deviation. There is never one without the other.
        fault: why a mean or a deviation that is present cannot be used.
        not_taken: ``(name, value)`` of other settings that it holds; see :data:`NOT_TAKEN`.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    fault: str | None = None
    not_taken: tuple[tuple[str, Any], ...] = ()


class _Unusable(ValueError):
    """A value that is no mean and no deviation; the text says why."""


def read_input_settings(settings: Sequence[Mapping[Any, Any]]) -> InputSettings:
    """The mean and deviation that all of ``settings`` agree on, and what else they say of the images."""
    seen: set[int] = set()
    places = [place for part in settings if not _is_state(part) for place in _list_places(part, seen)]
    not_taken = tuple(
        (name, value)
        for place in places
        for name, value in place.items()
        if name in NOT_TAKEN and value is not None and value != ""
    )
    try:
        _require_no_object(places)
        mean, std = _read_common(places, MEAN), _read_common(places, STD)
        if (mean is None) != (std is None):
            there, lacking = ("mean", "std") if std is None else ("std", "mean")
            raise _Unusable(f"it gives {there} without {lacking}")
    except _Unusable as exc:
        return InputSettings(fault=str(exc), not_taken=not_taken)
    return InputSettings(mean, std, None, not_taken)


def _is_state(part: Mapping[Any, Any]) -> bool:
    """Whether this is a state dict, whose ``mean`` is a buffer of the model."""
    return sum(isinstance(value, Tensor) for value in part.values()) > MAX_TENSORS


def _list_places(
    part: Mapping[Any, Any],
    seen: set[int],
    depth: int = 0,
) -> Iterator[dict[str, Any]]:
    """``part`` with its names in small letters, and the settings of images inside it; nothing for one of
    those that were ``seen``."""
    if id(part) in seen:
        return
    seen.add(id(part))
    named = {str(name).lower(): value for name, value in part.items()}
    yield named
    if depth == MAX_DEPTH:
        return
    for name in INNER:
        inner = _view_as_mapping(named.get(name))
        if inner is not None:
            yield from _list_places(inner, seen, depth + 1)


def _view_as_mapping(value: object) -> Mapping[Any, Any] | None:
    if isinstance(value, Mapping):
        return value
    is_plain = type(value).__name__ == "Namespace"
    return vars(value) if is_plain else None


def _require_no_object(places: Sequence[Mapping[str, Any]]) -> None:
    """Refuse an object of another program's class that normalises: only its own code knows its numbers."""
    for place in places:
        for name in NORMALIZING:
            value = place.get(name)
            if isinstance(value, Stranger):
                raise _Unusable(f"{name} is an object of the class {value.title}")


def _read_common(
    places: Sequence[Mapping[str, Any]],
    names: Sequence[str],
) -> tuple[float, ...] | None:
    """The three numbers of every setting with one of these names; ``None`` where there is none."""
    found = [
        _read_triple(name, place[name])
        for place in places
        for name in names
        if name in place and not _is_nothing(place[name])
    ]
    different = list(dict.fromkeys(found))
    if len(different) > 1:
        raise _Unusable(f"it gives different values of {names[0]}: {' and '.join(map(str, different))}")
    return different[0] if different else None


def _is_nothing(value: object) -> bool:
    """Whether a setting has no value."""
    if value is None or value is False:
        return True
    if isinstance(value, str):
        return value.strip().lower() in NOTHING
    return isinstance(value, (list, tuple, Mapping)) and not value


def _read_triple(name: str, value: object) -> tuple[float, ...]:
    """Three numbers, or one for all three colours; raises :class:`_Unusable`."""
    numbers = list(_iterate_numbers(name, value))
    if len(numbers) == 1:
        numbers *= 3
    if len(numbers) != 3:
        raise _Unusable(f"{name} holds {len(numbers)} numbers and not three")
    if not all(map(math.isfinite, numbers)):
        raise _Unusable(f"{name} holds a number that is not finite")
    return tuple(numbers)


def _iterate_numbers(name: str, value: object, depth: int = 0) -> Iterator[float]:
    """The numbers in a list, an array, a tensor or a text."""
    if isinstance(value, PlainArray):
        value = value.value
    if isinstance(value, (Tensor, np.ndarray)):
        size = value.numel() if isinstance(value, Tensor) else value.size
        if size > MAX_NUMBERS:
            raise _Unusable(f"{name} holds {size} numbers and not three")
        value = value.tolist()
    if isinstance(value, str):
        value = [part for part in BETWEEN.split(value) if part]
        yield from (_convert_to_float(name, part) for part in value)
    elif isinstance(value, (list, tuple)):
        if depth == MAX_NESTED:
            raise _Unusable(f"{name} holds more than {MAX_NESTED} lists inside each other")
        for part in value[:MAX_NUMBERS]:
            yield from _iterate_numbers(name, part, depth + 1)
    else:
        yield _convert_to_float(name, value)


def _convert_to_float(name: str, value: object) -> float:
    if isinstance(value, Stranger):
        raise _Unusable(f"{name} is an object of the class {value.title}")
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise _Unusable(f"{name} holds a {type(value).__name__} and no number")
    try:
        return float(value)
    except (ValueError, OverflowError) as exc:
        raise _Unusable(f"{name} holds {value!r:.40}, which is no number") from exc
