"""Which precision wins on this machine? Pure logic: what it asks for is measured by the caller, so it is
tested without models.

1. Answers of the first variant, the float32 reference, then of all others; each is judged by its *drop*,
   paired image by image with the reference: loss of top-1 where labels are known, else disagreement with the
   reference's top-1. A variant passes while the measured drop is at most the allowed one; its 95 % interval
   is reported beside it.
2. Sensitivity: every group of operations alone in int8, all others float. The ranking goes by the mean logit
deviation.
3. Where int8 does not pass, the most sensitive groups are taken back to float one after the other until it
does.
4. Latencies of the variants, interleaved. The fastest that passes wins; where the intervals of their
   speed-ups overlap, the one that agrees best with the reference, then the wider type.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from cmt_edge.deploy.bundle.sections import Accuracy, Candidate, Sensitivity, Speed, Variant
from cmt_edge.deploy.measure.statistics import paired_drop, wilson

WIDTH = {"fp32": 2, "bf16": 1, "int8": 0}
EPSILON = 1e-9


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
class Settings:
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

    def speeds(self, variants: Sequence[Variant]) -> Mapping[str, Speed]:
        """By name; measured interleaved, ratios refer to the first."""


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
    settings: Settings,
    measure: Measurement,
    missing: Mapping[str, str] | None = None,
) -> Verdict:
    """Judge ``variants``, refine int8 where it does not pass, and choose.

    Args:
        variants: the reference first; the plain int8 one, if any, is the first of precision ``"int8"``.
        groups: groups of operations that are int8 in it, and their number of operations.
        settings: when a variant passes.
        measure: measures.
        missing: names of variants that cannot run here, and why; they are reported, not measured.
    """
    return _Search(variants, groups, settings, measure, missing or {}).run()


class _Search:
    def __init__(
        self,
        variants: Sequence[Variant],
        groups: Mapping[str, int],
        settings: Settings,
        measure: Measurement,
        missing: Mapping[str, str],
    ) -> None:
        self.variants = [v for v in variants if v.name not in missing]
        self.groups, self.settings, self.measure = groups, settings, measure
        self.refused = [Candidate(v, why_not=missing[v.name]) for v in variants if v.name in missing]
        self.judged: dict[Variant, Accuracy] = {}
        self.ranking: list[Sensitivity] = []
        self.notes: list[str] = []

    def run(self) -> Verdict:
        reference, *others = self.variants
        expected = self.measure.answers(reference, False)
        self.judged[reference] = judge(expected, expected)
        for variant in others:
            if self._in_time("comparing variants"):
                self.judged[variant] = judge(expected, self.measure.answers(variant, False))
        int8 = next((v for v in others if v.precision == "int8"), None)
        if int8 in self.judged and len(self.groups) > 1:
            self._rank(reference, int8)
            if not self._accurate(self.judged[int8]):
                self._refine(expected, int8)
        speeds = self.measure.speeds([v for v in self.variants if v in self.judged])
        candidates = [self._candidate(v, speeds.get(v.name)) for v in self.variants]
        winner, tied = choose(candidates)
        settings = self.settings
        return Verdict(
            expected.truth is not None,
            settings.max_drop,
            settings.latency_budget,
            (*candidates, *self.refused),
            tuple(self.ranking),
            winner.variant if winner else None,
            tied,
            tuple(self.notes),
        )

    def _in_time(self, what: str) -> bool:
        """Whether there is time for one more accuracy; notes once where there is none."""
        limit, reserve = self.settings.deadline, self.settings.latency_seconds * (len(self.judged) + 1)
        if limit is None or self.settings.clock() + reserve < limit:
            return True
        if not any("time budget" in note for note in self.notes):
            self.notes.append(
                f"the time budget ended {what}: this is the best so far, another run goes on from here"
            )
        return False

    def _rank(self, reference: Variant, int8: Variant) -> None:
        """Every group alone in int8, most sensitive first."""
        expected = None
        for group, nodes in self.groups.items():
            if not self._in_time("the ranking of groups"):
                break
            expected = expected or self.measure.answers(reference, True)
            others = tuple(other for other in self.groups if other != group)
            alone = replace(int8, name=f"only {group} in int8", keep_float=others)
            self.ranking.append(Sensitivity(group, nodes, judge(expected, self.measure.answers(alone, True))))
        self.ranking.sort(key=lambda s: -s.accuracy.deviation)

    def _refine(self, expected: Answers, int8: Variant) -> None:
        """Take the most sensitive groups back to float, one more each time, until the drop holds."""
        kept: tuple[str, ...] = ()
        refined = None
        for item in self.ranking:
            kept = (*kept, item.group)
            if len(kept) == len(self.groups) or not self._in_time("taking groups back to float"):
                break
            plural = "s" if len(kept) > 1 else ""
            refined = replace(int8, name=f"int8, {len(kept)} group{plural} float", keep_float=kept)
            accuracy = judge(expected, self.measure.answers(refined, False))
            if self._accurate(accuracy):
                break
        if refined is not None:
            self.variants.append(refined)
            self.judged[refined] = accuracy

    def _accurate(self, accuracy: Accuracy) -> bool:
        return accuracy.drop <= self.settings.max_drop + EPSILON

    def _candidate(self, variant: Variant, speed: Speed | None) -> Candidate:
        accuracy, budget = self.judged.get(variant), self.settings.latency_budget
        reasons = []
        if accuracy is None or speed is None:
            reasons.append("not measured: no time left")
        else:
            if not self._accurate(accuracy):
                reasons.append(f"drop above {self.settings.max_drop:g}")
            if budget is not None and speed.p50 > budget:
                reasons.append(f"slower than {budget:g} ms")
        return Candidate(variant, accuracy, speed, ", ".join(reasons))


def choose(candidates: Sequence[Candidate]) -> tuple[Candidate | None, tuple[str, ...]]:
    """The winner among those that pass, and the names of those as fast as the fastest within the intervals
    (more than one, or none)."""
    able = [
        (c, c.accuracy, c.speed)
        for c in candidates
        if c.passes and c.accuracy is not None and c.speed is not None
    ]
    if not able:
        return None, ()
    fastest = max(able, key=lambda entry: entry[2].ratio)[2]
    close = [entry for entry in able if entry[2] is fastest or entry[2].ratio_ci[1] >= fastest.ratio_ci[0]]
    best = max(
        close,
        key=lambda entry: (entry[1].agreement, WIDTH.get(entry[0].variant.precision, 0), entry[2].ratio),
    )
    return best[0], tuple(c.variant.name for c, _, _ in close) if len(close) > 1 else ()


def judge(expected: Answers, ours: Answers) -> Accuracy:
    """Compare answers to the same images with the reference's."""
    n = len(expected.top1)
    agreement = float((ours.top1 == expected.top1).mean())
    if expected.truth is None:
        low, high = wilson(1 - agreement, n)
        return Accuracy(
            n, None, 100 * agreement, 100 * (1 - agreement), (100 * low, 100 * high), ours.deviation
        )
    drop = paired_drop(expected.top1 == expected.truth, ours.top1 == expected.truth)
    top1 = 100 * float((ours.top1 == expected.truth).mean())
    interval = (drop.interval.low, drop.interval.high)
    return Accuracy(n, top1, 100 * agreement, drop.mean, interval, ours.deviation)
