"""What ``--precision auto`` measured and chose, as text."""

from __future__ import annotations

from ..bundle.sections import Accuracy, Candidate, Speed, VerdictEntry
from .tables import format_table


def describe_verdict(verdict: VerdictEntry, markdown: bool = False, width: int | None = None) -> str:
    """What ``--precision auto`` measured and recommends: candidates, sensitivity of the groups, notes, the
    winner; ``width`` as :func:`.tables.format_table`."""
    parts = [_format_candidate_table(verdict, markdown, width)]
    if verdict.sensitivity:
        parts += _format_sensitivity_table(verdict, markdown, width)
    if verdict.float_already:
        parts.append(f"float in every int8 candidate (depthwise): {', '.join(verdict.float_already)}")
    parts.append(_describe_conditions(verdict))
    parts += [f"note: {c.variant.name}: {c.why_not}" for c in verdict.candidates if ":" in c.why_not]
    parts += [f"note: {note}" for note in verdict.notes]
    parts += [
        f"warning: {c.variant.name}: {warning}"
        for c in verdict.candidates
        if c.accuracy and c.speed
        for warning in c.speed.warnings
    ]
    return "\n\n".join([*parts, describe_recommendation(verdict)])


def _format_candidate_table(verdict: VerdictEntry, markdown: bool, width: int | None) -> str:
    labelled = verdict.labelled
    rows = [
        _format_candidate_row(candidate, labelled, candidate.variant == verdict.winner)
        for candidate in verdict.candidates
    ]
    header = [
        "candidate",
        *(["top-1 %"] if labelled else []),
        "drop (95 % CI)" if labelled else "disagreement (95 % CI)",
        "agreement %",
        "p50 ms",
        "speed-up (95 % CI)",
        "MB",
        "verdict",
    ]
    return format_table(header, rows, markdown, width)


def _format_candidate_row(
    candidate: Candidate,
    labelled: bool,
    best: bool,
) -> list[str]:
    accuracy, speed = candidate.accuracy, candidate.speed
    top1 = f"{accuracy.top1:.2f}" if accuracy and accuracy.top1 is not None else "-"
    return [
        candidate.variant.name,
        *([top1] if labelled else []),
        *(_drop(accuracy) if accuracy else ["-", "-"]),
        *(_format_speed(speed) if speed else ["-", "-", "-"]),
        "best" if best else candidate.why_not.partition(":")[0] or "passes",
    ]


def _drop(accuracy: Accuracy) -> list[str]:
    low, high = accuracy.drop_ci
    return [
        f"{accuracy.drop:+.2f} ({low:+.2f} to {high:+.2f})",
        f"{accuracy.agreement:.2f}",
    ]


def _format_speed(speed: Speed) -> list[str]:
    low, high = speed.ratio_ci
    return [
        f"{speed.p50:.2f}",
        f"{speed.ratio:.2f} ({low:.2f}-{high:.2f})",
        f"{speed.size_bytes / 1e6:.1f}",
    ]


def _format_sensitivity_table(verdict: VerdictEntry, markdown: bool, width: int | None) -> list[str]:
    """The groups of operations and what the table means."""
    rows = [
        [
            s.group,
            str(s.nodes),
            f"{s.accuracy.deviation:.4f}",
            *_drop(s.accuracy),
        ]
        for s in verdict.sensitivity
    ]
    header = [
        "group",
        "operations",
        "logit deviation",
        "drop (95 % CI)",
        "agreement %",
    ]
    meaning = (
        "sensitivity: each group alone in int8, the worst first; logits in standard deviations of fp32's"
    )
    return [meaning, format_table(header, rows, markdown, width)]


def _describe_conditions(verdict: VerdictEntry) -> str:
    """On what, where and within which limits the candidates were measured."""
    images = next((c.accuracy.images for c in verdict.candidates if c.accuracy), 0)
    what = "labelled images" if verdict.labelled else "calibration images"
    budget = f", {verdict.latency_budget:g} ms" if verdict.latency_budget else ""
    limit = f", limited to {verdict.isa}" if verdict.isa else ""
    return (
        f"{images} {what}; allowed: drop {verdict.max_drop:g} points{budget};"
        f" {verdict.runtime}, {verdict.host.cpu}{limit}; threads: {verdict.threads or 'all'};"
        " latencies interleaved"
    )


def describe_recommendation(verdict: VerdictEntry) -> str:
    """Which candidate to take, and what to know of it; a line each."""
    best = next(
        (c for c in verdict.candidates if c.variant == verdict.winner),
        None,
    )
    if best is None or best.accuracy is None or best.speed is None:
        return "recommended: none of these passes"
    base, (low, high) = (
        verdict.candidates[0].variant.name,
        best.accuracy.drop_ci,
    )
    lines = [
        f"recommended: {best.variant.name}{_describe_comparison(best, best.speed, base)},"
        f" drop {best.accuracy.drop:+.2f} points (95 % CI {low:+.2f} to {high:+.2f})"
    ]
    if best.variant.keep_float:
        groups = ",".join(best.variant.keep_float)
        lines.append(f"the same by name: --precision int8 --keep-float {groups}")
    if high > verdict.max_drop:
        lines.append(
            f"the drop's interval reaches beyond the allowed {verdict.max_drop:g} points: more images"
            " would tell"
        )
    if verdict.tied:
        lines.append(
            f"no clear difference in speed: {'; '.join(verdict.tied)}; of these the one closest to {base}"
            " was taken"
        )
    return "\n".join(lines)


def _describe_comparison(best: Candidate, speed: Speed, base: str) -> str:
    """How fast the recommended candidate is, unless it is the reference itself."""
    if best.variant.name == base:
        return ""
    low, high = speed.ratio_ci
    return f", {speed.ratio:.2f} times as fast as {base} (95 % CI {low:.2f} to {high:.2f})"
