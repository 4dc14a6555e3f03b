"""The names of the classes in a file: one a line, numbered or not, or JSON."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from cmt_edge.cmt.class_names import UnusableNames, read_named_classes
from cmt_edge.deploy.errors import InputError
from cmt_edge.deploy.files import read_text

from .label_lines import NoNames, read_lines

JSON_START = re.compile(r"\s*[\[{]\s*[\[{\"]")
"""The start of a text that is JSON, whatever its file is called."""

NAMED_ID = re.compile(r"[A-Za-z]{1,20}[0-9]{1,20}")
"""The ID of a class that has a name, too."""

FORMS = (
    "give a text file in UTF-8 with one class name a line, or JSON: a list of names, which may begin or end"
    " with numbers, or number -> name"
)
"""The remedy for a file that cannot be read."""


@dataclass(frozen=True)
class ClassNames:
    """What a file says.

    Attributes:
        names: in the order of the logits.
        note: what was left out of them, in words; empty if nothing was.
        ids: of the classes, where each has one beside its name; otherwise the names.
    """

    names: tuple[str, ...]
    note: str = ""
    ids: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.ids:
            object.__setattr__(self, "ids", self.names)


def read_class_names(path: Path) -> ClassNames:
    """The names in a file; a name that ends with ``.json`` holds JSON.

    Numbers that count the names from 0 or 1 tell the order, and are no part of the names.

    Raises:
        InputError: the file cannot be read, or does not hold names.
    """
    try:
        text = read_text(path)
        is_json = path.suffix.lower() == ".json" or JSON_START.match(text)
        content = json.loads(text, object_pairs_hook=_make_mapping) if is_json else None
    except (OSError, ValueError, RecursionError) as exc:  # what is no text or no JSON is a ValueError, too
        raise InputError(
            "the labels file cannot be read",
            where=path,
            why=exc,
            remedy=FORMS,
        ) from exc
    if is_json:
        return _read_json_names(content, path)
    try:
        names, note = read_lines(text)
    except NoNames as exc:
        raise _make_error(path, exc) from exc
    return ClassNames(names, f"{path}: {note}" if note else "")


def _make_error(path: Path, exc: Exception) -> InputError:
    """The error for a file whose content is understood, but does not tell the names in their order."""
    return InputError(
        "does not hold the names of the classes",
        where=path,
        why=exc,
        remedy=FORMS,
    )


def _make_mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping in JSON; raises ``ValueError`` for a key that stands there twice, of which Python's reader
    would silently lose one."""
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        double = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"the key {double!r} stands there more than once")
    return mapping


def _read_json_names(content: Any, path: Path) -> ClassNames:
    """The names in JSON, by the rules for those in a checkpoint, also under a key such as ``id2label``."""
    if isinstance(content, list) and not any(isinstance(name, (str, list)) for name in content):
        raise _make_error(path, ValueError("a list that holds no names"))
    try:
        if not _has_ids(content):
            return ClassNames(read_named_classes(content))
        names = read_named_classes({key: name for key, (_, name) in content.items()})
        ids = read_named_classes({key: cid for key, (cid, _) in content.items()})
        return ClassNames(names, ids=ids)
    except UnusableNames as exc:
        raise _make_error(path, exc) from exc


def _has_ids(content: Any) -> TypeGuard[dict[str, list[str]]]:
    """Whether each number has a pair of an ID and a name, as in ``imagenet_class_index.json`` of Keras."""
    if not isinstance(content, dict) or not content:
        return False
    are_numbers = all(map(str.isdecimal, content))
    return are_numbers and all(map(_is_named_id, content.values()))


def _is_named_id(value: Any) -> bool:
    """Whether ``value`` is a list of an ID, as ``n01440764`` of WordNet, and a name."""
    is_pair = isinstance(value, list) and [type(part) for part in value] == [str, str]
    return is_pair and NAMED_ID.fullmatch(value[0]) is not None
