"""Latency and throughput of bundles, measured interleaved (:mod:`~cmt_edge.deploy.measure.timing`). Returns
dataclasses, prints nothing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from ..backends.base import Session
from ..bundle import GOLDEN, LOGITS, Bundle
from ..bundle.record import OMITTED
from ..bundle.sections import (
    ExecutedPrecision,
    Host,
    LatencyEntry,
    RanOn,
)
from ..decoding import NamedBytes
from ..predictor import Predictor
from ..preprocessing import normalise
from ..values import require_finite
from .breakdown import Breakdown, break_down, read_blocks
from .host import describe_host, read_versions
from .loadgen_result import LoadGenResult
from .memory import Memory
from .stages import Stages, measure_stages
from .statistics import NS_PER_MS, Latency, compare_medians, summarise
from .timing import PUBLISHED, Protocol, time_interleaved

DRIFT_WARNING = 0.05
"""A drift of the latency beyond this share makes a warning."""
ENQUEUE_WARNING = 0.8
"""Starting an inference takes the host too long beyond this share of the device's time."""


@dataclass(frozen=True)
class OnDevice:
    """Milliseconds by the device's clock: the inference alone, and with copies; ``enqueue`` is the host's
    part of starting it."""

    compute: Latency
    with_copies: Latency
    enqueue: Latency


@dataclass(frozen=True)
class Measured:
    """All figures of one bundle in one runtime.

    ``model`` is the runtime's inference alone, ``end_to_end`` from encoded image to label (or feature maps),
    both one image or one batch at a time; ``throughput`` images a second with many requests at once;
    ``on_device`` where the device has a clock of its own. ``stages`` are the parts of an answer,
    ``breakdown`` says where the time of an inference goes, ``memory`` what a process needs, and ``loadgen``
    what MLPerf LoadGen measured of the same; they are ``None`` where they were not measured.
    """

    name: str
    precision: str
    runtime: RanOn
    batch: int
    size_bytes: int
    executed: ExecutedPrecision
    model: Latency
    end_to_end: Latency
    throughput: float | None
    ratio: float
    ratio_ci: tuple[float, float]
    warnings: list[str] = field(default_factory=list)
    on_device: OnDevice | None = None
    stages: Stages | None = field(default=None, metadata=OMITTED)
    breakdown: Breakdown | None = field(default=None, metadata=OMITTED)
    memory: Memory | None = field(default=None, metadata=OMITTED)
    loadgen: tuple[LoadGenResult, ...] | None = field(default=None, metadata=OMITTED)


@dataclass(frozen=True)
class Benchmark:
    """The result of one interleaved run; ratios are of model-only medians against the first entry (above 1 is
    faster)."""

    results: list[Measured]
    host: Host
    versions: dict[str, str]
    threads: int | None
    protocol: Protocol


def measure_throughput(
    predictor: Predictor,
    batch: np.ndarray,
    seconds: float,
) -> float:
    """Images a second with as many concurrent requests as the runtime recommends. Raises what an inference
    raised."""
    workers = max(1, predictor.session.parallelism)
    predictor.outputs(batch)
    start = time.perf_counter()

    def work() -> int:
        infer = bind_inference(predictor.session, batch)
        count = 0
        while time.perf_counter() - start < seconds:
            infer()
            count += len(batch)
        return count

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work) for _ in range(workers)]
        images = sum(future.result() for future in futures)
    return images / (time.perf_counter() - start)


def run_sustained(
    predictor: Predictor,
    batch: np.ndarray,
    seconds: float,
) -> tuple[int, float]:
    """One request after the other for ``seconds``: images done and milliseconds taken."""
    infer = bind_inference(predictor.session, batch)
    images, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        infer()
        images += len(batch)
    return images, 1e3 * elapsed


def _measure_on_device(
    session: Session,
    batch: np.ndarray,
    count: int,
) -> OnDevice | None:
    times = session.device_times(batch, count)
    if times is None:
        return None
    return OnDevice(
        compute=summarise(NS_PER_MS * times.compute),
        with_copies=summarise(NS_PER_MS * times.with_copies),
        enqueue=summarise(NS_PER_MS * times.enqueue),
    )


@dataclass(frozen=True)
class _Samples:
    """What was measured of one opened bundle; times in nanoseconds."""

    batch: np.ndarray
    runtime: RanOn
    model: np.ndarray
    end_to_end: np.ndarray
    executed: ExecutedPrecision
    on_device: OnDevice | None
    stages: Stages
    breakdown: Breakdown | None
    notes: tuple[str, ...]


