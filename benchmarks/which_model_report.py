"""What :mod:`which_model` found, put together: the JSON file, the Pareto front, the budgets, and the page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from which_model_slices import Run, choose_ratio, collect_runs, format_doubts, format_slices, list_slices
from which_model_subjects import Subject

from cmt_edge.deploy.files import write_atomic
from cmt_edge.deploy.report import format_table

PRECISIONS = ("fp32", "bf16", "int8")
"""What each model was measured in."""
REFERENCE = ("timm:resnet50", "fp32")
"""The model and precision that is measured in every slice."""
BUDGETS = (5, 10, 15, 20, 30, 50)
"""Budgets of the CPU, milliseconds."""
GPU = "RTX 4090"
"""The GPU of the estimate."""
GPU_BUDGETS = (0.1, 0.15, 0.2, 0.3, 0.5, 1)
"""Budgets of the estimate, milliseconds."""
EXTRA = "†"
"""What follows a top-1 of weights that saw more than ImageNet-1k."""
COARSE = "§"
"""What follows the logits' difference of an int8 graph that was calibrated for its latency alone."""
ELSEWHERE = "‡"
"""What follows an estimate that the page :data:`KNOWN` has, and ``estimate`` did not make."""

Results = dict[str, Any]
"""The content of the JSON file."""


KNOWN = Path(__file__).parent.parent / "docs" / "tensorrt.md"
"""The page with the table of ``rtx_compile.py``, whose estimates stand in where ``estimate`` has not run."""
KNOWN_GRAPH = "ours, fp16"
"""What that table calls the graph that ``estimate`` compiles."""


def read_known_estimates(page: Path) -> dict[str, float]:
    """Model -> milliseconds on :data:`GPU`, of the table that ``rtx_compile.py`` has written into a page."""
    found = {}
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) > 2 and cells[1] == KNOWN_GRAPH:
            found[cells[0]] = float(cells[-1])
    return found


@dataclass(frozen=True)
class Point:
    """One model in one precision.

    Attributes:
        label: the model.
        is_ours: whether it is one of the registry.
        ms: milliseconds of one inference.
        top1: published, percent.
        extra_data: whether the weights of ``top1`` saw more than ImageNet-1k.
    """

    label: str
    is_ours: bool
    ms: float
    top1: float
    extra_data: bool = False


def find_front(points: Iterable[Point]) -> list[Point]:
    """The points that no other one beats by being faster and as accurate, or as fast and more accurate.

    The fastest comes first.
    """
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.ms, -p.top1)):
        if not front or point.top1 > front[-1].top1:
            front.append(point)
    return front


def find_best(points: Iterable[Point], budget: float) -> Point | None:
    """The most accurate point within ``budget`` milliseconds, of equal ones the faster; ``None`` where none
    is within it. Weights that saw more than ImageNet-1k do not compete."""
    within = [point for point in points if point.ms <= budget and not point.extra_data]
    return max(within, key=lambda p: (p.top1, -p.ms), default=None)


# --- the JSON file --------------------------------------------------------------------------------


def collect(subjects: Sequence[Subject], folder: Path, earlier: Results | None = None) -> Results:
    """What the stages wrote into ``folder``, as one, with the figures of ``earlier`` where it has none.

    Raises ``SystemExit`` where nothing was measured, and where the earlier figures or those of two slices are
    of different machines, versions of OpenVINO or ways of measuring.
    """
    found = [json.loads(path.read_text()) for path in sorted((folder / "measure").glob("*.json"))]
    first = found[0] if found else earlier
    if first is None:
        raise SystemExit(f"error: nothing was measured in {folder}")
    for one in found:
        _require_same_conditions(one, earlier or first)
    reference = " ".join(REFERENCE)
    slices = list_slices(found, earlier["slices"] if earlier else (), reference)
    base_ms = float(np.median([entry["reference_ms"] for entry in slices]))
    kept = {model["name"]: model for model in earlier["models"]} if earlier else {}

    def collect_model(subject: Subject) -> dict[str, Any]:
        old = kept.get(subject.name, {})
        runs = {
            precision: collect_runs(
                f"{subject.name} {precision}",
                found,
                slices,
                reference,
                old.get("precisions", {}).get(precision, {}).get("runs", ()),
            )
            for precision in PRECISIONS
        }
        return _collect_model(subject, folder, runs, base_ms, old)

    return {
        **{key: first[key] for key in ("machine", "versions", "threads", "protocol")},
        "reference": reference,
        "reference_ms": base_ms,
        "slices": slices,
        "models": [collect_model(subject) for subject in subjects],
    }


