"""What :mod:`peers` writes: its results as a table and a plot, and earlier results read back."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common import Ratio, format_latency, format_machine, format_ratio

from cmt_edge.deploy.files import write_atomic
from cmt_edge.deploy.measure.isa import ISAS
from cmt_edge.deploy.measure.statistics import Latency
from cmt_edge.deploy.measure.timing import Protocol
from cmt_edge.deploy.report import format_table

RUNS = "runs"
"""Under what a JSON file holds several runs."""
BASE = "ov_fp32"
"""Key of the row that ratios refer to."""
IMAGES = 8
"""Number of images that are compared with PyTorch."""
INFERENCES = 20
"""Number of inferences before a process's memory is read."""


@dataclass
class Result:
    """What was found out about one row; ``note`` says why the rest is missing. Times in seconds, memory and
    sizes in bytes; ``best`` is the fastest call in milliseconds, ``best_ratio`` the base's fastest over
    it."""

    key: str
    label: str
    ours: bool
    note: str = ""
    latency: Latency | None = None
    ratio: Ratio | None = None
    best: float | None = None
    best_ratio: float | None = None
    images_per_second: float | None = None
    requests: int = 1
    bytes_read: int | None = None
    bytes_on_disk: int | None = None
    export_s: float | None = None
    export_peak: int | None = None
    running_peak: int | None = None
    deviation: float | None = None
    executed: str = ""
    warnings: list[str] = field(default_factory=list)


DRIFTED = re.compile(r"latency drifted by ([+-]\d+) %")
"""Matches a warning that the machine changed while a row was measured."""

HEADER = (
    "row",
    "p50 ms",
    "speed-up (95 % CI)",
    "best ms (speed-up)",
    "images/s (requests)",
    "MB read",
    "MB on disk",
    "export s",
    "export peak MB",
    "running peak MB",
    "logits off, std",
    "what really ran",
)
"""Heads of the table."""


def cells(r: Result) -> list[str]:
    """One line of the Markdown table."""
    mb = [
        None if n is None else n / 1e6 for n in (r.bytes_read, r.bytes_on_disk, r.export_peak, r.running_peak)
    ]
    read, disk, export_peak, running_peak = (
        "-" if n is None else f"{n:.1f}" if n < 1000 else f"{n:.0f}" for n in mb
    )
    images = "-" if r.images_per_second is None else f"{r.images_per_second:.1f} ({r.requests})"
    seconds = "-" if r.export_s is None else f"{r.export_s:.1f}"
    best = "-" if r.best is None else f"{r.best:.2f} ({r.best_ratio:.2f})"
    off = "-" if r.deviation is None else f"{r.deviation:.1e}"
    return [
        r.label,
        format_latency(r.latency),
        format_ratio(r.ratio),
        best,
        images,
        read,
        disk,
        seconds,
        export_peak,
        running_peak,
        off,
        r.executed or "-",
    ]


def format_results(rows: Sequence[Result]) -> str:
    """The Markdown table of one model, without the columns that no row has."""
    lines = [cells(r) for r in rows]
    shown = [i for i in range(len(HEADER)) if any(line[i] != "-" for line in lines)]
    return format_table(
        [HEADER[i] for i in shown],
        [[line[i] for i in shown] for line in lines],
        markdown=True,
    )


