"""Where the error of a bundle enters, block by block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from ...bundle.sections import LayerError, LayerRun
from ..layers import describe_run, split_runs
from .charts import draw_bar, make_key
from .elements import NOTHING, Markup, Table, join, make, make_list

SMALLEST = 1e-8
"""The relative error at the left end of a bar, below what float32 gives; at the right end it is 1."""


def write_layers(layers: Sequence[LayerError], runs: Sequence[LayerRun] = ()) -> Markup:
    """A table a bundle and runtime, in the order of the blocks, with bars on a logarithmic scale, and what it
    says: where the error enters and where it grows.

    Args:
        layers: of the runs, one run after the other.
        runs: what each says as a whole; none where only the errors were recorded.
    """
    if not layers:
        return NOTHING
    tables = _write_runs(layers, runs) if runs else _write_groups(layers)
    note = f"The bars are logarithmic: an empty one is {SMALLEST:g} or less, a full one is 1 or more."
    key = [make_key("limit"), "is the error from which on a block is named."] if runs else []
    return join([*tables, make("p", note, *(" " if key else ""), *key, class_="soft")])


def _write_runs(layers: Sequence[LayerError], runs: Sequence[LayerRun]) -> Iterator[Markup]:
    for run, part in zip(runs, split_runs(layers, runs), strict=False):
        yield _write_table(run.precision, run.backend, [*part.values()], run.threshold)
        yield make_list([line.strip() for line in describe_run(part, run)])


def _write_groups(layers: Sequence[LayerError]) -> Iterator[Markup]:
    groups: dict[tuple[str, str], list[LayerError]] = {}
    for layer in layers:
        groups.setdefault((layer.precision, layer.backend), []).append(layer)
    for (precision, backend), found in groups.items():
        yield _write_table(precision, backend, found, None)


def _write_table(
    precision: str, backend: str, found: Sequence[LayerError], threshold: float | None
) -> Markup:
    return Table(
        f"{precision} on {backend}: difference from the reference, block by block",
        ["block", "relative error", "", "cosine"],
        [_list_cells(layer, threshold) for layer in found],
    ).write()


def _list_cells(layer: LayerError, threshold: float | None) -> list[str]:
    error, cosine = layer.relative_error, layer.cosine
    limit = None if threshold is None else find_length(threshold)
    return [layer.name, f"{error:.2e}", draw_bar(find_length(error), limit), f"{cosine:.6f}"]


def find_length(error: float) -> float:
    """The share of a bar that an error fills."""
    if error <= SMALLEST:
        return 0.0
    return min(1.0, 1 - math.log10(error) / math.log10(SMALLEST))
