"""By how much the channels of a tensor are divided before it is quantized, by the error that is left.

The error is that of the conv which reads the tensor, on rows of calibration images
(:mod:`cmt_edge.calib.sampling`). Errors of rounding hardly go together, so that those of each input count
with the power of its weights: no product has to be computed for what is tried.

Channels are divided by their ranges to a **power**: 0 changes nothing, and 1 gives all channels the same
range. A dense conv rounds its weights worse then; a depthwise one has a scale of weights for each channel.
The power is chosen with ranges of other images than those of the error, because a channel that was divided by
too small a range is cut off on the next image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

POWERS = (0.2, 0.35, 0.5, 0.65, 0.8, 1.0)
"""Powers of the ranges of channels that are tried as their factors."""

PARTS = (1.0, 0.9, 0.8, 0.7)
"""Parts of a range that are tried as the range; values beyond are cut off. Smaller ones suit the rows that
choose but not other images: few rows show the highest values."""

SMALLEST = 2.0**-8
"""The smallest range of a channel, relative to the largest channel. A channel that was almost silent on the
calibration images may be louder elsewhere."""

LOWEST, HIGHEST = -128, 127
"""The values of int8."""

SHIFT_GAIN = 0.7
"""Values are shifted only where that leaves less than this part of the squared error of rounding: a shift is
one more addition to runtimes that do not take it into their rounding."""


@dataclass(frozen=True)
class Grid:
    """How values are rounded: ``x`` becomes the integer ``x / scale + shift``.

    Attributes:
        scale: the size of a step.
        shift: by how many steps values are moved before they are rounded.
    """

    scale: float
    shift: int = 0

    @property
    def move(self) -> float:
        """What is added to the values before they are rounded without a shift."""
        return float(np.float32(self.scale)) * self.shift

    def round(self, values: np.ndarray) -> np.ndarray:
        """Values as int8 leaves them."""
        steps = np.clip(np.rint(values / self.scale), LOWEST - self.shift, HIGHEST - self.shift)
        rounded: np.ndarray = steps * self.scale
        return rounded


@dataclass(frozen=True)
class Extremes:
    """The lowest and highest values of each channel, float64 ``(C,)`` each."""

    low: np.ndarray
    high: np.ndarray

    def measure_reach(self) -> np.ndarray:
        """The largest magnitude of each channel, float64 ``(C,)``."""
        reach: np.ndarray = np.maximum(-self.low, self.high)
        return reach

    def divide(self, factor: np.ndarray) -> tuple[float, float]:
        """The lowest and the highest value of all channels after they were divided by ``factor``."""
        return float((self.low / factor).min()), float((self.high / factor).max())


@dataclass(frozen=True)
class Reader:
    """The conv that reads a tensor.

    Attributes:
        weights: ``(outputs, C, taps)``; ``(C, 1, taps)`` of a depthwise conv.
        depthwise: whether each channel has filters of its own.
        shifts: whether what it reads may be shifted, see :class:`Grid`.
    """

    weights: np.ndarray
    depthwise: bool
    shifts: bool = False

    def measure_powers(self, weights: np.ndarray) -> np.ndarray:
        """The power of all weights that each channel is multiplied by, ``(C,)``."""
        powers: np.ndarray = np.square(weights).sum(axis=(1, 2) if self.depthwise else (0, 2))
        return powers


def choose_factor(
    everywhere: Extremes,
    elsewhere: Extremes,
    values: np.ndarray,
    reader: Reader,
) -> np.ndarray:
    """By how much each channel is divided so that the smallest error is left, float64 ``(C,)``.

    Args:
        everywhere: over all images.
        elsewhere: over other images than those of ``values``.
        values: of the tensor, ``(rows, C)``.
        reader: the conv.
    """
    best, least = POWERS[0], np.inf
    for power in POWERS:
        factor = _make_factor(elsewhere, power)
        powers, lost = _weigh(values, factor, reader)
        low, high = elsewhere.divide(factor)
        grids = list_grids(max(-low, high) / HIGHEST, (low, high) if reader.shifts else None)
        error = lost + float(measure_costs((values / factor).astype(np.float32), powers, grids).min())
        if error < least:
            best, least = power, error
    return _make_factor(everywhere, best)


def _weigh(values: np.ndarray, factor: np.ndarray, reader: Reader) -> tuple[np.ndarray, float]:
    """The power of the weights of each channel that was divided by ``factor``, and the error that rounding
    these weights costs, relative to what the values give."""
    if reader.depthwise:
        return reader.measure_powers(reader.weights) * factor**2, 0.0
    weights = reader.weights * factor[:, None]
    lost = round_weights(weights.reshape(len(weights), -1)).reshape(weights.shape) - weights
    varied = values.var(axis=0, dtype=np.float64) / factor**2
    given = float(_average_squares(values) @ reader.measure_powers(reader.weights)) or 1.0
    return reader.measure_powers(weights), float(reader.measure_powers(lost) @ varied) / given


def _make_factor(extremes: Extremes, power: float) -> np.ndarray:
    reach = extremes.measure_reach()
    relative = np.maximum(reach / max(float(reach.max()), 1e-30), SMALLEST)
    factor: np.ndarray = relative**power
    return factor


def round_weights(weights: np.ndarray) -> np.ndarray:
    """Weights ``(outputs, K)`` as int8 leaves them, with one scale for each output."""
    scale = np.abs(weights).max(axis=1, keepdims=True) / HIGHEST
    scale[scale == 0] = 1
    rounded: np.ndarray = np.rint(weights / scale) * scale
    return rounded


def list_grids(largest: float, reach: tuple[float, float] | None = None) -> list[Grid]:
    """What is tried for one tensor.

    Args:
        largest: the scale without cutting anything off.
        reach: the lowest and the highest value, where values may be shifted.
    """
    if reach is None or not _is_one_sided(*reach):
        return [Grid((largest or 1.0) * part) for part in PARTS]
    return [_make_shifted(*reach, part) for part in PARTS]


def _is_one_sided(low: float, high: float) -> bool:
    """Whether steps become so much smaller by a shift that :data:`SHIFT_GAIN` is reached."""
    symmetric = 2 * max(-low, high)
    shifted = max(-low, 0.0) + max(high, 0.0)
    return shifted**2 < SHIFT_GAIN * symmetric**2


def _make_shifted(low: float, high: float, part: float) -> Grid:
    """The grid whose integers reach from ``low`` to ``high``.

    The farther end is reduced to ``part``. The one that is nearer to zero is not: a GELU has most of its
    values there.
    """
    below, above = max(-low, 0.0), max(high, 0.0)
    near, far = sorted((below, above))
    scale = (near + part * far) / (HIGHEST - LOWEST)
    steps = round(near / scale)
    return Grid(scale, LOWEST + steps if below <= above else HIGHEST - steps)


def measure_costs(values: np.ndarray, powers: np.ndarray, grids: Sequence[Grid]) -> np.ndarray:
    """What each grid costs, relative to what the values give, float64 ``(grids,)``.

    A mean error is counted as well, although a bias may take it: it is small where the range is not cut off.

    Args:
        values: what a layer reads, ``(rows, ...)``.
        powers: of the weights that each of them is multiplied by, ``(...)``.
        grids: what is tried.
    """
    given = float(np.vdot(_average_squares(values), powers)) or 1.0
    errors = (_average_squares(grid.round(values) - values) for grid in grids)
    return np.array([float(np.vdot(error, powers)) / given for error in errors])


def _average_squares(values: np.ndarray) -> np.ndarray:
    """The mean square over rows."""
    averages: np.ndarray = np.einsum("r...,r...->...", values, values) / len(values)
    return averages
