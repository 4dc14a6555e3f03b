"""Text from files, made safe to print: nothing in a label, a name or a message can steer the terminal.

An escape sequence in a label could rewrite what a terminal shows, a carriage return could hide the start of a
line, and an override of the writing direction could make ``gpj.exe`` look like ``exe.jpg``. Such characters
are shown as JSON writes them (``\\u001b``), so that a line of JSON stays the same JSON.
"""

from __future__ import annotations

import json
import re
import unicodedata

SHOWN_CHARACTERS = 40
"""The largest number of characters of a wrong value that a message quotes."""

UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories that are escaped: control characters, invisible format characters (among them the
overrides of the writing direction), halves of surrogate pairs (bytes of a file name that are no UTF-8), and
separators of lines and paragraphs."""

JOINERS = "\u200c\u200d"
"""Format characters that stay: Persian words and joined emoji need them, and they only change shapes."""

_MAYBE_UNSAFE = re.compile(r"[^ -~]")
"""Matches what is not printable ASCII."""

_SURROGATE = re.compile(r"[\ud800-\udfff]")
"""Matches a half of a surrogate pair."""

_MARKDOWN = re.compile(r"[\\`*\[\]<>|&]")
"""Matches the characters that mean something in Markdown."""


def escape(text: str) -> str:
    """``text`` for a terminal or a log: line breaks and tabs stay, what else could steer it is escaped."""
    return _MAYBE_UNSAFE.sub(lambda found: _show_character(found[0], "\n\t"), text)


def escape_line(text: str) -> str:
    """``text`` on one line, for a name or a label inside a line: line breaks and tabs are escaped too, so
    that a name cannot pretend to be a line of ours."""
    return _MAYBE_UNSAFE.sub(lambda found: _show_character(found[0], ""), text)


def escape_surrogates(text: str) -> str:
    """``text`` for a program: only the bytes of a file name that are no UTF-8 are escaped."""
    return _SURROGATE.sub(lambda found: json.dumps(found[0])[1:-1], text)


def escape_markdown(text: str) -> str:
    """``text`` on one line, for a Markdown file: it also cannot end a cell, link, or bring HTML."""
    return _MARKDOWN.sub(lambda found: f"\\{found[0]}", escape_line(text))


def _show_character(character: str, kept: str) -> str:
    """The character itself, or its escape."""
    if character in kept or character in JOINERS or unicodedata.category(character) not in UNSAFE:
        return character
    return json.dumps(character)[1:-1] if character != "\x7f" else "\\u007f"
