"""The page of :mod:`which_model`: budgets, tables, and what is put between its comments.

The page has the figures of one machine in parts that are called ``models``, ``budgets`` and so on, and those
of each further machine in parts that begin with its name: ``avx2: models``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from which_model_points import (
    GPU,
    Point,
    Results,
    find_best,
    list_estimates,
    list_points,
    list_precisions,
    read_estimate,
)
from which_model_report import read_results
from which_model_slices import format_doubts, format_slices

from cmt_edge.deploy.report import format_table

BUDGETS = (5, 10, 15, 20, 30, 50)
"""Budgets of the CPU, milliseconds."""
LONG_BUDGETS = (10, 20, 30, 50, 100, 200)
"""Budgets of further machines, which are slower."""
GPU_BUDGETS = (0.1, 0.15, 0.2, 0.3, 0.5, 1)
"""Budgets of the estimate, milliseconds."""
EXTRA = "†"
"""What follows a top-1 of weights that saw more than ImageNet-1k."""
COARSE = "§"
"""What follows the logits' difference of an int8 graph that was calibrated for its latency alone."""
ELSEWHERE = "‡"
"""What follows an estimate that the page of ``rtx_compile.py`` has, and ``estimate`` did not make."""


def format_point(point: Point | None) -> str:
    """A model with its top-1 and milliseconds."""
    if point is None:
        return "-"
    return f"{point.label} {point.top1:g}{EXTRA if point.extra_data else ''} ({_format_ms(point.ms)} ms)"


def _format_ms(ms: float) -> str:
    return f"{ms:.2f}" if ms < 2 else f"{ms:.1f}"


def format_budgets(columns: dict[str, list[Point]], budgets: Sequence[float]) -> str:
    """The best model of each column for each budget."""
    rows = [
        [f"{budget:g} ms", *(format_point(find_best(points, budget)) for points in columns.values())]
        for budget in budgets
    ]
    return format_table(["budget", *columns], rows, markdown=True)


def format_contest(points: list[Point], budgets: Sequence[float]) -> str:
    """The best model of the registry beside the best yardstick, and the difference in top-1."""
    rows = []
    for budget in budgets:
        ours = find_best((p for p in points if p.is_ours), budget)
        other = find_best((p for p in points if not p.is_ours), budget)
        gap = "-" if ours is None or other is None else f"{ours.top1 - other.top1:+.1f}"
        rows.append([f"{budget:g} ms", format_point(ours), format_point(other), gap])
    return format_table(["budget", "best hybrid", "best yardstick", "difference"], rows, markdown=True)


def format_models(results: Results) -> str:
    """A line for every model, with the GPU's estimates where the file has them."""
    precisions, has_estimates = list_precisions(results), any("rtx" in model for model in results["models"])
    header = [
        *("model", "input", "M params", "GMACs", "published top-1 %"),
        *(f"{precision} ms" for precision in precisions),
        *("int8 over fp32", "GMACs/s, int8", "logits off, int8"),
        *([f"estimate for {GPU}, fp16, ms"] if has_estimates else ()),
    ]
    rows = [
        [*_format_model(model, precisions), *([_format_estimate(model)] if has_estimates else ())]
        for model in sort_models(results)
    ]
    return format_table(header, rows, markdown=True)


def sort_models(results: Results) -> list[dict[str, Any]]:
    """The models, those with few multiply-accumulates first."""
    return sorted(results["models"], key=lambda model: model["macs"] or float("inf"))


def read_ms(model: dict[str, Any], precision: str) -> float | None:
    """The milliseconds of a model in a precision, where it was measured."""
    ms: float | None = model["precisions"].get(precision, {}).get("ms")
    return ms


def _format_model(model: dict[str, Any], precisions: Sequence[str]) -> list[str]:
    int8, macs = read_ms(model, "int8"), model["macs"]
    runs = model["precisions"].get("int8", {}).get("runs")
    top1 = "none published" if model["top1"] is None else f"{model['top1']:g}"
    return [
        model["label"],
        str(model["imgsz"]),
        "-" if model["params"] is None else f"{model['params'] / 1e6:.1f}",
        "-" if macs is None else f"{macs / 1e9:.2f}",
        top1 + (EXTRA if model["extra_data"] else ""),
        *("-" if (ms := read_ms(model, name)) is None else _format_ms(ms) for name in precisions),
        _format_gain(model),
        "-" if int8 is None or macs is None else f"{macs / 1e6 / int8:.0f}",
        f"{runs[-1]['deviation']:.1e}{'' if model['refined'] else COARSE}" if runs else "-",
    ]


def _format_gain(model: dict[str, Any] | None) -> str:
    """How many times as fast as in fp32 a model is in int8."""
    fp32, int8 = (read_ms(model, name) if model else None for name in ("fp32", "int8"))
    return "-" if fp32 is None or int8 is None else f"{fp32 / int8:.2f}"


def _format_estimate(model: dict[str, Any]) -> str:
    estimate = read_estimate(model)
    return "-" if estimate is None else f"{estimate:.2f}{ELSEWHERE if 'source' in model['rtx'] else ''}"


