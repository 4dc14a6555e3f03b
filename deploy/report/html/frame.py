"""What every page has: head, verdict, list of sections, and its figures to download."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

from ...bundle import make_plain
from .conclusion import Conclusion, State
from .elements import Markup, keep_units, make, make_list
from .style import make_head

Section = tuple[str, Markup]
"""Title and content; a section without content is left out."""

OPEN = ("Accuracy", "Latency", "Bundles", "Devices", "Warnings")
"""Sections that a page shows at once; the others are folded until a reader opens them, and on paper none is.
"""
PREFIX = "data:application/json;base64,"
"""How the address of a page's figures begins."""


def make_conclusion_json(found: Conclusion) -> dict[str, str]:
    """A conclusion for a program: ``{"state": "ship" | "check" | "stop", "sentence": ...}``."""
    return {"state": found.state.name.lower(), "sentence": found.sentence}


def write_verdict(found: Conclusion) -> Markup:
    word = make("span", found.state.value, class_="word")
    rest = keep_units(found.sentence.removeprefix(found.state.value))
    return make("p", word, rest, class_=f"verdict {found.state.name.lower()}", role="status")


def write_word(state: State) -> Markup:
    return make("span", state.value, class_=f"word {state.name.lower()}")


def assemble(title: str, top: Sequence[Markup], sections: Sequence[Section], data: Any) -> str:
    """The page: head, top, list of its sections, sections, data."""
    shown = [(name, content) for name, content in sections if content]
    links = make_list([make("a", name, href=f"#{_make_anchor(name)}") for name, _ in shown])
    bodies = [_write_section(name, content) for name, content in shown]
    body = make(
        "body",
        make("main", *top, make("nav", links, aria_label="On this page"), *bodies),
        _write_footer(data),
    )
    return f"<!doctype html>\n{make('html', make_head(title), body, lang='en')}\n"


def _write_section(name: str, content: Markup) -> Markup:
    """A section that folds. A link to its content opens it."""
    head = make("summary", make("h2", name))
    body = make("div", content, id=_make_anchor(name))
    return make("section", make("details", head, body, open="" if name in OPEN else None))


def _write_footer(data: Any) -> Markup:
    """The figures of the page for a program."""
    address = f"{PREFIX}{base64.b64encode(make_figures_file(data)).decode()}"
    link = make("a", "the figures of this page as JSON", href=address, download="report.json")
    return make("footer", make("p", "Download ", link, "."))


def make_figures_file(data: Any) -> bytes:
    """The figures of a page as a JSON file of one line."""
    return f"{json.dumps(make_plain(data), ensure_ascii=False)}\n".encode()


def _make_anchor(name: str) -> str:
    return "-".join(name.lower().split())
