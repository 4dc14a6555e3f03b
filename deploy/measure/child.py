"""Answers and latencies of bundles, measured in a process of its own, which may be limited to the
instructions of an older CPU.

What a runtime may use is read once, when it is loaded, so a limit takes a fresh process. OpenVINO has two
switches that must agree: one of its own kernels (``OV_CPU_MAX_ISA``; release 2026.4.1 has it, older ones may
not) and one of oneDNN's (``ONEDNN_MAX_CPU_ISA``); with the second alone the plugin disagrees with itself and
crashes. The limit is proved, not believed: :meth:`MeasuringProcess.check_limit` reads the names of the
kernels that ran. ONNX Runtime has no such switch: it asks the CPU.

``python -m cmt_edge.deploy.measure.child`` reads requests, one JSON object a line, and answers likewise:
``{"share": ...}`` while it works, at last ``{"done": ...}`` or ``{"failed": ..., "kind": ...}``.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import errors
from ..backends import get_runtime
from ..bundle import Bundle, plain
from ..errors import CmtEdgeError, RuntimeMissingError, StepError
from ..predictor import Predictor
from ..preprocessing import normalise
from .benchmark import Protocol, benchmark, golden_batch
from .host import describe

CHUNK = 32
SWITCHES = ("OV_CPU_MAX_ISA", "ONEDNN_MAX_CPU_ISA")
OWN_CHOICE = "mlas"
"""In the name of kernels that ask the CPU themselves and heed no switch."""


@dataclass(frozen=True)
class Isa:
    """A limit: its name in the runtime, the CPU flag it needs here, parts of the names of kernels beyond it,
    and what it lacks."""

    switch: str
    flag: str
    beyond: tuple[str, ...]
    int8: bool
    like: str


ISAS = {
    "avx2": Isa("AVX2", "avx2", ("avx512", "amx", "vnni"), False, "Intel Core before 2021, AMD before Zen 4"),
    "avx2_vnni": Isa(
        "AVX2_VNNI", "avx_vnni", ("avx512", "amx"), True, "Intel N100, Core from the 12th generation on"
    ),
    "avx512_vnni": Isa(
        "AVX512_CORE_VNNI",
        "avx512_vnni",
        ("amx",),
        True,
        "Intel Core of the 10th and 11th generation, Xeon before 2023",
    ),
}
"""``--isa``: instruction sets of edge boxes."""
INT8_FLAGS = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}


def int8_hardware(isa: str | None) -> bool:
    """Whether this CPU, limited to ``isa``, has instructions that multiply and add int8 values."""
    return ISAS[isa].int8 if isa else bool(INT8_FLAGS & set(describe().flags))


class MeasuringProcess:
    """The child process; a context manager. Its failures are raised here as the typed errors they were
    there."""

    def __init__(self, isa: str | None = None, progress: Callable[[str, float], None] | None = None) -> None:
        """``isa``: a key of :data:`ISAS`; raises :class:`RuntimeMissingError` where this CPU has not got it
        itself."""
        if isa and ISAS[isa].flag not in describe().flags:
            raise RuntimeMissingError(
                f"this processor has no {isa}, so it cannot be measured here",
                why=describe().cpu,
                remedy="choose another --isa, or leave it out",
            )
        self.isa, self._progress = isa, progress or (lambda phase, share: None)
        self._child: subprocess.Popen[str] | None = None
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115

    def __enter__(self) -> MeasuringProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                self._child.kill()
            self._child.communicate()
        self._errors.close()

    def runtime(self, name: str) -> str:
        """Name and version of a runtime."""
        return self._call("runtime", backend=name)

    def missing(self, name: str, precision: str) -> str:
        """Why a runtime cannot compute in ``precision`` here; empty if it can."""
        return self._call("missing", backend=name, precision=precision)

    def logits(self, bundle: Path, pixels: Path, threads: int | None) -> np.ndarray:
        """Logits, float32 ``(N, classes)``, of a ``.npy`` file: pixels uint8 ``(N, S, S, 3)``, or float32
        ``(N, 3, S, S)`` as the model reads them."""
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "logits.npy"
            self._call("logits", bundle=str(bundle), pixels=str(pixels), target=str(target), threads=threads)
            return np.load(target)

    def benchmark(self, bundles: list[Path], protocol: Protocol, threads: int | None) -> dict[str, Any]:
        """:class:`cmt_edge.deploy.measure.benchmark.Benchmark` as a dictionary."""
        return self._call(
            "benchmark", bundles=list(map(str, bundles)), protocol=asdict(protocol), threads=threads
        )

    def kernels(self, bundle: Path, threads: int | None) -> dict[str, float]:
        """Share of the run time by kernel, see :meth:`cmt_edge.deploy.backends.base.Session.kernels`."""
        return self._call("kernels", bundle=str(bundle), threads=threads)

    def check_limit(self, kernels: dict[str, float]) -> None:
        """Raise :class:`RuntimeMissingError` if kernels beyond the limit ran."""
        beyond = [k for k in kernels if self.isa and any(part in k for part in ISAS[self.isa].beyond)]
        if beyond:
            raise RuntimeMissingError(
                f"this runtime does not keep to {self.isa}: it ran {', '.join(sorted(beyond))}",
                remedy="OpenVINO 2026.4.1 does; or leave --isa out",
            )

    def _start(self) -> subprocess.Popen[str]:
        root = str(Path(__file__).absolute().parents[3])
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        }
        if self.isa:
            environment |= dict.fromkeys(SWITCHES, ISAS[self.isa].switch)
        return subprocess.Popen(
            [sys.executable, "-m", "cmt_edge.deploy.measure.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )

    def _call(self, what: str, **arguments: Any) -> Any:
        self._child = self._child or self._start()
        assert self._child.stdin is not None and self._child.stdout is not None  # noqa: PT018
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"call": what, **arguments}), file=self._child.stdin, flush=True)
        for line in self._child.stdout:
            answer = json.loads(line)
            if "share" in answer:
                self._progress(answer["phase"], answer["share"])
            elif "done" in answer:
                return answer["done"]
            else:
                raise _error(answer)
        raise self._crashed(what, self._child.wait())

    def _crashed(self, what: str, code: int) -> StepError:
        self._errors.seek(0)
        tail = self._errors.read().strip().splitlines()[-3:]
        limited = (
            f"; it was limited to {self.isa}, which OpenVINO before 2026.4.1 may not bear" if self.isa else ""
        )
        return StepError(
            f"the runtime crashed while it was measured (step {what!r}, exit code {code}){limited}",
            why="; ".join(tail) or None,
            remedy="report the model; export one precision by name",
        )


def _error(answer: dict[str, Any]) -> CmtEdgeError:
    kind = getattr(errors, answer["kind"], StepError)
    error = CmtEdgeError.__new__(kind)
    CmtEdgeError.__init__(
        error, answer["failed"], where=answer["where"], why=answer["why"], remedy=answer["remedy"]
    )
    return error


# --- in the child ---------------------------------------------------------------------------------


def _runtime(request: dict[str, Any], _: Callable[[str, float], None]) -> str:
    return get_runtime(request["backend"]).check()


def _missing(request: dict[str, Any], _: Callable[[str, float], None]) -> str:
    try:
        get_runtime(request["backend"]).float_precision(request["precision"])
    except RuntimeMissingError as exc:
        return exc.what
    return ""


def _logits(request: dict[str, Any], report: Callable[[str, float], None]) -> None:
    pixels = np.load(request["pixels"], mmap_mode="r")
    parts = []
    with Predictor.load(request["bundle"], threads=request["threads"]) as predictor:
        chunk = max(CHUNK, predictor.batch)
        for start in range(0, len(pixels), chunk):
            part = np.asarray(pixels[start : start + chunk])
            parts.append(
                predictor.logits(normalise(part, predictor.spec) if part.dtype == np.uint8 else part)
            )
            report("", min(1.0, (start + chunk) / len(pixels)))
    np.save(request["target"], np.concatenate(parts))


def _benchmark(request: dict[str, Any], report: Callable[[str, float], None]) -> dict[str, Any]:
    bundles = [Bundle.open(path) for path in request["bundles"]]
    protocol = Protocol(**request["protocol"])
    measured = benchmark(
        bundles, threads=request["threads"], protocol=protocol, with_throughput=False, progress=report
    )
    return dict(plain(measured))


def _kernels(request: dict[str, Any], _: Callable[[str, float], None]) -> dict[str, float]:
    bundle = Bundle.open(request["bundle"])
    with Predictor.load(bundle, threads=request["threads"]) as predictor:
        return predictor.session.kernels(golden_batch(bundle, predictor))


CALLS: dict[str, Callable[..., Any]] = {
    "runtime": _runtime,
    "missing": _missing,
    "logits": _logits,
    "benchmark": _benchmark,
    "kernels": _kernels,
}


def main() -> None:
    """Answer requests until standard input ends."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what runtimes print must not stand among the answers

    def say(**answer: Any) -> None:
        print(json.dumps(answer), file=out, flush=True)

    for line in sys.stdin:
        request = json.loads(line)
        try:
            say(done=CALLS[request["call"]](request, lambda phase, share: say(phase=phase, share=share)))
        except CmtEdgeError as exc:
            say(failed=exc.what, where=exc.where, why=exc.why, remedy=exc.remedy, kind=type(exc).__name__)
        except Exception as exc:
            text = str(exc).strip().splitlines()
            say(
                failed="measuring failed in the runtime",
                where=None,
                why=f"{type(exc).__name__}: {text[0] if text else ''}",
                remedy="report the model",
                kind="StepError",
            )


if __name__ == "__main__":
    main()
