"""Reports in a real browser, where one is installed: nothing complains, nothing is fetched, nothing is wider
than the screen, and plots have their marks. One browser shows all pages."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from cmt_edge.deploy.report.html import Reported, make_bundle_page, make_comparison_page, make_fleet_page
from helpers.browser import Browser, find_browser
from helpers.paths import ROOT
from helpers.reports import full_measured, full_subject, run_of

VIEWS = [
    (1280, "light", ""),
    (1280, "dark", ""),
    (360, "light", ""),
    (360, "dark", ""),
    (970, "light", ""),  # the narrowest that shows tables as tables
    (720, "light", "print"),  # a sheet of A4
]
"""Width in pixels, colours, and medium."""
AXE = Path(os.environ.get("CMT_EDGE_AXE", ROOT / "node_modules" / "axe-core" / "axe.min.js"))
"""The accessibility checker, which ``make axe`` installs."""
SERIOUS = ("serious", "critical")
"""Findings of it that fail a test."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    command = find_browser()
    if command is None:
        pytest.skip("no Chromium is installed")
    with Browser(command, tmp_path_factory.mktemp("profile")) as shown:
        yield shown


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """A page of each kind, with everything that it can show."""
    run = run_of(full_measured("one"), full_measured("two", 2.0))
    both = [
        replace(full_subject(name), name=name).with_speed(run, place)
        for place, name in enumerate(("one", "two"))
    ]
    made = {
        "bundle": make_bundle_page(full_subject("a_bundle_with_a_long_name_" * 3)),
        "comparison": make_comparison_page(both, run),
        "fleet": make_fleet_page([Reported(name, full_subject()) for name in ("orin", "server", "laptop")]),
    }
    folder = tmp_path_factory.mktemp("pages")
    for name, text in made.items():
        (folder / f"{name}.html").write_text(text)
    return {name: folder / f"{name}.html" for name in made}


@pytest.mark.parametrize("kind", ["bundle", "comparison", "fleet"])
def test_a_page_shows_well_everywhere(browser, pages, kind):
    for width, scheme, medium in VIEWS:
        browser.show(pages[kind], width, scheme, medium)
        assert browser.list_complaints() == []
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        boxes = "[...document.querySelectorAll('main *:not(thead *)')]"
        boxes += ".map(e => [e.tagName, e.getBoundingClientRect().right])"
        assert [text for text, right in browser.evaluate(boxes) if right > width + 1] == []
    browser.print_pages(pages[kind].with_suffix(".pdf"))
    assert pages[kind].with_suffix(".pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("kind", "marks"),
    [
        ("bundle", {".matrix rect": 9, ".matrix .cell": 2, "img": 2, "svg.histogram": 2, ".median": 2}),
        ("comparison", {".scatter circle": 2, ".scatter .limit": 1, ".histogram": 2}),
        ("fleet", {".histogram": 3, "#devices table tbody tr": 3}),
    ],
)  # fmt: skip
def test_plots_have_their_marks(browser, pages, kind, marks):
    browser.show(pages[kind], 1280)
    found = {name: browser.evaluate(f"document.querySelectorAll({name!r}).length") for name in marks}
    assert found == marks
    assert browser.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")


def test_headings_of_columns_keep_their_words(browser, pages):
    """A word of a heading once broke in the middle."""
    browser.show(pages["comparison"], 1280)
    lines = (
        "[...document.querySelectorAll('thead th')].map(e => [e.textContent, e.scrollWidth - e.clientWidth])"
    )
    assert [text for text, beyond in browser.evaluate(lines) if beyond > 0] == []
    assert browser.evaluate("getComputedStyle(document.querySelector('thead th')).overflowWrap") == "normal"


@pytest.mark.parametrize("kind", ["bundle", "comparison", "fleet"])
@pytest.mark.skipif(not AXE.is_file(), reason="needs axe-core: make axe, or its file in CMT_EDGE_AXE")
def test_no_serious_finding_of_axe(browser, pages, kind):
    for width, scheme, _ in VIEWS[:4]:
        browser.show(pages[kind], width, scheme)
        browser.evaluate(AXE.read_text() + ";0")
        found = browser.evaluate(
            "axe.run().then(r => r.violations.map(v => [v.impact, v.id, v.nodes[0].html]))"
        )
        assert [one for one in found if one[0] in SERIOUS] == []


def test_what_is_folded_opens_by_a_link_and_on_paper(browser, pages):
    browser.show(pages["bundle"], 360)
    seen = "[...document.querySelectorAll('section > details > div')].filter(e => e.checkVisibility()).length"
    sections = browser.evaluate("document.querySelectorAll('section').length")
    height = browser.evaluate("document.documentElement.scrollHeight")
    assert 0 < browser.evaluate(seen) < sections
    assert not browser.evaluate("document.querySelector('#size').parentElement.open")
    browser.evaluate("document.querySelector('a[href=\"#size\"]').click()")
    assert browser.evaluate("document.querySelector('#size').parentElement.open")
    browser.show(pages["bundle"], 360, media="print")
    assert browser.evaluate("document.documentElement.scrollHeight") > height
