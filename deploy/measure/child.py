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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..backends import get_runtime
from ..bundle import Bundle, make_plain
from ..bundle.record import read_message
from ..bundle.sections import TYPED_FORMATS, Share
from ..children import Child, ChildCrashed, Report, Request, serve
from ..errors import CmtEdgeError, RuntimeMissingError, StepError
from ..predictor import Predictor
from ..preprocessing import normalise
from .benchmark import Benchmark, benchmark, make_golden_batch
from .isa import ISAS, require_isa
from .memory import Memory, read_memory
from .timing import Protocol

T = TypeVar("T")
"""A dataclass that one side sends to the other."""
CHILD_CHUNK_IMAGES = 32
"""Images that go through the model at once, at least."""
SWITCHES: tuple[str, ...] = ("OV_CPU_MAX_ISA", "ONEDNN_MAX_CPU_ISA")
"""Environment variables that limit OpenVINO, and oneDNN within it."""
OWN_CHOICE = "mlas"
"""In the name of kernels that ask the CPU themselves and heed no switch."""


@dataclass(frozen=True)
class RuntimeRequest:
    """Asks for name and version of a runtime."""

    backend: str


@dataclass(frozen=True)
class PrecisionRequest:
    """Asks why a runtime cannot compute in ``precision``."""

    backend: str
    precision: str


@dataclass(frozen=True)
class LogitsRequest:
    """Asks for the logits of the images in each file of ``pixels``, to be written to the file of ``targets``
    in the same place."""

    bundle: str
    pixels: tuple[str, ...]
    targets: tuple[str, ...]
    threads: int | None


@dataclass(frozen=True)
class BenchmarkRequest:
    """Asks for the latencies of ``bundles``."""

    bundles: tuple[str, ...]
    protocol: Protocol
    threads: int | None


@dataclass(frozen=True)
class KernelsRequest:
    """Asks for the share of the run time by kernel."""

    bundle: str
    threads: int | None


@dataclass(frozen=True)
class MemoryRequest:
    """Asks for the memory of a process that opens a bundle and answers one batch."""

    bundle: str
    backend: str | None
    device: str | None
    threads: int | None


@dataclass(frozen=True)
class MemoryAnswer:
    """``None`` where the system does not tell it."""

    memory: Memory | None


@dataclass(frozen=True)
class Text:
    """An answer of one text."""

    text: str


@dataclass(frozen=True)
class Kernels:
    """Name of a kernel -> its share of the run time."""

    shares: dict[str, Share]


class MeasuringProcess:
    """The child process, as a context manager. Its failures are raised here as the typed errors that they
    were there."""

    def __init__(
        self,
        isa: str | None = None,
        progress: Report | None = None,
    ) -> None:
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
        return self._request("runtime", RuntimeRequest(name), Text).text

    def missing(self, name: str, precision: str) -> str:
        """Why a runtime cannot compute in ``precision`` here; empty if it can."""
        return self._request("missing", PrecisionRequest(name, precision), Text).text

    def logits(
        self,
        bundle: Path,
        pixels: Sequence[Path],
        threads: int | None,
    ) -> list[np.ndarray]:
        """Logits of the images in each ``.npy`` file, float32 ``(N, classes)``; the bundle is opened once.

        Args:
            bundle: the bundle's folder.
            pixels: files of uint8 ``(N, S, S, 3)``, or float32 ``(N, 3, S, S)`` as the model reads them.
            threads: CPU threads of one inference; ``None`` uses all cores.
        """
        with tempfile.TemporaryDirectory() as folder:
            targets = [str(Path(folder) / f"{number}.npy") for number in range(len(pixels))]
            request = LogitsRequest(str(bundle), tuple(map(str, pixels)), tuple(targets), threads)
            self._request("logits", request, Text)
            return [np.load(target) for target in targets]

    def benchmark(
        self,
        bundles: Sequence[Path],
        protocol: Protocol,
        threads: int | None,
    ) -> Benchmark:
        """The latencies of ``bundles``, measured in turn; see
        :func:`cmt_edge.deploy.measure.benchmark.benchmark`."""
        paths = tuple(str(bundle) for bundle in bundles)
        return self._request(
            "benchmark",
            BenchmarkRequest(paths, protocol, threads),
            Benchmark,
        )

    def kernels(self, bundle: Path, threads: int | None) -> dict[str, float]:
        """Share of the run time by kernel, see :meth:`cmt_edge.deploy.backends.base.Session.kernels`."""
        return self._request("kernels", KernelsRequest(str(bundle), threads), Kernels).shares

    def memory(
        self,
        bundle: Path,
        backend: str | None,
        device: str | None,
        threads: int | None,
    ) -> Memory | None:
        """What the child holds once it has opened a bundle and answered one batch; ``None`` where the system
        does not tell. A child that did other work before holds the memory of that, too."""
        request = MemoryRequest(str(bundle), backend, device, threads)
        return self._request("memory", request, MemoryAnswer).memory

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

    def _request(self, call: str, request: object, kind: type[T]) -> T:
        """The child's answer, a dataclass ``kind``."""
        try:
            answer = self.child.request(call, **make_plain(request))
        except ChildCrashed as crash:
            raise self._make_crash_error(call, crash) from crash
        return read_message(kind, answer, f"the answer to {call!r}")

    def _make_crash_error(self, call: str, crash: ChildCrashed) -> StepError:
        limit = f"; it was limited to {self.isa}, which OpenVINO before 2026.4.1 may not support"
        return StepError(
            f"the runtime crashed while it was measured (step {call!r}, {crash.ending})"
            f"{limit if self.isa else ''}",
            why="; ".join(crash.tail) or None,
            remedy="report the model; export one precision by name",
        )


