"""The runtime of TensorRT for RTX; the import fails where its Python module is not installed."""

from __future__ import annotations

from .bindings import RTX, open_bindings
from .session import EngineRuntime

RUNTIME = EngineRuntime(open_bindings(RTX))
"""What the table of runtimes gives for ``"tensorrt_rtx"``."""
