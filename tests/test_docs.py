"""What the pages name exists: links, headings, and files of the repository."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
FILE = re.compile(r"`((?:cmt|export|calib|deploy|tests|docs|scripts|benchmarks|examples|src)/[\w./-]*)`")
PLACEHOLDER = re.compile("NAME|FAMILY")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
HISTORY = ROOT / "CHANGELOG.md"
"""It names what was, too."""


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def dead_links(page: Path) -> list[str]:
    dead = []
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if link.startswith(("https://", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    assert not dead_links(page)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page != HISTORY], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_files_exist(page):
    names = FILE.findall(page.read_text(encoding="utf-8"))
    names = [name for name in names if not PLACEHOLDER.search(name)]
    places = (ROOT, ROOT / "src" / "cmt_edge")
    assert not [name for name in names if not any((place / name).exists() for place in places)]


def test_dead_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A head\n[a](gone.md) [b](#a-head) [c](#no-head) [d](page.md#a-head)\n", encoding="utf-8"
    )
    assert dead_links(page) == ["gone.md", "#no-head"]