def format_markdown(
    content: dict[str, Any],
    results: dict[str, list[Result]],
    protocol: Protocol,
    legend: Sequence[tuple[str, str, str]],
) -> str:
    """A table a model, what the rows are, and the machine; ``legend`` has the key, label and description of
    every row there is."""
    parts = []
    for name, rows in results.items():
        parts += [f"## {name}", format_results(rows)]
        remarks = list_remarks(rows)
        parts += ["\n".join(remarks)] if remarks else []
    shown = {r.key for rows in results.values() for r in rows}
    parts += [
        "## What the rows are",
        "\n".join(f"- {label}: {about}." for key, label, about in legend if key in shown),
    ]
    parts += [
        (
            "Export: one process from the PyTorch model to the finished files, start-up included. Running: a"
            f" process that loads the files and runs {INFERENCES} inferences. MB read: the files that the"
            f" runtime opens. Logits off: mean absolute difference from eager PyTorch on {IMAGES} generated"
            " images, in standard deviations of the logits; the weights are random, so it shows broken rows,"
            " not accuracy. int8 is calibrated on the same images in every row:"
            f" {content['calibration']['source']}, {content['calibration']['images']}."
        ),
        format_machine(
            content["machine"], content["versions"], content["threads"], protocol, name_batch(content)
        )
        + name_limit(content, " OpenVINO was limited to {}."),
    ]
    return "\n\n".join(parts) + "\n"


def list_remarks(rows: Sequence[Result]) -> list[str]:
    """Why rows were left out, and what to know of those that ran: lines of a list. Where most rows drifted,
    one line says so of all."""
    drifts = [float(match[1]) for r in rows for text in r.warnings if (match := DRIFTED.match(text))]
    folds = len(drifts) > len(rows) / 2
    lines = [
        f"- {r.label}: {text}"
        for r in rows
        for text in (*([f"left out: {r.note}"] if r.note else []), *r.warnings)
        if not (folds and DRIFTED.match(text))
    ]
    if folds:
        span = f"{min(drifts):+.0f} to {max(drifts):+.0f} %"
        lines.append(f"- {len(drifts)} latencies drifted by {span} from the first to the last 100 calls")
    return lines


def name_batch(content: dict[str, Any]) -> str:
    """What a run's graphs take; runs of older versions took one image."""
    batch = content.get("batch", 1)
    return f"batch {batch}" if batch else "any batch size, measured with one image"


def name_limit(content: dict[str, Any], form: str = " limited to {}") -> str:
    """The instruction set that OpenVINO was limited to, in ``form``; empty where it was not."""
    isa = content.get("isa")
    return form.format(f"the instructions of {ISAS[isa].like} (--isa {isa})") if isa else ""


