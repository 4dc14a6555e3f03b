"""Building an engine: in a child process, with a part of the free memory, and for a limited time.

:func:`build_plan` builds for the GPU of this machine, :func:`build_portable_plan` ahead of time and without
one.
"""

from __future__ import annotations

import re
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..backends.base import read_batch_limit
from ..bundle import ONNX, Bundle, make_plain
from ..bundle.record import read_message
from ..bundle.sections import TensorEntry
from ..cache import can_keep
from ..children import Child, ChildCrashed, ChildTimedOut
from ..errors import StepError
from ..files import find_cache_folder, writing
from ..locks import TEMPORARY, clear_abandoned, scratch_folder
from ..progress import Progress
from ..telemetry.jetson import read_available_memory
from .bindings import PRODUCTS, RTX, Product
from .cuda import Cuda
from .engine import (
    DEFAULT_LEVEL,
    DEFAULT_PROFILE,
    BuildAnswer,
    BuildRequest,
    EngineOptions,
    EngineTarget,
    make_timing_key,
)

BUILDER = "cmt_edge.deploy.tensorrt.builder"
"""The module that the child process runs."""
FREE_SHARE = 0.4
"""Part of the free device memory that the builder may use, unless ``--workspace`` says otherwise."""
BUILD_TIME_LIMIT_S = 3600.0
"""Seconds after which a build is stopped, unless ``--time-limit`` says otherwise."""
GIB = 1 << 30
"""Bytes in a GiB."""
PORTABLE_TIME_LIMIT_S = 900.0
"""Seconds after which a build without a GPU is stopped; those of the registry's models take 2 to 20 s."""
PORTABLE_MEMORY_SHARE = 0.8
"""Part of the free memory that a build without a GPU may take."""
SCRATCH = "build."
"""Start of the name of a build's scratch folder."""
PLAN = "engine.plan"
"""The file of a build's scratch folder that holds the engine."""
LAYERS = "layers.txt"
"""The file of a build's scratch folder that lists the compiler's kernels."""
CURRENT = ("CURRENT",)
"""TensorRT for RTX's name for the compute capability of the GPU in the machine."""
MEMORY = re.compile(
    r"out ?of ?memory|bad_alloc|MemoryError|insufficient memory|memory is insufficient"
    r"|amount of GPU memory|memory allocation|(could not|failed to) allocate|NvMapMemAlloc",
    re.IGNORECASE,
)
"""What TensorRT and its allocators say when memory is short."""


def build_plan(
    bundle: Bundle,
    options: EngineOptions,
    target: EngineTarget,
    cuda: Cuda,
    *,
    time_limit: float = BUILD_TIME_LIMIT_S,
    progress: Progress,
) -> tuple[bytes, list[str]]:
    """Build the engine of ``bundle``; returns its bytes, and TensorRT's warnings.

    Raises:
        StepError: the build failed, or took longer than ``time_limit`` seconds; says what TensorRT said.
        OutputError: the cache folder cannot be written to.
    """
    with _scratch_folder() as folder:
        plan = folder / PLAN
        request = _make_request(bundle, options, target, cuda, plan)
        answer = _run_in_child(request, time_limit, progress)
        return plan.read_bytes(), list(answer.warnings)


@dataclass(frozen=True)
class PortablePlan:
    """An engine that was built without a GPU.

    Attributes:
        plan: its bytes.
        layers: the compiler's list of its kernels.
        warnings: the compiler's.
        version: of the compiler.
        seconds: that the build took.
    """

    plan: bytes
    layers: str
    warnings: tuple[str, ...]
    version: str
    seconds: float


@dataclass(frozen=True)
class PortableOptions:
    """What a build without a GPU is asked for.

    Attributes:
        compute: compute capabilities that the engine is for, by NVIDIA's names, ``"SM86"``; none for a
            portable engine.
        workspace: GiB of scratch memory that the engine may use, ``None`` for the compiler's default.
        aux_streams: the largest number of streams besides the caller's, ``None`` for the compiler's choice.
    """

    compute: tuple[str, ...] = ()
    workspace: float | None = None
    aux_streams: int | None = RTX.aux_streams


def build_portable_plan(
    graph: Path,
    sha256: str,
    source: TensorEntry,
    options: PortableOptions | None = None,
    *,
    time_limit: float = PORTABLE_TIME_LIMIT_S,
    progress: Progress,
) -> PortablePlan:
    """Build an engine with TensorRT for RTX; no GPU is used.

    Args:
        graph: the ONNX file.
        sha256: of its content.
        source: its input.
        options: of the build; default: of a portable engine.
        time_limit: seconds after which the build is stopped.
        progress: draws the steps.

    Raises:
        StepError: the build failed, took too long or ran out of memory; says what the compiler said.
        OutputError: the cache folder cannot be written to.
    """
    options = options or PortableOptions()
    with _scratch_folder() as folder:
        request = _make_portable_request(graph, sha256, source, options, folder)
        start = time.perf_counter()
        answer = _run_in_child(request, time_limit, progress)
        seconds = time.perf_counter() - start
        layers = (folder / LAYERS).read_text(encoding="utf-8")
        plan = (folder / PLAN).read_bytes()
        return PortablePlan(
            plan,
            layers,
            answer.warnings,
            answer.version,
            seconds,
        )


