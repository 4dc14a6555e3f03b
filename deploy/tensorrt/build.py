"""Finishing a bundle on the device: build the engine in a child process, read it back, verify, measure.

Nothing of the bundle changes until all of that has passed; then the engine, its report and the manifest are
written, in this order.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from .. import report
from ..backends import get_runtime
from ..backends.base import batch_limit
from ..bundle import ENGINES, ONNX, Bundle, Manifest, plain
from ..bundle.sections import EngineEntry, EngineKey, GoldenCheck
from ..errors import GateError, InputError, OutputError, RuntimeMissingError, StepError
from ..files import cache_folder, writing
from ..measure.benchmark import Protocol, benchmark, golden_batch, summary, sustained
from ..measure.parity import check_golden
from ..predictor import Predictor
from ..progress import Progress
from ..signals import terminate_as_interrupt
from ..telemetry.device import PowerMonitor, snapshot
from ..telemetry.dgpu import nvml_index
from ..telemetry.jetson import memory
from .cuda import Cuda, open_cuda
from .engine import (
    Device,
    EngineOptions,
    Request,
    differences,
    engine_key,
    member,
    read_engine,
    seal,
    timing_cache_name,
    trusted,
)
from .inspection import layers, require_precision

FREE_SHARE = 0.4
"""Part of the free device memory that the builder may use, unless ``--workspace`` says otherwise."""
TIME_LIMIT_S = 3600.0
POWER_SECONDS = 3.0
STALE_S = 86400.0
QUICK = Protocol(iters=100, seconds=3.0)
MEMORY = re.compile(
    r"out ?of ?memory|insufficient memory|memory is insufficient|amount of GPU memory|memory"
    r" allocation|(could not|failed to) allocate|NvMapMemAlloc",
    re.IGNORECASE,
)
"""What TensorRT and its allocators say when memory is short."""


@dataclass(frozen=True)
class Built:
    """An engine and how it came about; ``reused`` if the bundle's own was still right."""

    plan: bytes
    seconds: float
    reused: bool
    stale: list[str]
    warnings: list[str]


@dataclass(frozen=True)
class Finished:
    """The result of :func:`finish`: what is to be added to the bundle, and the device report."""

    manifest: Manifest
    files: dict[str, bytes]
    drop: list[str]
    report: dict[str, Any]


def require_tensorrt(device: str | None = None) -> None:
    """Raise a :class:`RuntimeMissingError` that names everything that is missing."""
    missing = []
    try:
        runtime = get_runtime("tensorrt")
    except RuntimeMissingError as exc:
        missing.append(exc.what)
    try:
        open_cuda()
    except RuntimeMissingError as exc:
        missing.append(f"{exc.what} ({exc.why})")
    if missing:
        raise RuntimeMissingError(
            "TensorRT engines are built only where TensorRT and an NVIDIA GPU are",
            why="; ".join(missing),
            remedy="build on the device; docs/tensorrt.md lists what it needs",
        )
    runtime.check(device)