def measure_memory(
    bundle: Bundle,
    backend: str | None,
    device: str | None,
    threads: int | None,
) -> Memory | None:
    """What a process of its own holds that opens ``bundle`` and answers one batch; ``None`` where the system
    does not tell, and for a bundle with an engine, which lies in the memory of its device."""
    if bundle.manifest.format in TYPED_FORMATS:
        return None
    with MeasuringProcess() as process:
        return process.memory(bundle.packed or bundle.path, backend, device, threads)


# --- in the child ---------------------------------------------------------------------------------


def _answer_runtime(request: RuntimeRequest, _: Report) -> Text:
    return Text(get_runtime(request.backend).check())


def _answer_missing(request: PrecisionRequest, _: Report) -> Text:
    try:
        get_runtime(request.backend).float_precision(request.precision)
    except RuntimeMissingError as exc:
        return Text(exc.what)
    return Text("")


def count_images_at_once(batch: int) -> int:
    """Number of images that go at once through a model with this batch size, 0 if it takes any."""
    return max(CHILD_CHUNK_IMAGES, batch)


def _answer_logits(request: LogitsRequest, report: Report) -> Text:
    files = [np.load(path, mmap_mode="r") for path in request.pixels]
    count, done = sum(map(len, files)), 0
    with Predictor.load(request.bundle, threads=request.threads, cache=False) as predictor:
        for pixels, target in zip(files, request.targets, strict=True):
            parts = []
            for part in _iterate_chunks(pixels, count_images_at_once(predictor.batch)):
                batch = normalise(part, predictor.spec) if part.dtype == np.uint8 else part
                parts.append(predictor.logits(batch))
                done += len(part)
                report("", done / count)
            np.save(target, np.concatenate(parts))
    return Text(request.bundle)


def _iterate_chunks(pixels: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """The images of a mapped file, ``size`` at a time, in memory."""
    for start in range(0, len(pixels), size):
        yield np.asarray(pixels[start : start + size])


def _answer_benchmark(request: BenchmarkRequest, report: Report) -> Benchmark:
    return benchmark(
        [Bundle.open(path) for path in request.bundles],
        threads=request.threads,
        protocol=request.protocol,
        with_throughput=False,
        progress=report,
    )


def _answer_kernels(request: KernelsRequest, _: Report) -> Kernels:
    bundle = Bundle.open(request.bundle)
    with Predictor.load(bundle, threads=request.threads, cache=False) as predictor:
        return Kernels(predictor.session.kernels(make_golden_batch(bundle, predictor)))


def _answer_memory(request: MemoryRequest, _: Report) -> MemoryAnswer:
    bundle = Bundle.open(request.bundle)
    with Predictor.load(
        bundle,
        backend=request.backend,
        device=request.device,
        threads=request.threads,
        cache=False,
    ) as predictor:
        predictor.outputs(make_golden_batch(bundle, predictor))
        return MemoryAnswer(read_memory())


def _wrap_answer(
    kind: type[T],
    answer: Callable[[T, Report], object],
) -> Callable[[Request, Report], Any]:
    """``answer`` as a function of JSON: its request is a dataclass ``kind``, and it returns a dataclass."""

    def call(request: Request, report: Report) -> Any:
        arguments = {name: value for name, value in request.items() if name != "call"}
        return make_plain(answer(read_message(kind, arguments, "the request"), report))

    return call


CALLS = {
    "runtime": _wrap_answer(RuntimeRequest, _answer_runtime),
    "missing": _wrap_answer(PrecisionRequest, _answer_missing),
    "logits": _wrap_answer(LogitsRequest, _answer_logits),
    "benchmark": _wrap_answer(BenchmarkRequest, _answer_benchmark),
    "memory": _wrap_answer(MemoryRequest, _answer_memory),
    "kernels": _wrap_answer(KernelsRequest, _answer_kernels),
}
"""Name of a request -> what answers it."""


def _make_unexpected_error(exc: Exception) -> CmtEdgeError:
    """An exception of a runtime as a typed error, with its first line."""
    lines = str(exc).strip().splitlines()
    return StepError(
        "measuring failed in the runtime",
        why=f"{type(exc).__name__}: {lines[0] if lines else ''}",
        remedy="report the model",
    )


if __name__ == "__main__":
    serve(CALLS, _make_unexpected_error)
