"""What runs on the device: bundles, the Predictor, verification and measurement. Needs NumPy, Pillow and one
runtime.

>>> from cmt_edge.deploy import Predictor
>>> with Predictor.load("cmt_nano_fp32_openvino") as p:
...     p("ship.jpg").label
'ship'

Each name below is imported when it is first used, so that what only prints starts without NumPy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bundle import Bundle
    from .errors import CmtEdgeError
    from .prediction import Prediction
    from .predictor import Predictor
    from .preprocessing import Preprocess, preprocess

_HOMES = {
    "Bundle": "bundle",
    "CmtEdgeError": "errors",
    "Prediction": "prediction",
    "Predictor": "predictor",
    "Preprocess": "preprocessing",
    "preprocess": "preprocessing",
}
"""Public name -> the module that defines it."""

__all__ = [
    "Bundle",
    "CmtEdgeError",
    "Prediction",
    "Predictor",
    "Preprocess",
    "preprocess",
]


def __getattr__(name: str) -> Any:
    """Import a public name on its first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