def _require_same_conditions(found: dict[str, Any], other: dict[str, Any]) -> None:
    """Raise ``SystemExit`` where the figures of two runs cannot stand in one table."""
    one, two = _read_conditions(found), _read_conditions(other)
    differing = [name for name in one if one[name] != two[name]]
    if differing:
        name = differing[0]
        raise SystemExit(
            f"error: the figures differ in their {name}: {one[name]} and {two[name]}. They do not belong"
            " into one table; measure all models again with an empty --folder and without the JSON file"
        )


def _read_conditions(found: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for all figures of the table."""
    machine = found["machine"]
    return {
        "processor": machine.get("cpu"),
        "processor's features": machine.get("flags"),
        "number of cores": machine.get("cores"),
        "version of OpenVINO": found["versions"].get("openvino"),
        "number of threads": found["threads"],
        "way of measuring": found["protocol"],
    }


def _collect_model(
    subject: Subject, folder: Path, runs: dict[str, list[Run]], base_ms: float, kept: dict[str, Any]
) -> dict[str, Any]:
    """One model with its runs of each precision; a figure of another stage is that of ``kept``, or is left
    out, where the stage has not run."""
    exported = _read(folder / "export" / f"{subject.key}.json")
    earlier = kept.get("precisions", {})
    source = exported or kept
    return {
        **asdict(subject),
        "params": source.get("params") or subject.params,
        "macs": source.get("macs") or subject.macs,
        "calibrated_on": source.get("calibrated_on"),
        "refined": source.get("refined"),
        "precisions": {
            precision: _collect_precision(
                exported, precision, runs[precision], base_ms, earlier.get(precision, {})
            )
            for precision in PRECISIONS
        },
        "rtx": _collect_estimate(subject, folder, kept.get("rtx")),
    }


def _collect_estimate(subject: Subject, folder: Path, kept: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the compiler said here, or earlier, or what the page has of a model that was compiled neither
    time."""
    here = _read(folder / "estimate" / f"{subject.key}.json")
    known = None if here or (kept and "source" not in kept) else _find_known_estimate(subject.name)
    return here or known or kept or None


def _find_known_estimate(name: str) -> dict[str, Any] | None:
    """What the page says of a model that was not compiled here; it names the page."""
    ms = read_known_estimates(KNOWN).get(name)
    if ms is None:
        return None
    return {"source": f"{KNOWN.parent.name}/{KNOWN.name}", "estimates": [{"gpu": GPU, "total_ms": ms}]}


def _collect_precision(
    exported: dict[str, Any],
    precision: str,
    runs: list[Run],
    base_ms: float,
    kept: dict[str, Any],
) -> dict[str, Any]:
    """Golden check, error, runs and latency of one precision; milliseconds are those of the reference over
    the ratio, so that those of all slices can be compared."""
    if exported:
        golden = exported.get("checks", {}).get(precision)
        found = {"golden": golden, "error": exported.get("errors", {}).get(precision)}
    else:
        found = {"golden": kept.get("golden"), "error": kept.get("error")}
    measured = {"ms": base_ms / choose_ratio(runs)} if runs else {}
    return found | measured | {"runs": runs}


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return content


def write_results(results: Results, path: Path) -> None:
    """Write the JSON file."""
    text = json.dumps(results, indent=1, ensure_ascii=False)
    write_atomic(path, (text + "\n").encode())


def read_results(path: Path) -> Results:
    """Read the JSON file."""
    content: Results = json.loads(path.read_text(encoding="utf-8"))
    return content


# --- points ---------------------------------------------------------------------------------------


def list_points(results: Results, precision: str) -> list[Point]:
    """The models with a published top-1 that were measured in ``precision``."""
    return [
        _make_point(model, model["precisions"][precision]["ms"])
        for model in results["models"]
        if model["top1"] is not None and "ms" in model["precisions"][precision]
    ]


def list_estimates(results: Results) -> list[Point]:
    """The models with a published top-1 that NVIDIA's compiler built, with the estimate for :data:`GPU`."""
    return [
        _make_point(model, ms)
        for model in results["models"]
        if model["top1"] is not None and (ms := read_estimate(model)) is not None
    ]


def read_estimate(model: dict[str, Any]) -> float | None:
    """The roofline's milliseconds on :data:`GPU`, where the compiler built the model."""
    estimates = (model["rtx"] or {}).get("estimates", ())
    return next((entry["total_ms"] for entry in estimates if entry["gpu"] == GPU), None)


def _make_point(model: dict[str, Any], ms: float) -> Point:
    return Point(model["label"], model["family"] != "yardstick", ms, model["top1"], model["extra_data"])


# --- tables ---------------------------------------------------------------------------------------


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


HEADER = (
    "model",
    "input",
    "M params",
    "GMACs",
    "published top-1 %",
    "fp32 ms",
    "bf16 ms",
    "int8 ms",
    "int8 over fp32",
    "GMACs/s, int8",
    "logits off, int8",
    f"estimate for {GPU}, fp16, ms",
)
"""Heads of :func:`format_models`."""


def format_models(results: Results) -> str:
    """A line for every model."""
    ordered = sorted(results["models"], key=lambda model: model["macs"] or float("inf"))
    return format_table(HEADER, [_format_model(model) for model in ordered], markdown=True)


def _format_model(model: dict[str, Any]) -> list[str]:
    found = {precision: model["precisions"][precision].get("ms") for precision in PRECISIONS}
    fp32, int8, macs = found["fp32"], found["int8"], model["macs"]
    runs = model["precisions"]["int8"]["runs"]
    top1 = "none published" if model["top1"] is None else f"{model['top1']:g}"
    estimate = read_estimate(model)
    return [
        model["label"],
        str(model["imgsz"]),
        "-" if model["params"] is None else f"{model['params'] / 1e6:.1f}",
        "-" if macs is None else f"{macs / 1e9:.2f}",
        top1 + (EXTRA if model["extra_data"] else ""),
        *("-" if ms is None else _format_ms(ms) for ms in found.values()),
        "-" if fp32 is None or int8 is None else f"{fp32 / int8:.2f}",
        "-" if int8 is None or macs is None else f"{macs / 1e6 / int8:.0f}",
        f"{runs[-1]['deviation']:.1e}{'' if model['refined'] else COARSE}" if runs else "-",
        "-" if estimate is None else f"{estimate:.2f}{ELSEWHERE if 'source' in model['rtx'] else ''}",
    ]


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
        if error := (model["rtx"] or {}).get("error"):
            lines.append(f"- {model['label']}, TensorRT for RTX: {error}")
    return lines


# --- page -----------------------------------------------------------------------------------------

BEGIN, END = "<!-- benchmarks/which_model.py: {}: begin -->", "<!-- benchmarks/which_model.py: {}: end -->"
"""The comments between which the page holds what is computed."""


def write_page(results: Results, page: Path) -> None:
    """Put the tables between the comments of the page, and draw the plots beside it."""
    from which_model_plot import draw_estimates, draw_measured

    text = page.read_text(encoding="utf-8")
    for name, content in make_parts(results).items():
        text = replace_part(text, name, content, page)
    page.write_text(text, encoding="utf-8")
    draw_measured(results, page.with_suffix(".png"))
    if list_estimates(results):
        draw_estimates(results, page.with_name(f"{page.stem}-rtx.png"))


def make_parts(results: Results) -> dict[str, str]:
    """Name of a part of the page -> its content."""
    points = {precision: list_points(results, precision) for precision in PRECISIONS}
    estimates = list_estimates(results)
    machine = results["machine"]
    refusals = list_refusals(results)
    spread = [entry["reference_ms"] for entry in results["slices"]]
    return {
        "budgets": format_budgets(points, BUDGETS),
        "contest": format_contest(points["int8"], BUDGETS),
        "estimates": format_budgets({f"estimate for {GPU}, fp16": estimates}, GPU_BUDGETS),
        "estimated contest": format_contest(estimates, GPU_BUDGETS),
        "models": format_models(results),
        "refusals": "\n".join(refusals) or "None.",
        "slices": format_slices(results),
        "doubts": format_doubts(results, PRECISIONS),
        "machine": (
            f"{machine['cpu']}, {results['threads']} threads; OpenVINO {results['versions']['openvino']};"
            " batch 1."
            f" The reference, {results['reference']}, took {min(spread):.2f} to {max(spread):.2f} ms in the"
            f" {len(spread)} slices."
        ),
        "sources": _list_sources(results),
    }


def _list_sources(results: Results) -> str:
    """Where the published figures are printed."""
    found: dict[str, list[str]] = {}
    for model in results["models"]:
        if model["top1"] is not None:
            found.setdefault(model["source"], []).append(model["label"])
    return "\n".join(f"- {', '.join(labels)}: {source}" for source, labels in found.items())


def replace_part(text: str, name: str, content: str, page: Path) -> str:
    """``text`` with ``content`` between the two comments of a part; raises ``SystemExit`` where they are
    missing."""
    begin, end = BEGIN.format(name), END.format(name)
    if begin not in text or end not in text:
        raise SystemExit(f"error: {page} lacks the comments {begin} and {end}")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.partition(end)[2]}"