def benchmark(
    bundles: Sequence[Bundle],
    *,
    backend: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    trusted_engine: bool = False,
    images: Sequence[bytes] = (),
    protocol: Protocol = PUBLISHED,
    with_throughput: bool = True,
    progress: Callable[[str, float], None] | None = None,
    load: Callable[..., Predictor] = Predictor.load,
    blocks: Mapping[str, str] | None = None,
) -> Benchmark:
    """Measure bundles side by side.

    >>> short = Protocol(iters=5, seconds=0.05, warmup_iters=1, warmup_seconds=0)
    >>> bundle = Bundle.open("cmt_nano_fp32_openvino")
    >>> measured = benchmark([bundle], protocol=short, with_throughput=False)
    >>> measured.results[0].model.p50 > 0
    True

    Args:
        bundles: at least one; the first is what ratios refer to.
        backend, device, threads, trusted_engine: as :meth:`cmt_edge.deploy.Predictor.load`.
        images: encoded images for the end-to-end figure; default: the golden source images of each bundle.
        protocol: how long.
        with_throughput: also measure many requests at once.
        progress: called with the name of the phase and its share done.
        load: opens a bundle, as :meth:`cmt_edge.deploy.Predictor.load`.
        blocks: name of an operation of the graphs -> its block of the model; default: as each bundle records
            it.
    """
    report = progress or (lambda phase, share: None)
    named = dict(zip(_name_bundles(bundles), bundles, strict=True))
    opened = partial(
        load,
        backend=backend,
        device=device,
        threads=threads,
        trusted_engine=trusted_engine,
        cache=False,
    )
    samples = _measure_latencies(named, opened, images, protocol, report, blocks)
    rates: dict[str, float] = {}
    if with_throughput:
        for name, bundle in named.items():
            report(f"throughput of {name}", 0.0)
            with opened(bundle, throughput=True) as predictor:
                seconds = max(0.5, protocol.seconds / 2)
                rates[name] = measure_throughput(predictor, samples[name].batch, seconds)
    base = next(iter(samples.values()))
    results = [
        _make_measured(name, bundle, samples[name], base, rates.get(name)) for name, bundle in named.items()
    ]
    return Benchmark(results, describe_host(), read_versions(), threads, protocol)


def _measure_latencies(
    bundles: Mapping[str, Bundle],
    opened: Callable[[Bundle], Predictor],
    images: Sequence[bytes],
    protocol: Protocol,
    report: Callable[[str, float], None],
    blocks: Mapping[str, str] | None,
) -> dict[str, _Samples]:
    """Open all bundles at once and time them in turn: first the model alone, then from image to answer."""
    with contextlib.ExitStack() as stack:
        predictors = {name: stack.enter_context(opened(bundle)) for name, bundle in bundles.items()}
        batches = {name: make_golden_batch(bundles[name], p) for name, p in predictors.items()}
        for name, p in predictors.items():
            require_finite(p.outputs(batches[name]), bundles[name].path)
        model = time_interleaved(
            {name: bind_inference(p.session, batches[name]) for name, p in predictors.items()},
            protocol,
            lambda share: report("latency, model only", share),
        )
        end_to_end = time_interleaved(
            {
                name: _make_end_to_end_call(p, _name_images(images, bundles[name]))
                for name, p in predictors.items()
            },
            protocol,
            lambda share: report("latency, end to end", share),
        )
        return {
            name: _finish(
                p,
                batches[name],
                (model[name], end_to_end[name]),
                _name_images(images, bundles[name]),
                protocol.iters,
                read_blocks(bundles[name]) if blocks is None else blocks,
            )
            for name, p in predictors.items()
        }


def _finish(
    predictor: Predictor,
    batch: np.ndarray,
    timed: tuple[np.ndarray, np.ndarray],
    images: Sequence[tuple[bytes, str]],
    calls: int,
    blocks: Mapping[str, str],
) -> _Samples:
    """What is measured of each bundle by itself, beside the two series of times, of the model and end to
    end."""
    session = predictor.session
    profile = session.profile(batch)
    return _Samples(
        batch,
        predictor.info,
        *timed,
        executed=profile.summarise() if profile else session.executed(batch),
        on_device=_measure_on_device(session, batch, calls),
        stages=measure_stages(predictor, images, calls),
        breakdown=break_down(profile, blocks) if profile else None,
        notes=tuple(session.notes),
    )


def _name_bundles(bundles: Sequence[Bundle]) -> list[str]:
    """Folder names, numbered where they repeat."""
    names: list[str] = []
    for bundle in bundles:
        name = bundle.name
        names.append(name if name not in names else f"{name} #{len(names) + 1}")
    return names


