"""Hybrid CNN-transformer image classifiers from PyTorch to the device: fast, small and verified.

>>> from cmt_edge import ExportConfig, Predictor, export
>>> bundle = export(ExportConfig("cmt_nano", output="out"))
>>> with Predictor.load(bundle.path) as predictor:
...     predictor("ship.jpg").label
'ship'

Importing this package loads neither PyTorch nor a runtime: each name below is imported when it is first used.
``cmt_edge.export`` is the subpackage and, called, :func:`cmt_edge.export.pipeline.run`.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from .cmt import create_model
    from .deploy import Bundle, Predictor
    from .deploy.measure.benchmark import benchmark
    from .deploy.measure.parity import verify
    from .export.config import ExportConfig
    from .export.pipeline import run as export
    from .version import __version__

TELEMETRY_SWITCHES = {
    "ORT_DISABLE_TELEMETRY": "1",
    "NNCF_CI": "1",
}
"""Environment variables that keep runtimes from reporting on their user, with the value that does so.

ONNX Runtime reads the first when it is loaded (its Privacy.md, "Disabling Telemetry"). Without it, its builds
write a device number and a session file, and look for a server. NNCF reads the second. A user who has set one
of them is obeyed."""

TELEMETRY_PACKAGES = ("openvino_telemetry",)
"""Packages that only report. OpenVINO and NNCF use this one where they can import it, as soon as they are
imported themselves: it writes a client number to the user's home, and only a file there would switch it
off. Without it they use stubs of their own. PyTorch and TensorRT do not report."""


def _switch_telemetry_off() -> None:
    """Keep every runtime that this process, or a child of it, imports from now on to itself."""
    for name, value in TELEMETRY_SWITCHES.items():
        os.environ.setdefault(name, value)
    for package in TELEMETRY_PACKAGES:
        sys.modules.setdefault(package, cast(Any, None))  # Python then says that there is no such package


_switch_telemetry_off()


_HOMES = {
    "Bundle": "deploy",
    "ExportConfig": "export.config",
    "Predictor": "deploy",
    "__version__": "version",
    "benchmark": "deploy.measure.benchmark",
    "create_model": "cmt",
    "verify": "deploy.measure.parity",
}
"""Public name -> the module that defines it."""

__all__ = [
    "Bundle",
    "ExportConfig",
    "Predictor",
    "__version__",
    "benchmark",
    "create_model",
    "export",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import a public name on its first use."""
    if name == "export":
        return import_module(".export", __name__)  # a module that can be called
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
