"""In which slices the figures of :mod:`which_model` were measured, and how far these slices agree.

A model may be measured in several slices. Each slice gives a run of every precision: the ratio to the
reference of the same slice. The figure is the median of the runs' ratios; no run is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cmt_edge.deploy.report import format_table

Run = dict[str, Any]
"""What one slice says of one model in one precision: the number of the slice, the ratio to the reference with
the ends of its 95 % interval, the ratio of the best times, the median in milliseconds, and how far the logits
are off."""
FIELDS = ("ratio", "best_ratio", "deviation")
"""What a run has of a row that ``measure`` wrote, beside its median."""


def list_slices(
    found: Sequence[Mapping[str, Any]], earlier: Sequence[dict[str, Any]], reference: str
) -> list[dict[str, Any]]:
    """The slices of the JSON file and those of a folder, each once: the same nanoseconds are the same slice.

    The number of a slice is its place in the list, from 1; those of the JSON file keep theirs.
    """
    slices = list(earlier)
    for entry in found:
        ms = read_reference_ms(entry, reference)
        if all(known["reference_ms"] != ms for known in slices):
            slices.append(
                {"measured": entry["measured"], "reference_ms": ms, "calls": entry["protocol"].get("iters")}
            )
    return slices


def read_reference_ms(entry: Mapping[str, Any], reference: str) -> float:
    """The reference's median in a slice, milliseconds."""
    ms: float = entry["rows"][reference]["latency"]["p50"]
    return ms


def collect_runs(
    name: str,
    found: Sequence[Mapping[str, Any]],
    slices: Sequence[Mapping[str, Any]],
    reference: str,
    kept: Sequence[Run],
) -> list[Run]:
    """All runs of a model in one precision, those of the JSON file first.

    Args:
        name: of the model and the precision, as ``measure`` writes it.
        found: what ``measure`` wrote.
        slices: from :func:`list_slices`.
        reference: the name of the reference.
        kept: the runs in the JSON file.
    """
    numbers = {entry["reference_ms"]: number for number, entry in enumerate(slices, 1)}
    runs = {run["slice"]: run for run in kept}
    for entry in found:
        row = entry["rows"].get(name)
        if row is None:
            continue
        number = numbers[read_reference_ms(entry, reference)]
        runs[number] = {
            "slice": number,
            "p50_ms": row["latency"]["p50"],
            **{key: row[key] for key in FIELDS},
        }
        if name == reference:
            runs[number] |= {"ratio": [1.0, 1.0, 1.0], "best_ratio": 1.0}
    return [runs[number] for number in sorted(runs)]


def choose_ratio(runs: Sequence[Run]) -> float:
    """The median of the runs' ratios to the reference."""
    return float(np.median([run["ratio"][0] for run in runs]))


def find_bounds(runs: Sequence[Run], base_ms: float) -> tuple[float, float]:
    """The lowest and the highest end of the runs' 95 % intervals, milliseconds."""
    return (
        min(base_ms / max(run["ratio"]) for run in runs),
        max(base_ms / min(run["ratio"]) for run in runs),
    )


def measure_disagreement(runs: Sequence[Run]) -> float | None:
    """By how much the slowest run is slower than the fastest one, as a part of it; ``None`` with one run."""
    ratios = [run["ratio"][0] for run in runs]
    return max(ratios) / min(ratios) - 1 if len(ratios) > 1 else None


def measure_width(run: Run) -> float:
    """Half of the 95 % interval of a ratio, as a part of the ratio."""
    middle, low, high = run["ratio"]
    width: float = (high - low) / 2 / middle
    return width


# --- tables ---------------------------------------------------------------------------------------


def format_slices(results: Mapping[str, Any]) -> str:
    """A line for every slice: when, the reference, the least number of calls of each model, the widest
    interval, and the models."""
    lines = []
    for number, entry in enumerate(results["slices"], 1):
        widths = {
            (model["label"], precision): measure_width(run)
            for model in results["models"]
            for precision, found in model["precisions"].items()
            for run in found["runs"]
            if run["slice"] == number and f"{model['name']} {precision}" != results["reference"]
        }
        widest = max(widths, key=widths.__getitem__)
        lines.append(
            [
                str(number),
                entry["measured"],
                f"{entry['reference_ms']:.2f}",
                str(entry.get("calls") or results["protocol"].get("iters", "-")),
                f"{100 * float(np.median([*widths.values()])):.1f}",
                f"{100 * widths[widest]:.1f} ({' '.join(widest)})",
                ", ".join(dict.fromkeys(label for label, _ in widths)),
            ]
        )
    header = ["slice", "measured (UTC)", "reference, ms", "calls", "interval, ± %", "widest, ± %", "models"]
    return format_table(header, lines, markdown=True)


def format_doubts(results: Mapping[str, Any], precisions: Sequence[str]) -> str:
    """A line for every model that was measured: its slices, and between what its milliseconds lie."""
    measured = [
        model
        for model in results["models"]
        if any(model["precisions"][precision]["runs"] for precision in precisions)
    ]
    lines = []
    for model in sorted(measured, key=lambda model: model["macs"] or math.inf):
        by_precision = [model["precisions"][precision]["runs"] for precision in precisions]
        numbers = sorted({run["slice"] for runs in by_precision[1:] for run in runs})
        apart = [value for runs in by_precision if (value := measure_disagreement(runs)) is not None]
        lines.append(
            [
                model["label"],
                ", ".join(map(str, numbers)),
                *(_format_bounds(runs, results["reference_ms"]) for runs in by_precision),
                f"{100 * max(apart):.0f}" if apart else "-",
            ]
        )
    header = ["model", "slices", *(f"{name} ms" for name in precisions), "slices differ by, %"]
    return format_table(header, lines, markdown=True)


def _format_bounds(runs: Sequence[Run], base_ms: float) -> str:
    if not runs:
        return "-"
    low, high = find_bounds(runs, base_ms)
    digits = 2 if high < 2 else 1
    return f"{low:.{digits}f} to {high:.{digits}f}"
