"""TensorRT engines in a bundle: what they are keyed by, and which of them may be loaded.

An engine is native code in effect: deserialising one from elsewhere runs whatever its author wanted. So an
engine is loaded only if

* its bytes hash to what the manifest says,
* the manifest's entry carries a *seal*, an HMAC-SHA256 under a secret that never leaves this machine, and
* its key (ONNX hash, TensorRT, CUDA, driver, GPU, options) is the present one.

Everything else is rebuilt from ``model.onnx``, the portable artefact. Source: TensorRT documentation,
"Security considerations".
"""

from __future__ import annotations

import hashlib
import shlex
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from cmt_edge.startup import name_program

from .. import sealing
from ..backends.base import read_batch_limit
from ..bundle import ENGINES, ONNX, PORTABLE_ENGINE, Bundle
from ..bundle.sections import BuildOptions, EngineKey
from ..cache import compute_digest
from ..errors import (
    BundleError,
    InputError,
    RuntimeMissingError,
)
from .bindings import RTX, Product
from .cuda import Cuda, Gpu

DEFAULT_LEVEL = 3
"""TensorRT's own default of the builder optimization level, which goes from 0 to 5."""
DEFAULT_PROFILE = (1, 1, 8)
"""Smallest, typical and largest batch that an engine of a dynamic graph takes, unless told otherwise."""
MAX_WORKSPACE_GIB = 4096
"""No device has so much memory; what is not below it is a mistake."""


@dataclass(frozen=True)
class EngineOptions:
    """What a build depends on besides the graph and the machine.

    Attributes:
        workspace: GiB the builder and the engine may use for scratch memory; default 40 % of what is free.
        level: TensorRT's builder optimization level, 0 (fast build) to 5 (thorough).
        profile: smallest, typical and largest batch of a dynamic graph.
        tf32: let float32 products round their inputs to TF32 (10 bits of mantissa).
    """

    workspace: float | None = None
    level: int = DEFAULT_LEVEL
    profile: tuple[int, int, int] = DEFAULT_PROFILE
    tf32: bool = False

    def check(self) -> None:
        """Raises :class:`InputError` for a value that TensorRT would refuse."""
        if self.workspace is not None and not 0 < self.workspace < MAX_WORKSPACE_GIB:
            raise InputError(
                f"a workspace of {self.workspace:g} GiB",
                remedy="give --workspace GiB, above 0",
            )
        if not 0 <= self.level <= 5:
            raise InputError(
                f"optimization level {self.level}",
                remedy="give 0 (fast build) to 5 (thorough)",
            )
        least, typical, most = self.profile
        if not 1 == least <= typical <= most:
            raise InputError(
                f"a batch profile of {least},{typical},{most}",
                remedy="give MIN,OPT,MAX with MIN 1 (single images must run) <= OPT <= MAX",
            )


@dataclass(frozen=True)
class BuildRequest:
    """What :mod:`cmt_edge.deploy.tensorrt.builder` builds.

    Attributes:
        format: of the bundle, which says which of NVIDIA's two compilers builds.
        onnx, sha256: path of the graph, and its hash.
        plan: path of the engine that is written.
        layers: path of the list of kernels that is written, ``None`` for none.
        timing_folder, timing_key: the cache of timings, and the entry in it; an empty key for none.
        input, shape: name and shape of the graph's input; the batch may be a name.
        workspace: bytes of scratch memory, ``None`` for the compiler's default.
        level, tf32: as :class:`EngineOptions`.
        profile: as :class:`EngineOptions`, only for a dynamic batch.
        device: number of the GPU; ``None`` builds without one.
        compute: compute capabilities by NVIDIA's names, ``"SM86"``; none for the compiler's choice.
        aux_streams: the largest number of streams besides the caller's, ``None`` for the compiler's choice.
        memory: bytes of address space that the builder may take, ``None`` for no limit.
    """

    format: str
    onnx: str
    sha256: str
    plan: str
    layers: str | None
    timing_folder: str
    timing_key: str
    input: str
    shape: tuple[int | str, ...]
    workspace: int | None
    level: int
    tf32: bool
    profile: tuple[int, int, int] | None
    device: int | None
    compute: tuple[str, ...]
    aux_streams: int | None
    memory: int | None


@dataclass(frozen=True)
class BuildAnswer:
    """What the builder returns besides the files that it writes: the compiler's warnings and its version."""

    warnings: tuple[str, ...]
    version: str


