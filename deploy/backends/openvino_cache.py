"""Compiled models that are kept for the next start, in the folder ``openvino`` of the cache.

Compiling takes longer than everything else before the first answer. OpenVINO gives a compiled model as bytes,
which it opens again in less time; the answers are the same bits. These bytes are code in effect, so they are
opened only if this machine sealed them (:mod:`cmt_edge.deploy.sealing`), under a key of everything that the
compiled model depends on. OpenVINO's own cache (``CACHE_DIR``) trusts whatever lies in its folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import openvino as ov

from cmt_edge.version import __version__

from ..bundle import ONNX, Bundle
from ..cache import compute_digest
from ..cores import list_cores
from ..errors import OutputError
from ..files import find_cache_folder
from ..sealing import Result, SealedCache
from .keeping import find_mode, read_instructions, require_same_file
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
        require_same_file(job.bundle)
        return compiled

    cache = SealedCache(find_cache_folder() / FOLDER, "compiled model", ".blob", KEEP, MOST_BYTES)
    return cache.get(
        make_key(core, job),
        decode=lambda content: core.import_model(content, job.device, dict(job.config)),
        make=compile_and_check,
        encode=_export,
        mode=find_mode(job.bundle),
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
        "instructions": read_instructions(),
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


def _export(compiled: ov.CompiledModel) -> bytes:
    """The bytes of a compiled model; raises :class:`OutputError` where the device does not give them."""
    try:
        stream = compiled.export_model()
    except RuntimeError as exc:
        raise OutputError("the compiled model cannot be kept", why=str(exc).strip().split("\n")[-1]) from exc
    return stream if isinstance(stream, bytes) else stream.getvalue()