def _make_portable_request(
    graph: Path,
    sha256: str,
    source: TensorEntry,
    options: PortableOptions,
    folder: Path,
) -> BuildRequest:
    """What the builder is asked for; it writes to ``folder``."""
    free = read_available_memory(Path("/"))
    workspace = options.workspace
    is_fixed = isinstance(source.shape[0], int)
    return BuildRequest(
        format=RTX.format,
        onnx=str(graph.resolve()),
        sha256=sha256,
        plan=str(folder / PLAN),
        layers=str(folder / LAYERS),
        timing_folder="",
        timing_key="",
        input=source.name,
        shape=source.shape,
        workspace=int(workspace * GIB) if workspace else None,
        level=DEFAULT_LEVEL,
        tf32=False,
        profile=None if is_fixed else DEFAULT_PROFILE,
        device=None,
        compute=options.compute,
        aux_streams=options.aux_streams,
        memory=int(PORTABLE_MEMORY_SHARE * free) if free else None,
    )


def _make_request(
    bundle: Bundle,
    options: EngineOptions,
    target: EngineTarget,
    cuda: Cuda,
    plan: Path,
) -> BuildRequest:
    described, product = bundle.manifest.input, PRODUCTS[bundle.manifest.format]
    return BuildRequest(
        format=product.format,
        onnx=str(bundle.file(ONNX).resolve()),
        sha256=bundle.manifest.files[ONNX].sha256,
        plan=str(plan),
        layers=None,
        timing_folder=str(find_cache_folder().resolve() / "timing"),
        timing_key=make_timing_key(target),
        input=described.name,
        shape=described.shape,
        workspace=_choose_workspace(options, target, cuda),
        level=options.level,
        tf32=options.tf32,
        profile=options.profile if read_batch_limit(bundle) == 0 else None,
        device=target.gpu.index,
        compute=CURRENT if product == RTX else (),
        aux_streams=product.aux_streams,
        memory=None,
    )


def _choose_workspace(options: EngineOptions, target: EngineTarget, cuda: Cuda) -> int:
    """Bytes of scratch memory."""
    if options.workspace:
        return int(options.workspace * GIB)
    return int(FREE_SHARE * _free_memory(target, cuda))


def _free_memory(target: EngineTarget, cuda: Cuda) -> int:
    """Bytes; what an integrated GPU calls free leaves out memory that the system would give up."""
    free, _total = cuda.memory()
    shared = read_available_memory(Path("/")) if target.gpu.integrated else None
    return shared or free


def clear_scratch() -> None:
    """Remove what builds that were killed left in the cache, also where nothing is built now."""
    clear_abandoned(_find_scratch(), SCRATCH, TEMPORARY)


def _find_scratch() -> Path:
    """The folder in the cache that builds work in."""
    return find_cache_folder().resolve() / "build"


@contextmanager
def _scratch_folder() -> Iterator[Path]:
    """A folder in the cache for one build, and none of builds that were killed; without a cache a temporary
    folder of the system's."""
    scratch = _find_scratch()
    if not can_keep(scratch):
        with tempfile.TemporaryDirectory(prefix="cmt-edge-") as name:
            yield Path(name)
        return
    with ExitStack() as stack:
        with writing(scratch):
            folder = stack.enter_context(scratch_folder(scratch, SCRATCH))
        yield folder


def _run_in_child(
    request: BuildRequest,
    time_limit: float,
    progress: Progress,
) -> BuildAnswer:
    """Run the builder; what it answers. Raises :class:`StepError` with the compiler's own words."""
    product = PRODUCTS[request.format]
    with Child(BUILDER, progress=progress.share) as child:
        try:
            answer = child.request(
                "build",
                time_limit=time_limit,
                **make_plain(request),
            )
        except ChildTimedOut as exc:
            raise StepError(
                f"the build did not end within {time_limit:g} s",
                remedy=product.slow_remedy,
            ) from exc
        except ChildCrashed as exc:
            raise _make_crash_error(exc, product) from exc
        except StepError as exc:
            if MEMORY.search(f"{exc.what} {exc.why or ''}"):
                raise _make_memory_error(exc.why or exc.what, product) from exc
            raise
        finally:
            progress.finish()
    return read_message(BuildAnswer, answer, "the builder's answer")


def _make_crash_error(crash: ChildCrashed, product: Product) -> StepError:
    """What ended the builder, as far as its last words tell."""
    words = "; ".join(crash.tail)
    if crash.code == -signal.SIGKILL:
        return _make_memory_error(words or "the system stopped it (signal SIGKILL)", product)
    if MEMORY.search(words):
        return _make_memory_error(words, product)
    return StepError(
        f"{product.title} crashed while it built the engine ({crash.ending})",
        why=words or None,
        remedy=product.crash_remedy,
    )


def _make_memory_error(why: str | None, product: Product) -> StepError:
    return StepError("the build ran out of memory", why=why, remedy=product.memory_remedy)
