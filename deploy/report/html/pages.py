"""Whole pages: one of a bundle, one of several."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

from ...bundle import LOGITS, make_plain
from ...measure.benchmark import Benchmark, Measured
from ..benchmark import describe_protocol, find_fastest
from .accuracy import draw_drop, find_reach, write_accuracy
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
from .origin import (
    make_export_command,
    write_commands,
    write_environment,
    write_files,
    write_images,
    write_model,
    write_preprocessing,
    write_steps,
)
from .scatter import Point, draw_scatter
from .speed import write_candidates, write_device, write_latency, write_precision
from .style import make_head
from .subject import Subject

Section = tuple[str, Markup]
"""Title and content; a section without content is left out."""


def make_bundle_page(subject: Subject) -> str:
    """The page of one bundle."""
    manifest, found = subject.manifest, conclude(subject)
    verdict = write_candidates(manifest.verdict) if manifest.verdict else Markup()
    sections = [
        ("Accuracy", write_accuracy(subject)),
        ("Precision", write_precision(subject)),
        ("Latency", write_latency(subject)),
        (f"Why {manifest.precision}", verdict),
        ("Device", write_device(subject)),
        ("Size", write_files(manifest)),
        ("Steps", write_steps(manifest)),
        ("Model", write_model(manifest)),
        ("Preprocessing", write_preprocessing(manifest)),
        ("Calibration images", write_images(manifest)),
        ("Environment", write_environment(subject)),
        ("How to reproduce it", write_commands(subject)),
    ]
    top = [
        make("h1", make_name(subject.name)),
        _write_verdict(found),
        _write_tiles(subject),
        make_list([text for text in subject.list_warnings() if text != found.why], "warnings"),
    ]
    data = subject.to_json() | {"conclusion": make_conclusion_json(found)}
    return _assemble(subject.name, top, sections, data)


def make_conclusion_json(found: Conclusion) -> dict[str, str]:
    """A conclusion for a program: ``{"state": "ship" | "check" | "stop", "sentence": ...}``."""
    return {"state": found.state.name.lower(), "sentence": found.sentence}


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
        ("Accuracy", _write_accuracies(subjects)),
        ("Latency", _write_latencies(subjects, speed)),
        ("Weights", _write_weights(subjects)),
        ("Warnings", _write_warnings(subjects)),
        ("Environment", _write_environments(subjects, speed)),
        ("How to reproduce it", _write_comparison_commands(subjects)),
    ]
    title = f"Comparison of {len(subjects)} bundles"
    verdict = compare(subjects, found, speed)
    data = {
        "conclusion": make_conclusion_json(verdict),
        "benchmark": speed,
        "bundles": [
            subject.to_json(with_speed=speed is None) | {"conclusion": make_conclusion_json(one)}
            for subject, one in zip(subjects, found, strict=True)
        ],
    }
    return _assemble(title, [make("h1", title), _write_verdict(verdict)], sections, data)


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
        note = "" if len(able) == 1 else "; cmt-bench tells which of them is the fastest"
        return Conclusion(State.SHIP, f"{names} {verb} verified within the allowed drop{note}")
    fastest, rival = find_fastest([speed.results[place] for place in able])
    clear = f", with no clear difference from {rival.name}" if rival else ""
    return Conclusion(
        State.SHIP,
        f"{fastest.name} is the fastest of those within the allowed drop ({names}){clear}",
    )


def _write_overview(subjects: Sequence[Subject], found: Sequence[Conclusion]) -> Markup:
    largest = max((subject.manifest.size_bytes for subject in subjects), default=1) or 1
    rows = [
        [
            subject.name,
            _write_word(one.state),
            subject.manifest.format,
            subject.executed,
            f"{subject.manifest.size_bytes / 1e6:.1f}",
            draw_bar(subject.manifest.size_bytes / largest),
        ]
        for subject, one in zip(subjects, found, strict=True)
    ]
    header = ["bundle", "verdict", "format", "really ran", "MB", ""]
    reasons = [f"{subject.name}: {one.sentence}" for subject, one in zip(subjects, found, strict=True)]
    return join([Table("What each comes to", header, rows).write(), make_list(reasons)])


def _write_accuracies(subjects: Sequence[Subject]) -> Markup:
    reach = find_reach([subject.data for subject in subjects if subject.data])
    rows = [_list_accuracy_cells(subject, reach) for subject in subjects]
    header = ["bundle", "images", "reference top-1 %", "top-1 %", "agreement %", "drop (95 % interval)", ""]
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
    header = [
        "bundle",
        "batch",
        "median, ms",
        "",
        "95 % interval",
        "p95",
        "image to answer",
        "images per second",
    ]
    if speed:
        header.append("speed-up (95 % interval)")
        how = (
            f"Measured in one run, {describe_protocol(speed.protocol)}; speed-ups refer to the first bundle."
        )
    else:
        how = (
            "Each bundle was measured by itself, maybe on another day or another machine, so that these"
            " figures do not compare well. cmt-bench measures bundles in turns."
        )
    table = Table("Milliseconds of one batch", header, rows).write()
    plot = _draw_losses(subjects) if speed else Markup()
    return join([make("p", how), table, plot, _draw_distributions(subjects)])


def _draw_losses(subjects: Sequence[Subject]) -> Markup:
    """Drop against latency, of bundles of one batch size whose top-1 is known."""
    if len({subject.batch for subject in subjects}) > 1:
        return Markup()
    known = [(subject, subject.data, subject.p50_ms) for subject in subjects]
    points = [Point(one.name, p50, data.drop, data.drop_ci) for one, data, p50 in known if data and p50]
    limits = [data.max_drop for _, data, _ in known if data]
    return draw_scatter(points, min(limits, default=0.0), "Drop of top-1")


def _draw_distributions(subjects: Sequence[Subject]) -> Markup:
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
    return [*cells, *_list_measured_cells(measured), *_list_ratio_cells(measured, is_interleaved)]


def _list_measured_cells(measured: Measured) -> list[str]:
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


def _write_warnings(subjects: Sequence[Subject]) -> Markup:
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
    return make_code([*exports, f"cmt-bench {paths}"])


def _write_verdict(found: Conclusion) -> Markup:
    word = make("span", found.state.value, class_="word")
    rest = found.sentence.removeprefix(found.state.value)
    return make("p", word, rest, class_=f"verdict {found.state.name.lower()}", role="status")


def _write_word(state: State) -> Markup:
    return make("span", state.value, class_=f"word {state.name.lower()}")


def _write_tiles(subject: Subject) -> Markup:
    median = subject.p50_ms
    tiles = [
        _describe_accuracy(subject),
        ("median latency", UNKNOWN if median is None else f"{median:.2f} ms"),
        ("size", f"{subject.manifest.size_bytes / 1e6:.1f} MB"),
        ("really ran", subject.executed),
    ]
    return make_facts(tiles, "tiles")


def _describe_accuracy(subject: Subject) -> tuple[str, str]:
    """Name and value of what tells most about the accuracy."""
    if subject.data:
        return "drop of top-1", f"{subject.data.drop:+.2f} points"
    if subject.manifest.model.head == LOGITS or subject.verification is None:
        return "drop of top-1", "not measured"
    golden = subject.verification.golden
    return "largest difference", f"{golden.diff:.2g} in {golden.output}"


def _assemble(title: str, top: Sequence[Markup], sections: Sequence[Section], data: Any) -> str:
    """The page: head, top, list of its sections, sections, data."""
    shown = [(name, content) for name, content in sections if content]
    links = make_list([make("a", name, href=f"#{_make_anchor(name)}") for name, _ in shown])
    bodies = [make("section", make("h2", name, id=_make_anchor(name)), content) for name, content in shown]
    body = make(
        "body",
        make("main", *top, make("nav", links, aria_label="On this page"), *bodies),
        _write_footer(data),
    )
    return f"<!doctype html>\n{make('html', make_head(title), body, lang='en')}\n"


def _write_footer(data: Any) -> Markup:
    """The figures of the page for a program, and what the page leaves out."""
    text = json.dumps(make_plain(data), ensure_ascii=False)
    address = f"data:application/json;base64,{base64.b64encode(text.encode()).decode()}"
    link = make("a", "the figures of this page as JSON", href=address, download="report.json")
    note = (
        " A bundle holds no labelled images, so the page shows none of those whose answers changed. It holds"
        " no error of single layers either."
    )
    return make("footer", make("p", "Download ", link, ".", note))


def _make_anchor(name: str) -> str:
    return "-".join(name.lower().split())
