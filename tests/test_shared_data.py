"""The data beside the checkout: every part is listed and described, and what is absent is skipped."""

from __future__ import annotations

import re

import pytest

from helpers import shared as shared_data
from helpers.paths import ROOT
from helpers.shared import PARTS, find_shared, shared

ROW = re.compile(r"^\| `([^`]+)` \| ([^|]+) \|", re.MULTILINE)


def test_the_table_of_the_readme_lists_the_same_parts():
    text = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    rows = {name: content.strip() for name, content in ROW.findall(text)}
    assert rows == PARTS


def test_a_part_that_is_not_listed_is_refused():
    for name in ("data", "data/other.tar", "golden.npz", "weights"):
        with pytest.raises(KeyError, match="is not in PARTS"):
            find_shared(name)


def test_what_is_absent_skips_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(shared_data, "SHARED", tmp_path)
    assert find_shared("data/cifar10.tar") is None
    with pytest.raises(pytest.skip.Exception, match=r"needs golden/a\.npz .* set CMT_EDGE_SHARED"):
        shared("golden/a.npz")
    (tmp_path / "golden").mkdir()
    (tmp_path / "golden" / "a.npz").touch()
    assert shared("golden/a.npz") == tmp_path / "golden" / "a.npz"
