"""The statistics behind every figure: percentiles, medians with bootstrap intervals, paired differences.

All intervals are of 95 %. Every random draw has a fixed seed, so the same samples give the same figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..bundle.record import OMITTED

Z95 = 1.959964
"""Standard deviations on either side of a normal mean that hold 95 % of its values."""
BOOTSTRAP = 1000
"""Number of resamples behind an interval."""
MOST_DRAWN = 1 << 18
"""The largest number of values that are resampled at a time: 2 MB of them."""
BOUNDS = (2.5, 97.5)
"""Percentiles between which an interval of 95 % lies."""
MIN_FOR_P99 = 1000
"""Number of samples below which the 99th percentile is not given: it would rest on fewer than ten values."""
EDGE = 100
"""Number of samples at either end whose medians are compared for drift."""
BINS = 40
"""Number of equal bins of a histogram."""
MOST_SHOWN = 99
"""Percentile at which a histogram ends: a few outliers would leave one bin for everything else."""
NS_PER_MS = 1e6
"""Nanoseconds in a millisecond."""


class Interval(NamedTuple):
    """The two ends of a 95 % interval."""

    low: float
    high: float


class Ratio(NamedTuple):
    """A ratio of medians with the two ends of its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def interval(self) -> Interval:
        return Interval(self.low, self.high)


class Difference(NamedTuple):
    """A mean of paired differences in percentage points, and its 95 % interval."""

    mean: float
    interval: Interval


@dataclass(frozen=True)
class Histogram:
    """How many samples lie in each of :data:`BINS` equal bins between ``low`` and ``high`` milliseconds;
    ``beyond`` is the number of larger ones."""

    low: float
    high: float
    counts: tuple[int, ...]
    beyond: int


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one variant.

    Attributes:
        count: number of samples.
        p50, p90, p95, max, mean: of all samples; no outlier is removed.
        ci: 95 % bootstrap interval of ``p50``.
        p99: ``None`` below :data:`MIN_FOR_P99` samples.
        drift: median of the last 100 samples over the median of the first 100, minus 1.
        histogram: how the samples are distributed; ``None`` in a file of an earlier version.
    """

    count: int
    p50: float
    ci: tuple[float, float]
    p90: float
    p95: float
    p99: float | None
    max: float
    mean: float
    drift: float
    histogram: Histogram | None = field(default=None, metadata=OMITTED)


def summarise(samples_ns: Sequence[int] | np.ndarray, seed: int = 0) -> Latency:
    """Statistics of one variant's samples, ``(count,)`` in nanoseconds."""
    ms = np.asarray(samples_ns, np.float64) / NS_PER_MS
    p50, p90, p95, p99 = np.percentile(ms, [50, 90, 95, 99])
    interval = compute_median_interval(ms, seed)
    return Latency(
        count=len(ms),
        p50=float(p50),
        ci=(interval.low, interval.high),
        p90=float(p90),
        p95=float(p95),
        p99=float(p99) if len(ms) >= MIN_FOR_P99 else None,
        max=float(ms.max()),
        mean=float(ms.mean()),
        drift=compute_drift(ms),
        histogram=count_in_bins(ms),
    )


def count_in_bins(values: np.ndarray) -> Histogram:
    """The histogram of ``values`` from the smallest to the percentile :data:`MOST_SHOWN`."""
    low, high = float(values.min()), float(np.percentile(values, MOST_SHOWN))
    shown = values[values <= high]
    counts, _ = np.histogram(shown, BINS, (low, high))
    return Histogram(low, high, tuple(counts.tolist()), len(values) - len(shown))


def compute_drift(values: np.ndarray) -> float:
    """Median of the last values over the median of the first ones, minus 1."""
    edge = min(EDGE, max(1, len(values) // 2))
    first = np.median(values[:edge])
    last = np.median(values[-edge:])
    return float(last / first - 1)


def compute_median_interval(values: np.ndarray, seed: int = 0) -> Interval:
    """The bootstrap interval of a median (Efron 1979, percentile method)."""
    medians = bootstrap_medians(values, np.random.default_rng(seed))
    return _find_middle(medians)


def compare_medians(
    base: np.ndarray,
    other: np.ndarray,
    seed: int = 0,
) -> Ratio:
    """How many times as fast as ``base`` the samples ``other`` are: above 1 is faster."""
    rng = np.random.default_rng(seed)
    base_medians = bootstrap_medians(base, rng)
    other_medians = bootstrap_medians(other, rng)
    low, high = _find_middle(base_medians / other_medians)
    return Ratio(
        float(np.median(base) / np.median(other)),
        low,
        high,
    )


def bootstrap_medians(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Medians of :data:`BOOTSTRAP` resamples of ``values``."""
    n = len(values)
    together = max(1, MOST_DRAWN // n)
    parts = [
        np.median(values[rng.integers(0, n, (min(together, BOOTSTRAP - start), n))], axis=1)
        for start in range(0, BOOTSTRAP, together)
    ]
    return np.concatenate(parts)


def _find_middle(values: np.ndarray) -> Interval:
    """The interval that holds the middle 95 % of ``values``."""
    low, high = np.percentile(values, BOUNDS)
    return Interval(float(low), float(high))


def compute_paired_drop(reference: np.ndarray, ours: np.ndarray) -> Difference:
    """Points by which ``ours`` is right less often than ``reference``, image by image.

    Args:
        reference, ours: bool ``(N,)``, whether each image was answered correctly; at least one image.

    The interval is method 10 of Newcombe (1998, "Improved confidence intervals for the difference between
    binomial proportions based on paired data"). Unlike the normal interval it does not collapse where few
    or no images are answered differently.
    """
    count = len(reference)
    before, after = float(reference.mean()), float(ours.mean())
    mean = float((reference.astype(np.float64) - ours).mean())
    correlation = _compute_correlation(reference, ours)
    first, second = compute_wilson_interval(before, count), compute_wilson_interval(after, count)
    below = _combine(
        before - first.low,
        second.high - after,
        correlation,
    )
    above = _combine(
        first.high - before,
        after - second.low,
        correlation,
    )
    interval = Interval(
        max(-100.0, 100 * (mean - below)),
        min(100.0, 100 * (mean + above)),
    )
    return Difference(100 * mean, interval)


def _compute_correlation(reference: np.ndarray, ours: np.ndarray) -> float:
    """How strongly both sides are right on the same images, -1 to 1; corrected for continuity as Newcombe
    does."""
    count = len(reference)
    right, ours_right = int(reference.sum()), int(ours.sum())
    both = int((reference & ours).sum())
    spread = right * (count - right) * ours_right * (count - ours_right)
    if spread == 0:
        return 0.0
    neither = count - right - ours_right + both
    excess = both * neither - (right - both) * (ours_right - both)
    corrected = max(excess - count / 2, 0.0) if excess > 0 else excess
    return float(corrected / spread**0.5)


def _combine(first: float, second: float, correlation: float) -> float:
    """The length of the difference of two distances with a ``correlation`` between them."""
    square = first**2 - 2 * correlation * first * second + second**2
    return math.sqrt(max(square, 0.0))


def compute_wilson_interval(share: float, count: int) -> Interval:
    """The interval of a share of ``count`` trials (Wilson 1927).

    Unlike the normal interval it also holds where the share is 0 or 1.
    """
    z = Z95**2 / count
    middle = (share + z / 2) / (1 + z)
    variance = share * (1 - share) / count + z / (4 * count)
    half = Z95 / (1 + z) * variance**0.5
    low = max(0.0, min(share, middle - half))
    high = min(1.0, max(share, middle + half))
    return Interval(low, high)
