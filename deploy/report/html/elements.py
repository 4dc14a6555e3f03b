"""HTML that is safe by construction: what is no :class:`Markup` is text, and text is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...escaping import escape_line
from ...folding import fold


class Markup(str):
    """Text that is HTML already. Only this module and the style sheet make it from a plain text."""

    __slots__ = ()


NOTHING = Markup("")
"""What stands where there is nothing to show."""
CODE_WIDTH = 88
"""Characters of a command's line, which fit into the page of a desktop and of a sheet of paper."""
MOST_ROWS = 8
"""A table with more rows than this is folded."""
UNKNOWN = "-"
"""What a cell shows where a figure is not known."""


FLAG = re.compile(r"(?<= )-[^\s&<>]+")
"""Matches a flag in an escaped command."""
UNITS = re.compile(r"(?<=\d) (?=(?:%|ms|MB|points)(?!\w))")
"""Matches the space between a number and what it counts."""
INTERVAL = re.compile(r"(?<![\d.])([-+]?\d[\d.]{0,5}) to ([-+]?\d[\d.]{0,5})(?![\d.])")
"""Matches two short numbers, from one to the other."""


def escape_text(text: str) -> Markup:
    """``text`` as HTML: it brings no element, ends no attribute, and cannot change the writing direction."""
    return text if isinstance(text, Markup) else Markup(html.escape(escape_line(text)))


def keep_units(text: str) -> str:
    """``text`` in which no line ends between a number and its percent sign or unit, nor inside an interval of
    short numbers; markup stays as it is."""
    if isinstance(text, Markup):
        return text
    space = "\N{NO-BREAK SPACE}"
    return INTERVAL.sub(rf"\1{space}to{space}\2", UNITS.sub(space, text))


def make_name(text: str) -> Markup:
    """A name, which may wrap after each of its underscores."""
    return Markup(escape_text(text).replace("_", "_<wbr>"))


def join(parts: Iterable[str]) -> Markup:
    """The parts one after the other; those that are no markup are escaped."""
    return Markup("".join(map(escape_text, parts)))


def make(element: str, *children: str, **attributes: object) -> Markup:
    """An element with its children.

    An attribute's name may end in an underscore, and its other underscores stand for hyphens: ``class_``,
    ``data_label``. One whose value is ``None`` is left out.
    """
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape_text(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{element}{written}>{join(children)}</{element}>")


def make_void(element: str, **attributes: object) -> Markup:
    """An element that has no content, such as ``meta``."""
    return Markup(make(element, **attributes).removesuffix(f"</{element}>"))


def make_list(items: Sequence[str], class_: str | None = None) -> Markup:
    """A list with an entry an item; nothing where there is none."""
    return make("ul", *(make("li", keep_units(item)) for item in items), class_=class_) if items else NOTHING


def make_facts(facts: Iterable[tuple[str, str]], class_: str = "facts") -> Markup:
    """Names and values side by side, or one below the other where the page is narrow."""
    pairs = (make("div", make("dt", name), make("dd", value)) for name, value in facts)
    return make("dl", *pairs, class_=class_)


def make_code(lines: Iterable[str]) -> Markup:
    """Commands, a line each; a long one is folded as a shell reads it, and wraps further on a narrow page."""
    folded = (part for line in lines for part in fold(line, CODE_WIDTH).split("\n"))
    return make("pre", make("code", Markup("\n".join(map(_mark_flags, folded)))))


def _mark_flags(line: str) -> Markup:
    """A line of a command; a browser would else end a line behind the hyphens of a flag."""
    return Markup(FLAG.sub(r'<span class="flag">\g<0></span>', escape_text(line)))


def make_hash(digest: str) -> Markup:
    """A hash, which may wrap at any of its digits."""
    return make("code", digest, class_="hash")


@dataclass(frozen=True)
class Table:
    """A table; ``is_numeric`` aligns every column but the first to the right.

    On a narrow page a row becomes a block with a line a cell, which begins with the column's name. Browsers
    then forget that it is a table, so that the roles say it. A long table is folded.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    is_numeric: bool = True

    def write(self) -> Markup:
        """The element; nothing where there is no row."""
        if not self.rows:
            return NOTHING
        if len(self.rows) <= MOST_ROWS:
            return self._write_element(make("caption", self.caption))
        head = make("summary", f"{self.caption}: {len(self.rows)} rows")
        return make("details", head, self._write_element(NOTHING), class_="rows")

    def _write_element(self, caption: Markup) -> Markup:
        """The table; without a caption it bears that as its name."""
        heads = (
            make("th", name, scope="col", role="columnheader") if name else make("td", role="cell")
            for name in self.header
        )
        return make(
            "table",
            caption,
            make("thead", make("tr", *heads, role="row"), role="rowgroup"),
            make("tbody", *map(self._write_row, self.rows), role="rowgroup"),
            role="table",
            aria_label=None if caption else self.caption,
            class_="numbers" if self.is_numeric else None,
        )

    def _write_row(self, row: Sequence[str]) -> Markup:
        names = zip(self.header[1:], row[1:], strict=True)
        cells = [make("td", keep_units(cell), role="cell", data_label=name or None) for name, cell in names]
        head = make("th", make_name(row[0]), scope="row", role="rowheader", data_label=self.header[0])
        return make("tr", head, *cells, role="row")
