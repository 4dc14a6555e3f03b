"""MLPerf LoadGen's figures beside ours, as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..escaping import escape_line
from ..measure.benchmark import Measured
from ..measure.loadgen_result import OFFLINE, SERVER, LoadGenResult
from .tables import format_table

DISCLAIMER = (
    "Results not verified by MLCommons Association: they are no submission, and the tests are shorter than"
    " MLPerf's rules demand."
)
"""What MLCommons wants said beside figures that it did not verify."""
HEADER = (
    "bundle, scenario",
    "LoadGen",
    "ours, before and after",
    "ratio",
    "within",
    "p90 ms",
    "p99 ms",
    "images",
)
"""Heads of the columns."""


def describe_loadgen(results: Sequence[Measured], markdown: bool, width: int | None) -> Iterator[str]:
    """A table, what it means, and warnings; nothing where LoadGen asked nothing."""
    pairs = [(measured.name, one) for measured in results for one in measured.loadgen or ()]
    if not pairs:
        return
    yield format_table(HEADER, [_format_row(name, one) for name, one in pairs], markdown, width)
    yield f"MLPerf LoadGen {pairs[0][1].version}. {DISCLAIMER}"
    yield from dict.fromkeys(f"No figure of ours: {one.note}." for _, one in pairs if one.note)
    for name, one in pairs:
        where = f"{escape_line(name)}, {one.scenario}"
        yield from (f"warning: {where}: {warning}" for warning in _write_warnings(one))
    yield "\n".join(f"logs of {escape_line(name)}: {escape_line(one.logs)}" for name, one in pairs)


def _format_row(name: str, one: LoadGenResult) -> list[str]:
    unit = "/s" if one.scenario == OFFLINE else " ms"
    return [
        f"{name}, {one.scenario}",
        _format_figure(one),
        " ".join(f"{value:.4g}{unit}" for value in one.ours or ()) or "-",
        "-" if one.ratio is None else f"{one.ratio:.3f}",
        "-" if one.noise is None else f"{100 * one.noise:.0f} %",
        "-" if one.p90 is None else f"{one.p90:.2f}",
        "-" if one.p99 is None else f"{one.p99:.2f}",
        str(one.images),
    ]


def _format_figure(one: LoadGenResult) -> str:
    """What LoadGen's scenario is about."""
    rate = f"{one.rate:.4g}/s"
    if one.p50 is None:
        return rate
    latency = f"p50 {one.p50:.4g} ms"
    return f"{latency} at {rate}" if one.scenario == SERVER else latency


def _write_warnings(one: LoadGenResult) -> Iterator[str]:
    if one.agrees is False and one.ratio is not None and one.noise is not None:
        yield (
            f"LoadGen's figure and ours differ by {100 * abs(one.ratio - 1):.0f} %, more than the"
            f" {100 * one.noise:.0f} % that the machine's noise explains"
        )
    if not one.valid:
        yield f"LoadGen calls this test invalid: {escape_line(one.reason) or 'it does not say why'}"
