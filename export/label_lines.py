"""The names of the classes in the lines of a text, with what other programs write around them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

LINE_END = re.compile(r"\r\n|\n|\r")
"""What ends a line. A name may hold anything else, such as U+2028, at which ``str.splitlines`` splits."""

IN_FRONT = re.compile(r'"?([0-9]{1,9})"?(?:\s*[\s,;:)]\s*|\.(?![0-9])\s*)(\S.*)', re.DOTALL)
"""A line that begins with the number of its class."""

BEHIND = re.compile(r'"?([0-9]{1,9})"?$')
"""The end of a line that ends with the number of its class."""

SEPARATORS = ",;:=\t"
"""What separates the columns of a table; a space may be a part of a name."""

# fmt: off
HEAD_WORDS = frozenset((
    "index", "idx", "id", "number", "no", "label", "labels", "label_id", "label_name", "class", "classes",
    "class_id", "class_idx", "class_index", "class_name", "classname", "name", "names", "category",
    "category_id", "category_name", "target",
))
# fmt: on
"""Words, in lower case, that name the columns of a table of classes."""

SYNTAX = re.compile(r"[A-Za-z_]\w*\s*\{|[A-Za-z_]\w*:(?:\s*\[.*\])?|\[(?=[^,'\"]*[,'\"]).*\]")
"""A line that belongs to a format of data and is no name: ``item {``, ``names:``, ``names: [cat, dog]``."""

KEY = re.compile(r"[A-Za-z_]\w*:")
"""A line that names what follows, as ``names:`` in YAML."""

BRACKETS = ("[]", "{}", "()")
"""Brackets around a list or a mapping, of which each may stand on a line of its own."""


class NoNames(ValueError):
    """The lines cannot be understood as names in the order of the logits; the text says why."""


class LineNames(NamedTuple):
    """The names in the order of the logits, and what was left out of them, in words."""

    names: tuple[str, ...]
    note: str = ""


class _Line(NamedTuple):
    """One line with a number, its name, and whether a separator of columns stands between them."""

    number: int
    name: str
    is_table: bool


def read_lines(text: str) -> LineNames:
    """The names in a text, one a line.

    Numbers are no part of the names where they count the lines from 0 or 1; they tell the order then. One
    line alone is never taken for a numbered one, and neither are lines of one character each.

    Raises:
        NoNames: some lines are no names, or the numbers do not tell the order.
    """
    lines = [line.strip() for line in LINE_END.split(text) if line.strip()]
    if all(len(line) == 1 for line in lines):
        return LineNames(tuple(lines))
    lines = _strip_dashes(_drop_head(lines))
    _refuse_syntax(lines)
    if len(lines) > 1:
        for place, split in PLACES.items():
            if (found := _read_numbered(lines, split, place)) is not None:
                return found
    return LineNames(_strip_quotes(lines))


def _drop_head(lines: list[str]) -> list[str]:
    """The lines without a first one that names the columns, or the list, of lines with numbers or dashes."""
    first, rest = lines[0], lines[1:]
    is_comment = first.startswith("#") and re.search(r"[A-Za-z]", first)
    if is_comment and not all(line.startswith("#") for line in rest):
        raise NoNames(f"the first line {first!r} seems to be a comment; remove it if it is")
    split = _find_numbers(rest)
    if KEY.fullmatch(first) and rest and (split or all(line.startswith("- ") for line in rest)):
        return rest
    if _is_table_head(first):
        if split:
            return rest
        raise NoNames(f"the first line {first!r} names columns, but no column numbers the classes")
    if len(rest) > 1 and split and split(first) is None:
        raise NoNames(f"the first line {first!r} has no number, and all others have one")
    return lines


def _is_table_head(line: str) -> bool:
    """Whether a line names the columns of a table, as ``index,label``."""
    cells = re.split(r"[,;\t]", line)
    words = [cell.strip().strip('"').lower() for cell in cells]
    are_known = all(word in HEAD_WORDS for word in words if word)
    return len(words) > 1 and are_known and any(words)


def _find_numbers(lines: Sequence[str]) -> Callable[[str], _Line | None] | None:
    """What splits the lines into names and the numbers that count them; ``None`` where nothing does."""
    for split in PLACES.values():
        found = _split_all(lines, split)
        if found and _count_from(found) is not None and (len(found) == 1 or _are_names(found)):
            return split
    return None


def _strip_dashes(lines: list[str]) -> list[str]:
    """The items of a list in YAML or Markdown; other lines as they are."""
    if len(lines) > 1 and all(line.startswith("- ") for line in lines):
        return [line[2:].strip() for line in lines]
    return lines


def _refuse_syntax(lines: Sequence[str]) -> None:
    """Raise :class:`NoNames` where lines belong to a format that is not read."""
    wrong = next((line for line in lines if SYNTAX.fullmatch(line)), None)
    first, last = lines[0], lines[-1].rstrip(",;")
    for brackets in BRACKETS:
        opening, closing = brackets[0], brackets[1]
        around = (first, last) == (opening, closing)
        quoted = [line.startswith(opening) and closing in line[-2:] for line in lines]
        each = len(lines) > 1 and all(quoted)
        if around or (each and all("," in line for line in lines)):
            wrong = first
    if wrong is not None:
        raise NoNames(f"the line {wrong!r} belongs to a format that is not read")


# --- numbers before or behind the names -----------------------------------------------------------


def _split_front(line: str) -> _Line | None:
    """``0: cat`` as its number and name."""
    found = IN_FRONT.fullmatch(line)
    return None if found is None else _Line(int(found[1]), found[2], True)


def _split_behind(line: str) -> _Line | None:
    """``cat,0`` as its number and name."""
    found = BEHIND.search(line[-11:])  # as long as nine digits in quotes
    if found is None:
        return None
    before = line[: len(line) - len(found[0])]
    name = before.rstrip(SEPARATORS + " ")
    if not name or name == before:
        return None
    return _Line(
        int(found[1]),
        name,
        not before[len(name) :].isspace() or "\t" in before[len(name) :],
    )


PLACES: dict[str, Callable[[str], _Line | None]] = {
    "in front of": _split_front,
    "behind": _split_behind,
}
"""Where a number stands -> what splits a line into number and name."""


def _read_numbered(
    lines: Sequence[str],
    split: Callable[[str], _Line | None],
    place: str,
) -> LineNames | None:
    """The names of lines with numbers at one place; ``None`` where the numbers are parts of the names."""
    found = _split_all(lines, split)
    if not found or not _are_names(found):
        return None
    first = _count_from(found)
    if first is None:
        _refuse_gaps(found, place)
        return None
    _refuse_two_orders(found)
    names = _strip_quotes([line.name for line in sorted(found)])
    note = f"the numbers {first} to {first + len(found) - 1} {place} the names were left out"
    if sorted(found) != found:
        note += ", and the names were sorted by them"
    return LineNames(names, note)


def _split_all(
    lines: Sequence[str],
    split: Callable[[str], _Line | None],
) -> list[_Line] | None:
    """Every line as number and name; ``None`` where one has no number."""
    found: list[_Line] = []
    for line in lines:
        if (parts := split(line)) is None:
            return None
        found.append(parts)
    return found


def _count_from(found: Sequence[_Line]) -> int | None:
    """0 or 1 where the numbers are all whole numbers from there, in any order; otherwise ``None``."""
    numbers = sorted(line.number for line in found)
    for first in (0, 1):
        if numbers == list(range(first, first + len(numbers))):
            return first
    return None


def _are_names(found: Sequence[_Line]) -> bool:
    """Whether most lines differ without their numbers: the numbers of ``1 euro, 2 euro`` are parts of the
    names, but ImageNet has two cranes."""
    return len({line.name for line in found}) * 2 > len(found)


def _refuse_gaps(found: Sequence[_Line], place: str) -> None:
    """Raise :class:`NoNames` for numbers that seem to be indices and do not count the lines. A year behind a
    name, as in ``Fiat 500 2012``, is a part of it."""
    if all(line.is_table and not line.name[0].isdigit() for line in found):
        numbers = [line.number for line in found]
        counted = f"{len(numbers)} numbers from {min(numbers)} to {max(numbers)}"
        raise NoNames(f"{counted} {place} the names, which are not 0, 1, 2 and so on")


def _refuse_two_orders(found: Sequence[_Line]) -> None:
    """Raise :class:`NoNames` where names are numbers that count the lines, too, and in another order."""
    names = [line.name.strip('"') for line in found]
    if not all(re.fullmatch("[0-9]{1,9}", name) for name in names):
        return
    backward = [_Line(int(name), "", True) for name in names]
    forward_numbers = [line.number for line in found]
    backward_numbers = [line.number for line in backward]
    if _count_from(backward) is not None and backward_numbers != forward_numbers:
        raise NoNames("every line has two numbers, of which either may be the index")


def _strip_quotes(names: Sequence[str]) -> tuple[str, ...]:
    """The names without the quotes that CSV puts around a text, or YAML around all of them."""
    for quote in ("'", '"'):
        quoted = [_is_quoted(name, quote) for name in names]
        if quote == '"' or all(quoted):
            names = [
                name[1:-1].replace(quote * 2, quote) if is_quoted else name
                for name, is_quoted in zip(names, quoted, strict=True)
            ]
    return tuple(names)


def _is_quoted(name: str, quote: str) -> bool:
    """Whether ``name`` is a text in quotes; an empty one is none."""
    return len(name) > 2 and name[0] == name[-1] == quote