@contextlib.contextmanager
def building(folder: Path) -> Iterator[None]:
    """One build of a bundle at a time, and a place that can be written to, found out before the long work."""
    with writing(folder):
        (folder / ENGINES).mkdir(exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    signals = (signal.SIGTERM, signal.SIGHUP)  # SIGHUP: the connection of the terminal broke
    previous = {number: terminate_as_interrupt(number) for number in signals}
    try:
        if not os.access(folder, os.W_OK):
            raise OutputError(
                "cannot write here", where=folder, remedy="copy the bundle to a writable folder"
            )
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise OutputError(
                "another build of this bundle is running", where=folder, remedy="wait for it to end"
            ) from exc
        yield
    finally:
        for number, handler in previous.items():
            if handler is not None:
                signal.signal(number, handler)
        with contextlib.suppress(OSError):
            (folder / ENGINES).rmdir()  # stays where there is an engine
        os.close(descriptor)


def finish(
    bundle: Bundle,
    options: EngineOptions,
    *,
    device: str | None = None,
    force: bool = False,
    time_limit: float = TIME_LIMIT_S,
    protocol: Protocol = QUICK,
    atol: float | None = None,
    progress: Progress | None = None,
) -> Finished:
    """Build (or reuse) the engine of ``bundle``, verify it against the golden vectors, and measure it; the
    bundle is not changed.

    Args:
        bundle: of format ``"trt"``, opened, so its hashes hold.
        options: of the build.
        device: number of the GPU.
        force: build even where the bundle's engine is still right.
        time_limit: seconds after which the build is stopped.
        protocol: how long to measure.
        atol: allowed golden logit difference; default by precision, see
            :data:`cmt_edge.deploy.measure.parity.ATOL`.
        progress: draws the steps.

    Raises:
        InputError: the bundle is for another runtime, or an option is out of range.
        RuntimeMissingError: no TensorRT or no GPU here.
        StepError: the build failed; says what TensorRT said.
        GateError: the engine does not compute in what was asked, or its logits differ from the reference.
    """
    options.check()
    if bundle.manifest.format != "trt":
        raise InputError(
            f"is a bundle for {bundle.manifest.format}, not for TensorRT",
            where=bundle.path,
            remedy="export it with --format trt",
        )
    progress = progress or Progress(quiet=True)
    require_tensorrt(device)
    from .session import TensorRTSession, describe_device

    cuda, here = describe_device(device)
    key = engine_key(bundle, here, options)
    nvml = nvml_index(here.gpu.pci, here.gpu.index)
    before = snapshot(gpu_index=nvml)
    with progress.step("build the engine"):
        built = None if force else _reused(bundle, here, key)
        built = built or _build(bundle, options, here, cuda, time_limit, progress)

    def load(*_: object, throughput: bool = False, **__: object) -> Predictor:
        session = TensorRTSession(
            built.plan, cuda, here.gpu.index, outputs=bundle.outputs, throughput=throughput
        )
        return Predictor(
            session, bundle.preprocess, bundle.labels, batch=batch_limit(bundle), head=bundle.head
        )

    with progress.step("verify"), load() as predictor:
        found, typing = layers(predictor.session.inspect()), bundle.manifest.typing
        share = require_precision(bundle.manifest.precision, typing.operations if typing else {}, found)
        golden = _require_golden(bundle, predictor, atol)
    with progress.step("measure"):
        speed = benchmark([bundle], protocol=protocol, progress=progress.share, load=load)
        with load() as predictor:
            power = _power(bundle, predictor, nvml)
            notes = list(predictor.session.notes)
    state = {"before": asdict(before), "after": asdict(snapshot(gpu_index=nvml))}
    content = {
        "bundle": bundle.name,
        "key": plain(key),
        "built_s": built.seconds,
        "reused": built.reused,
        "replaces": built.stale,
        "engine_bytes": len(built.plan),
        "low_precision_share": share,
        "golden": asdict(golden),
        "benchmark": plain(speed),
        "power": power,
        "state": state,
        "warnings": [*notes, *built.warnings],
    }
    return _finished(replace(bundle.manifest, latency=summary(speed)), key, golden, built, content)


def _finished(
    manifest: Manifest, key: EngineKey, golden: GoldenCheck, built: Built, content: dict[str, Any]
) -> Finished:
    """Everything that is to be written."""
    plan, text = member(built.plan, "engine", ".plan"), report.device_text(content, markdown=True).encode()
    data = (report.to_json(content) + "\n").encode()
    files = {plan: built.plan, member(data, "report", ".json"): data, member(text, "report", ".md"): text}
    entry = EngineEntry(
        file=plan,
        key=key,
        seal=seal(hashlib.sha256(built.plan).hexdigest(), key),
        report=member(data, "report", ".json"),
        text=member(text, "report", ".md"),
        golden=golden,
        low_precision_share=content["low_precision_share"],
    )
    old = [name for name in manifest.files if name.startswith(f"{ENGINES}/") and name not in files]
    return Finished(replace(manifest, engine=entry), files, old, content)


def _reused(bundle: Bundle, here: Device, key: EngineKey) -> Built | None:
    """The bundle's engine, if it was built here for exactly ``key``."""
    entry = bundle.manifest.engine
    if not entry or not trusted(bundle) or entry.key != key:
        return None
    return Built(read_engine(bundle, here), 0.0, True, [], [])


def _stale(bundle: Bundle, key: EngineKey) -> list[str]:
    """Why the engine in the bundle is not used, empty if there is none."""
    entry = bundle.manifest.engine
    if not entry:
        return []
    if not trusted(bundle):
        return ["the engine in the bundle was not built on this machine"]
    return differences(entry.key, key) or ["the options changed, or a build was asked for"]


def _build(
    bundle: Bundle, options: EngineOptions, here: Device, cuda: Cuda, time_limit: float, progress: Progress
) -> Built:
    start = time.perf_counter()
    key = engine_key(bundle, here, options)
    workspace = options.workspace * (1 << 30) if options.workspace else FREE_SHARE * _free_memory(cuda, here)
    timing = cache_folder().resolve() / "timing"
    scratch = cache_folder().resolve() / "build"
    with writing(scratch):
        for folder in (timing, scratch):
            folder.mkdir(parents=True, exist_ok=True)
        _clear_stale(scratch)
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        plan = Path(name) / "engine.plan"
        request = Request(
            str(bundle.file(ONNX).resolve()),
            bundle.manifest.files[ONNX].sha256,
            str(plan),
            str(timing / timing_cache_name(here)),
            bundle.manifest.input.name,
            bundle.manifest.input.shape,
            int(workspace),
            options.level,
            options.tf32,
            options.profile if batch_limit(bundle) == 0 else None,
            here.gpu.index,
        )
        request.save(Path(name) / "request.json")
        warnings = _run_child(Path(name) / "request.json", time_limit, progress)
        return Built(plan.read_bytes(), time.perf_counter() - start, False, _stale(bundle, key), warnings)


def _clear_stale(scratch: Path) -> None:
    """Remove what a build left that was killed more than a day ago; a younger one may still run."""
    for folder in scratch.iterdir():
        if time.time() - folder.stat().st_mtime > STALE_S:
            shutil.rmtree(folder, ignore_errors=True)


def _free_memory(cuda: Cuda, here: Device) -> float:
    """Bytes; what an integrated GPU calls free leaves out memory that the system would give up."""
    shared = memory(Path("/")) if here.gpu.integrated else None
    return shared.available_mb * float(1 << 20) if shared else cuda.memory()[0]


def _run_child(request: Path, time_limit: float, progress: Progress) -> list[str]:
    """Run the builder; its warnings. Raises :class:`StepError` with TensorRT's own words."""
    root = str(Path(__file__).absolute().parents[3])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    }
    with open(request.with_name("stderr"), "w+", encoding="utf-8", errors="replace") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "cmt_edge.deploy.tensorrt.builder", str(request)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            start_new_session=True,
            cwd=request.parent,
        )
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            _kill(child)

        timer = threading.Timer(time_limit, expire)
        timer.start()
        try:
            assert child.stdout is not None
            last = _follow(child.stdout, progress)
            child.wait()
        finally:
            timer.cancel()
            _kill(child)
            child.communicate()
            progress.finish()
        errors.seek(0)
        tail = errors.read()[-2000:].strip().splitlines()[-3:]
    if expired.is_set():
        raise StepError(
            f"the build did not end within {time_limit:g} s",
            remedy="allow more with --time-limit, or use --level 0 to 2",
        )
    if last.get("done"):  # whatever its exit was like: the plan was written before
        return list(last.get("warnings", []))
    raise _failure(child.returncode, last, tail)


