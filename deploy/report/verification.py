"""The verification of a bundle as text."""

from __future__ import annotations

from ..bundle.sections import DataCheck, GoldenCheck
from ..escaping import escape_line
from ..measure.parity import Verification
from .layers import describe_layers
from .tables import format_differences, format_table


def describe_verification(v: Verification, markdown: bool = False, width: int | None = None) -> str:
    """Golden check, top-1 table and verdict; ``width`` as :func:`.tables.format_table`."""
    lines = [_describe_golden(v.golden, v.kind)]
    if v.data:
        lines += [_format_top1_table(v.data, markdown, width), _describe_top1(v.data)]
    if v.layers is not None and v.layer_runs is not None:
        lines.append(describe_layers(v.layers, v.layer_runs, markdown, width))
    lines += [f"warning: {note}" for note in v.notes]
    lines.append(f"{escape_line(v.bundle)} on {v.runtime.summary()}: {_write_conclusion(v)}")
    return "\n".join(lines)


def _describe_golden(golden: GoldenCheck, kind: str | None) -> str:
    found, allowed = format_differences(golden.diff, golden.atol)
    unit = describe_unit(kind)
    return (
        f"golden images: {golden.images}; pixels differ by at most {golden.pixel_diff} grey levels;"
        f" {golden.output} by {found} (allowed {allowed}{unit}): {_format_passed(golden.passed)}"
    )


def describe_unit(kind: str | None) -> str:
    """What follows a difference of outputs of a ``kind``: nothing for logits and maps."""
    return "" if kind is None else " in probability"


def _format_top1_table(data: DataCheck, markdown: bool, width: int | None) -> str:
    header = [
        "images",
        "reference top-1 %",
        "bundle top-1 %",
        "drop (95 % CI)",
        "agreement %",
        "max logit diff",
        "mean",
    ]
    low, high = data.drop_ci
    row = [
        str(data.images),
        f"{data.reference_top1:.2f}",
        f"{data.top1:.2f}",
        f"{data.drop:+.2f} ({low:+.2f} to {high:+.2f})",
        f"{data.agreement:.2f}",
        _format_difference(data.logit_max_diff),
        _format_difference(data.logit_mean_diff),
    ]
    return format_table(header, [row], markdown, width)


def _describe_top1(data: DataCheck) -> str:
    limit = f"allowed drop {data.max_drop:g} points"
    return f"reference: {data.reference_source}; {limit}: {_format_passed(data.passed)}"


def _format_difference(value: float | None) -> str:
    """A difference of logits; ``"-"`` where the reference did not run here."""
    return "-" if value is None else f"{value:.3g}"


def _format_passed(passed: bool) -> str:
    return "ok" if passed else "FAILED"


def _write_conclusion(v: Verification) -> str:
    """What was verified: accuracy is only where the images can show it."""
    if not v.passed:
        return "NOT verified"
    if v.data is None or not v.data.doubt:
        return "verified"
    return f"golden images verified; {v.data.images} images are too few to judge the accuracy"
