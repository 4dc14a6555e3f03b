"""The names of the classes that a checkpoint holds.

A training program keeps them as a list, or as a mapping between names and indices, at the top of the file or
among its settings. Names that are found but cannot be put in the order of the logits are never dropped: the
fault is told, so that no other names take their place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from .strangers import Stranger
from .unpickling import Inert, PlainArray

SETTINGS = (
    "settings",
    "args",
    "config",
    "hyper_parameters",
    "datamodule_hyper_parameters",
    "hparams",
    "cfg",
    "opt",
    "meta",
    "metadata",
)
"""Entries of a checkpoint that hold the settings of its training, in the order in which they are asked."""

INNER = ("dataset_meta", "dataset", "data", "datamodule", "model")
"""Entries of such settings that hold settings of their own."""

NAMES = (
    "classes",
    "CLASSES",
    "class_names",
    "class_to_idx",
    "idx_to_class",
    "id2label",
    "label2id",
    "label_map",
)
"""Keys that hold names of classes and nothing else."""

PERHAPS_NAMES = ("names", "labels")
"""Keys that hold names of classes or something else; only a list that fits is believed."""

MAX_DIGITS = 9
"""The largest number of digits of an index that is a text; Python refuses to convert thousands of them."""

BY_NAME = ("class_to_idx", "label2id")
"""Keys of mappings whose values are the indices."""


@dataclass(frozen=True)
class ClassNames:
    """What a checkpoint says of its classes.

    Attributes:
        names: in the order of the logits; ``None`` where it has none that can be used.
        fault: why names that were found cannot be used; ``None`` where none were found, or some can be used.
    """

    names: tuple[str, ...] | None = None
    fault: str | None = None


class UnusableNames(ValueError):
    """Names that cannot be put in the order of the logits; the text says why."""


@dataclass(frozen=True)
class _Found:
    """One entry with names: where it is, what it holds, and why that cannot be used."""

    entry: str
    names: tuple[str, ...]
    fault: str | None = None


def find_class_names(content: Any, count: int) -> ClassNames:
    """The names of the classes in the order of the logits.

    Args:
        content: of the checkpoint.
        count: number of the model's logits; a model of one logit has one name or two.
    """
    usable: list[_Found] = []
    faults: list[str] = []
    for found in _find(content):
        if found.fault is not None:
            faults.append(f"{found.entry} {found.fault}")
        elif _fits(found, count):
            usable.append(found)
        elif not _may_be_others(found):
            faults.append(f"{found.entry} has {len(found.names)} names for {count} classes")
    if not usable:
        return ClassNames(fault=faults[0] if faults else None)
    return _choose(usable)


def _choose(usable: list[_Found]) -> ClassNames:
    """The names of the first entry that has more than numbers, unless another has them in another order."""
    usable.sort(key=_is_numbered)  # numbers say no more than the order
    first = usable[0]
    for other in usable[1:]:
        if other.names != first.names and sorted(other.names) == sorted(first.names):
            return ClassNames(fault=f"gives its classes in two orders: {first.entry} and {other.entry}")
    return ClassNames(first.names)


def read_named_classes(content: Any) -> tuple[str, ...]:
    """The names in the order of the logits in what a file holds that is written for them: a list, a mapping
    from or to indices, or pairs of both, alone or under one of the usual keys of a checkpoint.

    Raises:
        UnusableNames: it holds none, or their order is not known.
    """
    entries = list(_find(content))
    usable = [found for found in entries if found.fault is None]
    if usable:
        chosen = _choose(usable)
        if chosen.names is None:
            raise UnusableNames(chosen.fault)
        return chosen.names
    if entries:
        raise UnusableNames(f"{entries[0].entry} {entries[0].fault}")
    try:
        names = _convert_to_names(content, "") if isinstance(content, (list, Mapping)) else None
    except UnusableNames as exc:
        raise UnusableNames(f"the content {exc}") from exc
    if not names:
        raise UnusableNames("it holds no list of names, and no mapping between names and numbers")
    return names


def count_class_names(content: Any) -> int | None:
    """The number of names of the first entry that has some; ``None`` where no entry has any."""
    sound = (found for found in _find(content) if not found.fault)
    counts = (len(found.names) for found in sound if not _may_be_others(found))
    return next(counts, None)


def _fits(found: _Found, count: int) -> bool:
    return len(found.names) == count or (count, len(found.names)) == (1, 2)


def _may_be_others(found: _Found) -> bool:
    """Whether a list of another length may have nothing to do with the classes: its key does not say so, or
    it holds numbers alone, as a choice among classes does."""
    last = found.entry.rpartition(".")[2]
    return last in PERHAPS_NAMES or all(name.isdecimal() for name in found.names)


def _is_numbered(found: _Found) -> bool:
    return found.names == tuple(map(str, range(len(found.names))))


def _find(content: Any) -> Iterator[_Found]:
    """Every entry that holds names, at the top of a checkpoint first."""
    for way in _iterate_places():
        place = follow(content, way)
        for key in (*NAMES, *PERHAPS_NAMES):
            value = follow(place, (key,))
            entry = ".".join((*way, key))
            try:
                names = _convert_to_names(value, key)
            except UnusableNames as exc:
                if key in NAMES:
                    yield _Found(entry, (), str(exc))
                continue
            if names:
                yield _Found(entry, names)


def _iterate_places() -> Iterator[tuple[str, ...]]:
    yield ()
    for key in SETTINGS:
        yield (key,)
        yield from ((key, inner) for inner in INNER)


def follow(content: Any, way: Iterable[str]) -> Any:
    """What lies in ``content`` at the end of ``way``: keys of mappings and attributes of settings; ``None``
    where one of them is missing."""
    for key in way:
        if isinstance(content, Mapping):
            content = content.get(key)
        else:
            content = vars(content).get(key) if hasattr(content, "__dict__") else None
    return content


# --- reading one entry ----------------------------------------------------------------------------


def _convert_to_names(value: Any, key: str) -> tuple[str, ...] | None:
    """Names by index; ``None`` where ``value`` holds none, such as a number of classes.

    Raises:
        UnusableNames: it holds names whose order is not known.
    """
    if isinstance(value, PlainArray):
        value = value.value
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (set, frozenset, Inert)):
        raise UnusableNames("is a set, which has no order")
    if isinstance(value, Stranger):
        raise UnusableNames(f"is an object of the class {value.title}, which is not read")
    if isinstance(value, str):
        return _split(value)
    if isinstance(value, (list, tuple)) and value and all(map(_is_numbered_pair, value)):
        value = dict(value)
    if isinstance(value, Mapping):
        return _put_in_order(value, key) if value else None
    if not isinstance(value, (list, tuple)) or not value:
        return None
    return tuple(map(_parse_name, value))


def _split(text: str) -> tuple[str, ...] | None:
    """The names in a text with commas or lines; a text without any is the name of a file or a data set."""
    parts = tuple(part.strip() for part in re.split(r"[,\n]", text))
    parts = tuple(part for part in parts if part)
    return parts if len(parts) > 1 else None


def _is_numbered_pair(item: object) -> bool:
    """Whether ``item`` is a name and its index."""
    if not isinstance(item, (list, tuple)) or len(item) != 2:
        return False
    return any(_parse_index(part) is not None for part in item) and any(
        isinstance(part, str) for part in item
    )


def _parse_name(value: object) -> str:
    if isinstance(value, Stranger):
        raise UnusableNames(f"holds an object of the class {value.title}, which is not read")
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise UnusableNames("holds bytes that are no text in UTF-8") from None
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise UnusableNames(f"holds a {type(value).__name__} where a name is expected")
    return str(value)


def _put_in_order(
    mapping: Mapping[Any, Any],
    key: str,
) -> tuple[str, ...]:
    """The names of a mapping from index to name, or from name to index, in the order of the indices."""
    if key in BY_NAME or _maps_names(mapping):
        indices, names = list(mapping.values()), list(mapping)
    else:
        indices, names = list(mapping), list(mapping.values())
        numbers = all(_is_whole(name) for name in names) or _are_both_indices(indices, names)
        if key not in ("idx_to_class", "id2label") and numbers and _differ(indices, names):
            raise UnusableNames("maps numbers to numbers, of which either may be the index")
    order = [index for value in indices if (index := _parse_index(value)) is not None]
    if len(order) < len(indices):
        raise UnusableNames("has an index that is no whole number")
    return _sort_names(order, [_parse_name(name) for name in names])


def _maps_names(mapping: Mapping[Any, Any]) -> bool:
    """Whether the keys are names and the values their indices; a key such as ``"7"`` is a name there, too."""
    if any(_parse_index(key) is None for key in mapping):
        return all(_parse_index(value) is not None for value in mapping.values())
    by_name = not all(_is_whole(key) for key in mapping)
    return by_name and all(_is_whole(value) for value in mapping.values())


def _are_both_indices(keys: Sequence[Any], values: Sequence[Any]) -> bool:
    """Whether keys and values are texts of numbers from 0 or 1 on, so that either may be the index."""
    if not all(isinstance(text, str) for text in (*keys, *values)):
        return False
    numbers = ([_parse_index(text) for text in texts] for texts in (keys, values))
    return all(map(_count, numbers))


def _count(numbers: Sequence[int | None]) -> bool:
    """Whether the numbers are all whole numbers from 0 or 1, in any order."""
    found, count = set(numbers), len(numbers)
    return any(found == set(range(first, first + count)) for first in (0, 1))


def _differ(indices: Sequence[Any], names: Sequence[Any]) -> bool:
    return [_parse_index(value) for value in indices] != [_parse_index(value) for value in names]


def _sort_names(
    order: list[int],
    names: list[str],
) -> tuple[str, ...]:
    """``names`` in the ``order`` of their indices, which begin with 0 or 1 and have no holes."""
    first = min(order)
    expected = list(range(first, first + len(order)))
    if first not in (0, 1) or sorted(order) != expected:
        shown = f"{first} to {max(order)}"
        raise UnusableNames(f"has {len(order)} indices from {shown}, which are not 0, 1, 2 and so on")
    numbered = sorted(zip(order, names, strict=True))
    return tuple(name for _, name in numbered)


def _is_whole(value: object) -> bool:
    """Whether ``value`` is a whole number, or a tensor that holds one."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_floating_point()
    if isinstance(value, float):
        return value.is_integer()
    return isinstance(value, int) and not isinstance(value, bool)


def _parse_index(value: Any) -> int | None:
    """A whole number, also as text; ``None`` for anything else."""
    is_text = isinstance(value, str) and value.isdecimal() and len(value) <= MAX_DIGITS
    if _is_whole(value) or is_text:
        return int(value)
    return None
