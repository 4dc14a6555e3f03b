"""The statistics behind all figures: they are those of earlier reports, bit for bit, and intervals hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmt_edge.deploy.measure.statistics import (
    Z95,
    bootstrap_medians,
    median_interval,
    paired_drop,
    ratio_of_medians,
    summarise,
    wilson,
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
    ratio = ratio_of_medians(samples(150, seed=1), samples(130, seed=2))
    assert ratio.value == 1.0099290956231035
    assert ratio.interval == (0.9499821999004955, 1.0526557393101625)


def test_one_generator_serves_both_sides_of_a_ratio():
    """A generator of the same seed for each side would draw the same resamples, and narrow the interval."""
    values = samples(100, seed=3)
    same = ratio_of_medians(values, values)
    assert same.value == 1
    assert same.low < 1 < same.high
    rng = np.random.default_rng(0)
    assert not np.array_equal(bootstrap_medians(values, rng), bootstrap_medians(values, rng))


def test_an_interval_holds_the_median_it_is_of():
    """Of 200 experiments with a known median, about 95 % of the intervals hold it."""
    held = 0
    for seed in range(200):
        low, high = median_interval(np.random.default_rng(seed).normal(10, 1, 60))
        held += low <= 10 <= high
    assert 180 <= held <= 198


def test_a_paired_drop():
    reference = np.array([True] * 90 + [False] * 10)
    ours = np.array([True] * 85 + [False] * 5 + [True] * 2 + [False] * 8)  # 5 lost, 2 gained
    drop = paired_drop(reference, ours)
    assert drop.mean == pytest.approx(3.0)
    spread = np.std([1] * 5 + [-1] * 2 + [0] * 93, ddof=1)
    half = 100 * Z95 * spread / 10
    assert drop.interval == pytest.approx((3.0 - half, 3.0 + half))
    assert paired_drop(reference, reference) == (0.0, (0.0, 0.0))


@pytest.mark.parametrize(("reference", "ours"), [(True, False), (True, True), (False, True)])
def test_one_image_tells_nothing(reference, ours):
    drop = paired_drop(np.array([reference]), np.array([ours]))
    assert drop.mean == 100 * (reference - ours)
    assert drop.interval == (-100, 100)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=50))
def test_a_drop_stays_within_its_bounds(answers):
    reference, ours = (np.array(side) for side in zip(*answers, strict=True))
    drop = paired_drop(reference, ours)
    assert -100 <= drop.interval.low <= drop.mean + 1e-9
    assert drop.mean - 1e-9 <= drop.interval.high <= 100


@given(st.integers(1, 1000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_stays_within_its_bounds(trials):
    count, n = trials
    low, high = wilson(count / n, n)
    assert 0 <= low <= count / n <= high <= 1
    assert not math.isclose(low, high)
