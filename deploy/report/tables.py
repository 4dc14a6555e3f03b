"""Tables of text: aligned for a terminal, or Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import zip_longest

from ..escaping import escape_line, escape_markdown
from ..measure.statistics import Latency

GAP = "  "
"""What stands between two columns of a table for a terminal."""


def format_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    markdown: bool = False,
    width: int | None = None,
) -> str:
    """Aligned columns; the first is left-aligned, the others right-aligned. No cell can end its row.

    Args:
        header: heads of the columns.
        rows: cells; every row has as many as the header.
        markdown: for a Markdown file, whose tables have no width.
        width: characters that a line may have, ``None`` for any number. In a table that is too wide, cells
            of several words fold within their column; where that is not enough, the last columns follow in
            a table of their own, which repeats the first column.
    """
    safe = escape_markdown if markdown else escape_line
    lines = [[safe(cell) for cell in row] for row in [header, *rows]]
    natural = [max(map(len, column)) for column in zip(*lines, strict=True)]
    if markdown:
        return _format_markdown(lines, natural)
    if width is None or _add_widths(natural) <= width:
        return _format_lines(lines, natural)
    if folded := _fold_widths(lines, natural, width):
        return _format_lines(lines, folded)
    return "\n\n".join(_format_lines(part, widths) for part, widths in _split_columns(lines, natural, width))


def _format_markdown(lines: Sequence[Sequence[str]], widths: Sequence[int]) -> str:
    first, *others = ["-" * (width - 1) for width in widths]
    rule = [f":{first}", *(f"{dashes}:" for dashes in others)]
    table = [lines[0], rule, *lines[1:]]
    return "\n".join(f"| {' | '.join(_align(row, widths))} |" for row in table)


def _format_lines(lines: Sequence[Sequence[str]], widths: Sequence[int]) -> str:
    """A table for a terminal; a cell that is longer than its column takes several lines."""
    header, *rows = ["\n".join(_format_row(row, widths)) for row in lines]
    return "\n".join([header, GAP.join("-" * width for width in widths), *rows])


def _format_row(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """The lines of a row."""
    cells = [_fold_cell(cell, width) for cell, width in zip(row, widths, strict=True)]
    return [GAP.join(_align(parts, widths)).rstrip() for parts in zip_longest(*cells, fillvalue="")]


def _align(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    first, *others = zip(row, widths, strict=True)
    return [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]


def _fold_cell(cell: str, width: int) -> list[str]:
    if len(cell) <= width:
        return [cell]
    return textwrap.wrap(cell, width, break_on_hyphens=False)


def _add_widths(widths: Sequence[int]) -> int:
    return sum(widths) + len(GAP) * (len(widths) - 1)


def _fold_widths(lines: Sequence[Sequence[str]], natural: Sequence[int], width: int) -> list[int]:
    """Widths with which a table fits in ``width`` and no word is cut; empty where there are none. The widest
    column that can give a character gives it."""
    columns = zip(*lines, strict=True)
    least = [max(len(word) for cell in column for word in [*cell.split(), ""]) for column in columns]
    widths = list(natural)
    while _add_widths(widths) > width:
        able = [i for i, low in enumerate(least) if widths[i] > low]
        if not able:
            return []
        widths[max(able, key=lambda i: widths[i])] -= 1
    return widths


def _split_columns(
    lines: Sequence[Sequence[str]],
    natural: Sequence[int],
    width: int,
) -> Iterator[tuple[list[list[str]], list[int]]]:
    """Tables side by side in ``width``, each with its widths; each repeats the first column, which gets half
    of the width at most. No column is wider than what is left of that."""
    first = min(natural[0], width // 2)
    most = max(1, width - first - len(GAP))
    chosen: list[int] = []
    for column in range(1, len(natural)):
        taken = [min(natural[i], most) for i in [*chosen, column]]
        if chosen and _add_widths([first, *taken]) > width:
            yield _take_columns(lines, natural, chosen, first, most)
            chosen = []
        chosen.append(column)
    yield _take_columns(lines, natural, chosen, first, most)


def _take_columns(
    lines: Sequence[Sequence[str]],
    natural: Sequence[int],
    chosen: Sequence[int],
    first: int,
    most: int,
) -> tuple[list[list[str]], list[int]]:
    """The first column and the ``chosen`` ones, with their widths."""
    part = [[row[0], *(row[i] for i in chosen)] for row in lines]
    return part, [first, *(min(natural[i], most) for i in chosen)]


MAX_DIGITS = 9
"""The largest number of digits that a difference is shown with; a float32 number has no more."""


def format_differences(found: float, allowed: float) -> tuple[str, str]:
    """A difference and the allowed one, with two digits, or with as many as tell them apart."""
    for digits in range(2, MAX_DIGITS):
        texts = f"{found:.{digits}g}", f"{allowed:.{digits}g}"
        if texts[0] != texts[1] or found == allowed:
            return texts
    return repr(found), repr(allowed)


LATENCY_COLUMNS = ("p50", "p90", "p95", "p99", "max")
"""Headings of the cells that :func:`format_latency_cells` gives."""


def format_latency_cells(latency: Latency) -> list[str]:
    """Milliseconds under :data:`LATENCY_COLUMNS`; ``"-"`` where there were too few samples."""
    p99 = "-" if latency.p99 is None else f"{latency.p99:.2f}"
    return [
        f"{latency.p50:.2f}",
        f"{latency.p90:.2f}",
        f"{latency.p95:.2f}",
        p99,
        f"{latency.max:.2f}",
    ]
