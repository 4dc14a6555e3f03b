"""The names of the classes in a file: one a line, numbered or not, or JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmt_edge.deploy.errors import InputError
from cmt_edge.deploy.files import read_text

NUMBERED = re.compile(r"(\d+)\s*[\s,;:.)]\s*(\S.*)")
"""A line that begins with the number of its class."""

FORMS = "give a text file in UTF-8 with one class name a line, or JSON: a list of names, or number -> name"
"""The remedy for a file that cannot be read."""


@dataclass(frozen=True)
class ClassNames:
    """What a file says.

    Attributes:
        names: in the order of the logits.
        note: what was left out of them, in words; empty if nothing was.
    """

    names: tuple[str, ...]
    note: str = ""


def read_class_names(path: Path) -> ClassNames:
    """The names in a file; a name that ends with ``.json`` holds JSON.

    Numbers in front that count the lines from 0 are an index, and no part of the names.

    Raises:
        InputError: the file cannot be read, or does not hold names.
    """
    try:
        text = read_text(path)
        if path.suffix.lower() == ".json":
            return ClassNames(_read_json_names(json.loads(text), path))
    except (OSError, ValueError, RecursionError) as exc:  # what is no text or no JSON is a ValueError, too
        raise InputError(
            "the labels file cannot be read",
            where=path,
            why=exc,
            remedy=FORMS,
        ) from exc
    return _strip_numbers([line.strip() for line in text.splitlines() if line.strip()], path)


def _strip_numbers(lines: Sequence[str], path: Path) -> ClassNames:
    """The names of lines that may be numbered; one line alone is never taken for a numbered one."""
    found = [NUMBERED.fullmatch(line) for line in lines]
    names = [match[2] for match in found if match]
    numbers = [int(match[1]) for match in found if match]
    if len(lines) < 2 or numbers != list(range(len(lines))):
        return ClassNames(tuple(lines))
    note = f"{path}: the numbers 0 to {numbers[-1]} in front of the names were left out"
    return ClassNames(tuple(names), note)


def _read_json_names(content: Any, path: Path) -> tuple[str, ...]:
    """The names of a list, of ``{"0": name}`` or of ``{name: 0}``."""
    if isinstance(content, dict):
        content = _put_in_order(content)
    if isinstance(content, list) and content and all(isinstance(name, str) for name in content):
        return tuple(content)
    raise InputError(
        "does not hold the names of the classes",
        where=path,
        remedy=FORMS,
    )


def _put_in_order(content: dict[str, Any]) -> list[Any] | None:
    """The names of a mapping between names and the numbers from 0; ``None`` for any other mapping."""
    by_number: dict[object, Any] = {int(key): name for key, name in content.items() if key.isdecimal()}
    if len(by_number) != len(content):
        by_number = {number: name for name, number in content.items() if type(number) is int}
    wanted = range(len(content))
    return [by_number[i] for i in wanted] if set(by_number) == set(wanted) else None
