"""The flags of commands that can also write their result as one HTML file, or its figures as JSON."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from ..bundle import require_outside_bundles
from ..errors import InputError
from ..files import require_writable, write_output

SUFFIXES = (".html", ".htm")
"""Of a page."""
FIGURES = ".json"
"""Suffix of a file of figures; by it ``cmt-report --merge`` tells them from bundles."""


def add_page_flags(add_flag: Callable[..., object]) -> None:
    """``--html`` and the flags about what a page holds.

    ``add_flag`` is the ``add_argument`` of a parser or of a group.
    """
    add_flag(
        "--html",
        type=Path,
        metavar="FILE",
        help="also write a report as one HTML file, which needs no network",
    )
    add_content_flags(add_flag)


def add_content_flags(add_flag: Callable[..., object]) -> None:
    """``--figures`` and ``--no-thumbnails``."""
    add_flag(
        "--figures",
        type=Path,
        metavar="FILE.json",
        help="also write the figures of the report as JSON, which report --merge reads",
    )
    add_flag(
        "--no-thumbnails",
        action="store_true",
        help="show no small copies of images whose answer changed",
    )


def wants_page(args: argparse.Namespace) -> bool:
    """Whether a page or its figures were asked for."""
    return bool(args.html or args.figures)


def require_targets(args: argparse.Namespace, page: Path | None) -> None:
    """Raise an error before the work for files that could not be written at its end.

    Raises:
        InputError: the ``page`` is not called ``.html``, or the figures not ``.json``.
        OutputError: one lies in a bundle, which it would break, or cannot be written.
    """
    if page and page.suffix.lower() not in SUFFIXES:
        raise InputError("a report is HTML", where=page, remedy="name it .html")
    if args.figures and args.figures.suffix.lower() != FIGURES:
        raise InputError("figures are JSON", where=args.figures, remedy="name it .json")
    for target in filter(None, (page, args.figures)):
        require_outside_bundles(target)
        require_writable(target)


def write_pages(
    args: argparse.Namespace,
    page: Path | None,
    make_page: Callable[[], str],
    make_figures: Callable[[], bytes],
) -> None:
    """Write what was asked for."""
    if page:
        write_output(page, make_page().encode())
    if args.figures:
        write_output(args.figures, make_figures())
