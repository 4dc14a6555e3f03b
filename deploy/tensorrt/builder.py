"""Builds one engine: the child process of :mod:`cmt_edge.deploy.tensorrt.building` (repeated builds leak, and
a crash must not take the caller along).

It answers the request ``build``, see :mod:`cmt_edge.deploy.children`: it writes the plan, the list of kernels
and the timing cache, and returns the compiler's warnings.
"""

from __future__ import annotations

import contextlib
import hashlib
import resource
from pathlib import Path
from typing import Any

from ..bundle import make_plain
from ..bundle.record import read_message
from ..bundle.sections import MAX_TOTAL
from ..cache import Cache
from ..children import Report, Request, serve
from ..errors import BundleError, CmtEdgeError, OutputError, StepError
from ..files import read_regular, write_atomic
from .bindings import PRODUCTS, Bindings, make_monitor, open_bindings
from .cuda import open_cuda
from .engine import BuildAnswer, BuildRequest

REPORT_REMEDY = (
    "report the model with the TensorRT version; --trtexec prints the command that shows whether"
    " NVIDIA's own tool fails alike"
)
"""The remedy where TensorRT fails for a reason that this program does not know."""

TIMINGS = ".cache"
"""Suffix of a file of timings."""
KEPT_TIMINGS = 8
"""The number of files of timings that are kept, one for each version of TensorRT on each kind of GPU."""


def build_engine(request: BuildRequest, report: Report, bindings: Bindings) -> None:
    """Build and write the engine, its kernels and the timings; raises :class:`StepError` with the compiler's
    own words."""
    trt, title = bindings.trt, bindings.product.title
    if request.device is not None:
        open_cuda().use(request.device)  # TensorRT builds for the device that is current
    builder = trt.Builder(bindings.log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    # the parser is held until the build is over: it owns the network's weights
    parser = parse(network, request, bindings)
    config = builder.create_builder_config()
    configure(builder, config, request, bindings, report)
    timings = read_timings(config, request)
    plan = builder.build_serialized_network(network, config)
    del parser
    words = bindings.words
    if plan is None:
        raise make_step_error(f"{title} built no engine", [*words.errors, *words.warnings])
    write_atomic(Path(request.plan), read_blob(plan))
    if request.layers is not None:
        write_atomic(Path(request.layers), words.layers.encode())
    if timings is not None:
        _keep_timings(timings, request, bindings)


def make_step_error(what: str, details: list[str]) -> StepError:
    """A step of TensorRT that failed; ``details`` are its own words."""
    return StepError(
        what,
        why="; ".join(details) or None,
        remedy=REPORT_REMEDY,
    )


def parse(network: Any, request: BuildRequest, bindings: Bindings) -> Any:
    """Read the ONNX file into ``network``; returns the parser."""
    trt, words = bindings.trt, bindings.words
    parser = trt.OnnxParser(network, bindings.log)
    content = read_graph(Path(request.onnx))
    if hashlib.sha256(content).hexdigest() != request.sha256:
        raise BundleError(
            "was changed after the bundle was opened",
            where=request.onnx,
            remedy="run the command again, or copy the whole bundle again",
        )
    if not parser.parse(content, request.onnx):
        found = [parser.get_error(i) for i in range(parser.num_errors)]
        errors = [str(error.desc()) for error in found]
        raise make_step_error(
            f"{bindings.product.title}'s parser refused model.onnx",
            errors + words.errors,
        )
    # outputs are checked where the engine is opened
    if network.num_inputs != 1 or network.get_input(0).name != request.input:
        raise make_step_error(
            "model.onnx does not have the input its manifest names",
            words.errors,
        )
    return parser


def read_graph(path: Path) -> bytes:
    """The content of the ONNX file; raises :class:`BundleError`."""
    try:
        return read_regular(path, MAX_TOTAL)
    except OSError as exc:
        raise BundleError(
            "a file of the bundle cannot be read",
            where=path,
            why=exc.strerror or exc,
            remedy="check the disk and the file's permissions, or copy the whole bundle again",
        ) from exc


def configure(
    builder: Any,
    config: Any,
    request: BuildRequest,
    bindings: Bindings,
    report: Report,
) -> None:
    """Set every option of ``config`` but the timings."""
    trt = bindings.trt
    if request.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(request.workspace))
    config.builder_optimization_level = request.level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if request.tf32:
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)
    if request.aux_streams is not None:
        config.max_aux_streams = request.aux_streams
    config.progress_monitor = make_monitor(trt, report)
    if request.profile:
        profile = builder.create_optimization_profile()
        rest = tuple(int(d) for d in request.shape[1:])
        profile.set_shape(
            request.input,
            *((count, *rest) for count in request.profile),
        )
        config.add_optimization_profile(profile)
    _name_targets(config, request, trt)


def _name_targets(config: Any, request: BuildRequest, trt: Any) -> None:
    """Tell TensorRT for RTX which compute capabilities the engine is for; none are named for a portable
    one."""
    if not request.compute:
        return
    config.num_compute_capabilities = len(request.compute)
    for i, name in enumerate(request.compute):
        capability = getattr(trt.ComputeCapability, name, None)
        if capability is None:
            raise make_step_error(f"this version of TensorRT for RTX does not know {name}", [])
        config.set_compute_capability(capability, i)


def read_timings(config: Any, request: BuildRequest) -> Any:
    """The timings of earlier builds, which must live until the build is over; new ones where there are none,
    or those of another version. ``None`` for a build without a GPU, which times nothing."""
    if not request.timing_key:
        return None
    saved = make_timing_cache(request).read(request.timing_key)
    timings = config.create_timing_cache(saved[0] if saved else b"")
    if timings is None or not config.set_timing_cache(timings, False):
        timings = config.create_timing_cache(b"")
        config.set_timing_cache(timings, False)
    return timings


def _keep_timings(timings: Any, request: BuildRequest, bindings: Bindings) -> None:
    try:
        make_timing_cache(request).write(request.timing_key, (read_blob(timings.serialize()),))
    except OutputError as exc:  # the next build is slower, that is all
        bindings.words.warnings.append(f"the timings could not be kept: {exc.why}")


def make_timing_cache(request: BuildRequest) -> Cache:
    """What TensorRT keeps between builds."""
    return Cache(Path(request.timing_folder), (TIMINGS,), KEPT_TIMINGS)


def read_blob(memory: Any) -> bytes:
    """Bytes of a plan or cache that TensorRT holds."""
    return bytes(memory)


def limit_memory(size: int) -> None:
    """Let this process take ``size`` bytes of address space more than it has; beyond that, allocations
    fail."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    allowed = pages * resource.getpagesize() + size
    with contextlib.suppress(ValueError):  # a lower limit of the system's stays
        resource.setrlimit(resource.RLIMIT_AS, (allowed, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _build(request: Request, report: Report) -> Any:
    """Build what the request asks for."""
    arguments = {name: value for name, value in request.items() if name != "call"}
    asked = read_message(BuildRequest, arguments, "the request")
    bindings = open_bindings(PRODUCTS[asked.format])
    if asked.memory is not None:
        limit_memory(asked.memory)
    try:
        build_engine(asked, report, bindings)
    except CmtEdgeError:
        raise
    except Exception as exc:
        raise make_step_error(f"{type(exc).__name__}: {exc}", bindings.words.errors) from exc
    return make_plain(BuildAnswer(tuple(bindings.words.warnings), bindings.version))


def _make_unexpected_error(exc: Exception) -> CmtEdgeError:
    return make_step_error(f"{type(exc).__name__}: {exc}", [])


if __name__ == "__main__":
    serve({"build": _build}, _make_unexpected_error)