@dataclass(frozen=True)
class EngineTarget:
    """What an engine is built for: the versions and the GPU of this machine."""

    tensorrt: str
    cuda: str
    driver: str
    gpu: Gpu

    @classmethod
    def here(cls, tensorrt: str, cuda: Cuda, index: int = 0) -> EngineTarget:
        """This machine with GPU ``index``; raises :class:`RuntimeMissingError` where there is no such GPU."""
        release = _read_driver_release()
        driver = f"{cuda.driver_version()} ({release})" if release else cuda.driver_version()
        return cls(tensorrt, cuda.runtime_version(), driver, cuda.gpu(index))


def make_engine_key(bundle: Bundle, target: EngineTarget, options: EngineOptions) -> EngineKey:
    """Everything an engine depends on; equal keys mean that an engine may be used again."""
    chosen = BuildOptions(
        workspace=options.workspace,
        level=options.level,
        profile=options.profile if read_batch_limit(bundle) == 0 else None,
        tf32=options.tf32,
    )
    return EngineKey(
        onnx=bundle.manifest.files[ONNX].sha256,
        tensorrt=target.tensorrt,
        cuda=target.cuda,
        driver=target.driver,
        gpu=f"{target.gpu.name}, {target.gpu.processors} multiprocessors",
        sm=target.gpu.sm,
        options=chosen,
    )


def name_member(data: bytes, kind: str, suffix: str) -> str:
    """Name of a new file of the bundle: by content, so that it never replaces one before the manifest
    knows."""
    return f"{ENGINES}/{kind}-{hashlib.sha256(data).hexdigest()[:12]}{suffix}"


def make_timing_key(target: EngineTarget) -> str:
    """Key of the timings TensorRT keeps between builds; they hold for one version on one kind of GPU."""
    return compute_digest(asdict(target))[:16]


def make_seal(sha256: str, key: EngineKey) -> str:
    """Proof that this machine recorded the engine of hash ``sha256`` under ``key``."""
    return sealing.make_seal(_describe_engine(sha256, key))


def is_sealed(sha256: str, key: EngineKey, seal: str) -> bool:
    """Whether ``seal`` is the one that :func:`make_seal` gives here."""
    return sealing.is_sealed(_describe_engine(sha256, key), seal)


def is_trusted(bundle: Bundle) -> bool:
    """Whether the bundle's engine entry was written on this machine."""
    entry = bundle.manifest.engine
    if not entry or entry.file not in bundle.manifest.files:
        return False
    return is_sealed(bundle.manifest.files[entry.file].sha256, entry.key, entry.seal)


def _describe_engine(sha256: str, key: EngineKey) -> str:
    """What the seal of an engine covers."""
    return f"{sha256} {compute_digest(asdict(key))}"


def list_differences(built: EngineKey, here: EngineKey) -> list[str]:
    """What changed between an engine and the present machine and bundle, readable; options are not
    compared."""
    names = [f.name for f in fields(EngineKey) if f.name != "options"]
    pairs = [(name, getattr(built, name), getattr(here, name)) for name in names]
    return [f"{name}: built for {old}, here {new}" for name, old, new in pairs if old != new]


def read_engine(bundle: Bundle, target: EngineTarget) -> bytes:
    """The bytes of the bundle's engine, if they may be deserialised here.

    Raises:
        RuntimeMissingError: there is no engine for this device; the remedy is ``cmt-build``.
        BundleError: the file is not what the manifest says.
    """
    entry, remedy = bundle.manifest.engine, f"{name_program('build')} {bundle.path}"
    if not entry:
        raise RuntimeMissingError(
            "the bundle has no TensorRT engine yet",
            where=bundle.path,
            remedy=f"build it on this device: {remedy}",
        )
    if not is_trusted(bundle):
        raise RuntimeMissingError(
            "the engine was not built on this machine by this user, so it is not loaded",
            where=bundle.path,
            why="an engine is native code",
            remedy=(
                f"build it here: {remedy}; several users of one machine "
                "share engines by naming one folder in CMT_EDGE_STATE"
            ),
        )
    changed = list_differences(entry.key, make_engine_key(bundle, target, EngineOptions()))
    if changed:
        raise RuntimeMissingError(
            "the engine does not fit this device",
            where=bundle.path,
            why="; ".join(changed),
            remedy=f"build it again: {remedy}",
        )
    data = bundle.file(entry.file).read_bytes()
    if hashlib.sha256(data).hexdigest() != bundle.manifest.files[entry.file].sha256:
        raise BundleError(
            "the engine was changed",
            where=bundle.path / entry.file,
            remedy=f"build it again: {remedy} --force",
        )
    return data