def format_gains(here: Results, there: Results) -> str:
    """What int8 and the multiply-accumulates are worth on two machines: a line for every model of the first.

    The ratios are to the reference of each machine, so that no milliseconds of one stand beside those of the
    other.
    """
    others = {model["name"]: model for model in there["models"]}
    rows = []
    for model in sort_models(here):
        other = others.get(model["name"])
        pairs = [
            (side and read_ms(side, "fp32"), base["reference_ms"])
            for side, base in ((model, here), (other, there))
        ]
        rows.append(
            [
                model["label"],
                *("-" if ms is None else f"{ms / base:.2f}" for ms, base in pairs),
                _format_gain(model),
                _format_gain(other),
            ]
        )
    header = [
        "model",
        "fp32, times the reference: here",
        "fp32, times the reference: on the first machine",
        "int8 over fp32: here",
        "int8 over fp32: on the first machine",
    ]
    return format_table(header, rows, markdown=True)


def list_refusals(results: Results) -> list[str]:
    """What the pipeline refused, and what failed its golden check, one line each."""
    lines = []
    for model in results["models"]:
        for precision, found in model["precisions"].items():
            golden = found["golden"]
            if found["error"]:
                lines.append(f"- {model['label']} {precision}: {found['error']}")
            elif golden and not golden["passed"]:
                lines.append(
                    f"- {model['label']} {precision}: the golden logits differ by {golden['diff']:.2g},"
                    f" allowed are {golden['atol']:.2g}; an export would have refused it"
                )
        if error := (model.get("rtx") or {}).get("error"):
            lines.append(f"- {model['label']}, TensorRT for RTX: {error}")
    return lines


# --- page -----------------------------------------------------------------------------------------

BEGIN, END = "<!-- benchmarks/which_model.py: {}: begin -->", "<!-- benchmarks/which_model.py: {}: end -->"
"""The comments between which the page holds what is computed."""


def write_page(results: Results, page: Path) -> None:
    """Put the tables between the comments of the page, and draw the plots beside it.

    Every further machine that has a JSON file there gets its own.
    """
    from which_model_plot import draw_estimates, draw_measured

    text = page.read_text(encoding="utf-8")
    others = read_others(page)
    parts = make_parts(results) | make_own_parts(results)
    parts["sources"] = _list_sources([results, *others.values()])
    for name, other in others.items():
        found = make_parts(other, LONG_BUDGETS) | {"gains": format_gains(other, results)}
        parts |= {f"{name}: {part}": content for part, content in found.items()}
    for name, content in parts.items():
        text = replace_part(text, name, content, page)
    page.write_text(text, encoding="utf-8")
    draw_measured(results, page.with_suffix(".png"))
    for name, other in others.items():
        draw_measured(other, locate_machine(page, name).with_suffix(".png"))
    if list_estimates(results):
        draw_estimates(results, page.with_name(f"{page.stem}-rtx.png"))


def locate_machine(page: Path, machine: str) -> Path:
    """The JSON file of a machine, of the page's own one where its name is empty."""
    return page.with_name(f"{page.stem}-{machine}.json") if machine else page.with_suffix(".json")


def read_others(page: Path) -> dict[str, Results]:
    """Name of a further machine -> its figures."""
    begin = f"{page.stem}-"
    places = sorted(page.parent.glob(f"{begin}*.json"))
    return {place.stem.removeprefix(begin): read_results(place) for place in places}


def make_parts(results: Results, budgets: Sequence[float] = BUDGETS) -> dict[str, str]:
    """Name of a part that the page has for every machine -> its content."""
    points = {precision: list_points(results, precision) for precision in list_precisions(results)}
    machine = results["machine"]
    refusals = list_refusals(results)
    spread = [entry["reference_ms"] for entry in results["slices"]]
    return {
        "budgets": format_budgets(points, budgets),
        "contest": format_contest(points.get("int8", []), budgets),
        "models": format_models(results),
        "refusals": "\n".join(refusals) or "None.",
        "slices": format_slices(results),
        "doubts": format_doubts(results, list_precisions(results)),
        "machine": (
            f"{machine['cpu']} ({', '.join(machine['flags'])}), {results['threads']} threads;"
            f" OpenVINO {results['versions']['openvino']}; batch 1."
            f" The reference, {results['reference']}, took {min(spread):.2f} to {max(spread):.2f} ms in the"
            f" {len(spread)} slices."
        ),
    }


def make_own_parts(results: Results) -> dict[str, str]:
    """Name of a part that the page has once -> its content."""
    estimates = list_estimates(results)
    return {
        "estimates": format_budgets({f"estimate for {GPU}, fp16": estimates}, GPU_BUDGETS),
        "estimated contest": format_contest(estimates, GPU_BUDGETS),
    }


def _list_sources(machines: Sequence[Results]) -> str:
    """Where the published figures of all models are printed."""
    found: dict[str, list[str]] = {}
    for results in machines:
        for model in results["models"]:
            labels = found.setdefault(model["source"], [])
            if model["top1"] is not None and model["label"] not in labels:
                labels.append(model["label"])
    return "\n".join(f"- {', '.join(labels)}: {source}" for source, labels in found.items() if labels)


def replace_part(text: str, name: str, content: str, page: Path) -> str:
    """``text`` with ``content`` between the two comments of a part; raises ``SystemExit`` where they are
    missing."""
    begin, end = BEGIN.format(name), END.format(name)
    if begin not in text or end not in text:
        raise SystemExit(f"error: {page} lacks the comments {begin} and {end}")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.partition(end)[2]}"
