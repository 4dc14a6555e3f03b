"""Building an engine: in a child process, with a part of the free memory, and for a limited time."""

from __future__ import annotations

import re
import signal
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..backends.base import read_batch_limit
from ..bundle import ONNX, Bundle, make_plain
from ..bundle.record import read_message
from ..cache import can_keep
from ..children import Child, ChildCrashed, ChildTimedOut
from ..errors import StepError
from ..files import find_cache_folder, writing
from ..locks import scratch_folder
from ..progress import Progress
from ..telemetry.jetson import read_available_memory
from .cuda import Cuda
from .engine import (
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
MEMORY = re.compile(
    r"out ?of ?memory|insufficient memory|memory is insufficient|amount of GPU memory|memory"
    r" allocation|(could not|failed to) allocate|NvMapMemAlloc",
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
        plan = folder / "engine.plan"
        request = _make_request(bundle, options, target, cuda, plan)
        warnings = _run_in_child(request, time_limit, progress)
        return plan.read_bytes(), warnings


def _make_request(
    bundle: Bundle,
    options: EngineOptions,
    target: EngineTarget,
    cuda: Cuda,
    plan: Path,
) -> BuildRequest:
    described = bundle.manifest.input
    return BuildRequest(
        onnx=str(bundle.file(ONNX).resolve()),
        sha256=bundle.manifest.files[ONNX].sha256,
        plan=str(plan),
        timing_folder=str(find_cache_folder().resolve() / "timing"),
        timing_key=make_timing_key(target),
        input=described.name,
        shape=described.shape,
        workspace=_choose_workspace(options, target, cuda),
        level=options.level,
        tf32=options.tf32,
        profile=options.profile if read_batch_limit(bundle) == 0 else None,
        device=target.gpu.index,
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


@contextmanager
def _scratch_folder() -> Iterator[Path]:
    """A folder in the cache for one build, and none of builds that were killed; without a cache a temporary
    folder of the system's."""
    scratch = find_cache_folder().resolve() / "build"
    if not can_keep(scratch):
        with tempfile.TemporaryDirectory(prefix="cmt-edge-") as name:
            yield Path(name)
        return
    with ExitStack() as stack:
        with writing(scratch):
            folder = stack.enter_context(scratch_folder(scratch, "build."))
        yield folder


def _run_in_child(request: BuildRequest, time_limit: float, progress: Progress) -> list[str]:
    """Run the builder; its warnings. Raises :class:`StepError` with TensorRT's own words."""
    with Child(BUILDER, progress=progress.share) as child:
        try:
            answer = child.request("build", time_limit=time_limit, **make_plain(request))
        except ChildTimedOut as exc:
            raise StepError(
                f"the build did not end within {time_limit:g} s",
                remedy="allow more with --time-limit, or use --level 0 to 2",
            ) from exc
        except ChildCrashed as exc:
            raise _make_crash_error(exc) from exc
        except StepError as exc:
            if MEMORY.search(exc.why or ""):
                raise _make_memory_error(exc.why) from exc
            raise
        finally:
            progress.finish()
    return list(read_message(BuildAnswer, answer, "the builder's answer").warnings)


def _make_crash_error(crash: ChildCrashed) -> StepError:
    """What ended the builder, as far as its last words tell."""
    words = "; ".join(crash.tail)
    if crash.code == -signal.SIGKILL:
        return _make_memory_error(words or "the system stopped it (signal SIGKILL)")
    if MEMORY.search(words):
        return _make_memory_error(words)
    return StepError(
        f"TensorRT crashed while it built the engine ({crash.ending})",
        why=words or None,
        remedy="try --level 2, then cmt-build --trtexec and report what it prints",
    )


def _make_memory_error(why: str | None) -> StepError:
    return StepError(
        "the build ran out of memory",
        why=why,
        remedy=(
            "close other programs, add swap, or use a smaller --workspace GiB, --level 2 or a smaller"
            " --profile"
        ),
    )
