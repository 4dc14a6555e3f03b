"""Finishing a bundle on the device: build the engine or use it again, read it back, verify, measure.

Nothing of the bundle changes until all of that has passed; then the engine, its report and the manifest are
written, in this order.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from .. import report
from ..backends import get_runtime
from ..backends.base import read_batch_limit
from ..bundle import ENGINES, Bundle, Manifest
from ..bundle.belongings import require_no_links
from ..bundle.sections import CompiledEntry, EngineEntry, EngineKey, GoldenCheck
from ..cache import is_cache_wanted
from ..errors import (
    GateError,
    InputError,
    OutputError,
    RuntimeMissingError,
    StepError,
)
from ..files import writing
from ..locks import try_lock
from ..measure.benchmark import Benchmark, benchmark, make_golden_batch, run_sustained, summarise_latency
from ..measure.device import DeviceState
from ..measure.device_report import DeviceReport, DeviceStates, SustainedPower
from ..measure.parity import check_golden
from ..measure.timing import Protocol
from ..predictor import Predictor
from ..progress import Progress
from ..signals import unwound_by_signals
from ..telemetry.dgpu import find_nvml_index
from ..telemetry.power import PowerMonitor
from ..telemetry.state import read_state
from .bindings import PRODUCTS, TENSORRT, Product, open_bindings
from .building import BUILD_TIME_LIMIT_S, build_plan, clear_scratch
from .compiled import EngineFacts, summarise_kernels
from .cuda import Cuda, open_cuda
from .engine import (
    EngineOptions,
    EngineTarget,
    is_trusted,
    list_differences,
    make_engine_key,
    make_seal,
    name_member,
    read_engine,
)
from .inspection import read_layers, require_precision
from .jit import find_store
from .kernels import read_kernels
from .session import TensorRTSession, find_engine_target

POWER_SECONDS = 3.0
"""Seconds of uninterrupted inference while the power is sampled."""
DEVICE_PROTOCOL = Protocol(iters=100, seconds=3.0)
"""How long ``cmt-build`` measures."""


@dataclass(frozen=True)
class Built:
    """An engine and how it came about.

    Attributes:
        plan: its bytes.
        seconds: how long the build took.
        reused: the bundle's own engine was still right.
        stale: why that one was not used.
        warnings: TensorRT's.
    """

    plan: bytes
    seconds: float
    reused: bool
    stale: list[str]
    warnings: list[str]


@dataclass(frozen=True)
class Finished:
    """The result of :func:`finish_bundle`: what is added to the bundle, and the device report.

    Attributes:
        manifest: the new one.
        files: name -> content of new files.
        drop: names of files that go.
        report: the device report.
    """

    manifest: Manifest
    files: dict[str, bytes]
    drop: list[str]
    report: DeviceReport


def require_compiler(product: Product) -> None:
    """Raise a :class:`RuntimeMissingError` with the remedy where a compiler is not installed."""
    get_runtime(product.name)


def require_tensorrt(device: str | None = None, product: Product = TENSORRT) -> None:
    """Raise a :class:`RuntimeMissingError` that names everything that is missing."""
    missing = []
    try:
        runtime = get_runtime(product.name)
    except RuntimeMissingError as exc:
        missing.append(exc.what)
    try:
        open_cuda()
    except RuntimeMissingError as exc:
        missing.append(f"{exc.what} ({exc.why})")
    if missing:
        raise RuntimeMissingError(
            f"{product.title} engines are built only where {product.title} and an NVIDIA GPU are",
            why="; ".join(missing),
            remedy="build on the device; docs/tensorrt.md lists what it needs",
        )
    runtime.check(device)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """One build of a bundle at a time, and a place that can be written to, found out before the long work.

    Raises :class:`OutputError` where another build runs, the folder cannot be written to, or the folder of
    engines is a link.
    """
    require_no_links(folder, [f"{ENGINES}/any"])
    with writing(folder):
        (folder / ENGINES).mkdir(exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        with unwound_by_signals():
            _lock_folder(folder, descriptor)
            yield
    finally:
        with contextlib.suppress(OSError):
            (folder / ENGINES).rmdir()  # stays where there is an engine
        os.close(descriptor)


def _lock_folder(folder: Path, descriptor: int) -> None:
    """Lock the folder until ``descriptor`` is closed."""
    if not os.access(folder, os.W_OK):
        raise OutputError(
            "cannot write here",
            where=folder,
            remedy="copy the bundle to a writable folder",
        )
    if not try_lock(descriptor):
        raise OutputError(
            "another build of this bundle is running",
            where=folder,
            remedy="wait for it to end",
        )


def finish_bundle(
    bundle: Bundle,
    options: EngineOptions,
    *,
    device: str | None = None,
    force: bool = False,
    time_limit: float = BUILD_TIME_LIMIT_S,
    protocol: Protocol = DEVICE_PROTOCOL,
    atol: float | None = None,
    progress: Progress | None = None,
) -> Finished:
    """Build (or reuse) the engine of a bundle, which is not changed, verify the engine, and measure it.

    Args:
        bundle: of format ``"trt"`` or ``"rtx"``, opened, so its hashes hold.
        options: of the build.
        device: number of the GPU.
        force: build even where the bundle's engine is still right.
        time_limit: seconds after which the build is stopped.
        protocol: how long to measure.
        atol: allowed golden logit difference; default by precision.
        progress: draws the steps.

    Raises:
        InputError: the bundle is for another runtime, or an option is out of range.
        RuntimeMissingError: no TensorRT or no GPU here.
        StepError: the build failed; says what TensorRT said.
        GateError: the engine does not compute in what was asked, or its logits differ from the reference.
    """
    progress = progress or Progress(quiet=True)
    clear_scratch()
    job = _Job.prepare(bundle, options, device)
    before = read_state(gpu_index=job.nvml)
    with progress.step("build the engine"):
        built = job.engine(force, time_limit, progress)
    with progress.step("verify"):
        verified = job.verify(built, atol)
    with progress.step("measure"):
        measured = job.measure(built, protocol, progress)
    report = _make_report(job, built, verified, measured, before)
    return _make_finished(bundle.manifest, built, report)


def _require_format(bundle: Bundle) -> None:
    if bundle.manifest.format not in PRODUCTS:
        raise InputError(
            f"is a bundle for {bundle.manifest.format}, not for TensorRT",
            where=bundle.path,
            remedy="export it with --format trt or --format rtx",
        )


@dataclass(frozen=True)
class _Verified:
    """What the engine was found to be: the share of its layers at the asked precision or below, the golden
    check, and what the compiler made of the graph."""

    low_precision_share: float
    golden: GoldenCheck
    compiled: CompiledEntry | None


@dataclass(frozen=True)
class _OnDevice:
    """What was measured with the engine; ``after`` is the state of the device then."""

    speed: Benchmark
    power: SustainedPower
    after: DeviceState
    notes: list[str]


@dataclass(frozen=True)
class _Job:
    """One bundle on one GPU.

    Attributes:
        key: what an engine for it must be keyed by.
        nvml: NVML's number of the GPU.
    """

    bundle: Bundle
    options: EngineOptions
    cuda: Cuda
    target: EngineTarget
    key: EngineKey
    nvml: int

    @classmethod
    def prepare(
        cls,
        bundle: Bundle,
        options: EngineOptions,
        device: str | None,
    ) -> _Job:
        """Find the GPU; raises as :func:`finish_bundle`."""
        options.check()
        _require_format(bundle)
        product = PRODUCTS[bundle.manifest.format]
        require_tensorrt(device, product)
        cuda, target = find_engine_target(open_bindings(product), device)
        key = make_engine_key(bundle, target, options)
        return cls(
            bundle,
            options,
            cuda,
            target,
            key,
            find_nvml_index(target.gpu.pci, target.gpu.index),
        )

    def engine(self, force: bool, time_limit: float, progress: Progress) -> Built:
        """The bundle's engine if it was built here for exactly this key, else a new one."""
        entry = self.bundle.manifest.engine
        if entry and not force and is_trusted(self.bundle) and entry.key == self.key:
            return Built(
                read_engine(self.bundle, self.target),
                0.0,
                True,
                [],
                [],
            )
        start = time.perf_counter()
        plan, warnings = build_plan(
            self.bundle,
            self.options,
            self.target,
            self.cuda,
            time_limit=time_limit,
            progress=progress,
        )
        return Built(
            plan,
            time.perf_counter() - start,
            False,
            self._find_stale(),
            warnings,
        )

    def _find_stale(self) -> list[str]:
        """Why the engine in the bundle is not used, empty if there is none."""
        entry = self.bundle.manifest.engine
        if not entry:
            return []
        if not is_trusted(self.bundle):
            return ["the engine in the bundle was not built on this machine"]
        return list_differences(entry.key, self.key) or ["the options changed, or a build was asked for"]

    def verify(self, built: Built, atol: float | None) -> _Verified:
        """Read the engine back and run the golden images; raises :class:`GateError`."""
        manifest = self.bundle.manifest
        operations = manifest.typing.operations if manifest.typing else {}
        with self._open(built) as predictor:
            inspection = predictor.session.inspect()
            share = require_precision(manifest.precision, operations, read_layers(inspection))
            golden = _require_golden(self.bundle, predictor, atol)
        return _Verified(share, golden, self._summarise(inspection, built))

    def _summarise(self, inspection: str, built: Built) -> CompiledEntry | None:
        """What the compiler made of the graph; ``None`` where its inspection names no tensors."""
        product = PRODUCTS[self.bundle.manifest.format]
        seconds = None if built.reused else built.seconds
        made = EngineFacts(
            product.name, self.target.tensorrt, len(built.plan), (self.target.gpu.sm,), seconds
        )
        with contextlib.suppress(StepError):
            return summarise_kernels(read_kernels(inspection), made)
        return None

    def measure(
        self,
        built: Built,
        protocol: Protocol,
        progress: Progress,
    ) -> _OnDevice:
        def load(*_: object, throughput: bool = False, **__: object) -> Predictor:
            return self._open(built, throughput)

        speed = benchmark(
            [self.bundle],
            protocol=protocol,
            progress=progress.share,
            load=load,
        )
        with self._open(built) as predictor:
            power = _measure_power(self.bundle, predictor, self.nvml)
            notes = list(predictor.session.notes)
        return _OnDevice(
            speed,
            power,
            read_state(gpu_index=self.nvml),
            notes,
        )

    def _open(self, built: Built, throughput: bool = False) -> Predictor:
        bundle = self.bundle
        product = PRODUCTS[bundle.manifest.format]
        session = TensorRTSession(
            open_bindings(product),
            built.plan,
            self.cuda,
            self.target.gpu.index,
            outputs=bundle.outputs,
            throughput=throughput,
            store=find_store(product, bundle, self.target, built.plan) if is_cache_wanted() else None,
        )
        return Predictor(
            session,
            bundle.preprocess,
            bundle.labels,
            batch=read_batch_limit(bundle),
            head=bundle.head,
        )


