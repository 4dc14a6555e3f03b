"""What :mod:`which_model` found, put together into one JSON file for each machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from which_model_points import GPU, PRECISIONS, Results, list_precisions
from which_model_slices import Run, choose_ratio, collect_runs, list_slices
from which_model_subjects import Subject

from cmt_edge.deploy.files import write_atomic

REFERENCE = ("timm:resnet50", "fp32")
"""The model and precision that is measured in every slice."""
CALLS = "iters"
"""The part of the way of measuring that only widens or narrows intervals: slices may differ in it."""
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


def keep_measured(results: Results) -> Results:
    """Without the models that this machine did not measure, the precisions that it does not compute in, and
    the estimates, which depend on no machine and stay in the page's own file."""
    measured = list_precisions(results)
    return results | {
        "models": [
            {key: value for key, value in model.items() if key != "rtx"}
            | {"precisions": {name: model["precisions"][name] for name in measured}}
            for model in results["models"]
            if any(found["runs"] for found in model["precisions"].values())
        ]
    }


def take_estimates(results: Results, subjects: Sequence[Subject], folder: Path) -> Results:
    """``results`` with the estimates that ``estimate`` has written into a folder, whichever machine it ran
    on: the compiler computes for the GPU that it is told."""
    keys = {subject.name: subject for subject in subjects}
    return results | {
        "models": [
            model | {"rtx": _collect_estimate(keys[model["name"]], folder, model["rtx"])}
            if model["name"] in keys
            else model
            for model in results["models"]
        ]
    }


def _require_same_conditions(found: dict[str, Any], other: dict[str, Any]) -> None:
    """Raise ``SystemExit`` where the figures of two runs cannot stand in one table."""
    one, two = _read_conditions(found), _read_conditions(other)
    differing = [name for name in one if one[name] != two[name]]
    if differing:
        name = differing[0]
        raise SystemExit(
            f"error: the figures differ in their {name}: {one[name]} and {two[name]}. They do not belong"
            " into one table; give another processor a table of its own with --machine NAME, or measure all"
            " models again with an empty --folder and without the JSON file"
        )


def _read_conditions(found: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for all figures of the table; the number of calls is told by each slice."""
    machine = found["machine"]
    return {
        "processor": machine.get("cpu"),
        "processor's features": machine.get("flags"),
        "number of cores": machine.get("cores"),
        "version of OpenVINO": found["versions"].get("openvino"),
        "number of threads": found["threads"],
        "way of measuring": {key: value for key, value in found["protocol"].items() if key != CALLS},
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
