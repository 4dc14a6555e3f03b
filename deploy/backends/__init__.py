"""Runtimes by name. Nothing heavy is imported before a runtime is asked for."""

from __future__ import annotations

import difflib
from importlib import import_module, util
from types import ModuleType

from ..errors import RuntimeMissingError, UnknownNameError
from .base import ExecutedPrecision, LoadOptions, Session

# name -> (module, packages it needs, extra that installs them)
TABLE: dict[str, tuple[str, tuple[str, ...], str]] = {
    "openvino": ("openvino", ("openvino",), "openvino"),
    "onnxruntime": ("onnxruntime", ("onnxruntime",), "onnxruntime"),
    "torch": ("torch", ("torch",), "export"),
    "fake": ("fake", (), ""),
}

FORMATS = {"openvino": "openvino", "onnx": "onnxruntime"}
"""Bundle format -> the runtime that serves it."""


def backend(name: str) -> ModuleType:
    """The module of a runtime.

    Raises:
        UnknownNameError: no such runtime.
        RuntimeMissingError: its packages are not installed.
    """
    if name not in TABLE:
        raise UnknownNameError("runtime", name, difflib.get_close_matches(name, TABLE, n=2, cutoff=0.4), TABLE)
    module, packages, extra = TABLE[name]
    missing = [p for p in packages if util.find_spec(p) is None]
    if missing:
        raise RuntimeMissingError(f"{' and '.join(missing)} is not installed", remedy=f'pip install "cmt-edge[{extra}]"')
    return import_module(f"{__name__}.{module}")


__all__ = ["FORMATS", "TABLE", "ExecutedPrecision", "LoadOptions", "Session", "backend"]