def make_golden_batch(bundle: Bundle, predictor: Predictor) -> np.ndarray:
    """A batch of golden inputs, ``(N, 3, S, S)``, in the graph's batch size."""
    pixels = bundle.golden().pixels
    count = predictor.batch or 1
    repeated = np.resize(pixels, (count, *pixels.shape[1:]))
    return normalise(repeated, bundle.preprocess)


def bind_inference(session: Session, batch: np.ndarray) -> Callable[[], object]:
    """The inference of ``batch``, which lies where the runtime reads it: what
    :class:`~cmt_edge.deploy.Predictor` runs on an image once prepared."""
    binding = session.bind(batch.shape)
    binding.batch[:] = batch
    return binding.run


def _name_images(images: Sequence[bytes], bundle: Bundle) -> list[tuple[bytes, str]]:
    """Encoded images, or the golden ones where there are none, with what messages call each."""
    if images:
        return [(image, "image") for image in images]
    return [
        (image, f"{bundle.file(GOLDEN)}, image {number}")
        for number, image in enumerate(bundle.golden().sources)
    ]


def _make_end_to_end_call(predictor: Predictor, images: Sequence[tuple[bytes, str]]) -> Callable[[], object]:
    """Each call takes the next ``batch`` encoded images from bytes to labels or feature maps."""
    position = 0

    def call() -> object:
        nonlocal position
        count = predictor.batch or 1
        turns = [(position + i) % len(images) for i in range(count)]
        chosen = [images[turn] for turn in turns]
        position += count
        files = [NamedBytes(*image) for image in chosen]
        if predictor.head != LOGITS:
            return predictor.features(predictor.prepare(files))
        return [p.label for p in predictor.predict(files)]

    return call


def _make_measured(
    name: str,
    bundle: Bundle,
    samples: _Samples,
    base: _Samples,
    rate: float | None,
) -> Measured:
    """The figures of one bundle; its ratio refers to ``base``."""
    latency = summarise(samples.model)
    ratio = compare_medians(base.model, samples.model)
    warnings = [
        *list_precision_warnings(bundle.manifest.precision, samples.executed),
        *_write_latency_warnings(latency, samples.on_device),
        *dict.fromkeys((*samples.notes, *_write_accuracy_warnings(bundle))),
    ]
    return Measured(
        name=name,
        precision=bundle.manifest.precision,
        runtime=samples.runtime,
        batch=len(samples.batch),
        size_bytes=bundle.manifest.size_bytes,
        executed=samples.executed,
        model=latency,
        end_to_end=summarise(samples.end_to_end),
        throughput=rate,
        ratio=ratio.value,
        ratio_ci=(ratio.low, ratio.high),
        warnings=warnings,
        on_device=samples.on_device,
        stages=samples.stages,
        breakdown=samples.breakdown,
    )


def _write_accuracy_warnings(bundle: Bundle) -> list[str]:
    """What the export found about the accuracy and could not show."""
    recorded = bundle.manifest.verification
    return list(recorded.notes) if recorded else []


def _write_latency_warnings(latency: Latency, clock: OnDevice | None) -> list[str]:
    """A sentence where the latency drifted, and where the host limits the device."""
    warnings = []
    if abs(latency.drift) > DRIFT_WARNING:
        warnings.append(
            f"latency drifted by {100 * latency.drift:+.0f} % between the first and the last 100 iterations"
        )
    if clock and clock.enqueue.p50 > ENQUEUE_WARNING * clock.compute.p50:
        warnings.append(
            f"starting an inference takes the host {clock.enqueue.p50:.2f} ms of the device's"
            f" {clock.compute.p50:.2f} ms: the host, not the GPU, limits the speed; use a larger batch or"
            " several requests at once"
        )
    return warnings


def summarise_latency(speed: Benchmark) -> LatencyEntry:
    """What a manifest keeps of the first bundle's figures."""
    measured = speed.results[0]
    return LatencyEntry(
        p50_ms=measured.model.p50,
        ci_ms=measured.model.ci,
        p95_ms=measured.model.p95,
        end_to_end_p50_ms=measured.end_to_end.p50,
        batch=measured.batch,
        threads=speed.threads,
        executed=measured.executed,
        warnings=tuple(measured.warnings),
    )


def list_precision_warnings(asked: str, executed: ExecutedPrecision) -> list[str]:
    """A sentence where what ran is not what was asked for: most of the time went to another precision."""
    share = executed.time_share
    if not share or max(share, key=lambda k: share[k]) == asked:
        return []
    spent = f"{100 * share.get(asked, 0):.0f} %"
    return [
        f"{asked} was asked for, but the runtime spent only {spent} of its time in it: {executed.summary()}"
    ]
