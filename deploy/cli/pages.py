"""The flag of commands that can also write their result as one HTML file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..bundle import require_outside_bundles
from ..errors import InputError
from ..files import require_writable

SUFFIXES = (".html", ".htm")
"""Of a page."""


def add_page_flag(add_flag: Callable[..., object]) -> None:
    """``--html``; ``add_flag`` is the ``add_argument`` of a parser or of a group."""
    add_flag(
        "--html",
        type=Path,
        metavar="FILE",
        help="also write a report as one HTML file, which needs no network",
    )


def require_page_target(target: Path) -> None:
    """Raise an error before the work for a page that could not be written at its end.

    Raises:
        InputError: the file is not called ``.html``.
        OutputError: it lies in a bundle, which it would break, or cannot be written.
    """
    if target.suffix.lower() not in SUFFIXES:
        raise InputError("a report is HTML", where=target, remedy="name it .html")
    require_outside_bundles(target)
    require_writable(target)