def _follow(lines: IO[str], progress: Progress) -> dict[str, Any]:
    """Draw the builder's progress until it ends; its last message."""
    last: dict[str, Any] = {}
    for line in lines:
        with contextlib.suppress(ValueError):
            last = json.loads(line)
            if "progress" in last:
                progress.share(*last["progress"])
    return last


def _kill(child: subprocess.Popen[str]) -> None:
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def _failure(code: int, last: dict[str, Any], tail: list[str]) -> StepError:
    """What went wrong in the builder, as far as it could say."""
    details = [*last.get("details", []), *([] if "failed" in last else tail)]
    text = "; ".join(details)
    killed = code == -signal.SIGKILL
    if killed or MEMORY.search(text):
        return StepError(
            "the build ran out of memory",
            why=text or "the system stopped it (signal SIGKILL)",
            remedy=(
                "close other programs, add swap, or use a smaller --workspace GiB, --level 2 or a smaller"
                " --profile"
            ),
        )
    if "failed" in last:
        return StepError(
            last["failed"],
            why=text or None,
            remedy=(
                "report the model with the TensorRT version; cmt-build --trtexec "
                "prints the command that shows whether NVIDIA's own tool fails alike"
            ),
        )
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return StepError(
        f"TensorRT crashed while it built the engine ({name})",
        why=text or None,
        remedy="try --level 2, then cmt-build --trtexec and report what it prints",
    )


def _require_golden(bundle: Bundle, predictor: Predictor, atol: float | None) -> GoldenCheck:
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


def _power(bundle: Bundle, predictor: Predictor, index: int) -> dict[str, Any]:
    """Power before, during and after some seconds of uninterrupted inference, and joules an image where power
    is known."""
    with PowerMonitor(gpu_index=index) as monitor:
        images, elapsed_ms = sustained(predictor, golden_batch(bundle, predictor), POWER_SECONDS)
    return asdict(monitor.report()) | {
        "images": images,
        "joules_per_image": monitor.energy_per_inference(elapsed_ms, images),
    }
