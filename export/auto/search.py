"""Which precision wins on this machine? Pure logic: what it asks for is measured by the caller, so it is
tested without models.

1. The first variant, the float32 reference, answers, then all others. Each is judged by its *drop*, paired
   image by image with the reference: loss of top-1 where labels are known, else disagreement with the
   reference's top-1. A variant passes while the measured drop is at most the allowed one; its 95 % interval
   is reported beside it.
2. Sensitivity: every group of operations is alone in int8, all others float. The ranking goes by the mean
   logit deviation.
3. Where int8 does not pass, the most sensitive groups are taken back to float, one more each time, until it
   does.
4. Latencies of the variants, interleaved. The fastest that passes wins; where the intervals of their speed-
   ups overlap, the one that agrees best with the reference, then the wider type.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Protocol

import numpy as np

from cmt_edge.deploy.bundle.sections import (
    Accuracy,
    Candidate,
    Sensitivity,
    Speed,
    Variant,
)
from cmt_edge.deploy.measure.parity import DROP_ROUNDING_POINTS
from cmt_edge.deploy.measure.statistics import compute_paired_drop, compute_wilson_interval

WIDTH = {"fp32": 2, "bf16": 1, "int8": 0}
"""Precision -> its rank by the width of its numbers; of equals the wider one is taken."""


class Phase(Enum):
    """A part of a search, in order; ranking and refining may be left out."""

    COMPARE = "every candidate answers"
    RANK = "every group of operations is tried alone in int8"
    REFINE = "groups go back to float"
    TIME = "latencies are measured"
    CHOOSE = "one is chosen"


def ignore_phase(phase: Phase) -> None:
    """Do nothing with the phase that begins."""


@dataclass(frozen=True)
class Answers:
    """What a variant made of the images.

    Attributes:
        top1: int ``(N,)``, most probable class of each image.
        deviation: mean absolute difference of its logits from the reference's, in standard deviations of the
            latter.
        truth: int ``(N,)``, the images' labels; ``None`` where there are none.
    """

    top1: np.ndarray
    deviation: float
    truth: np.ndarray | None = None


@dataclass(frozen=True)
class Conditions:
    """When a variant passes, and how long to look.

    Attributes:
        max_drop: allowed drop, percentage points.
        latency_budget: allowed median latency of one batch, milliseconds.
        deadline: by ``clock``; no further accuracy is measured once what is left would not do for the
            latencies.
        latency_seconds: what measuring the latency of one variant takes, for that decision.
        clock: seconds, monotonic.
    """

    max_drop: float
    latency_budget: float | None = None
    deadline: float | None = None
    latency_seconds: float = 0.0
    clock: Callable[[], float] = field(default=time.monotonic, repr=False, compare=False)


class Measurement(Protocol):
    """What the search asks for."""

    def answers(self, variant: Variant, quick: bool) -> Answers:
        """On all images, or, ``quick``, on some of them (the same for every variant)."""
        ...

    def speeds(self, variants: Sequence[Variant]) -> Mapping[str, Speed]:
        """By name; measured interleaved, ratios refer to the first."""
        ...


@dataclass(frozen=True)
class Verdict:
    """The result of :func:`search`.

    ``winner`` is ``None`` if nothing passes; ``tied`` names the passing variants whose speed is not clearly
    another than the fastest's.
    """

    labelled: bool
    max_drop: float
    latency_budget: float | None
    candidates: tuple[Candidate, ...]
    sensitivity: tuple[Sensitivity, ...]
    winner: Variant | None
    tied: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def search(
    variants: Sequence[Variant],
    groups: Mapping[str, int],
    conditions: Conditions,
    measure: Measurement,
    missing: Mapping[str, str] | None = None,
    entering: Callable[[Phase], None] = ignore_phase,
) -> Verdict:
    """Judge ``variants``, refine int8 where it does not pass, and choose.

    Args:
        variants: the reference first; the plain int8 one, if any, is the first of precision ``"int8"``.
        groups: groups of operations that are int8 in it, and their number of operations.
        conditions: when a variant passes.
        measure: measures.
        missing: names of variants that cannot run here, and why; they are reported, not measured.
        entering: called with every phase as it begins.
    """
    return _Search(variants, groups, conditions, measure, missing or {}, entering).run()


class _Search:
    """One search on its way.

    Attributes:
        variants: those that can run here, with the refined one once there is one.
        refused: those that cannot.
        judged: variant -> its accuracy, of those that were measured.
        ranking: groups by their sensitivity, most sensitive first.
        notes: readable.
    """

    def __init__(
        self,
        variants: Sequence[Variant],
        groups: Mapping[str, int],
        conditions: Conditions,
        measure: Measurement,
        missing: Mapping[str, str],
        entering: Callable[[Phase], None],
    ) -> None:
        self.variants = [v for v in variants if v.name not in missing]
        absent = [variant for variant in variants if variant.name in missing]
        self.refused = [Candidate(variant, why_not=missing[variant.name]) for variant in absent]
        self.groups, self.conditions = groups, conditions
        self.measure, self.entering = measure, entering
        self.judged: dict[Variant, Accuracy] = {}
        self.ranking: list[Sensitivity] = []
        self.notes: list[str] = []

    def run(self) -> Verdict:
        """The verdict."""
        expected = self._compare()
        int8 = next(
            (v for v in self.variants[1:] if v.precision == "int8"),
            None,
        )
        if int8 in self.judged and len(self.groups) > 1:
            self._rank_groups(int8)
            if not self._is_accurate(self.judged[int8]):
                self._refine(expected, int8)
        self.entering(Phase.TIME)
        judged = [variant for variant in self.variants if variant in self.judged]
        speeds = self.measure.speeds(judged)
        self.entering(Phase.CHOOSE)
        candidates = [self._make_candidate(v, speeds.get(v.name)) for v in self.variants]
        winner, tied = pick_winner(candidates)
        return Verdict(
            expected.truth is not None,
            self.conditions.max_drop,
            self.conditions.latency_budget,
            (*candidates, *self.refused),
            tuple(self.ranking),
            winner.variant if winner else None,
            tied,
            tuple(self.notes),
        )

    def _compare(self) -> Answers:
        """Judge every variant; the answers of the reference."""
        self.entering(Phase.COMPARE)
        reference, *others = self.variants
        expected = self.measure.answers(reference, False)
        self.judged[reference] = judge(expected, expected)
        for variant in others:
            if self._is_in_time("comparing variants"):
                answers = self.measure.answers(variant, False)
                self.judged[variant] = judge(expected, answers)
        return expected

    def _is_in_time(self, what: str) -> bool:
        """Whether there is time for one more accuracy; notes once where there is none."""
        limit = self.conditions.deadline
        reserve = self.conditions.latency_seconds * (len(self.judged) + 1)
        if limit is None or self.conditions.clock() + reserve < limit:
            return True
        if not any("time budget" in note for note in self.notes):
            self.notes.append(
                f"the time budget ended {what}: this is the best so far, another run goes on from here"
            )
        return False

    def _rank_groups(self, int8: Variant) -> None:
        """Every group alone in int8, most sensitive first."""
        self.entering(Phase.RANK)
        expected = None
        for group, nodes in self.groups.items():
            if not self._is_in_time("the ranking of groups"):
                break
            expected = expected or self.measure.answers(self.variants[0], True)
            others = tuple(other for other in self.groups if other != group)
            alone = replace(int8, name=f"only {group} in int8", keep_float=others)
            accuracy = judge(expected, self.measure.answers(alone, True))
            self.ranking.append(Sensitivity(group, nodes, accuracy))
        self.ranking.sort(key=lambda s: -s.accuracy.deviation)

    def _refine(self, expected: Answers, int8: Variant) -> None:
        """Take the most sensitive groups back to float, one more each time, until the drop holds."""
        self.entering(Phase.REFINE)
        kept: tuple[str, ...] = ()
        refined = None
        for item in self.ranking:
            kept = (*kept, item.group)
            if len(kept) == len(self.groups) or not self._is_in_time("taking groups back to float"):
                break
            plural = "s" if len(kept) > 1 else ""
            refined = replace(
                int8,
                name=f"int8, {len(kept)} group{plural} float",
                keep_float=kept,
            )
            accuracy = judge(expected, self.measure.answers(refined, False))
            if self._is_accurate(accuracy):
                break
        if refined is not None:
            self.variants.append(refined)
            self.judged[refined] = accuracy

    def _is_accurate(self, accuracy: Accuracy) -> bool:
        return accuracy.drop <= self.conditions.max_drop + DROP_ROUNDING_POINTS

    def _make_candidate(self, variant: Variant, speed: Speed | None) -> Candidate:
        """``variant`` with what was measured, and why it does not pass."""
        accuracy, budget = (
            self.judged.get(variant),
            self.conditions.latency_budget,
        )
        if accuracy is None or speed is None:
            return Candidate(variant, accuracy, speed, "not measured: no time left")
        reasons = []
        if not self._is_accurate(accuracy):
            reasons.append(f"drop above {self.conditions.max_drop:g}")
        if budget is not None and speed.p50 > budget:
            reasons.append(f"slower than {budget:g} ms")
        return Candidate(variant, accuracy, speed, ", ".join(reasons))


def pick_winner(
    candidates: Sequence[Candidate],
) -> tuple[Candidate | None, tuple[str, ...]]:
    """The winner among those that pass, and the names of those as fast as the fastest within the intervals
    (more than one, or none)."""
    able = [
        (c, c.accuracy, c.speed)
        for c in candidates
        if c.passes and c.accuracy is not None and c.speed is not None
    ]
    if not able:
        return None, ()
    fastest = max((speed for _, _, speed in able), key=lambda speed: speed.ratio)
    close = [
        (candidate, accuracy, speed)
        for candidate, accuracy, speed in able
        if speed is fastest or speed.ratio_ci[1] >= fastest.ratio_ci[0]
    ]

    def preference(
        entry: tuple[Candidate, Accuracy, Speed],
    ) -> tuple[float, int, float]:
        candidate, accuracy, speed = entry
        return (
            accuracy.agreement,
            WIDTH.get(candidate.variant.precision, 0),
            speed.ratio,
        )

    winner = max(close, key=preference)[0]
    tied = tuple(candidate.variant.name for candidate, _, _ in close)
    return winner, tied if len(tied) > 1 else ()


def judge(expected: Answers, ours: Answers) -> Accuracy:
    """Compare answers to the same images with the reference's."""
    count = len(expected.top1)
    agreement = float((ours.top1 == expected.top1).mean())
    if expected.truth is None:
        low, high = compute_wilson_interval(1 - agreement, count)
        return Accuracy(
            count,
            None,
            100 * agreement,
            100 * (1 - agreement),
            (100 * low, 100 * high),
            ours.deviation,
        )
    right = ours.top1 == expected.truth
    drop = compute_paired_drop(expected.top1 == expected.truth, right)
    return Accuracy(
        count,
        100 * float(right.mean()),
        100 * agreement,
        drop.mean,
        (drop.interval.low, drop.interval.high),
        ours.deviation,
    )
