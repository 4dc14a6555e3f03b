"""From a PyTorch checkpoint to a verified bundle.

>>> from export import ExportConfig, run
>>> bundle = run(ExportConfig("cmt_nano", format="openvino", precision="fp32"))
"""

import typing as _typing

if _typing.TYPE_CHECKING:
    from .config import ExportConfig
    from .pipeline import run

__all__ = ["ExportConfig", "run"]


def __getattr__(name: str) -> _typing.Any:
    """Import on first use: ``cmt-export`` must be able to say that PyTorch is missing."""
    if name == "ExportConfig":
        from .config import ExportConfig

        return ExportConfig
    if name == "run":
        from .pipeline import run

        return run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
