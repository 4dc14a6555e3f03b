"""The page that says what goes in names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "what-goes-in.md"
KINDS = (
    "Checkpoints",
    "Your own models",
    "Outputs",
    "Pictures and cameras",
    "Labels",
    "Folders and archives",
    "Settings",
    "Bundles in the world",
    "Homes and outputs",
    "Names",
)
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def rows_of(kind: str) -> list[str]:
    """The rows of the table below a heading, without its head."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {kind}\n")[1].split("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("|")][2:]


def missing(rows: list[str]) -> list[str]:
    """Rows that name no test, or one that does not exist."""
    wrong = []
    for row in rows:
        found = NAMED.findall(row)
        if not found or not all(has_test(file, name) for file, name in found):
            wrong.append(row)
    return wrong


def has_test(file: str, name: str) -> bool:
    path = ROOT / file
    return path.exists() and re.search(rf"^def {name}\(", path.read_text(encoding="utf-8"), re.M) is not None


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_names_a_test_that_exists(kind):
    rows = rows_of(kind)
    assert rows
    assert not missing(rows)


@pytest.mark.parametrize(
    "row",
    ["| a | b | c |", "| a | b | `tests/gone.py::test_a` |", "| a | b | `tests/test_docs.py::test_gone` |"],
)
def test_a_row_without_a_test_is_noticed(row):
    assert missing([row]) == [row]
