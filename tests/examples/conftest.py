"""What the tests of the examples share."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from helpers.paths import ROOT


@pytest.fixture(scope="session")
def example():
    """A function that imports a program of ``examples/``, ``"service/service.py"`` for instance, once."""
    loaded: dict[str, ModuleType] = {}

    def load(name: str) -> ModuleType:
        if name not in loaded:
            unique = "example_" + Path(name).with_suffix("").as_posix().replace("/", "_")
            spec = spec_from_file_location(unique, ROOT / "examples" / name)
            loaded[name] = sys.modules[unique] = module_from_spec(spec)
            spec.loader.exec_module(loaded[name])
        return loaded[name]

    return load
