"""NVIDIA's two compilers, TensorRT and TensorRT for RTX: what differs between them, and their Python modules.

Both modules have the same interface, so that the builder and the session exist once and are told which of the
two they drive. An object of NVIDIA's can only derive from a class of its own module; such classes are
therefore made where the module is opened.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

KEPT_LINES = 20
"""The number of a compiler's last errors and warnings that are kept."""
LAYERS = "Layers:"
"""What the message begins with in which a builder lists the kernels of an engine."""


@dataclass(frozen=True)
class Product:
    """One of the two compilers.

    Attributes:
        name: of its Python module, and of the runtime that serves its engines.
        title: what messages call it.
        format: of the bundles that are for it.
        slow_remedy, memory_remedy, crash_remedy: what to do where a build takes too long, runs out of memory
            or crashes.
        compiles_on_opening: whether an engine's kernels are compiled when it is opened.
        aux_streams: the largest number of streams that an engine uses besides the caller's; ``None`` leaves
            it to the compiler.
    """

    name: str
    title: str
    format: str
    slow_remedy: str
    memory_remedy: str
    crash_remedy: str
    compiles_on_opening: bool = False
    aux_streams: int | None = None


TENSORRT = Product(
    "tensorrt",
    "TensorRT",
    "trt",
    "allow more with --time-limit, or use --level 0 to 2",
    "close other programs, add swap, or use a smaller --workspace GiB, --level 2 or a smaller --profile",
    "try --level 2, then --trtexec, and report what it prints",
)
"""TensorRT, whose engines are built on the GPU that runs them."""
RTX = Product(
    "tensorrt_rtx",
    "TensorRT for RTX",
    "rtx",
    "export a smaller model or batch; --time-limit allows more on the device",
    "close other programs, add swap, or export a smaller --batch",
    "report the model and the version of the package tensorrt-rtx-cu12",
    compiles_on_opening=True,
    aux_streams=0,
)
"""TensorRT for RTX, which compiles ahead of time without a GPU. Its models are short of work for several
streams: the signals between them cost more than they save."""
PRODUCTS = {product.format: product for product in (TENSORRT, RTX)}
"""Format of a bundle -> the compiler that it is for."""


class Words:
    """What a compiler said: its last errors and warnings, and its list of an engine's kernels.

    Attributes:
        layers: one line a kernel; empty where the compiler did not list them.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.layers = ""

    def add(self, severity: str, message: str) -> None:
        """Keep a message of a severity by NVIDIA's name."""
        if severity in ("INTERNAL_ERROR", "ERROR"):
            self.errors = [*self.errors, message][-KEPT_LINES:]
        elif severity == "WARNING":
            self.warnings = [*self.warnings, message][-KEPT_LINES:]
        elif message.startswith(LAYERS):
            self.layers = message.removeprefix(LAYERS).lstrip()


@dataclass(frozen=True)
class Bindings:
    """The opened module of a product.

    Attributes:
        product: the compiler.
        trt: its Python module.
        log: its logger. It keeps the first one that it is given for the whole process, so there is one.
        words: what went into that logger.
    """

    product: Product
    trt: Any
    log: Any
    words: Words

    @property
    def version(self) -> str:
        """NVIDIA's version, for example ``"10.3.0"``."""
        return str(self.trt.__version__)

    @property
    def runtime(self) -> str:
        """Name and version, as results name a runtime."""
        return f"{self.product.name} {self.version}"

    def serves(self, sm: str) -> bool:
        """Whether engines run on a GPU of compute capability ``sm``, e.g. ``"8.9"``.

        TensorRT for RTX builds for any GPU and refuses some when the engine is opened: 9.0, of which it knows
        no relative. Relatives of those that it has a name for, and later ones, are taken as served. TensorRT
        serves the GPU that it builds on.
        """
        if not self.product.compiles_on_opening:
            return True
        names = [name for name in dir(self.trt.ComputeCapability) if re.fullmatch(r"SM\d+", name)]
        known = {int(name.removeprefix("SM")) for name in names}
        number = int(sm.replace(".", ""))
        is_related = number >= min(known) and number // 10 in {each // 10 for each in known}
        return is_related or number > max(known)


@cache
def open_bindings(product: Product) -> Bindings:
    """The module of ``product``; raises ``ImportError`` where it is not installed."""
    trt = import_module(product.name)
    words = Words()
    return Bindings(product, trt, _make_log(trt, words), words)


def _make_log(trt: Any, words: Words) -> Any:
    """A logger that keeps what it is told in ``words`` instead of printing it."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            words.add(severity.name, message)

    return Log()


def make_monitor(trt: Any, report: Any) -> Any:
    """A progress monitor that reports the steps of the outermost phase to ``report``."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self._steps[phase_name] = max(1, num_steps)
                report(phase_name, 0.0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._steps:
                report(phase_name, min(1.0, (step + 1) / self._steps[phase_name]))
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor()


def make_layer_times(trt: Any) -> Any:
    """A profiler that sums the milliseconds of each layer, by name, in ``milliseconds``."""

    class LayerTimes(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.milliseconds: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.milliseconds[layer_name] = self.milliseconds.get(layer_name, 0.0) + ms

    return LayerTimes()
