"""Builds one TensorRT engine: the child process of :mod:`cmt_edge.deploy.tensorrt.build` (repeated builds
leak, and a crash must not take the caller along).

``python -m cmt_edge.deploy.tensorrt.builder REQUEST.json`` reads the paths and options, writes the plan and
the timing cache, and says on standard output, one JSON object a line, how far it is and at last what it did:
``{"progress": ...}``, ``{"failed": ...}`` or ``{"done": ...}``.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorrt as trt

from ..errors import OutputError
from ..files import write_atomic
from .cuda import open_cuda
from .engine import Request
from .session import LOG, Log


class BuildFailed(Exception):
    """A step of TensorRT that returned nothing; the message names it, ``details`` are its own words."""

    def __init__(self, what: str, details: list[str]) -> None:
        self.details = details
        super().__init__(what)


class Monitor(trt.IProgressMonitor):
    """Reports the steps of the outermost phase."""

    def __init__(self, report: Callable[[str, float], None]) -> None:
        trt.IProgressMonitor.__init__(self)
        self._report = report
        self._steps: dict[str, int] = {}

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        if not parent_phase:
            self._steps[phase_name] = max(1, num_steps)
            self._report(phase_name, 0.0)

    def step_complete(self, phase_name: str, step: int) -> bool:
        if phase_name in self._steps:
            self._report(phase_name, min(1.0, (step + 1) / self._steps[phase_name]))
        return True

    def phase_finish(self, phase_name: str) -> None:
        self._steps.pop(phase_name, None)


def build(request: Request, report: Callable[[str, float], None], log: Log) -> None:
    """Build and write the engine and the timing cache; raises :class:`BuildFailed`."""
    open_cuda().use(request.device)  # TensorRT builds for the device that is current
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = parse(
        network, request, log
    )  # held until the build is over: the network's weights are the parser's
    config = builder.create_builder_config()
    cache = configure(builder, config, request, report)
    plan = builder.build_serialized_network(network, config)
    del parser
    if plan is None:
        raise BuildFailed("TensorRT built no engine", [*log.errors, *log.warnings])
    write_atomic(Path(request.plan), blob(plan))
    try:
        write_atomic(Path(request.timing_cache), blob(cache.serialize()))
    except OutputError as exc:  # the next build is slower, that is all
        log.warnings.append(f"the timings could not be kept: {exc.why}")


def parse(network: Any, request: Request, log: Log) -> Any:
    """Read the ONNX file into ``network``; returns the parser."""
    parser = trt.OnnxParser(network, log)
    content = Path(request.onnx).read_bytes()
    if hashlib.sha256(content).hexdigest() != request.sha256:
        raise BuildFailed("model.onnx was changed after the bundle was opened", [])
    if not parser.parse(content, request.onnx):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        raise BuildFailed(
            "TensorRT's parser refused model.onnx", [str(e.desc()) for e in errors] + log.errors
        )
    if (
        network.num_inputs != 1 or network.get_input(0).name != request.input
    ):  # outputs are checked where the engine is opened
        raise BuildFailed("model.onnx does not have the input its manifest names", log.errors)
    return parser


def configure(builder: Any, config: Any, request: Request, report: Callable[[str, float], None]) -> Any:
    """Set every option of ``config``; returns its timing cache, which must live until the build is over."""
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
        profile.set_shape(request.input, *((count, *rest) for count in request.profile))
        config.add_optimization_profile(profile)
    try:
        saved = Path(request.timing_cache).read_bytes()
    except OSError:
        saved = b""
    cache = config.create_timing_cache(saved)
    if cache is None or not config.set_timing_cache(
        cache, False
    ):  # written by another version: start a new one
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def blob(memory: Any) -> bytes:
    """Bytes of a plan or cache that TensorRT holds."""
    return bytes(memory)


def main(path: str) -> int:
    """Build what ``path`` asks for; standard output carries nothing but the protocol."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(**message: Any) -> None:
        try:
            channel.write(json.dumps(message) + "\n")
        except BrokenPipeError:  # the caller is gone
            os._exit(1)

    log = LOG
    threading.Thread(target=_end_with_the_caller, daemon=True).start()
    try:
        build(Request.read(Path(path)), lambda phase, share: say(progress=[phase, round(share, 3)]), log)
    except BuildFailed as exc:
        say(failed=str(exc), details=exc.details)
        return 1
    except Exception as exc:
        say(failed=f"{type(exc).__name__}: {exc}", details=log.errors)
        return 1
    say(done=True, warnings=log.warnings)
    channel.flush()
    os._exit(0)  # the plan is written: what TensorRT's destructors do now can only harm


def _end_with_the_caller() -> None:
    """Standard input is a pipe that the caller holds open: when that ends, so does the build."""
    os.read(0, 1)  # not sys.stdin, whose lock would be in the way at exit
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
