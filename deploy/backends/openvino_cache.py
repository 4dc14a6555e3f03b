"""Compiled models that are kept for the next start, in the folder ``openvino`` of the cache.

Compiling takes longer than everything else before the first answer. OpenVINO gives a compiled model as bytes,
which it opens again in less time; the answers are the same bits. These bytes are code in effect, so they are
opened only if this machine sealed them (:mod:`cmt_edge.deploy.sealing`), under a key of everything that the
compiled model depends on. OpenVINO's own cache (``CACHE_DIR``) trusts whatever lies in its folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openvino as ov

from cmt_edge.version import __version__

from ..bundle import ONNX, Bundle
from ..cache import compute_digest
from ..cores import list_cores
from ..errors import BundleError, OutputError
from ..files import find_cache_folder, hash_file
from ..sealing import Result, SealedCache
from .variables import read_variables

FOLDER = "openvino"
"""Name of the folder in the cache."""
KEEP = 32
"""The number of compiled models that stay, those that were used last."""
MOST_BYTES = 2 << 30
"""The total size in bytes of the compiled models that stay."""
WAY = 5
"""How a file becomes a compiled model. Raised when :mod:`.openvino_graph` makes another graph of a file."""
CAN_EXPORT = "EXPORT_IMPORT"
"""OpenVINO's word for a device whose compiled models can be kept."""
PROCESSORS = Path("/proc/cpuinfo")
"""Where Linux describes the processors."""
PROCESSOR_CHARACTERS = 1 << 14
"""The number of characters there that are read; the first processor takes fewer."""
PROCESSOR_WORDS = ("flags", "features", "model name", "cpu part", "stepping")
"""Starts, in lower case, of the lines there that tell what is compiled for a processor."""


@dataclass(frozen=True)
class Job:
    """What is compiled.

    Attributes:
        bundle: where the graph comes from.
        device: OpenVINO's name of the device.
        config: what OpenVINO compiles it with.
    """

    bundle: Bundle
    device: str
    config: Mapping[str, Any]


def compile_once(
    core: ov.Core, job: Job, compile_anew: Callable[[], ov.CompiledModel]
) -> Result[ov.CompiledModel]:
    """The compiled model that an earlier process kept, or the one of ``compile_anew``, which is kept now.

    Raises:
        BundleError: the files of the bundle were changed while they were compiled. What ``compile_anew``
            raises comes through.
    """

    def compile_and_check() -> ov.CompiledModel:
        compiled = compile_anew()
        _require_same_file(job)
        return compiled

    cache = SealedCache(find_cache_folder() / FOLDER, "compiled model", ".blob", KEEP, MOST_BYTES)
    return cache.get(
        make_key(core, job),
        decode=lambda content: core.import_model(content, job.device, dict(job.config)),
        make=compile_and_check,
        encode=_export,
        mode=_find_mode(job.bundle.file(ONNX)),
    )


def can_keep(core: ov.Core, job: Job) -> bool:
    """Whether the device gives its compiled models as bytes, and the bundle is finished."""
    if job.bundle.target is not None:
        return False
    return CAN_EXPORT in core.get_property(job.device, "OPTIMIZATION_CAPABILITIES")


def make_key(core: ov.Core, job: Job) -> str:
    """Name of the entry: the digest of everything that a compiled model depends on."""
    return compute_digest(
        {
            "graph": job.bundle.manifest.files[ONNX].sha256,
            "device": job.device,
            "config": {name: str(value) for name, value in job.config.items()},
            "runtime": ov.__version__,
            "ours": [__version__, WAY],
            "machine": _describe_machine(core, job.device),
        }
    )


def _describe_machine(core: ov.Core, device: str) -> dict[str, Any]:
    """What of this machine and of this process a compiled model depends on."""
    return {
        "device": _read_caching_properties(core, device),
        "name": core.get_property(device, "FULL_DEVICE_NAME"),
        "capabilities": sorted(core.get_property(device, "OPTIMIZATION_CAPABILITIES")),
        "instructions": _read_instructions(),
        "cores": list_cores(),
        "environment": read_variables(),
    }


def _read_caching_properties(core: ov.Core, device: str) -> dict[str, str]:
    """What OpenVINO itself keys compiled models of the device by, such as the version of a GPU's driver.

    Empty where the device names nothing.
    """
    try:
        names = core.get_property(device, "CACHING_PROPERTIES")
        return {name: str(core.get_property(device, name)) for name in names}
    except RuntimeError:
        return {}


def _read_instructions() -> list[str]:
    """What Linux says of the first processor and its instructions, empty elsewhere."""
    try:
        with open(PROCESSORS, errors="replace") as file:  # it is long where there are many processors
            first = file.read(PROCESSOR_CHARACTERS).partition("\n\n")[0]
    except OSError:
        return []
    return sorted(line for line in first.splitlines() if line.lower().startswith(PROCESSOR_WORDS))


def _require_same_file(job: Job) -> None:
    """Raise :class:`BundleError` where the graph is no longer the one that the bundle was opened with.

    What was compiled of another file must never be kept under the hash of this one.
    """
    path = job.bundle.file(ONNX)
    try:
        found = hash_file(path)
    except OSError:
        found = ""
    if found != job.bundle.manifest.files[ONNX].sha256:
        raise BundleError(
            "a file of the bundle was changed while it was being compiled",
            where=path,
            remedy="run the command again",
        )


def _export(compiled: ov.CompiledModel) -> bytes:
    """The bytes of a compiled model; raises :class:`OutputError` where the device does not give them."""
    try:
        stream = compiled.export_model()
    except RuntimeError as exc:
        raise OutputError("the compiled model cannot be kept", why=str(exc).strip().split("\n")[-1]) from exc
    return stream if isinstance(stream, bytes) else stream.getvalue()


def _find_mode(weights: Path) -> int:
    """Permissions of what is kept: whoever may not read the bundle's weights may not read them there."""
    return weights.stat().st_mode & 0o444 | 0o200
