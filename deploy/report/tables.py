"""Tables of text: aligned for a terminal, or Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from ..escaping import escape_line, escape_markdown
from ..measure.statistics import Latency


def format_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    markdown: bool = False,
) -> str:
    """Aligned columns; the first is left-aligned, the others right-aligned. No cell can end its row."""
    safe = escape_markdown if markdown else escape_line
    header, *rows = ([safe(cell) for cell in row] for row in [header, *rows])
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |" if markdown else "  ".join(cells).rstrip()

    first, *others = ["-" * (width - 1) for width in widths]
    rule = [f":{first}", *(f"{dashes}:" for dashes in others)]
    dashes = line(rule) if markdown else "  ".join("-" * w for w in widths)
    return "\n".join([line(header), dashes, *map(line, rows)])


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