def _make_report(
    job: _Job,
    built: Built,
    verified: _Verified,
    measured: _OnDevice,
    before: DeviceState,
) -> DeviceReport:
    """Everything that was found, for the bundle's device report."""
    return DeviceReport(
        bundle=job.bundle.name,
        key=job.key,
        built_s=built.seconds,
        reused=built.reused,
        replaces=tuple(built.stale),
        engine_bytes=len(built.plan),
        low_precision_share=verified.low_precision_share,
        golden=verified.golden,
        compiled=verified.compiled,
        benchmark=measured.speed,
        power=measured.power,
        state=DeviceStates(before, measured.after),
        warnings=(*measured.notes, *built.warnings),
    )


def _make_finished(manifest: Manifest, built: Built, found: DeviceReport) -> Finished:
    """Everything that is written."""
    plan = name_member(built.plan, "engine", ".plan")
    text = report.describe_device_report(found, markdown=True).encode()
    data = found.to_bytes()
    text_name = name_member(text, "report", ".md")
    data_name = name_member(data, "report", ".json")
    files = {plan: built.plan, data_name: data, text_name: text}
    entry = EngineEntry(
        file=plan,
        key=found.key,
        seal=make_seal(hashlib.sha256(built.plan).hexdigest(), found.key),
        report=data_name,
        text=text_name,
        golden=found.golden,
        low_precision_share=found.low_precision_share,
    )
    engines = [name for name in manifest.files if name.startswith(f"{ENGINES}/")]
    old = [name for name in engines if name not in files]
    finished = replace(manifest, latency=summarise_latency(found.benchmark), engine=entry)
    return Finished(finished, files, old, found)


def _require_golden(
    bundle: Bundle,
    predictor: Predictor,
    atol: float | None,
) -> GoldenCheck:
    golden = check_golden(bundle, predictor, atol)
    if golden.passed:
        return golden
    raise GateError(
        f"the engine's {golden.output} differ from the reference by {golden.diff:.3g}, allowed are"
        f" {golden.atol:.3g}",
        where=bundle.path,
        why=f"pixels differ by {golden.pixel_diff} grey levels",
        remedy="nothing was kept; export another --precision, or allow more with --atol",
    )


def _measure_power(bundle: Bundle, predictor: Predictor, index: int) -> SustainedPower:
    """Power before, during and after some seconds of uninterrupted inference, and joules an image where power
    is known."""
    with PowerMonitor(gpu_index=index) as monitor:
        images, elapsed_ms = run_sustained(
            predictor,
            make_golden_batch(bundle, predictor),
            POWER_SECONDS,
        )
    power = monitor.report()
    return SustainedPower(
        source=power.source,
        interval_s=power.interval_s,
        before=power.before,
        during=power.during,
        after=power.after,
        notes=power.notes,
        images=images,
        joules_per_image=monitor.energy_per_inference(elapsed_ms, images),
    )
