"""The notebook: it is a valid file without outputs, and its cells run one after the other."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from helpers.paths import ROOT

NOTEBOOKS = sorted((ROOT / "examples").rglob("*.ipynb"))


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def run_cell(source: str, names: dict) -> object:
    """Run a cell; the value of its last line, which a notebook would show."""
    body = ast.parse(source).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if last else None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_valid_and_holds_no_output(path):
    notebook = read(path)
    assert (notebook["nbformat"], notebook["nbformat_minor"] >= 5) == (4, True)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert {cell["cell_type"] for cell in notebook["cells"]} == {"markdown", "code"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)


@pytest.mark.slow
def test_the_cells_of_the_first_bundle_run(tmp_path, monkeypatch, one_trace):
    pytest.importorskip("torch", reason="needs torch, which the model is made with")
    pytest.importorskip("openvino", reason="needs OpenVINO, which serves the bundle")
    (path,) = NOTEBOOKS
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    cells = ["".join(cell["source"]) for cell in read(path)["cells"] if cell["cell_type"] == "code"]
    shown = [run_cell(cell, names) for cell in cells]
    name, precision, labels = shown[1]
    assert (name, precision, len(labels)) == ("cmt_nano_fp32_openvino", "fp32", 10)
    assert (tmp_path / "out" / name / "manifest.json").is_file()
    assert shown[3][0][0] == "ship"
    assert shown[4][0] is True
    assert min(shown[5]) > 0
