"""The scripts that a contributor runs: which tests are quick, and how large the code is."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = '''"""A module
of two lines."""

# a comment
LIMIT = 3  # behind code
"""What it is."""


def grow(value):
    """Add."""
    return value + LIMIT
'''


@pytest.fixture
def script(monkeypatch):
    """A function that imports a file of ``scripts/``."""

    def load(name: str):
        spec = spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
        module = module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


def test_a_change_chooses_the_tests_that_import_it(script):
    quick = script("quick_tests")
    nothing = quick.choose([])
    assert nothing == sorted(quick.ALWAYS)
    assert all((ROOT / name).exists() for name in quick.ALWAYS)
    chosen = quick.choose([Path("deploy/tensorrt/cuda.py"), Path("README.md")])
    assert set(chosen) - set(nothing) >= {"tests/deploy/test_cuda.py"}
    assert "tests/cmt/test_cvt.py" not in chosen
    assert "tests/cmt/test_cvt.py" in quick.choose([Path("tests/cmt/test_cvt.py")])


def test_names_of_modules(script):
    quick = script("quick_tests")
    assert quick.module_name(Path("deploy/bundle/__init__.py")) == "cmt_edge.deploy.bundle"
    assert quick.module_name(Path("cmt/layers.py")) == "cmt_edge.cmt.layers"
    assert quick.module_name(Path("scripts/code_figures.py")) is None
    assert quick.module_name(Path("cmt/data/imagenet_labels.txt")) is None


def test_an_unknown_base_changes_nothing(script):
    assert script("quick_tests").changed_files("no-such-commit") == []


def test_figures_of_a_file(script, tmp_path, capsys):
    figures = script("code_figures")
    (tmp_path / "sample.py").write_text(SAMPLE, encoding="utf-8")
    (tmp_path / "again").symlink_to(tmp_path, target_is_directory=True)
    assert figures.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "files              1\n" in out
    assert "lines of code      3\n" in out, "LIMIT = 3; def grow(value):; return value + LIMIT"
    assert f"tokens a line      {(3 + 6 + 4) / 3:.2f} (mean)" in out
    assert "functions          1, 0 of them over 40 lines" in out
    assert f"    3  {tmp_path / 'sample.py'}:grow:9" in out


def test_figures_of_nothing(script, tmp_path, capsys):
    assert script("code_figures").main([str(tmp_path)]) == 2
    assert "no Python file was found" in capsys.readouterr().err
