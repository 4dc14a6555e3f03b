"""The sections about speed: latency, precisions that ran, the candidates of ``auto``, the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ...bundle.sections import Candidate, ExecutedPrecision, Speed, VerdictEntry
from ...measure.benchmark import Benchmark, Measured
from ...measure.stages import Stages
from ...measure.statistics import Latency
from ..benchmark import describe_protocol
from ..compiled import describe_compiled
from ..device import describe_power, describe_state
from ..verdict import describe_recommendation
from .breakdown import write_breakdown
from .charts import draw_bar, draw_histogram
from .elements import UNKNOWN, Markup, Table, join, make, make_facts, make_list
from .scatter import Point, draw_scatter
from .subject import Subject

Facts = list[tuple[str, str]]
"""Names and values."""


def write_precision(subject: Subject) -> Markup:
    """What was asked for, and what the runtime made of it."""
    latency, measured = subject.manifest.latency, subject.measured
    executed = measured.executed if measured else latency.executed if latency else None
    parts = [make_facts([("asked for", subject.manifest.precision), ("really ran", subject.executed)])]
    if executed:
        parts.append(_write_executed(executed))
    if measured:
        parts.append(write_breakdown(measured.breakdown))
    if typing := subject.manifest.typing:
        counts = sorted(typing.operations.items(), key=lambda item: -item[1])
        rows = [[name, str(count)] for name, count in counts]
        parts.append(Table("Precision written into the graph", ["precision", "operations"], rows).write())
        kept = [f"{island.node} ({island.op}): {island.reason}" for island in typing.islands]
        parts += [make("p", "Operations that stay float32:"), make_list(kept)] if kept else []
    if compiled := subject.manifest.compiled:
        parts.append(make_list(describe_compiled(compiled).splitlines()))
    return join(parts)


def _write_executed(executed: ExecutedPrecision) -> Markup:
    names = sorted(
        {*executed.time_share, *executed.operations}, key=lambda name: -executed.time_share.get(name, 0)
    )
    rows = [
        [
            name,
            f"{100 * executed.time_share[name]:.1f} %" if name in executed.time_share else UNKNOWN,
            draw_bar(executed.time_share.get(name, 0)),
            str(executed.operations.get(name, UNKNOWN)),
        ]
        for name in names
    ]
    caption = f"What really ran, by {executed.source or 'the runtime'}"
    table = Table(caption, ["precision", "share of the time", "", "operations"], rows).write()
    if not executed.time_share:
        return table
    spent = f"{100 * executed.conversion_share:.1f} % of the time goes to reorders and conversions of types."
    return join([table, make("p", spent)])


def write_latency(subject: Subject) -> Markup:
    """Percentiles, distribution and conditions of the measurement."""
    if subject.measured and subject.speed:
        return join(_list_latency_parts(subject.measured, subject.speed))
    entry = subject.manifest.latency
    if entry is None:
        return make("p", "Latency was not measured here: the bundle is for another device.")
    low, high = entry.ci_ms
    facts = [
        ("median", f"{entry.p50_ms:.2f} ms (95 % interval {low:.2f} to {high:.2f})"),
        ("95th percentile", f"{entry.p95_ms:.2f} ms"),
        ("median from image file to answer", f"{entry.end_to_end_p50_ms:.2f} ms"),
        ("batch", str(entry.batch)),
        ("threads", str(entry.threads or "all")),
    ]
    return make_facts(facts)


def _list_latency_parts(measured: Measured, speed: Benchmark) -> Iterator[Markup]:
    timed = list_latencies(measured)
    yield _write_percentiles(timed)
    if measured.stages:
        yield _write_stages(measured.stages)
    for name, latency in timed.items():
        yield draw_histogram(latency, name)
    facts = [
        ("batch", str(measured.batch)),
        ("threads", str(speed.threads or "all")),
        ("runtime", measured.runtime.summary()),
        ("calls", ", ".join(f"{name}: {latency.count}" for name, latency in timed.items())),
        (
            "drift, first to last 100 calls",
            ", ".join(f"{name}: {100 * latency.drift:+.1f} %" for name, latency in timed.items()),
        ),
        ("how", describe_protocol(speed.protocol)),
    ]
    if measured.throughput is not None:
        facts.insert(0, ("throughput, many requests at once", f"{measured.throughput:.0f} images/s"))
    yield make_facts(facts)


def _write_stages(stages: Stages) -> Markup:
    """Decoding, resizing and inference as parts of one answer."""
    named = {"decode": stages.decode, "resize and normalise": stages.resize, "infer": stages.infer}
    total = sum(latency.p50 for latency in named.values()) or 1.0
    rows = [
        [
            name,
            f"{part.p50:.2f}",
            f"{part.ci[0]:.2f} to {part.ci[1]:.2f}",
            f"{part.p95:.2f}",
            draw_bar(part.p50 / total),
        ]
        for name, part in named.items()
    ]
    caption = f"Parts of an answer in one thread, milliseconds of a batch, {stages.infer.count} calls"
    return Table(caption, ["part", "median", "95 % interval", "p95", ""], rows).write()


def list_latencies(measured: Measured) -> dict[str, Latency]:
    """The figures that are easily confused, by what they time."""
    named = {"model alone": measured.model, "image file to answer": measured.end_to_end}
    if clock := measured.on_device:
        named |= {
            "device's clock, inference": clock.compute,
            "device's clock, with copies": clock.with_copies,
            "host, starting it": clock.enqueue,
        }
    return named


def _write_percentiles(timed: Mapping[str, Latency]) -> Markup:
    most = max(latency.p95 for latency in timed.values()) or 1.0
    rows = [
        [
            name,
            f"{latency.p50:.2f}",
            f"{latency.ci[0]:.2f} to {latency.ci[1]:.2f}",
            f"{latency.p90:.2f}",
            f"{latency.p95:.2f}",
            UNKNOWN if latency.p99 is None else f"{latency.p99:.2f}",
            f"{latency.max:.2f}",
            draw_bar(latency.p50 / most),
        ]
        for name, latency in timed.items()
    ]
    header = ["what", "median", "95 % interval", "p90", "p95", "p99", "max", ""]
    return Table("Milliseconds of one batch; p99 needs 1000 calls", header, rows).write()


def write_candidates(verdict: VerdictEntry) -> Markup:
    """What ``--precision auto`` measured and chose."""
    slowest = max((c.speed.p50 for c in verdict.candidates if c.speed), default=1.0) or 1.0
    rows = [_list_candidate_cells(c, c.variant == verdict.winner, slowest) for c in verdict.candidates]
    drop = "drop, points (95 % interval)" if verdict.labelled else "disagreement, % (95 % interval)"
    header = ["candidate", "top-1 %", drop, "median, ms", "", "speed-up", "MB", "result"]
    parts = [
        Table("Candidates, measured interleaved", header, rows).write(),
        draw_scatter(list(_list_points(verdict)), verdict.max_drop, drop.partition(",")[0].capitalize()),
        make_list(describe_recommendation(verdict).splitlines()),
    ]
    if verdict.sensitivity:
        parts.append(_write_sensitivity(verdict))
    return join([*parts, make_list(list(verdict.notes))])


def _list_points(verdict: VerdictEntry) -> Iterator[Point]:
    for candidate in verdict.candidates:
        accuracy, speed = candidate.accuracy, candidate.speed
        if accuracy and speed:
            yield Point(candidate.variant.name, speed.p50, accuracy.drop, accuracy.drop_ci)


def _list_candidate_cells(candidate: Candidate, is_best: bool, slowest: float) -> list[str]:
    accuracy = candidate.accuracy
    top1 = accuracy.top1 if accuracy else None
    drop = UNKNOWN
    if accuracy:
        low, high = accuracy.drop_ci
        drop = f"{accuracy.drop:+.2f} ({low:+.2f} to {high:+.2f})"
    return [
        candidate.variant.name,
        UNKNOWN if top1 is None else f"{top1:.2f}",
        drop,
        *_list_speed_cells(candidate.speed, slowest),
        "chosen" if is_best else candidate.why_not or "passes",
    ]


def _list_speed_cells(speed: Speed | None, slowest: float) -> list[str]:
    if speed is None:
        return [UNKNOWN, "", UNKNOWN, UNKNOWN]
    low, high = speed.ratio_ci
    return [
        f"{speed.p50:.2f}",
        draw_bar(speed.p50 / slowest),
        f"{speed.ratio:.2f} ({low:.2f} to {high:.2f})",
        f"{speed.size_bytes / 1e6:.1f}",
    ]


def _write_sensitivity(verdict: VerdictEntry) -> Markup:
    most = max(item.accuracy.deviation for item in verdict.sensitivity) or 1.0
    rows = [
        [
            item.group,
            str(item.nodes),
            f"{item.accuracy.deviation:.4f}",
            draw_bar(item.accuracy.deviation / most),
            f"{item.accuracy.agreement:.2f}",
        ]
        for item in verdict.sensitivity
    ]
    header = ["group", "operations", "deviation of the logits", "", "agreement %"]
    caption = "Each group of operations alone in int8, in standard deviations of fp32's logits"
    return Table(caption, header, rows).write()


def write_device(subject: Subject) -> Markup:
    """The device that ``cmt-build`` ran on: engine, power, state."""
    found = subject.device
    if found is None:
        return Markup()
    key = found.key
    facts: Facts = [
        ("GPU", f"{key.gpu} (sm {key.sm})"),
        ("software", f"TensorRT {key.tensorrt}, CUDA {key.cuda}, driver {key.driver}"),
        ("engine", f"{found.engine_bytes / 1e6:.1f} MB, built in {found.built_s:.0f} s"),
        ("layers at the asked precision or below", f"{100 * found.low_precision_share:.0f} %"),
    ]
    return join([make_facts(facts), make_list([*describe_power(found.power), *describe_state(found.state)])])
