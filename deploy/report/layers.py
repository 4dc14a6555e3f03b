"""The errors of a model's blocks as a table, and what they say as sentences."""

from __future__ import annotations

from collections.abc import Sequence

from ..bundle.sections import LayerError, LayerRun
from ..escaping import escape_line
from ..measure.layouts import FARTHEST
from .tables import format_table

BEYOND = "*"
"""Stands behind an error beyond the threshold."""


def describe_layers(
    errors: Sequence[LayerError],
    runs: Sequence[LayerRun],
    markdown: bool = False,
    width: int | None = None,
) -> str:
    """A row for each block, two columns for each run, and sentences below.

    Args:
        errors: of the runs, one run after the other.
        runs: bundles on runtimes.
        markdown, width: as :func:`.tables.format_table`.
    """
    parts = _split(errors, runs)
    names = list(dict.fromkeys(error.name for error in errors))
    header = ["block", *(head for run in runs for head in _name_columns(run))]
    rows = [
        [
            name,
            *(cell for run, part in zip(runs, parts, strict=True) for cell in _write_cells(part, run, name)),
        ]
        for name in names
    ]
    sentences = [line for run, part in zip(runs, parts, strict=True) for line in _describe_run(part, run)]
    images = errors[0].images if errors else 0
    first = f"relative error and cosine of every block, PyTorch in float64 as the reference, {images} images:"
    return "\n".join([first, format_table(header, rows, markdown, width), *sentences])


def _split(errors: Sequence[LayerError], runs: Sequence[LayerRun]) -> list[dict[str, LayerError]]:
    """The errors of each run by the name of the block; a run begins where a block comes again."""
    parts: list[dict[str, LayerError]] = [{}]
    for error in errors:
        known = next(iter(parts[-1].values()), error)
        if error.name in parts[-1] or (known.backend, known.precision) != (error.backend, error.precision):
            parts.append({})
        parts[-1][error.name] = error
    return [*parts, *({} for _ in runs[len(parts) :])]


def _name_columns(run: LayerRun) -> tuple[str, str]:
    side = f"{run.precision} {run.backend}"
    return f"{side} error", f"{side} cosine"


def _write_cells(part: dict[str, LayerError], run: LayerRun, name: str) -> tuple[str, str]:
    """Error and cosine of one block, or dashes."""
    error = part.get(name)
    if error is None:
        return "-", "-"
    mark = BEYOND if error.relative_error > run.threshold else ""
    return f"{_format_error(error.relative_error)}{mark}", f"{error.cosine:.5f}"


def _format_error(value: float) -> str:
    return "not finite" if value >= FARTHEST else f"{value:.2g}"


def _describe_run(part: dict[str, LayerError], run: LayerRun) -> list[str]:
    """Where the error enters, where it grows, what watching changed, and what was not compared."""
    side = f"{run.precision} on {escape_line(run.runtime)}"
    lines = [f"{side}: {_tell_entry(part, run)}; {_tell_growth(part, run)}", f"  {_tell_watching(run)}"]
    partial = [f"{e.name} before its {e.before}" for e in part.values() if e.before]
    partial += [f"the first {_count_tokens(e.rows)} of {e.name}" for e in part.values() if e.rows]
    if partial:
        lines.append(f"  compared where the graph has them: {escape_line(', '.join(partial))}")
    if run.hidden:
        hidden = ", ".join(f"{name} ({why})" for name, why in run.hidden.items())
        lines.append(f"  not compared: {escape_line(hidden)}")
    return lines


def _count_tokens(rows: int) -> str:
    return "token" if rows == 1 else f"{rows} tokens"


def _tell_entry(part: dict[str, LayerError], run: LayerRun) -> str:
    limit = f"{run.threshold:.2g}"
    if run.first is None:
        return f"no block is beyond {limit}"
    found = _format_error(part[run.first].relative_error)
    return f"the error is first beyond {limit} in {run.first} ({found})"


def _tell_growth(part: dict[str, LayerError], run: LayerRun) -> str:
    end = f"at the output it is {_format_error(run.output)}"
    if run.grows is None:
        return end
    names = list(part)
    place = names.index(run.grows)
    before = part[names[place - 1]].relative_error if place else 0.0
    after = part[run.grows].relative_error
    return f"it grows most in {run.grows}, from {_format_error(before)} to {_format_error(after)}; {end}"


def _tell_watching(run: LayerRun) -> str:
    if run.moved == 0:
        return "watching the blocks left the output as it is, bit for bit"
    return (
        f"watching the blocks moved the output by {_format_error(run.moved)}: its error is"
        f" {_format_error(run.output)} as the bundle runs, {_format_error(run.watched)} watched"
    )
