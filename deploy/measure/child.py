"""Answers and latencies of bundles, measured in a process of its own, which may be limited to the
instructions of an older CPU.

A runtime reads once, when it is loaded, which instructions it may use, so a limit takes a fresh process.
OpenVINO has two switches that must agree: one of its own kernels (``OV_CPU_MAX_ISA``; release 2026.4.1 has
it, older ones may not) and one of oneDNN's (``ONEDNN_MAX_CPU_ISA``); with the second alone the plugin
disagrees with itself and crashes. The limit is checked, not believed: :meth:`MeasuringProcess.check_limit`
reads the names of the kernels that ran. ONNX Runtime has no such switch: it asks the CPU.

``python -m cmt_edge.deploy.measure.child`` is the process itself; :mod:`cmt_edge.deploy.children` says how
both sides speak.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..backends import get_runtime
from ..bundle import Bundle, plain
from ..children import Child, ChildCrashed, Report, Request, serve
from ..errors import CmtEdgeError, RuntimeMissingError, StepError
from ..predictor import Predictor
from ..preprocessing import normalise
from .benchmark import Protocol, benchmark, golden_batch
from .isa import ISAS, require_isa

CHUNK_IMAGES = 32
"""Images that go through the model at once, at least."""
SWITCHES: tuple[str, ...] = ("OV_CPU_MAX_ISA", "ONEDNN_MAX_CPU_ISA")
"""Environment variables that limit OpenVINO, and oneDNN within it."""
OWN_CHOICE = "mlas"
"""In the name of kernels that ask the CPU themselves and heed no switch."""


class MeasuringProcess:
    """The child process, as a context manager. Its failures are raised here as the typed errors that they
    were there."""

    def __init__(self, isa: str | None = None, progress: Report | None = None) -> None:
        """Limit the process to ``isa``, a key of :data:`cmt_edge.deploy.measure.isa.ISAS`.

        Raises:
            RuntimeMissingError: this CPU does not have these instructions.
        """
        if isa:
            require_isa(isa)
        self.isa = isa
        limits = dict.fromkeys(SWITCHES, ISAS[isa].switch) if isa else {}
        self.child = Child(__name__, environment=limits, progress=progress)

    def __enter__(self) -> MeasuringProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.child.__exit__()

    def runtime(self, name: str) -> str:
        """Name and version of a runtime."""
        version: str = self._request("runtime", backend=name)
        return version

    def missing(self, name: str, precision: str) -> str:
        """Why a runtime cannot compute in ``precision`` here; empty if it can."""
        reason: str = self._request("missing", backend=name, precision=precision)
        return reason

    def logits(self, bundle: Path, pixels: Path, threads: int | None) -> np.ndarray:
        """Logits of the images in a ``.npy`` file, float32 ``(N, classes)``.

        Args:
            bundle: the bundle's folder.
            pixels: uint8 ``(N, S, S, 3)``, or float32 ``(N, 3, S, S)`` as the model reads them.
            threads: CPU threads of one inference; ``None`` uses all cores.
        """
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "logits.npy"
            self._request(
                "logits",
                bundle=str(bundle),
                pixels=str(pixels),
                target=str(target),
                threads=threads,
            )
            logits: np.ndarray = np.load(target)
            return logits

    def benchmark(
        self,
        bundles: Sequence[Path],
        protocol: Protocol,
        threads: int | None,
    ) -> dict[str, Any]:
        """:class:`cmt_edge.deploy.measure.benchmark.Benchmark` as a dictionary."""
        result: dict[str, Any] = self._request(
            "benchmark",
            bundles=[str(bundle) for bundle in bundles],
            protocol=asdict(protocol),
            threads=threads,
        )
        return result

    def kernels(self, bundle: Path, threads: int | None) -> dict[str, float]:
        """Share of the run time by kernel, see :meth:`cmt_edge.deploy.backends.base.Session.kernels`."""
        shares: dict[str, float] = self._request("kernels", bundle=str(bundle), threads=threads)
        return shares

    def check_limit(self, kernels: dict[str, float]) -> None:
        """Raise :class:`RuntimeMissingError` if kernels beyond the limit ran."""
        if self.isa is None:
            return
        parts = ISAS[self.isa].beyond
        beyond = [name for name in kernels if any(part in name for part in parts)]
        if beyond:
            raise RuntimeMissingError(
                f"this runtime does not keep to {self.isa}: it ran {', '.join(sorted(beyond))}",
                remedy="use OpenVINO 2026.4.1, which does; or leave --isa out",
            )

    def _request(self, call: str, **arguments: Any) -> Any:
        try:
            return self.child.request(call, **arguments)
        except ChildCrashed as crash:
            raise self._crash_error(call, crash) from crash

    def _crash_error(self, call: str, crash: ChildCrashed) -> StepError:
        limit = f"; it was limited to {self.isa}, which OpenVINO before 2026.4.1 may not support"
        return StepError(
            f"the runtime crashed while it was measured (step {call!r}, {crash.ending})"
            f"{limit if self.isa else ''}",
            why="; ".join(crash.tail) or None,
            remedy="report the model; export one precision by name",
        )


# --- in the child ---------------------------------------------------------------------------------


def _runtime(request: Request, _: Report) -> str:
    return get_runtime(request["backend"]).check()


def _missing(request: Request, _: Report) -> str:
    try:
        get_runtime(request["backend"]).float_precision(request["precision"])
    except RuntimeMissingError as exc:
        return exc.what
    return ""


def _logits(request: Request, report: Report) -> None:
    pixels = np.load(request["pixels"], mmap_mode="r")
    parts = []
    with Predictor.load(request["bundle"], threads=request["threads"]) as predictor:
        chunk = max(CHUNK_IMAGES, predictor.batch)
        for start in range(0, len(pixels), chunk):
            part = np.asarray(pixels[start : start + chunk])
            batch = normalise(part, predictor.spec) if part.dtype == np.uint8 else part
            parts.append(predictor.logits(batch))
            report("", min(1.0, (start + chunk) / len(pixels)))
    np.save(request["target"], np.concatenate(parts))


def _benchmark(request: Request, report: Report) -> dict[str, Any]:
    bundles = [Bundle.open(path) for path in request["bundles"]]
    result = benchmark(
        bundles,
        threads=request["threads"],
        protocol=Protocol(**request["protocol"]),
        with_throughput=False,
        progress=report,
    )
    return dict(plain(result))


def _kernels(request: Request, _: Report) -> dict[str, float]:
    bundle = Bundle.open(request["bundle"])
    with Predictor.load(bundle, threads=request["threads"]) as predictor:
        return predictor.session.kernels(golden_batch(bundle, predictor))


CALLS = {
    "runtime": _runtime,
    "missing": _missing,
    "logits": _logits,
    "benchmark": _benchmark,
    "kernels": _kernels,
}
"""Name of a request -> what answers it."""


def _unexpected(exc: Exception) -> CmtEdgeError:
    """An exception of a runtime as a typed error, with its first line."""
    lines = str(exc).strip().splitlines()
    return StepError(
        "measuring failed in the runtime",
        why=f"{type(exc).__name__}: {lines[0] if lines else ''}",
        remedy="report the model",
    )


if __name__ == "__main__":
    serve(CALLS, _unexpected)
