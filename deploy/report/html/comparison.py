"""The page of several bundles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cmt_edge.startup import name_program

from ...measure.benchmark import Benchmark, Measured
from ..benchmark import describe_protocol, find_fastest
from .accuracy import draw_drop, find_reach
from .charts import draw_bar, draw_histogram
from .conclusion import Conclusion, State, conclude
from .elements import (
    UNKNOWN,
    Markup,
    Table,
    join,
    make,
    make_code,
    make_facts,
    make_hash,
    make_list,
    make_name,
)
from .frame import assemble, make_conclusion_json, write_verdict, write_word
from .origin import make_export_command
from .scatter import Point, draw_scatter
from .subject import Subject

LATENCY_HEADER = (
    "batch",
    "median, ms",
    "",
    "95 % interval",
    "p95",
    "image to answer",
    "images per second",
)
"""Heads of what a table tells of latency, whatever its rows are; the one without a name is of bars."""


def make_comparison_page(subjects: Sequence[Subject], speed: Benchmark | None = None) -> str:
    """The page of several bundles.

    Args:
        subjects: in the order of the table.
        speed: the run that measured all of them interleaved, in the same order; ``None`` where each was
            measured by itself, so that their latencies do not compare well.
    """
    found = [conclude(subject) for subject in subjects]
    sections = [
        ("Bundles", _write_overview(subjects, found)),
        ("Accuracy", write_accuracies(subjects)),
        ("Latency", _write_latencies(subjects, speed)),
        ("Weights", _write_weights(subjects)),
        ("Warnings", write_warnings(subjects)),
        ("Environment", _write_environments(subjects, speed)),
        ("How to reproduce it", _write_comparison_commands(subjects)),
    ]
    title = f"Comparison of {len(subjects)} bundles"
    top = [make("h1", title), write_verdict(compare(subjects, found, speed))]
    return assemble(title, top, sections, make_comparison_figures(subjects, speed))


def make_comparison_figures(subjects: Sequence[Subject], speed: Benchmark | None = None) -> dict[str, Any]:
    """What the page of several bundles shows, for a program; arguments as :func:`make_comparison_page`."""
    found = [conclude(subject) for subject in subjects]
    return {
        "conclusion": make_conclusion_json(compare(subjects, found, speed)),
        "benchmark": speed,
        "bundles": [
            subject.to_json(with_speed=speed is None) | {"conclusion": make_conclusion_json(one)}
            for subject, one in zip(subjects, found, strict=True)
        ],
    }


def compare(
    subjects: Sequence[Subject],
    found: Sequence[Conclusion],
    speed: Benchmark | None,
) -> Conclusion:
    """Which of several bundles may be shipped; with interleaved figures also which is the fastest of them."""
    able = [place for place, conclusion in enumerate(found) if conclusion.state is State.SHIP]
    if not able:
        is_hopeless = all(conclusion.state is State.STOP for conclusion in found)
        state = State.STOP if is_hopeless else State.CHECK
        return Conclusion(state, f"none of the {len(found)} bundles can be shipped as it is")
    names = ", ".join(subjects[place].name for place in able)
    if speed is None or len(able) == 1:
        verb = "is" if len(able) == 1 else "are"
        note = "" if len(able) == 1 else f"; {name_program('bench')} tells which of them is the fastest"
        return Conclusion(State.SHIP, f"{names} {verb} verified within the allowed drop{note}")
    fastest, rival = find_fastest([speed.results[place] for place in able])
    clear = f", with no clear difference from {rival.name}" if rival else ""
    return Conclusion(
        State.SHIP,
        f"{fastest.name} is the fastest of those within the allowed drop ({names}){clear}",
    )


def _write_overview(subjects: Sequence[Subject], found: Sequence[Conclusion]) -> Markup:
    largest = max((subject.size_bytes for subject in subjects), default=1) or 1
    rows = [
        [
            subject.name,
            write_word(one.state),
            subject.manifest.format,
            subject.executed,
            f"{subject.size_bytes / 1e6:.1f}",
            draw_bar(subject.size_bytes / largest),
            format_memory(subject),
        ]
        for subject, one in zip(subjects, found, strict=True)
    ]
    header = ["bundle", "verdict", "format", "really ran", "MB", "", "memory, MB"]
    reasons = [f"{subject.name}: {one.sentence}" for subject, one in zip(subjects, found, strict=True)]
    return join([Table("What each comes to", header, rows).write(), make_list(reasons)])


def write_accuracies(subjects: Sequence[Subject], what: str = "bundle") -> Markup:
    """Top-1 of each, beside its reference; ``what`` is a row of the table."""
    reach = find_reach([subject.data for subject in subjects if subject.data])
    rows = [_list_accuracy_cells(subject, reach) for subject in subjects]
    header = [what, "images", "reference top-1 %", "top-1 %", "agreement %", "drop (95 % interval)", ""]
    note = make("p", "The line in a picture of a drop is what was allowed.", class_="soft")
    return join([Table("Labelled images, as each was verified", header, rows).write(), note])


def _list_accuracy_cells(subject: Subject, reach: float) -> list[str]:
    data = subject.data
    if data is None:
        return [subject.name, "not measured", *[UNKNOWN] * 4, ""]
    low, high = data.drop_ci
    return [
        subject.name,
        str(data.images),
        f"{data.reference_top1:.2f}",
        f"{data.top1:.2f}",
        f"{data.agreement:.2f}",
        f"{data.drop:+.2f} ({low:+.2f} to {high:+.2f})",
        draw_drop(data, reach),
    ]


def _write_latencies(subjects: Sequence[Subject], speed: Benchmark | None) -> Markup:
    slowest = max((subject.p50_ms or 0 for subject in subjects), default=0) or 1.0
    rows = [_list_latency_cells(subject, slowest, speed is not None) for subject in subjects]
    header = ["bundle", *LATENCY_HEADER]
    if speed:
        header.append("speed-up (95 % interval)")
        how = (
            f"Measured in one run, {describe_protocol(speed.protocol)}; speed-ups refer to the first bundle."
        )
    else:
        how = (
            "Each bundle was measured by itself, maybe on another day or another machine, so that these"
            f" figures do not compare well. {name_program('bench')} measures bundles in turns."
        )
    table = Table("Milliseconds of one batch", header, rows).write()
    plot = _draw_losses(subjects) if speed else Markup()
    return join([make("p", how), table, plot, draw_distributions(subjects)])


def _draw_losses(subjects: Sequence[Subject]) -> Markup:
    """Drop against latency, of bundles of one batch size whose top-1 is known."""
    if len({subject.batch for subject in subjects}) > 1:
        return Markup()
    known = [(subject, subject.data, subject.p50_ms) for subject in subjects]
    points = [Point(one.name, p50, data.drop, data.drop_ci) for one, data, p50 in known if data and p50]
    limits = [data.max_drop for _, data, _ in known if data]
    return draw_scatter(points, min(limits, default=0.0), "Drop of top-1")


def draw_distributions(subjects: Sequence[Subject]) -> Markup:
    """The histograms of all bundles, one below the other on one scale."""
    timed = [(subject.name, subject.measured.model) for subject in subjects if subject.measured]
    found = [latency.histogram for _, latency in timed if latency.histogram]
    if not found:
        return Markup()
    scale = min(one.low for one in found), max(one.high for one in found)
    return join(draw_histogram(latency, name, scale) for name, latency in timed)


def _list_latency_cells(subject: Subject, slowest: float, is_interleaved: bool) -> list[str]:
    median = subject.p50_ms
    if median is None or subject.batch is None:
        return [subject.name, "not measured", *[UNKNOWN] * 6, *([UNKNOWN] if is_interleaved else [])]
    cells = [subject.name, str(subject.batch), f"{median:.2f}", draw_bar(median / slowest)]
    measured = subject.measured
    if measured is None:
        return [*cells, *[UNKNOWN] * 4]
    return [*cells, *list_measured_cells(measured), *_list_ratio_cells(measured, is_interleaved)]


def list_measured_cells(measured: Measured) -> list[str]:
    """What stands below the last four of :data:`LATENCY_HEADER`."""
    low, high = measured.model.ci
    rate = measured.throughput
    return [
        f"{low:.2f} to {high:.2f}",
        f"{measured.model.p95:.2f}",
        f"{measured.end_to_end.p50:.2f}",
        UNKNOWN if rate is None else f"{rate:.0f}",
    ]


def _list_ratio_cells(measured: Measured, is_interleaved: bool) -> list[str]:
    low, high = measured.ratio_ci
    return [f"{measured.ratio:.2f} ({low:.2f} to {high:.2f})"] if is_interleaved else []


def _write_weights(subjects: Sequence[Subject]) -> Markup:
    """Which weights each bundle holds, and a sentence where they are not the same."""
    entries = [subject.manifest.model.weights for subject in subjects]
    rows = [
        [subject.name, make_name(subject.manifest.model.name), entry.source, make_hash(entry.sha256)]
        for subject, entry in zip(subjects, entries, strict=True)
    ]
    differ = len({entry.sha256 for entry in entries}) > 1
    note = make("p", "These bundles do not hold the same weights: they are different models.")
    table = Table("Weights", ["bundle", "model", "weights", "hash"], rows, is_numeric=False).write()
    return join([*([note] if differ else []), table])


def write_warnings(subjects: Sequence[Subject]) -> Markup:
    texts = [f"{subject.name}: {warning}" for subject in subjects for warning in subject.list_warnings()]
    return make_list(texts, "warnings")


def _write_environments(subjects: Sequence[Subject], speed: Benchmark | None) -> Markup:
    """The machine of the run, or those of the exports."""
    if speed:
        host = speed.host
        versions = ", ".join(f"{name} {version}" for name, version in speed.versions.items())
        facts = [("CPU", f"{host.cpu}, {host.cores} cores"), ("system", host.system), ("versions", versions)]
        return make_facts(facts)
    hosts = ((subject.name, subject.manifest.host) for subject in subjects)
    return make_facts([(name, f"{host.cpu}, {host.cores} cores") for name, host in hosts if host])


def _write_comparison_commands(subjects: Sequence[Subject]) -> Markup:
    paths = " ".join(subject.path for subject in subjects)
    exports = [make_export_command(subject.manifest) for subject in subjects]
    return make_code([*exports, f"{name_program('bench')} {paths}"])


def format_memory(subject: Subject) -> str:
    """The most megabytes that a process holds which opens the bundle."""
    memory = subject.measured.memory if subject.measured else None
    return UNKNOWN if memory is None else f"{memory.peak / 1e6:.0f}"
