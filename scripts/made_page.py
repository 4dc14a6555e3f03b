"""What the scripts share that write a page of the docs from the code."""

from __future__ import annotations

import sys
from pathlib import Path


def write_or_check(page: Path, text: str, arguments: list[str], script: str) -> int:
    """Write ``text`` into ``page``, or with ``--check`` only compare; returns the exit code.

    ``script`` is what writes the page, for the message."""
    if arguments != ["--check"]:
        page.write_text(text, encoding="utf-8")
        return 0
    if page.is_file() and page.read_text(encoding="utf-8") == text:
        return 0
    print(f"docs/{page.name} is not current: python {script}", file=sys.stderr)
    return 1
