"""What is kept of a test by MLPerf LoadGen."""

from __future__ import annotations

from dataclasses import dataclass

SINGLE, OFFLINE, SERVER = "SingleStream", "Offline", "Server"
"""LoadGen's names of its scenarios."""
SCENARIOS = (SINGLE, OFFLINE, SERVER)
"""The scenarios that a bundle can be asked in."""


@dataclass(frozen=True)
class LoadGenResult:
    """LoadGen's figures of one bundle in one scenario, and ours of the same.

    Attributes:
        scenario: one of :data:`SCENARIOS`.
        version: of LoadGen.
        valid: LoadGen's own judgement: long enough, enough queries, the limit kept.
        reason: why it is not valid, in LoadGen's words; empty otherwise.
        images: number of images that were asked for.
        p50, p90, p99, mean: latency of a query in milliseconds; ``None`` in ``Offline``, where it says how
            long the queue was.
        rate: images a second; in ``SingleStream`` with LoadGen's own time between two queries.
        asked_rate, limit_ms: what ``Server`` asked for; ``None`` elsewhere.
        ours: the two figures of ours that belong beside ``p50`` in ``SingleStream`` and ``rate`` in
            ``Offline``, from before and after; ``None`` in ``Server``.
        ratio: LoadGen's figure by the mean of ours.
        noise: the share by which they may differ.
        agrees: whether they do not differ by more; ``None`` in ``Server``.
        note: why there is no figure of ours; empty otherwise.
        logs: folder of LoadGen's own logs.
    """

    scenario: str
    version: str
    valid: bool
    reason: str
    images: int
    p50: float | None
    p90: float | None
    p99: float | None
    mean: float | None
    rate: float
    asked_rate: float | None
    limit_ms: float | None
    ours: tuple[float, float] | None
    ratio: float | None
    noise: float | None
    agrees: bool | None
    note: str
    logs: str
