"""Runtimes by name. Nothing heavy is imported before a runtime is asked for."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module, util

from ..bundle.sections import ExecutedPrecision
from ..errors import RuntimeMissingError, UnknownNameError
from .base import Binding, DeviceTimes, LoadOptions, Runtime, Session


@dataclass(frozen=True)
class Entry:
    """Where a runtime is implemented and what it needs.

    Attributes:
        module: its module, relative to this package; ``RUNTIME`` there is the :class:`Runtime`.
        packages: the packages that it imports.
        remedy: how the user gets them.
        is_double: whether it only stands for a runtime in tests: no command offers it.
    """

    module: str
    packages: tuple[str, ...] = ()
    remedy: str = ""
    is_double: bool = False


RUNTIMES = {
    "openvino": Entry(".openvino", ("openvino",), 'pip install "cmt-edge[openvino]"'),
    "onnxruntime": Entry(
        ".onnxruntime",
        ("onnxruntime",),
        'pip install "cmt-edge[onnxruntime]"',
    ),
    "tensorrt": Entry(
        "..tensorrt.trt",
        ("tensorrt",),
        "JetPack brings it (a virtual environment needs --system-site-packages); elsewhere see "
        "docs/tensorrt.md. Here, --backend onnxruntime runs the same graph",
    ),
    "tensorrt_rtx": Entry(
        "..tensorrt.rtx",
        ("tensorrt_rtx",),
        'pip install "cmt-edge[rtx]", which brings tensorrt-rtx-cu12; "cmt-edge[rtx-cu13]" for CUDA 13. Here,'
        " --backend onnxruntime runs the same graph",
    ),
    "kserve": Entry(".kserve", ("tritonclient", "grpc"), 'pip install "cmt-edge[kserve]"'),
    "torch": Entry(".torch", ("torch",), 'pip install "cmt-edge[export]"'),
    "fake": Entry(".fake", is_double=True),
}
"""Name of a runtime -> where it is."""

RUNTIME_OF_FORMAT = {
    "openvino": "openvino",
    "onnx": "onnxruntime",
    "trt": "tensorrt",
    "rtx": "tensorrt_rtx",
}
"""Format of a bundle -> name of the runtime that serves it by default."""


FORMAT_ALIASES = {"engine": "trt", "tensorrt": "trt", "tensorrt_rtx": "rtx"}
"""Other names of a format -> its name."""


CLOSE = 0.5
"""Similarity, 0 to 1, from which on a runtime is offered in place of a misspelled one: ``onnx`` is that close
to ``onnxruntime``, and a word that shares two letters with it is not."""


def list_offered_runtimes() -> list[str]:
    """Names of the runtimes that ``--backend`` takes: all but the doubles of tests."""
    return [name for name, entry in RUNTIMES.items() if not entry.is_double]


def require_offered(name: str | None) -> None:
    """Raise :class:`UnknownNameError` unless ``name`` is a runtime that a command offers, or ``None``."""
    offered = list_offered_runtimes()
    if name is not None and name not in offered:
        close = difflib.get_close_matches(name, offered, n=2, cutoff=CLOSE)
        raise UnknownNameError("runtime", name, close, offered)


def describe_missing(packages: Sequence[str]) -> str:
    """The sentence about Python packages that are missing here."""
    return f"{' and '.join(packages)} {'is' if len(packages) == 1 else 'are'} not installed"


def get_runtime(name: str) -> Runtime:
    """The runtime of that name.

    Raises:
        UnknownNameError: there is no such runtime.
        RuntimeMissingError: its packages are not installed, or they cannot be loaded.
    """
    if name not in RUNTIMES:
        require_offered(name)
    entry = RUNTIMES[name]
    missing = [package for package in entry.packages if util.find_spec(package) is None]
    if missing:
        raise RuntimeMissingError(
            describe_missing(missing),
            remedy=entry.remedy,
        )
    try:
        module = import_module(entry.module, __name__)
    except (ImportError, OSError) as exc:
        raise RuntimeMissingError(
            f"{' and '.join(entry.packages)} is installed but cannot be loaded",
            why=exc,
            remedy=f"repair the installation: {entry.remedy}",
        ) from exc
    runtime: Runtime = module.RUNTIME
    return runtime


def has_runtime(name: str) -> bool:
    """Whether the packages of a runtime are installed and can be loaded."""
    try:
        get_runtime(name)
    except RuntimeMissingError:
        return False
    return True


__all__ = [
    "FORMAT_ALIASES",
    "RUNTIMES",
    "RUNTIME_OF_FORMAT",
    "Binding",
    "DeviceTimes",
    "Entry",
    "ExecutedPrecision",
    "LoadOptions",
    "Runtime",
    "Session",
    "get_runtime",
    "has_runtime",
    "list_offered_runtimes",
    "require_offered",
]