def read_portable_engine(bundle: Bundle, trusted: bool) -> bytes:
    """The bytes of the engine that the export wrote into a bundle for TensorRT for RTX.

    It was built on another machine, so it is opened only if the bundle was checked against a public key,
    which covers the engine, or if the caller says that it trusts the bundle.

    Args:
        bundle: whose manifest names such an engine.
        trusted: whether the caller trusts an engine without a signature.

    Raises:
        RuntimeMissingError: there is no signature and no trust; the remedy is ``cmt-build``.
        BundleError: the file is not what the manifest says.
    """
    compiled = bundle.manifest.compiled
    assert compiled is not None, "the caller has looked"
    assert compiled.engine is not None, "the caller has looked"
    if compiled.engine != PORTABLE_ENGINE:  # a signature covers that file, and not those of cmt-build
        raise BundleError(
            f"names {compiled.engine} as its portable engine, which is always {PORTABLE_ENGINE}",
            where=bundle.path,
            remedy=f"copy the whole bundle again, or build an engine here: {name_program('build')}",
        )
    if not (trusted or bundle.signature_checked):
        raise RuntimeMissingError(
            "the engine in the bundle was built on another machine, so it is not loaded",
            where=bundle.path,
            why="an engine is native code, and the bundle was opened without a key",
            remedy=f"build one here: {name_program('build')} {bundle.path}; or open a signed bundle with"
            " --key KEY; or, if you trust whoever made it, use --trust-engine (in Python:"
            " trusted_engine=True)",
        )
    data = bundle.file(compiled.engine).read_bytes()
    if hashlib.sha256(data).hexdigest() != bundle.manifest.files[compiled.engine].sha256:
        raise BundleError(
            "the engine was changed",
            where=bundle.path / compiled.engine,
            remedy=f"copy the whole bundle again, or build an engine here: {name_program('build')}",
        )
    return data


def require_format(bundle: Bundle, product: Product) -> None:
    """Raise :class:`InputError` unless ``bundle`` is for ``product``."""
    if bundle.manifest.format != product.format:
        raise InputError(
            f"is a bundle for {bundle.manifest.format}, not for {product.title}",
            where=bundle.path,
            remedy=f"export it with --format {product.format}",
        )


def make_trtexec_command(bundle: Bundle, options: EngineOptions, device: str | None = None) -> str:
    """The command line of NVIDIA's own tool that builds the same engine, for comparing and for bug reports.

    Scratch memory is left to the tool unless ``options`` name it.
    """
    parts = [f"--onnx={bundle.file(ONNX)}", "--saveEngine=engine.plan", "--profilingVerbosity=detailed"]
    if bundle.manifest.format == RTX.format:
        parts = ["tensorrt_rtx", *parts, *_list_rtx_flags(options)]
    else:
        parts = ["trtexec", *parts, *_list_trt_flags(bundle, options)]
    if options.workspace:
        parts.append(f"--memPoolSize=workspace:{round(options.workspace * 1024)}M")
    if not options.tf32:
        parts.append("--noTF32")
    parts += _list_shape_flags(bundle, options)
    if device:
        parts.append(f"--device={device}")
    return shlex.join(parts)


def _list_trt_flags(bundle: Bundle, options: EngineOptions) -> list[str]:
    """The flags for TensorRT's ``trtexec`` alone."""
    entry = bundle.manifest.engine
    version = entry.key.tensorrt if entry else "10"
    is_typed = version.split(".", maxsplit=1)[0] == "10"  # from 11 on there is nothing else
    return [
        f"--builderOptimizationLevel={options.level}",
        "--timingCacheFile=timing.cache",
        *(["--stronglyTyped"] if is_typed else []),
    ]


def _list_rtx_flags(options: EngineOptions) -> list[str]:
    """The flags for ``tensorrt_rtx``, the tool of TensorRT for RTX, alone: an engine for the GPU in the
    machine, and its kernels in the log. Source: NVIDIA's documentation, "CPU-Only AOT"."""
    level = options.level
    return [
        "--useGpu",
        f"--maxAuxStreams={RTX.aux_streams}",
        "--verbose",
        *([] if level == DEFAULT_LEVEL else [f"--builderOptimizationLevel={level}"]),
    ]


def _list_shape_flags(bundle: Bundle, options: EngineOptions) -> list[str]:
    """The batch sizes of a dynamic bundle as NVIDIA's tools take them."""
    if read_batch_limit(bundle) != 0:
        return []
    rest = "x".join(map(str, bundle.manifest.input.shape[1:]))
    return [
        f"--{kind}Shapes={bundle.manifest.input.name}:{count}x{rest}"
        for kind, count in zip(("min", "opt", "max"), options.profile, strict=True)
    ]


def _read_driver_release(root: Path = Path("/")) -> str | None:
    """Version of NVIDIA's kernel driver, where it says so."""
    try:
        return (root / "sys/module/nvidia/version").read_text().strip()
    except OSError:
        return None
