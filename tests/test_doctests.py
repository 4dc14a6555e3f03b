"""The examples in docstrings: they run as they stand, in a folder that holds what they name."""

from __future__ import annotations

import doctest
import sys
from importlib import import_module
from types import ModuleType

import pytest

import cmt_edge
from helpers.paths import ROOT

pytest.importorskip("torch", reason="needs torch, which makes the bundle")
pytest.importorskip("openvino", reason="needs OpenVINO, which serves the bundle")

MODULES = (
    "cmt_edge",
    "cmt_edge.cmt",
    "cmt_edge.cmt.registry",
    "cmt_edge.deploy",
    "cmt_edge.deploy.bundle.bundle",
    "cmt_edge.deploy.measure.benchmark",
    "cmt_edge.deploy.measure.parity",
    "cmt_edge.deploy.prediction",
    "cmt_edge.deploy.predictor",
    "cmt_edge.deploy.preprocessing",
    "cmt_edge.export",
    "cmt_edge.export.config",
)
"""Modules whose examples are run; those of the fake runtime are in deploy/test_backends.py."""


@pytest.fixture
def place(tmp_path, monkeypatch, fp32_bundle, one_trace):
    """The folder of the examples: a bundle, a checkpoint and pictures."""
    import torch

    from cmt_edge.cmt import create_model, load_pretrained

    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    drawings = import_module("draw_images").DRAWINGS
    for name in ("ship", "truck"):
        drawings[name]().save(tmp_path / f"{name}.jpg")
    (tmp_path / "cmt_nano_fp32_openvino").symlink_to(fp32_bundle.path, target_is_directory=True)
    model = create_model("cmt_nano", img_size=64, num_classes=10)
    load_pretrained(model)
    torch.save(model.state_dict(), tmp_path / "cmt_nano.pth")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("draw_images", None)


def find_examples(module: ModuleType) -> list[doctest.DocTest]:
    return [found for found in doctest.DocTestFinder().find(module) if found.examples]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings_run(name, place, capsys):
    runner = doctest.DocTestRunner(optionflags=doctest.FAIL_FAST)
    found = find_examples(import_module(name))
    assert found
    for example in found:
        runner.run(example)
    assert runner.summarize(verbose=False).failed == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", sorted({*cmt_edge.__all__} - {"__version__"}))
def test_every_public_name_has_an_example(name):
    """In its own docstring, in that of one of its methods, or where it lives."""
    used = [
        example.source
        for module in MODULES
        for test in find_examples(import_module(module))
        for example in test.examples
        if doctest.SKIP not in example.options
    ]
    assert any(f"{name}(" in source or f"{name}." in source for source in used)


def test_a_wrong_answer_of_an_example_is_found():
    module = ModuleType("sample", '>>> 1 + 1\n3\n>>> "unreached"\n')
    runner = doctest.DocTestRunner(optionflags=doctest.FAIL_FAST)
    (found,) = find_examples(module)
    assert runner.run(found, out=lambda _: None).failed == 1
