"""The runtime of TensorRT; the import fails where its Python module is not installed."""

from __future__ import annotations

from .bindings import TENSORRT, open_bindings
from .session import EngineRuntime

RUNTIME = EngineRuntime(open_bindings(TENSORRT))
"""What the table of runtimes gives for ``"tensorrt"``."""
