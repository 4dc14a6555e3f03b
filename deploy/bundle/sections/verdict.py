"""What ``--precision auto`` measured and chose."""

from __future__ import annotations

from dataclasses import dataclass

from .calibration import ImagesEntry
from .model import Host
from .values import Count, Duration, OutputDifference, Percent, Points, Precision, Size, Speedup


@dataclass(frozen=True)
class Variant:
    """One way to build the model; ``keep_float`` as in :class:`cmt_edge.calib.Recipe`."""

    name: str
    precision: Precision
    keep_float: tuple[str, ...] = ()


@dataclass(frozen=True)
class Accuracy:
    """Percentages and percentage points; ``drop`` is disagreement where no labels are known (then ``top1`` is
    ``None``)."""

    images: Count
    top1: Percent | None
    agreement: Percent
    drop: Points
    drop_ci: tuple[Points, Points]
    deviation: OutputDifference


@dataclass(frozen=True)
class Speed:
    """Milliseconds of one batch, model only; ``ratio`` of the first variant's median to this one's (above 1
    is faster), 95 % intervals."""

    p50: Duration
    ci: tuple[Duration, Duration]
    ratio: Speedup
    ratio_ci: tuple[Speedup, Speedup]
    size_bytes: Count
    executed: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """A variant with what was measured; ``why_not`` is empty if it passes."""

    variant: Variant
    accuracy: Accuracy | None = None
    speed: Speed | None = None
    why_not: str = ""

    @property
    def passes(self) -> bool:
        return not self.why_not


@dataclass(frozen=True)
class Sensitivity:
    """A group of ``nodes`` operations, alone in int8: the damage it does."""

    group: str
    nodes: Count
    accuracy: Accuracy


@dataclass(frozen=True, kw_only=True)
class VerdictEntry:
    """What ``--precision auto`` measured and chose.

    Attributes:
        labelled: whether the images had labels; without them a drop is disagreement with fp32.
        max_drop: allowed drop, percentage points.
        latency_budget: allowed median latency of one batch, milliseconds.
        candidates: everything that was considered; the float32 reference comes first.
        sensitivity: groups of operations, the most sensitive first.
        winner: ``None`` if nothing passes.
        tied: names of passing variants whose speed is not clearly different from the fastest one's.
        notes: readable.
        isa: the instruction set that the runtime was limited to.
        runtime: name and version.
        threads: CPU threads; ``None`` for all.
        batch: images in a batch, 0 if it is dynamic.
        host: the machine.
        data: the calibration images.
        float_already: groups of operations that are float in every int8 candidate.
    """

    labelled: bool
    max_drop: float
    latency_budget: Duration | None
    candidates: tuple[Candidate, ...]
    sensitivity: tuple[Sensitivity, ...]
    winner: Variant | None
    tied: tuple[str, ...]
    notes: tuple[str, ...]
    isa: str | None
    runtime: str
    threads: Size | None
    batch: Count
    host: Host
    data: ImagesEntry
    float_already: tuple[str, ...]
