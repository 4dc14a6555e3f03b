"""A quick measurement of the bundle, and the precisions that really ran."""

from __future__ import annotations

from dataclasses import dataclass, field

from .values import Count, Duration, Share, Size

LEAST_SHOWN_SHARE = 0.005
"""A precision with a smaller share than this is left out of :meth:`ExecutedPrecision.summary`."""


@dataclass(frozen=True)
class ExecutedPrecision:
    """What a runtime really ran, from its own execution graph.

    Attributes:
        time_share: precision -> share of the run time; the shares sum to 1. It is empty where the runtime
            measures no times.
        operations: precision -> number of executed operations.
        conversion_share: share of the time spent on reorders and type conversions.
        source: where the figures come from.
    """

    time_share: dict[str, Share] = field(default_factory=dict)
    operations: dict[str, Count] = field(default_factory=dict)
    conversion_share: Share = 0.0
    source: str = ""

    def summary(self) -> str:
        """For a table, e.g. ``"int8 58 % + bf16 42 %"``."""
        total = max(1, sum(self.operations.values()))
        counted = {precision: number / total for precision, number in self.operations.items()}
        shares = self.time_share or counted
        ordered = sorted(shares.items(), key=lambda item: -item[1])
        shown = [
            f"{precision} {100 * share:.0f} %" for precision, share in ordered if share >= LEAST_SHOWN_SHARE
        ]
        return " + ".join(shown) or "unknown"


@dataclass(frozen=True, kw_only=True)
class LatencyEntry:
    """A quick measurement of the bundle where it was exported or built; milliseconds of one batch.

    Attributes:
        p50_ms, p95_ms: percentiles of the model alone.
        ci_ms: 95 % interval of ``p50_ms``.
        end_to_end_p50_ms: median from encoded image to answer.
        batch: images in a batch.
        threads: CPU threads; ``None`` for all.
        executed: the precisions that really ran.
        warnings: readable.
    """

    p50_ms: Duration
    ci_ms: tuple[Duration, Duration]
    p95_ms: Duration
    end_to_end_p50_ms: Duration
    batch: Size
    threads: Size | None
    executed: ExecutedPrecision
    warnings: tuple[str, ...]
