"""The statistics behind all figures: they are those of earlier reports, bit for bit, and intervals hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmt_edge.deploy.measure.statistics import (
    bootstrap_medians,
    compare_medians,
    compute_median_interval,
    compute_paired_drop,
    compute_wilson_interval,
    summarise,
)


def samples(count: int, seed: int) -> np.ndarray:
    """Latencies in nanoseconds, around 9 ms."""
    return np.random.default_rng(seed).lognormal(16.0, 0.2, count).astype(np.int64)


RECORDED = {
    7: (9.522013, (7.981279, 10.473131), None, 0.020362606100201797),
    150: (8.867384999999999, (8.580867, 9.1141005), None, -0.025745677450785265),
    1200: (8.8307955, (8.6872075, 8.9406359875), 13.73937684, 0.011778621507249731),
}
"""Number of samples -> p50, its interval, p99 and drift, as they were computed before this module existed."""


@pytest.mark.parametrize("count", RECORDED)
def test_figures_are_those_of_earlier_reports(count):
    found = summarise(samples(count, seed=1))
    assert (found.p50, found.ci, found.p99, found.drift) == RECORDED[count]
    assert found.count == count


def test_ratios_are_those_of_earlier_reports():
    ratio = compare_medians(samples(150, seed=1), samples(130, seed=2))
    assert ratio.value == 1.0099290956231035
    assert ratio.interval == (0.9499821999004955, 1.0526557393101625)


def test_one_generator_serves_both_sides_of_a_ratio():
    """A generator of the same seed for each side would draw the same resamples, and narrow the interval."""
    values = samples(100, seed=3)
    same = compare_medians(values, values)
    assert same.value == 1
    assert same.low < 1 < same.high
    rng = np.random.default_rng(0)
    assert not np.array_equal(bootstrap_medians(values, rng), bootstrap_medians(values, rng))


def test_an_interval_holds_the_median_it_is_of():
    """Of 200 experiments with a known median, about 95 % of the intervals hold it."""
    held = 0
    for seed in range(200):
        low, high = compute_median_interval(np.random.default_rng(seed).normal(10, 1, 60))
        held += low <= 10 <= high
    assert 180 <= held <= 198


def test_a_paired_drop():
    reference = np.array([True] * 90 + [False] * 10)
    ours = np.array([True] * 85 + [False] * 5 + [True] * 2 + [False] * 8)  # 5 lost, 2 gained
    drop = compute_paired_drop(reference, ours)
    assert drop.mean == pytest.approx(3.0)
    assert drop.interval == pytest.approx((-2.905, 9.310), abs=1e-3)


NEWCOMBE = {
    (36, 12, 2, 0): (5.69, 34.04),
    (54, 0, 0, 0): (-6.64, 6.64),
    (53, 0, 1, 0): (-9.77, 4.96),
    (30, 10, 0, 10): (8.08, 31.48),
    (2, 0, 0, 0): (-65.76, 65.76),
    (900, 0, 0, 100): (-0.363, 0.363),
}
"""Images right in both, only in the reference, only in ours, in none -> the interval, in points."""


@pytest.mark.parametrize("counts", NEWCOMBE)
def test_intervals_of_paired_drops(counts):
    both, lost, gained, none = counts
    reference = np.repeat([True, True, False, False], [both, lost, gained, none])
    ours = np.repeat([True, False, True, False], [both, lost, gained, none])
    drop = compute_paired_drop(reference, ours)
    assert drop.mean == pytest.approx(100 * (lost - gained) / sum(counts))
    assert drop.interval == pytest.approx(NEWCOMBE[counts], abs=0.01)


def test_a_perfect_pair_has_the_interval_of_a_single_share():
    """Without any mistake on either side, the interval is that of Wilson for a share of 1."""
    right = np.ones(54, bool)
    low, _ = compute_wilson_interval(1.0, 54)
    half = 100 * (1 - low)
    assert compute_paired_drop(right, right).interval == pytest.approx((-half, half))


def test_an_interval_of_a_drop_holds_it():
    """Of 500 experiments with a known drop, at least 93 % of the intervals hold it, also with few images."""
    rng = np.random.default_rng(0)
    for count in (10, 40, 200):
        held = 0
        for _ in range(500):
            kind = rng.choice(4, count, p=[0.8, 0.06, 0.02, 0.12])
            drop = compute_paired_drop(kind <= 1, (kind == 0) | (kind == 2))
            held += drop.interval.low <= 4.0 <= drop.interval.high
        assert held >= 465


@pytest.mark.parametrize(("reference", "ours"), [(True, False), (True, True), (False, True), (False, False)])
def test_one_image_tells_almost_nothing(reference, ours):
    drop = compute_paired_drop(np.array([reference]), np.array([ours]))
    assert drop.mean == 100 * (int(reference) - int(ours))
    assert drop.interval.high - drop.interval.low > 100


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=50))
def test_a_drop_stays_within_its_bounds(answers):
    reference, ours = (np.array(side) for side in zip(*answers, strict=True))
    drop = compute_paired_drop(reference, ours)
    assert -100 <= drop.interval.low <= drop.mean + 1e-9
    assert drop.mean - 1e-9 <= drop.interval.high <= 100
    assert drop.interval.high - drop.interval.low > 1


@given(st.integers(1, 1000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_stays_within_its_bounds(trials):
    count, n = trials
    low, high = compute_wilson_interval(count / n, n)
    assert 0 <= low <= count / n <= high <= 1
    assert not math.isclose(low, high)
