"""From a PyTorch checkpoint to a verified bundle.

>>> from cmt_edge.export import ExportConfig, run
>>> bundle = run(ExportConfig("cmt_nano", format="onnx", output="out"))
>>> bundle.path.name
'cmt_nano_fp32_onnx'

The module itself can be called, so that ``from cmt_edge import export`` gives one object that is both the
subpackage and the function :func:`cmt_edge.export.pipeline.run`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmt_edge.deploy import Bundle
    from cmt_edge.deploy.progress import Progress

    from .config import ExportConfig
    from .pipeline import run

__all__ = ["ExportConfig", "run"]


def __getattr__(name: str) -> Any:
    """Import on first use: ``cmt-export`` must be able to say that PyTorch is missing."""
    if name == "ExportConfig":
        from .config import ExportConfig

        return ExportConfig
    if name == "run":
        from .pipeline import run

        return run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(
        {
            *__all__,
            *(name for name in globals() if name.startswith("__")),
        }
    )


class _CallableModule(ModuleType):
    def __call__(
        self,
        config: ExportConfig,
        progress: Progress | None = None,
    ) -> Bundle:
        """Export, verify and measure; see :func:`cmt_edge.export.pipeline.run`."""
        from .pipeline import run

        return run(config, progress)


sys.modules[__name__].__class__ = _CallableModule
