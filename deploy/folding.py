"""Long lines, folded at spaces to the width of a terminal, which would cut them in the middle of a word.

Commands stay commands: a folded one has a backslash at the end of each line, so that it can be pasted. A line
with a name and, behind several spaces, a text folds below the text. Lines with more columns, the rows of a
table, stay as they are; tables fold themselves.
"""

from __future__ import annotations

import contextlib
import os
import re
import textwrap
from collections.abc import Iterator
from typing import IO

DEEPER = "  "
"""What a folded line is indented by, beyond its first part."""

COMMAND = re.compile(r" *(?:cmt-|python |pip |docker )")
"""Matches the beginning of a line that is a command."""

NAMED = re.compile(r"(?P<name> *\S+(?: \S+)* {2,})(?P<text>\S+(?: \S+)*)")
"""Matches a line that has a name and, behind several spaces, a text."""

WORD = re.compile(r"""(?:[^\s'"]|'[^']*'|"(?:\\.|[^"\\])*")+""")
"""Matches a word of a command, its quoted spaces included."""

QUOTED = re.compile(r"pip install (?:-\S+ )*\S+")
"""Matches a command inside a sentence; it is not folded."""

COLUMN_COUNT = "0*[1-9][0-9]{0,4}"
"""A number of columns in the environment; anything else there is nobody's."""

KEPT = "\0"
"""Stands for a space that must not become the end of a line; text that may be printed holds no such
character."""


def find_terminal_width(stream: IO[str] | None) -> int | None:
    """Columns of the terminal that ``stream`` is, or ``COLUMNS``; ``None`` where it is no terminal."""
    if stream is None or not stream.isatty():
        return None
    return read_columns() or _ask_terminal(stream)


def read_columns() -> int | None:
    """What the environment's ``COLUMNS`` says, if that is a positive number."""
    asked = os.environ.get("COLUMNS", "")
    return int(asked) if re.fullmatch(COLUMN_COUNT, asked) else None


def _ask_terminal(stream: IO[str]) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return os.get_terminal_size(stream.fileno()).columns or None
    return None


def fold(text: str, width: int | None) -> str:
    """``text`` with no line longer than ``width``, where spaces allow it; ``None`` is any width."""
    if width is None:
        return text
    return "\n".join(part for line in text.split("\n") for part in _fold_line(line, width))


def _fold_line(line: str, width: int) -> list[str]:
    if len(line) <= width:
        return [line]
    indent = line[: len(line) - len(line.lstrip(" "))]
    if COMMAND.match(line):
        return list(_fold_command(line, indent, width))
    if named := NAMED.fullmatch(line):
        return _fold_named(named["name"], named["text"], width) or [line]
    if "  " in line.strip():
        return [line]
    kept = QUOTED.sub(lambda found: found[0].replace(" ", KEPT), line.strip())
    parts = textwrap.wrap(
        kept,
        width,
        initial_indent=indent,
        subsequent_indent=indent + DEEPER,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [part.replace(KEPT, " ") for part in parts]


def _fold_named(name: str, text: str, width: int) -> list[str]:
    """The lines of a name and its text; none where the name leaves the text too little room."""
    room = width - len(name)
    if room < width // 3:
        return []
    first, *others = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)
    return [name + first, *(" " * len(name) + part for part in others)]


def _fold_command(line: str, indent: str, width: int) -> Iterator[str]:
    """The lines of a command; a flag and its value stay together."""
    part = ""
    for piece in _join_flags(WORD.findall(line)):
        longer = f"{part} {piece}" if part else indent + piece
        if part and len(longer) > width - len(" \\"):
            yield f"{part} \\"
            longer = indent + 2 * DEEPER + piece
        part = longer
    yield part


def _join_flags(words: list[str]) -> list[str]:
    """The words, a flag and the word behind it as one."""
    pieces: list[str] = []
    after_flag = False
    for word in words:
        if after_flag and not word.startswith("-"):
            pieces[-1] += f" {word}"
        else:
            pieces.append(word)
        after_flag = word.startswith("-") and "=" not in word
    return pieces
