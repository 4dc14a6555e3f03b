"""How a tensor is rescaled before it is quantized: errors become smaller."""

from __future__ import annotations

import numpy as np
import pytest

from cmt_edge.calib.factors import (
    SMALLEST,
    Extremes,
    Grid,
    Reader,
    choose_factor,
    list_grids,
    measure_costs,
    round_weights,
)


def gelu_like(rng, rows=256, channels=6):
    """Values from -0.17 upwards, channels of very different sizes."""
    values = np.abs(rng.standard_normal((rows, channels))) * 10.0 ** rng.uniform(-1, 1, channels)
    return np.maximum(values - 0.2, -0.17).astype(np.float32)


def choose(rng, values, *, depthwise=False) -> tuple[np.ndarray, Reader]:
    channels = values.shape[1]
    shape = (channels, 1, 9) if depthwise else (4, channels, 1)
    reader = Reader(rng.standard_normal(shape), depthwise)
    extremes = Extremes(values.min(0).astype(np.float64), values.max(0).astype(np.float64))
    return choose_factor(extremes, extremes, values, reader), reader


def measure_error(values, factor, reader: Reader) -> float:
    """The variance of what the conv gives wrongly; a bias takes the mean."""
    weights, scaled = reader.weights[:, :, 0], values / factor
    rounded = Grid(float(np.abs(scaled).max()) / 127).round(scaled)
    wrong = rounded @ round_weights(weights * factor).T - values @ weights.T
    return float(wrong.var(axis=0).sum())


def test_channels_of_different_sizes_come_closer():
    ratios = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        values = gelu_like(rng)
        factor, reader = choose(rng, values)
        ratios.append(measure_error(values, factor, reader) / measure_error(values, np.ones(6), reader))
    assert np.median(ratios) < 0.6
    assert max(ratios) < 1.5


def test_depthwise_channels_of_one_shape_get_one_range():
    rng = np.random.default_rng(1)
    sizes = 10.0 ** np.arange(-2, 2)
    values = (np.sign(rng.standard_normal((256, 4))) * sizes).astype(np.float32)
    factor, _ = choose(rng, values, depthwise=True)
    np.testing.assert_allclose(factor * sizes.max(), np.maximum(sizes, sizes.max() * SMALLEST), rtol=1e-6)


def test_channels_without_any_value_stay_finite():
    rng = np.random.default_rng(3)
    for values in (np.zeros((8, 3), np.float32), gelu_like(rng, 8, 3) * [0, 1, 1]):
        factor, _ = choose(rng, values.astype(np.float32))
        assert np.isfinite(factor).all()
        assert factor.min() > 0


def test_ranges_over_all_images_make_the_factors():
    rng = np.random.default_rng(4)
    values = gelu_like(rng)
    near = Extremes(values.min(0).astype(np.float64), values.max(0).astype(np.float64))
    louder = near.high.copy()
    quiet = int(louder.argmin())
    louder[quiet] *= 3
    reader = Reader(np.ones((4, 6, 1)), False)
    one, three = (choose_factor(e, near, values, reader) for e in (near, Extremes(near.low, louder)))
    assert three[quiet] > 1.1 * one[quiet]
    np.testing.assert_array_equal(np.delete(three, quiet), np.delete(one, quiet))


def test_the_whole_range_costs_more_where_one_value_sets_it():
    rng = np.random.default_rng(5)
    values = rng.standard_normal((4096, 4)).astype(np.float32)
    values[0, 0] = 8
    costs = measure_costs(values, np.ones(4), list_grids(8 / 127))
    assert min(costs) < costs[0]
    even = np.sign(values)
    assert (
        measure_costs(even, np.ones(4), list_grids(1 / 127))[0] < 1e-9
    )  # and nothing is cut off for nothing


def test_values_that_reach_to_one_side_are_shifted():
    values = np.linspace(-0.17, 4, 5000, dtype=np.float32)[:, None]
    plain, shifted = list_grids(4 / 127), list_grids(4 / 127, (-0.17, 4.0))
    assert [grid.shift for grid in plain] == [0] * len(plain)
    assert shifted[0].scale == pytest.approx(4.17 / 255)
    assert shifted[0].shift == -118  # the integers from -128 to 127 are those from -10 to 245 steps
    costs = [measure_costs(values, np.ones(1), grids).min() for grids in (plain, shifted)]
    assert costs[1] < 0.35 * costs[0]
    assert not shifted[0].round(np.zeros(3)).any()  # zero stays exact
    assert np.abs(shifted[0].round(values) - values).max() <= shifted[0].scale / 2 * 1.01
    mirrored = list_grids(4 / 127, (-4.0, 0.17))
    np.testing.assert_allclose(mirrored[0].round(-values), -shifted[0].round(values), atol=1e-6)


@pytest.mark.parametrize("reach", [(-4.0, 4.0), (-3.0, 4.0), (0.0, 0.0), None])
def test_values_on_both_sides_are_not_shifted(reach):
    assert all(grid.shift == 0 and grid.scale > 0 for grid in list_grids(4 / 127, reach))


@pytest.mark.parametrize("reach", [(0.0, 4.0), (1.0, 4.0), (-4.0, -1.0)])
def test_values_of_one_sign_take_all_integers(reach):
    grid = list_grids(4 / 127, reach)[0]
    assert grid.scale == pytest.approx(4 / 255)
    ends = grid.round(np.array([-9.0, 9.0])) / grid.scale
    np.testing.assert_allclose(ends, (0, 255) if reach[1] > 0 else (-255, 0))


def test_weights_of_zeros_stay_zeros():
    assert not round_weights(np.zeros((2, 3))).any()
