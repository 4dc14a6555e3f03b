"""Runtimes by name. Nothing heavy is imported before a runtime is asked for."""

from __future__ import annotations

import difflib
from importlib import import_module, util
from types import ModuleType

from ..bundle.sections import ExecutedPrecision
from ..errors import RuntimeMissingError, UnknownNameError
from .base import DeviceTimes, LoadOptions, Session

# name -> (module, packages it needs, how to get them)
TABLE: dict[str, tuple[str, tuple[str, ...], str]] = {
    "openvino": (".openvino", ("openvino",), 'pip install "cmt-edge[openvino]"'),
    "onnxruntime": (".onnxruntime", ("onnxruntime",), 'pip install "cmt-edge[onnxruntime]"'),
    "tensorrt": (
        "..tensorrt.session",
        ("tensorrt",),
        (
            "JetPack brings it (a virtual environment needs --system-site-packages); elsewhere see "
            "docs/tensorrt.md. Here, --backend onnxruntime runs the same graph"
        ),
    ),
    "torch": (".torch", ("torch",), 'pip install "cmt-edge[export]"'),
    "fake": (".fake", (), ""),
}

FORMATS = {"openvino": "openvino", "onnx": "onnxruntime", "trt": "tensorrt"}
"""Bundle format -> the runtime that serves it."""


def backend(name: str) -> ModuleType:
    """The module of a runtime.

    Raises:
        UnknownNameError: no such runtime.
        RuntimeMissingError: its packages are not installed.
    """
    if name not in TABLE:
        raise UnknownNameError(
            "runtime", name, difflib.get_close_matches(name, TABLE, n=2, cutoff=0.4), TABLE
        )
    module, packages, remedy = TABLE[name]
    missing = [p for p in packages if util.find_spec(p) is None]
    if missing:
        raise RuntimeMissingError(f"{' and '.join(missing)} is not installed", remedy=remedy)
    try:
        return import_module(module, __name__)
    except (ImportError, OSError) as exc:
        raise RuntimeMissingError(
            f"{' and '.join(packages)} is installed but cannot be loaded",
            why=exc,
            remedy=f"repair the installation: {remedy}",
        ) from exc


__all__ = ["FORMATS", "TABLE", "DeviceTimes", "ExecutedPrecision", "LoadOptions", "Session", "backend"]
