"""Latency and throughput, measured interleaved. Returns dataclasses, prints nothing.

Protocol: warm up until at least 10 iterations and 1 s have passed and the rolling median is stable within 2
%; then at least ``iters`` iterations and ``seconds`` for each variant, A B A B. No outlier is removed.
"""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..backends.base import Session
from ..bundle import LOGITS, Bundle
from ..bundle.sections import ExecutedPrecision, Host, LatencyEntry, RanOn
from ..predictor import Predictor
from ..preprocessing import normalise
from .host import describe, versions

WARMUP_LIMIT_S = 15.0
DRIFT_WARNING = 0.05
ENQUEUE_WARNING = 0.8
MIN_FOR_P99 = 1000
BOOTSTRAP = 1000
CLOCK_FLOOR_S = 1e-4
"""Shorter calls count as this long when deciding how often a variant runs in a round: their ratio is
noise."""


@dataclass(frozen=True)
class Protocol:
    """How long to measure; the defaults are for figures that are published.

    Where several variants take turns, each turn begins with calls of ``settle_seconds`` that are not counted,
    and as many that are follow.
    """

    iters: int = 200
    seconds: float = 10.0
    warmup_iters: int = 10
    warmup_seconds: float = 1.0
    settle_seconds: float = 0.05


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one variant; ``p99`` is ``None`` below 1000 samples, ``ci`` the 95 % bootstrap interval
    of p50.

    ``drift`` is the last 100 samples' median over the first 100's, minus 1.
    """

    count: int
    p50: float
    ci: tuple[float, float]
    p90: float
    p95: float
    p99: float | None
    max: float
    mean: float
    drift: float


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
    ``on_device`` where the device has a clock of its own.
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


@dataclass(frozen=True)
class Benchmark:
    """The result of one interleaved run; ratios are of model-only medians against the first entry (above 1 is
    faster)."""

    results: list[Measured]
    host: Host
    versions: dict[str, str]
    threads: int | None
    protocol: Protocol


def summarise(samples_ns: Sequence[int] | np.ndarray, seed: int = 0) -> Latency:
    """Statistics of one variant's samples in nanoseconds."""
    ms = np.asarray(samples_ns, np.float64) / 1e6
    low, high = np.percentile(_bootstrap_medians(ms, np.random.default_rng(seed)), [2.5, 97.5])
    p50, p90, p95, p99 = np.percentile(ms, [50, 90, 95, 99])
    edge = min(100, max(1, len(ms) // 2))
    drift = float(np.median(ms[-edge:]) / np.median(ms[:edge]) - 1)
    return Latency(
        len(ms),
        float(p50),
        (float(low), float(high)),
        float(p90),
        float(p95),
        float(p99) if len(ms) >= MIN_FOR_P99 else None,
        float(ms.max()),
        float(ms.mean()),
        drift,
    )


def _bootstrap_medians(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Medians of ``BOOTSTRAP`` resamples."""
    n = len(values)
    return np.array([np.median(values[rng.integers(0, n, n)]) for _ in range(BOOTSTRAP)])


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    protocol: Protocol,
    progress: Callable[[float], None] | None = None,
) -> dict[str, np.ndarray]:
    """Time the callables in turn, A B A B; nanoseconds of each call, in order, after a warm-up of each.

    Where there are several, each turn begins with calls that are not counted: they bring the variant's own
    weights back into the caches, as in a process that serves one model, and let clocks follow its
    instructions and the threads of other runtimes, which spin for milliseconds after their call, come to
    rest. On a Xeon with AMX a model's calls became faster until the sixth after another model's.
    """
    typical = {name: _warm_up(call, protocol) for name, call in variants.items()}
    slowest = max(typical.values())
    several = len(variants) > 1
    turns = []
    for name, call in variants.items():
        # much faster variants run several times a round, or the slow ones would run for minutes until the
        # fast have their seconds
        repeats = max(
            int(slowest / typical[name] / 2),
            int(protocol.settle_seconds / typical[name]) if several else 0,
            1,
        )
        turns.append((name, call, repeats))
    samples: dict[str, list[int]] = {name: [] for name in variants}
    spent = dict.fromkeys(variants, 0)
    need = protocol.seconds * 1e9
    rounds = 0
    while (count := min(map(len, samples.values()))) < protocol.iters or min(spent.values()) < need:
        for name, call, repeats in turns:
            if several:
                _settle(call, protocol.settle_seconds)
            for _ in range(repeats):
                start = time.perf_counter_ns()
                call()
                elapsed = time.perf_counter_ns() - start
                samples[name].append(elapsed)
                spent[name] += elapsed
        rounds += 1
        if progress and rounds % 20 == 0:
            progress(min(count / max(1, protocol.iters), min(spent.values()) / need if need else 1.0, 1.0))
    if progress:
        progress(1.0)
    return {name: np.array(values) for name, values in samples.items()}


def _settle(call: Callable[[], object], seconds: float) -> None:
    """Call at least once, and until ``seconds`` have passed."""
    begin = time.perf_counter()
    call()
    while time.perf_counter() - begin < seconds:
        call()


def _warm_up(call: Callable[[], object], protocol: Protocol) -> float:
    """Until iterations and time have passed and the medians of the last two windows of 10 agree within 2 %.

    Returns the median of the last 10 in seconds.
    """
    times: list[float] = []
    begin = time.perf_counter()
    while True:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        passed = time.perf_counter() - begin
        enough = len(times) >= max(1, protocol.warmup_iters) and passed >= protocol.warmup_seconds
        stable = len(times) < 20 or abs(np.median(times[-10:]) / np.median(times[-20:-10]) - 1) < 0.02
        if (enough and stable) or passed >= max(WARMUP_LIMIT_S, protocol.warmup_seconds):
            return max(CLOCK_FLOOR_S, float(np.median(times[-10:])))


def throughput(predictor: Predictor, batch: np.ndarray, seconds: float) -> float:
    """Images a second with as many concurrent requests as the runtime recommends."""
    workers = max(1, predictor.session.parallelism)
    predictor.outputs(batch)
    counts = [0] * workers
    start = time.perf_counter()

    def work(index: int) -> None:
        infer = bound(predictor.session, batch)
        while time.perf_counter() - start < seconds:
            infer()
            counts[index] += len(batch)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - start)


def sustained(predictor: Predictor, batch: np.ndarray, seconds: float) -> tuple[int, float]:
    """One request after the other for ``seconds``: images done and milliseconds taken."""
    infer = bound(predictor.session, batch)
    images, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        infer()
        images += len(batch)
    return images, 1e3 * elapsed


def _on_device(predictor: Predictor, batch: np.ndarray, count: int) -> OnDevice | None:
    times = predictor.session.device_times(batch, count)
    return (
        None
        if times is None
        else OnDevice(*(summarise(1e6 * t) for t in (times.compute, times.with_copies, times.enqueue)))
    )


def benchmark(
    bundles: Sequence[Bundle],
    *,
    backend: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    images: Sequence[bytes] = (),
    protocol: Protocol = Protocol(),
    with_throughput: bool = True,
    progress: Callable[[str, float], None] | None = None,
    load: Callable[..., Predictor] = Predictor.load,
) -> Benchmark:
    """Measure bundles side by side.

    Args:
        bundles: at least one; the first is what ratios refer to.
        backend, device, threads: as :meth:`cmt_edge.deploy.Predictor.load`.
        images: encoded images for the end-to-end figure; default: the golden source images of each bundle.
        protocol: how long.
        with_throughput: also measure many requests at once.
        progress: called with the name of the phase and its share done.
        load: opens a bundle, as :meth:`cmt_edge.deploy.Predictor.load`.
    """
    report = progress or (lambda phase, share: None)
    names = _names(bundles)
    with contextlib.ExitStack() as stack:
        predictors = {}
        for name, bundle in zip(names, bundles, strict=True):
            predictor = load(bundle, backend=backend, device=device, threads=threads)
            predictors[name] = stack.enter_context(predictor)
        batches = {n: golden_batch(b, p) for (n, p), b in zip(predictors.items(), bundles, strict=True)}
        calls = {n: bound(p.session, batches[n]) for n, p in predictors.items()}
        model = interleaved(calls, protocol, lambda s: report("latency, model only", s))
        encoded = [images or b.golden().sources for b in bundles]
        calls = {n: _end_to_end_call(p, e) for (n, p), e in zip(predictors.items(), encoded, strict=True)}
        whole = interleaved(calls, protocol, lambda s: report("latency, end to end", s))
        executed = {n: p.session.executed(batches[n]) for n, p in predictors.items()}
        clocks = {n: _on_device(p, batches[n], protocol.iters) for n, p in predictors.items()}
    rates: dict[str, float | None] = dict.fromkeys(names)
    if with_throughput:
        for n, b in zip(names, bundles, strict=True):
            report(f"throughput of {n}", 0.0)
            with load(b, backend=backend, device=device, threads=threads, throughput=True) as p:
                rates[n] = throughput(p, batches[n], max(0.5, protocol.seconds / 2))
    results = [
        _measured(
            n, b, predictors[n], batches[n], executed[n], model, whole[n], rates[n], names[0], clocks[n]
        )
        for n, b in zip(names, bundles, strict=True)
    ]
    return Benchmark(results, describe(), versions(), threads, protocol)


def _names(bundles: Sequence[Bundle]) -> list[str]:
    """Folder names, numbered where they repeat."""
    names: list[str] = []
    for bundle in bundles:
        name = bundle.name
        names.append(name if name not in names else f"{name} #{len(names) + 1}")
    return names


def golden_batch(bundle: Bundle, predictor: Predictor) -> np.ndarray:
    """A batch of golden inputs, ``(N, 3, S, S)``, in the graph's batch size."""
    pixels = bundle.golden().pixels
    count = predictor.batch or 1
    return normalise(np.resize(pixels, (count, *pixels.shape[1:])), bundle.preprocess)


def bound(session: Session, batch: np.ndarray) -> Callable[[], object]:
    """The inference of ``batch``, which lies where the runtime reads it: what
    :class:`~cmt_edge.deploy.Predictor` runs on an image once prepared."""
    binding = session.bind(batch.shape)
    binding.batch[:] = batch
    return binding.run


def _end_to_end_call(predictor: Predictor, images: Sequence[bytes]) -> Callable[[], object]:
    """Each call takes the next ``batch`` encoded images from bytes to labels or feature maps."""
    position = 0

    def call() -> object:
        nonlocal position
        count = predictor.batch or 1
        chosen = [images[(position + i) % len(images)] for i in range(count)]
        position += count
        files = [io.BytesIO(c) for c in chosen]
        if predictor.head != LOGITS:
            return predictor.features(predictor.prepare(files))
        return [p.label for p in predictor.predict(files)]

    return call


def _measured(
    name: str,
    bundle: Bundle,
    predictor: Predictor,
    batch: np.ndarray,
    executed: ExecutedPrecision,
    model: dict[str, np.ndarray],
    whole: np.ndarray,
    rate: float | None,
    base: str,
    clock: OnDevice | None,
) -> Measured:
    latency = summarise(model[name])
    rng = np.random.default_rng(0)
    ratios = _bootstrap_medians(model[base], rng) / _bootstrap_medians(model[name], rng)
    warnings = precision_warnings(bundle.manifest.precision, executed)
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
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Measured(
        name,
        bundle.manifest.precision,
        RanOn(**predictor.info),
        len(batch),
        bundle.manifest.size_bytes,
        executed,
        latency,
        summarise(whole),
        rate,
        float(np.median(model[base]) / np.median(model[name])),
        (float(low), float(high)),
        warnings,
        clock,
    )


def summary(speed: Benchmark) -> LatencyEntry:
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


def precision_warnings(asked: str, executed: ExecutedPrecision) -> list[str]:
    """A sentence where what ran is not what was asked for: most of the time went to another precision."""
    share = executed.time_share
    if not share or max(share, key=lambda k: share[k]) == asked:
        return []
    spent = f"{100 * share.get(asked, 0):.0f} %"
    return [
        f"{asked} was asked for, but the runtime spent only {spent} of its time in it: {executed.summary()}"
    ]
