"""``benchmarks/felt.py``: it starts what it says, and its table compares with the first row."""

from __future__ import annotations

import subprocess
import sys

import pytest

from helpers.bundles import make_bundle
from helpers.images import coloured_folder
from helpers.paths import ROOT

pytest.importorskip("openvino")

SECONDS = 300
"""A benchmark that takes longer hangs."""


def run(*arguments: object) -> list[list[str]]:
    """The rows of the table, without its head."""
    command = [sys.executable, ROOT / "benchmarks" / "felt.py", *arguments, "--rounds", "1"]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.slow
def test_cold_starts_are_told_apart(tmp_path):
    bundle = make_bundle(tmp_path / "b", format="openvino")
    image = next(coloured_folder(tmp_path / "images").rglob("*.png"))
    rows = run("--what", "cold", bundle.path, image, "--before", ROOT / "src")
    assert [row[0] for row in rows] == ["before", "without cache", "first", "second"]
    assert rows[0][2] == rows[0][4] == "1.00"
    assert all(float(cell) > 0 for row in rows for cell in row[1:])


@pytest.mark.slow
def test_a_kept_graph_is_measured(tmp_path):
    pytest.importorskip("onnxruntime")
    bundle = make_bundle(tmp_path / "b")
    rows = run("--what", "graph", bundle.file("model.onnx"))
    assert [row[0] for row in rows] == ["as it is", "kept"]


@pytest.mark.slow
def test_a_start_that_fails_is_no_figure(tmp_path):
    with pytest.raises(AssertionError, match="failed"):
        run("--what", "cold", tmp_path / "none", tmp_path / "none.png")
