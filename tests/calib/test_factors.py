"""How a tensor is rescaled and shifted before it is quantized: 0 keeps its value, errors become smaller."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmt_edge.calib.factors import (
    Extremes,
    Reader,
    Rescaling,
    choose_part,
    choose_rescaling,
    round_values,
    round_weights,
)


def gelu_like(rng, rows=256, channels=6):
    """Values from -0.17 upwards, channels of very different sizes."""
    values = np.abs(rng.standard_normal((rows, channels))) * 10.0 ** rng.uniform(-1, 1, channels)
    return np.maximum(values - 0.2, -0.17).astype(np.float32)


def choose(rng, values, *, depthwise=False, padded=False) -> tuple[Rescaling, Reader]:
    channels = values.shape[1]
    shape = (channels, 1, 9) if depthwise else (4, channels, 1)
    reader = Reader(rng.standard_normal(shape), depthwise, padded)
    extremes = Extremes(values.min(0).astype(np.float64), values.max(0).astype(np.float64))
    return choose_rescaling(extremes, extremes, values, reader), reader


def measure_error(values, chosen: Rescaling, reader: Reader) -> float:
    """The variance of what the conv gives wrongly; a bias takes the mean."""
    factor, weights = chosen.factor, reader.weights[:, :, 0]
    rounded = round_values(values / factor, chosen.scale, chosen.steps)
    wrong = rounded @ round_weights(weights * factor).T - values @ weights.T
    return float(wrong.var(axis=0).sum())


def test_one_sided_values_are_shifted_and_come_closer():
    ratios = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        values = gelu_like(rng)
        (shifted, reader), plain = choose(rng, values), Rescaling(np.ones(6), float(values.max()) / 127)
        assert shifted.steps > 0
        ratios.append(measure_error(values, shifted, reader) / measure_error(values, plain, reader))
    assert np.median(ratios) < 0.5
    assert max(ratios) < 1.5


@pytest.mark.parametrize("how", [{"depthwise": True}, {"padded": True}])
def test_zeros_around_a_map_forbid_a_shift(how):
    rng = np.random.default_rng(1)
    assert choose(rng, gelu_like(rng), **how)[0].steps == 0


def test_symmetric_values_are_not_shifted():
    rng = np.random.default_rng(2)
    values = rng.standard_normal((256, 6)).astype(np.float32)
    values[0], values[1] = 4, -4
    assert choose(rng, values)[0].steps == 0


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(1e-4, 1e3), steps=st.integers(-127, 128))
def test_zero_keeps_its_value(scale, steps):
    assert round_values(np.zeros(1, np.float32), scale, steps) == 0
    shift = np.float32(scale * steps)
    stored = np.rint((np.float32(0) - shift) / np.float32(scale))  # as a runtime computes it
    assert stored == -steps


def test_channels_without_any_value_stay_finite():
    rng = np.random.default_rng(3)
    for values in (np.zeros((8, 3), np.float32), gelu_like(rng, 8, 3) * [0, 1, 1]):
        chosen, _ = choose(rng, values.astype(np.float32))
        assert np.isfinite(chosen.factor).all()
        assert chosen.factor.min() > 0
        assert 0 < chosen.scale < np.inf


def test_louder_channels_elsewhere_set_the_range():
    rng = np.random.default_rng(4)
    values = gelu_like(rng)
    near = Extremes(values.min(0).astype(np.float64), values.max(0).astype(np.float64))
    far = Extremes(near.low, 3 * near.high)
    reader = Reader(np.ones((4, 6, 1)), False, True)
    one, three = (choose_rescaling(e, near, values, reader) for e in (near, far))
    np.testing.assert_allclose(three.scale, 3 * one.scale)


def test_the_whole_range_costs_more_where_one_value_sets_it():
    rng = np.random.default_rng(5)
    values = rng.standard_normal((4096, 4)).astype(np.float32)
    values[0, 0] = 8
    costs = choose_part(values, np.ones(4), 8 / 127)
    assert min(costs) < costs[0]
    even = np.sign(values)
    assert choose_part(even, np.ones(4), 1 / 127)[0] < 1e-9  # and nothing is cut off for nothing


def test_weights_of_zeros_stay_zeros():
    assert not round_weights(np.zeros((2, 3))).any()
