"""Check a built site: every link leads somewhere, and no page loads anything from a network.

usage: python scripts/check_site.py FOLDER

Sphinx checks the sources; this reads what a browser would read. The exit code is 1 if something is wrong.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src")}
"""Tag and attribute of what a browser fetches by itself."""
POINTERS = {"canonical", "author", "next", "prev", "index", "search", "license"}
"""Relations of a ``link`` that a browser does not fetch."""
IMPORTS = re.compile(r"""(?:@import\s+["']|url\(\s*["']?)(?P<address>(?:https?:)?//[^"')\s]+)""")
"""An address that a style sheet fetches."""


class Page(HTMLParser):
    """What one page loads, what it links to, and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag names."""
        values = {name: value or "" for name, value in attrs}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        self.anchors.update(values[name] for name in ("id", "name") if values.get(name))
        if tag == "link" and values.get("rel") in POINTERS:
            return
        self.loads += [values[name] for name in ("src", "href") if (tag, name) in LOADS and name in values]


def is_remote(address: str) -> bool:
    """Whether a browser would ask a network for it."""
    return urlsplit(address).scheme in {"http", "https", "ftp"} or address.startswith("//")


def find_dead(name: Path, page: Page, pages: dict[Path, Page]) -> list[str]:
    """The links of a page that lead nowhere, as sentences."""
    found = []
    for link in page.links:
        parts = urlsplit(link)
        if parts.scheme or link.startswith("//"):
            continue
        target = (name.parent / unquote(parts.path)).resolve() if parts.path else name
        anchor = unquote(parts.fragment)
        if not target.exists():
            found.append(f"{link} leads to no file")
        elif anchor and target in pages and anchor not in pages[target].anchors:
            found.append(f"{link} leads to no heading")
    return found


def find_faults(folder: Path) -> list[str]:
    """What is wrong with a site, one sentence each."""
    pages = {
        path.resolve(): Page(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html"))
    }
    faults = [] if pages else [f"{folder} holds no page"]
    for name, page in pages.items():
        shown = name.relative_to(folder.resolve())
        faults += [f"{shown}: {fault}" for fault in find_dead(name, page, pages)]
        faults += [f"{shown} loads {address}" for address in page.loads if is_remote(address)]
    for sheet in sorted(folder.rglob("*.css")):
        found = IMPORTS.finditer(sheet.read_text(encoding="utf-8"))
        faults += [f"{sheet.relative_to(folder)} loads {match['address']}" for match in found]
    return faults


def main(arguments: list[str]) -> int:
    """Check the folder; returns the exit code."""
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    folder = Path(arguments[0])
    faults = find_faults(folder)
    print(*faults, sep="\n", file=sys.stderr, end="\n" if faults else "")
    if not faults:
        print(
            f"{len(list(folder.rglob('*.html')))} pages in {folder}: every link leads somewhere, all is local"
        )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
