"""Graphs that ONNX Runtime has optimised, kept for the next start in the folder ``onnxruntime`` of the cache.

ONNX Runtime rewrites a graph at every start, and rewriting an int8 graph takes longer than all else before
its first answer. It can write what it has made to a file, which it opens again as it is; the kernels that run
are the same, and so are the bits of the answers. Whoever writes such a graph decides the answers, so it is
opened only if this machine sealed it (:mod:`cmt_edge.deploy.sealing`), under a key of everything that it
depends on.

Source: ONNX Runtime documentation, "Graph Optimizations in ONNX Runtime", offline mode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import onnxruntime as ort

from cmt_edge.version import __version__

from ..bundle import ONNX, Bundle
from ..cache import compute_digest
from ..errors import OutputError
from ..files import find_cache_folder
from ..locks import scratch_folder
from ..sealing import Result, SealedCache
from .keeping import find_mode, read_instructions, require_same_file
from .variables import ONNX_RUNTIME, read_variables

FOLDER = "onnxruntime"
"""Name of the folder in the cache."""
KEEP = 32
"""The number of optimised graphs that stay, those that were used last."""
MOST_BYTES = 2 << 30
"""The total size in bytes of the optimised graphs that stay."""
SCRATCH = ".optimising-"
"""Start of the names of folders for a graph that is being optimised."""
WAY = 1
"""How a graph is optimised and kept. Raised when this module changes it."""


@dataclass(frozen=True)
class Job:
    """What is opened on the CPU.

    Attributes:
        bundle: where the graph comes from.
        widens: whether int8 products are computed exactly by slower kernels, which changes the graph.
        make_options: gives new options of a session. The number of threads does not change the graph.
        open: makes a session of an ONNX file, or of its content.
    """

    bundle: Bundle
    widens: bool
    make_options: Callable[[], ort.SessionOptions]
    open: Callable[[str | bytes, ort.SessionOptions], ort.InferenceSession]


class _Opened(NamedTuple):
    """A session, and the graph that it has optimised or why that could not be written."""

    session: ort.InferenceSession
    content: bytes = b""
    fault: str = ""


def can_keep(bundle: Bundle) -> bool:
    """Whether the optimised graph of a bundle is kept: where that saves time, and where it is known for which
    processor it is.

    Only that of an int8 bundle saves time. In float32 the weights are four times as large, and hashing the
    kept graph takes as long as making it anew (docs/notes/felt.md).
    """
    return bundle.target is None and bundle.manifest.precision == "int8" and bool(read_instructions())


def open_once(job: Job, form: str | bytes) -> Result[ort.InferenceSession]:
    """A session of the graph that an earlier process has optimised, or of ``form``, the bundle's ONNX file or
    its content, whose optimised graph is kept now.

    Raises:
        BundleError: the graph was changed while it was opened. What ``job.open`` raises comes through.
    """

    folder = find_cache_folder() / FOLDER

    def open_kept(content: bytes) -> _Opened:
        options = job.make_options()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = job.open(content, options)
        vars(session)["_model_bytes"] = b""  # ONNX Runtime's own class would hold the content for good
        return _Opened(session)

    def open_plainly() -> _Opened:
        return _Opened(job.open(form, job.make_options()))

    def open_and_check() -> _Opened:
        opened = _optimise(job, form, folder)
        require_same_file(job.bundle)
        return opened

    cache = SealedCache(folder, "optimised graph", ".graph", KEEP, MOST_BYTES)
    found = cache.get(
        make_key(job),
        decode=open_kept,
        make=open_and_check,
        encode=_take_content,
        mode=find_mode(job.bundle),
        make_unkept=open_plainly,
    )
    return Result(found.value.session, found.is_kept)


def make_key(job: Job) -> str:
    """Name of the entry: the digest of everything that an optimised graph depends on."""
    return compute_digest(
        {
            "graph": job.bundle.manifest.files[ONNX].sha256,
            "widens": job.widens,
            "runtime": [ort.__version__, ort.get_build_info()],
            "ours": [__version__, WAY],
            "instructions": read_instructions(),
            "environment": read_variables(ONNX_RUNTIME),
        }
    )


def _optimise(job: Job, form: str | bytes, parent: Path) -> _Opened:
    """A session of the bundle's graph, with the optimised graph where that could be written to a folder in
    ``parent``."""
    try:
        with scratch_folder(parent, SCRATCH) as folder:
            file = folder / ONNX
            options = job.make_options()
            options.optimized_model_filepath = str(file)
            return _Opened(job.open(form, options), file.read_bytes())
    except Exception as exc:  # a full disk must not keep the bundle from being opened
        fault = str(getattr(exc, "why", None) or exc)
        return _Opened(job.open(form, job.make_options()), fault=fault)


def _take_content(opened: _Opened) -> bytes:
    """The optimised graph; raises :class:`OutputError` where it could not be written."""
    if not opened.content:
        raise OutputError("the optimised graph cannot be kept", why=opened.fault)
    return opened.content
