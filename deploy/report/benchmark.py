"""Latencies as text."""

from __future__ import annotations

from collections.abc import Sequence

from ..escaping import escape_line
from ..measure.benchmark import Benchmark, Measured
from ..measure.timing import Protocol
from .loadgen import describe_loadgen
from .tables import LATENCY_COLUMNS, format_latency_cells, format_table


def describe_benchmark(result: Benchmark, markdown: bool = False, width: int | None = None) -> str:
    """Latency table, what really ran, the machine, and warnings; ``width`` as
    :func:`.tables.format_table`."""
    warnings = [
        f"warning: {escape_line(r.name)}: {warning}" for r in result.results for warning in r.warnings
    ]
    parts = [
        _format_latency_table(result, markdown, width),
        _format_executed_table(result, markdown, width),
        *describe_loadgen(result.results, markdown, width),
        _describe_conditions(result),
        *_describe_fastest(result),
        *warnings,
    ]
    return "\n\n".join(parts)


def _format_latency_table(result: Benchmark, markdown: bool, width: int | None) -> str:
    first, *others = LATENCY_COLUMNS
    header = [
        "bundle",
        "MB",
        f"{first} ms",
        *others,
        "end-to-end p50",
        "images/s",
        "speed-up (95 % CI)",
    ]
    rows = [_format_latency_row(measured) for measured in result.results]
    return format_table(header, rows, markdown, width)


def _format_latency_row(measured: Measured) -> list[str]:
    low, high = measured.ratio_ci
    rate = measured.throughput
    return [
        measured.name,
        f"{measured.size_bytes / 1e6:.1f}",
        *format_latency_cells(measured.model),
        f"{measured.end_to_end.p50:.2f}",
        "-" if rate is None else f"{rate:.0f}",
        f"{measured.ratio:.2f} ({low:.2f}-{high:.2f})",
    ]


def _format_executed_table(result: Benchmark, markdown: bool, width: int | None) -> str:
    """The precision that was asked for beside those that really ran."""
    header = [
        "bundle",
        "asked",
        "what really ran (share of time)",
        "conversions",
        "runtime",
    ]
    rows = [
        [
            r.name,
            r.precision,
            r.executed.summary(),
            f"{100 * r.executed.conversion_share:.0f} %" if r.executed.time_share else "-",
            r.runtime.summary(),
        ]
        for r in result.results
    ]
    return format_table(header, rows, markdown, width)


def _describe_conditions(result: Benchmark) -> str:
    """The machine, and how it was measured."""
    host = result.host
    flags = ", ".join(host.flags) or "none of note"
    return (
        f"{host.cpu}, {host.cores} cores ({flags}); threads: {result.threads or 'all'}; batch"
        f" {result.results[0].batch}; {describe_protocol(result.protocol)}."
    )


def _describe_fastest(result: Benchmark) -> list[str]:
    """Which of several to take, if the others' intervals leave no doubt."""
    if len(result.results) < 2:
        return []
    if len({r.batch for r in result.results}) > 1:
        return []  # ratios are of calls
    best, rival = find_fastest(result.results)
    return [
        f"fastest: {escape_line(best.name)}"
        + (f" (no clear difference from {escape_line(rival.name)})" if rival else "")
    ]


def find_fastest(results: Sequence[Measured]) -> tuple[Measured, Measured | None]:
    """The fastest of at least two, and the next one where their intervals leave doubt."""
    best, second = sorted(results, key=lambda r: -r.ratio)[:2]
    close = second.ratio_ci[1] >= best.ratio_ci[0]
    return best, second if close else None


def describe_protocol(protocol: Protocol) -> str:
    """What the line under a table of latencies says of the order and number of calls."""
    return (
        f"interleaved, at least {protocol.iters} iterations and {protocol.seconds:g} s each after warm-up,"
        f" turns after {1e3 * protocol.settle_seconds:g} ms uncounted"
    )
