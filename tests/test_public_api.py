"""What each package offers is what ``__all__`` says, and every name is documented."""

from __future__ import annotations

import inspect
from importlib import import_module

import pytest

PACKAGES = ("cmt_edge.cmt", "cmt_edge.deploy", "cmt_edge.calib", "cmt_edge.export")
NAMES = [(package, name) for package in PACKAGES for name in import_module(package).__all__]


@pytest.mark.parametrize("package", PACKAGES)
def test_all_is_exactly_what_is_importable(package):
    module = import_module(package)
    public = {n for n in dir(module) if not n.startswith("_") and not inspect.ismodule(getattr(module, n))}
    assert sorted(public) == sorted(module.__all__)
    assert len(module.__all__) == len(set(module.__all__))
    assert len(module.__doc__.splitlines()[0]) > 20


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_every_name_is_documented(package, name):
    value = getattr(import_module(package), name)
    doc = inspect.getdoc(value) or ""
    assert len(doc) > 15
    assert not doc.startswith(f"{name}("), "the docstring is the one that dataclass makes"
