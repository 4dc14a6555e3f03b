"""Where the error of a bundle enters, block by block."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...bundle.sections import LayerError
from .charts import draw_bar
from .elements import NOTHING, Markup, Table, join, make

SMALLEST = 1e-8
"""The relative error at the left end of a bar, below what float32 gives; at the right end it is 1."""


def write_layers(layers: Sequence[LayerError]) -> Markup:
    """A table a runtime and precision, in the order of the blocks, with bars on a logarithmic scale."""
    groups: dict[tuple[str, str], list[LayerError]] = {}
    for layer in layers:
        groups.setdefault((layer.precision, layer.backend), []).append(layer)
    if not groups:
        return NOTHING
    tables = (
        Table(
            f"{precision} on {backend}: difference from the reference, block by block",
            ["block", "relative error", "", "cosine"],
            [_list_cells(layer) for layer in found],
        ).write()
        for (precision, backend), found in groups.items()
    )
    note = f"The bars are logarithmic: an empty one is {SMALLEST:g} or less, a full one is 1 or more."
    return join([*tables, make("p", note, class_="soft")])


def _list_cells(layer: LayerError) -> list[str]:
    error, cosine = layer.relative_error, layer.cosine
    return [
        layer.name,
        f"{error:.2e}",
        draw_bar(find_length(error)),
        f"{cosine:.6f}",
    ]


def find_length(error: float) -> float:
    """The share of a bar that an error fills."""
    if error <= SMALLEST:
        return 0.0
    return min(1.0, 1 - math.log10(error) / math.log10(SMALLEST))
