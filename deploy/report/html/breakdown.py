"""Where the time of an inference goes: tables by class of operation and by block of the model."""

from __future__ import annotations

from collections.abc import Sequence

from ...bundle.sections import ExecutedPrecision
from ...measure.breakdown import Breakdown, Part
from .charts import draw_bar
from .elements import NOTHING, UNKNOWN, Markup, Table, join, make

LEAST_SHARE = 0.0005
"""Classes of operations with a smaller share of the time than this are not listed."""


def write_breakdown(found: Breakdown | None) -> Markup:
    """Both tables; nothing where the runtime tells no times."""
    if found is None:
        return NOTHING
    kinds = [part for part in found.kinds if part.share >= LEAST_SHARE]
    left_out = len(found.kinds) - len(kinds)
    notes = [f"By {found.source}, whose clock takes time itself: these are shares of a slower inference."]
    if left_out:
        notes.append(f"Classes with less than {100 * LEAST_SHARE:.2f} % each are not listed: {left_out}.")
    parts = [
        make("p", " ".join(notes)),
        _write_parts("Time by class of operation", "class", kinds),
    ]
    if found.blocks:
        parts += [
            _write_parts("What really ran in each block of the model", "block", found.blocks),
            make(
                "p",
                "An operation that the runtime fused from several blocks counts to the last of them.",
                class_="soft",
            ),
        ]
    return join(parts)


def _write_parts(caption: str, what: str, parts: Sequence[Part]) -> Markup:
    most = max((part.share for part in parts), default=0) or 1.0
    rows = [
        [
            part.name or "(not known)",
            f"{100 * part.share:.1f}",
            draw_bar(part.share / most),
            _describe_precisions(part),
            str(part.operations),
        ]
        for part in parts
    ]
    return Table(caption, [what, "% of the time", "", "precisions", "operations"], rows).write()


def _describe_precisions(part: Part) -> str:
    """The shares within the part."""
    if not part.share:
        return UNKNOWN
    return ExecutedPrecision({name: share / part.share for name, share in part.precisions.items()}).summary()