def plot(results: dict[str, list[Result]], path: Path, caption: str) -> None:
    """Horizontal bars of the speed-up, a panel a model, ours in another colour, written as PNG or SVG."""
    from matplotlib.figure import Figure

    measured = {name: [r for r in reversed(rows) if r.ratio] for name, rows in results.items()}
    heights = [len(rows) + 1 for rows in measured.values()]
    figure = Figure(figsize=(8.5, 1.1 + 0.27 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(measured), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, rows) in zip(panels, measured.items(), strict=True):
        ratios = np.array([r.ratio for r in rows])
        whiskers = np.abs(ratios[:, 1:] - ratios[:, :1]).T
        colours = ["#cc6677" if r.ours else "#888888" if r.key == BASE else "#88aacc" for r in rows]
        bars = axes.barh(
            [r.label for r in rows], ratios[:, 0], xerr=whiskers, color=colours, capsize=2, ecolor="#333333"
        )
        texts = [f"{r.ratio[0]:.2f}x  ({r.latency.p50:.2f} ms)" for r in rows if r.ratio and r.latency]
        axes.bar_label(bars, texts, padding=4, fontsize=8)
        axes.axvline(1.0, color="#888888", linewidth=1, linestyle=":")
        axes.set_title(name, loc="left", fontsize=10, fontweight="bold")
        axes.tick_params(axis="y", labelsize=8, length=0)
        axes.spines[["top", "right"]].set_visible(False)
    longest = max(r.ratio[2] for rows in measured.values() for r in rows if r.ratio)
    panels[-1].set_xlim(0, 1.25 * longest)
    panels[-1].set_xlabel(
        "speed-up of one inference over OpenVINO fp32 (grey); red: cmt-edge; whiskers: 95 % interval",
        fontsize=9,
    )
    figure.suptitle(caption, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lstrip(".") or "png", dpi=150)
    write_atomic(path, buffer.getvalue())


def read_runs(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Earlier runs, of files that hold one, or several under :data:`RUNS`."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return [run for content in files for run in content.get(RUNS, [content])]


def read_again(runs: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, list[Result]], Protocol]:
    """Content, results and protocol of earlier runs on one machine, as one; of protocols the shortest.

    A row that several runs measured comes from the first of them, and one that could not run in any from the
    last. Every run has the base, to which its ratios refer.

    Raises:
        SystemExit: the runs are of different machines, versions or thread counts.
    """
    for key in ("versions", "threads", "batch", "isa", "base"):
        if any(run.get(key) != runs[0].get(key) for run in runs):
            raise SystemExit(f"the runs differ in their {key}: they do not belong into one table")
    if any(
        (run["machine"]["cpu"], run["machine"]["flags"])
        != (runs[0]["machine"]["cpu"], runs[0]["machine"]["flags"])
        for run in runs
    ):
        raise SystemExit("the runs are of different machines: they do not belong into one table")
    results: dict[str, list[Result]] = {}
    for run in runs:
        for name, rows in run["models"].items():
            shown = results.setdefault(name, [])
            measured = {r.key for r in shown if not r.note}
            found = [_read_result(r) for r in rows if r["key"] not in measured]
            keys = {r.key for r in found}
            shown[:] = [*(r for r in shown if r.key not in keys), *found]
    calibration = {
        key: ", ".join(dict.fromkeys(str(run["calibration"][key]) for run in runs))
        for key in runs[0]["calibration"]
    }
    protocol = Protocol(**{key: min(run["protocol"][key] for run in runs) for key in runs[0]["protocol"]})
    return runs[0] | {"calibration": calibration}, results, protocol


def _read_result(entry: dict[str, Any]) -> Result:
    latency = entry["latency"] and Latency(**entry["latency"] | {"ci": tuple(entry["latency"]["ci"])})
    return Result(**entry | {"latency": latency, "ratio": entry["ratio"] and tuple(entry["ratio"])})


# --- a page of the documentation ------------------------------------------------------------------

BEGIN, END = "<!-- benchmarks/peers.py: {}: begin -->", "<!-- benchmarks/peers.py: {}: end -->"
"""The comments between which a page holds the table of a machine."""


def write_part(page: Path, part: str, runs: Sequence[dict[str, Any]]) -> None:
    """Put the tables of earlier runs between the two comments of a page, the slowest row first.

    Raises:
        SystemExit: the page lacks the comments; nothing is written.
    """
    begin, end = BEGIN.format(part), END.format(part)
    text = page.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        raise SystemExit(f"error: {page} lacks the comments {begin} and {end}")
    content, results, protocol = read_again(runs)
    blocks = []
    for model, rows in results.items():
        rows.sort(key=lambda row: row.ratio[0] if row.ratio else 0.0)
        blocks += [format_results(rows), "\n".join([*list_repeats(runs, model), *list_remarks(rows)])]
    blocks.append(
        format_machine(
            content["machine"], content["versions"], content["threads"], protocol, name_batch(content)
        )
    )
    before, _, rest = text.partition(begin)
    body = "\n\n".join(block for block in blocks if block)
    write_atomic(page, f"{before}{begin}\n{body}\n{end}{rest.partition(end)[2]}".encode())


def list_repeats(runs: Sequence[dict[str, Any]], model: str) -> list[str]:
    """The base's milliseconds in every run, and the speed-ups of rows that several runs have: lines of a
    list."""
    found: dict[str, list[Result]] = {}
    for run in runs:
        for entry in run["models"].get(model, ()):
            if entry["latency"]:
                found.setdefault(entry["key"], []).append(_read_result(entry))
    base = found.pop(BASE)
    lines = [f"- {base[0].label} in the runs, ms: {', '.join(format_latency(row.latency) for row in base)}"]
    for rows in found.values():
        if len(rows) > 1:
            ratios = ", ".join(format_ratio(row.ratio) for row in rows)
            lines.append(f"- {rows[0].label} in the runs that have it: {ratios}")
    return lines
