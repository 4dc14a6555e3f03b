"""Builds one TensorRT engine: the child process of :mod:`cmt_edge.deploy.tensorrt.building` (repeated builds
leak, and a crash must not take the caller along).

It answers the request ``build``, see :mod:`cmt_edge.deploy.children`: it writes the plan and the timing
cache, and returns TensorRT's warnings.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import tensorrt as trt

from ..bundle import make_plain
from ..bundle.record import read_message
from ..cache import Cache
from ..children import Report, Request, serve
from ..errors import CmtEdgeError, OutputError, StepError
from ..files import write_atomic
from .cuda import open_cuda
from .engine import BuildAnswer, BuildRequest
from .session import LOG, Log

REPORT_REMEDY = (
    "report the model with the TensorRT version; cmt-build --trtexec prints the command that shows whether"
    " NVIDIA's own tool fails alike"
)
"""The remedy where TensorRT fails for a reason that this program does not know."""

TIMINGS = ".cache"
"""Suffix of a file of timings."""
KEPT_TIMINGS = 8
"""The number of files of timings that are kept, one for each version of TensorRT on each kind of GPU."""


class Monitor(trt.IProgressMonitor):
    """Reports the steps of the outermost phase."""

    def __init__(self, report: Report) -> None:
        trt.IProgressMonitor.__init__(self)
        self._report = report
        self._steps: dict[str, int] = {}

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        if not parent_phase:
            self._steps[phase_name] = max(1, num_steps)
            self._report(phase_name, 0.0)

    def step_complete(self, phase_name: str, step: int) -> bool:
        if phase_name in self._steps:
            self._report(
                phase_name,
                min(1.0, (step + 1) / self._steps[phase_name]),
            )
        return True

    def phase_finish(self, phase_name: str) -> None:
        self._steps.pop(phase_name, None)


def build_engine(request: BuildRequest, report: Report, log: Log) -> None:
    """Build and write the engine and the timings; raises :class:`StepError` with TensorRT's own words."""
    open_cuda().use(request.device)  # TensorRT builds for the device that is current
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    # the parser is held until the build is over: it owns the network's weights
    parser = parse(network, request, log)
    config = builder.create_builder_config()
    timings = configure(builder, config, request, report)
    plan = builder.build_serialized_network(network, config)
    del parser
    if plan is None:
        raise make_step_error("TensorRT built no engine", [*log.errors, *log.warnings])
    write_atomic(Path(request.plan), read_blob(plan))
    try:
        make_timing_cache(request).write(request.timing_key, (read_blob(timings.serialize()),))
    except OutputError as exc:  # the next build is slower, that is all
        log.warnings.append(f"the timings could not be kept: {exc.why}")


def make_step_error(what: str, details: list[str]) -> StepError:
    """A step of TensorRT that failed; ``details`` are its own words."""
    return StepError(what, why="; ".join(details) or None, remedy=REPORT_REMEDY)


def parse(network: Any, request: BuildRequest, log: Log) -> Any:
    """Read the ONNX file into ``network``; returns the parser."""
    parser = trt.OnnxParser(network, log)
    content = Path(request.onnx).read_bytes()
    if hashlib.sha256(content).hexdigest() != request.sha256:
        raise make_step_error("model.onnx was changed after the bundle was opened", [])
    if not parser.parse(content, request.onnx):
        errors = [str(parser.get_error(i).desc()) for i in range(parser.num_errors)]
        raise make_step_error("TensorRT's parser refused model.onnx", errors + log.errors)
    # outputs are checked where the engine is opened
    if network.num_inputs != 1 or network.get_input(0).name != request.input:
        raise make_step_error(
            "model.onnx does not have the input its manifest names",
            log.errors,
        )
    return parser


def configure(builder: Any, config: Any, request: BuildRequest, report: Report) -> Any:
    """Set every option of ``config``; returns its timings, which must live until the build is over."""
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(request.workspace))
    config.builder_optimization_level = request.level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if request.tf32:
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)
    config.progress_monitor = Monitor(report)
    if request.profile:
        profile = builder.create_optimization_profile()
        rest = tuple(int(d) for d in request.shape[1:])
        profile.set_shape(
            request.input,
            *((count, *rest) for count in request.profile),
        )
        config.add_optimization_profile(profile)
    return _read_timings(config, request)


def _read_timings(config: Any, request: BuildRequest) -> Any:
    """The timings of earlier builds; new ones where there are none, or those of another version."""
    saved = make_timing_cache(request).read(request.timing_key)
    timings = config.create_timing_cache(saved[0] if saved else b"")
    if timings is None or not config.set_timing_cache(timings, False):
        timings = config.create_timing_cache(b"")
        config.set_timing_cache(timings, False)
    return timings


def make_timing_cache(request: BuildRequest) -> Cache:
    """What TensorRT keeps between builds."""
    return Cache(Path(request.timing_folder), (TIMINGS,), KEPT_TIMINGS)


def read_blob(memory: Any) -> bytes:
    """Bytes of a plan or cache that TensorRT holds."""
    return bytes(memory)


def _build(request: Request, report: Report) -> Any:
    """Build what the request asks for."""
    arguments = {name: value for name, value in request.items() if name != "call"}
    build_engine(read_message(BuildRequest, arguments, "the request"), report, LOG)
    return make_plain(BuildAnswer(tuple(LOG.warnings)))


def _make_unexpected_error(exc: Exception) -> CmtEdgeError:
    return make_step_error(f"{type(exc).__name__}: {exc}", LOG.errors)


if __name__ == "__main__":
    serve({"build": _build}, _make_unexpected_error)
