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


@dataclass(frozen=True)
class Extremes:
    """The lowest and highest values of each channel, float64 ``(C,)`` each."""

    low: np.ndarray
    high: np.ndarray

    def measure_reach(self) -> np.ndarray:
        """The largest magnitude of each channel, float64 ``(C,)``."""
        reach: np.ndarray = np.maximum(-self.low, self.high)
        return reach


@dataclass(frozen=True)
class Reader:
    """The conv that reads a tensor.

    Attributes:
        weights: ``(outputs, C, taps)``; ``(C, 1, taps)`` of a depthwise conv.
        depthwise: whether each channel has filters of its own.
    """

    weights: np.ndarray
    depthwise: bool

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
        powers, basis = _weigh(values, factor, reader)
        scaled = (values / factor).astype(np.float32)
        largest = _compute_scale(elsewhere, factor)
        for part in PARTS:
            lost = round_values(scaled, largest * part) - scaled
            error = basis + float(_average_squares(lost) @ powers)
            if error < least:
                best, least = power, error
    return _make_factor(everywhere, best)


def _weigh(values: np.ndarray, factor: np.ndarray, reader: Reader) -> tuple[np.ndarray, float]:
    """The power of the weights of each channel that was divided by ``factor``, and the error that rounding
    these weights costs."""
    if reader.depthwise:
        return reader.measure_powers(reader.weights) * factor**2, 0.0
    weights = reader.weights * factor[:, None]
    lost = round_weights(weights.reshape(len(weights), -1)).reshape(weights.shape) - weights
    varied = values.var(axis=0, dtype=np.float64) / factor**2
    return reader.measure_powers(weights), float(reader.measure_powers(lost) @ varied)


def _make_factor(extremes: Extremes, power: float) -> np.ndarray:
    reach = extremes.measure_reach()
    relative = np.maximum(reach / max(float(reach.max()), 1e-30), SMALLEST)
    factor: np.ndarray = relative**power
    return factor


def _compute_scale(extremes: Extremes, factor: np.ndarray) -> float:
    """The scale that cuts nothing off, after the channels were divided by ``factor``."""
    return (float((extremes.measure_reach() / factor).max()) or 1.0) / HIGHEST


def round_weights(weights: np.ndarray) -> np.ndarray:
    """Weights ``(outputs, K)`` as int8 leaves them, with one scale for each output."""
    scale = np.abs(weights).max(axis=1, keepdims=True) / HIGHEST
    scale[scale == 0] = 1
    rounded: np.ndarray = np.rint(weights / scale) * scale
    return rounded


def round_values(values: np.ndarray, scale: float) -> np.ndarray:
    """Activations as int8 leaves them."""
    rounded: np.ndarray = np.clip(np.rint(values / scale), LOWEST, HIGHEST) * scale
    return rounded


def choose_part(values: np.ndarray, powers: np.ndarray, largest: float) -> tuple[float, ...]:
    """What each of :data:`PARTS` of the scale ``largest`` costs, relative to all.

    Args:
        values: what a layer reads, ``(rows, ...)``.
        powers: of the weights that each of them is multiplied by, ``(...)``.
        largest: the scale without cutting anything off.
    """
    given = float(np.vdot(_average_squares(values), powers)) or 1.0
    errors = (_average_squares(round_values(values, largest * part) - values) for part in PARTS)
    return tuple(float(np.vdot(error, powers)) / given for error in errors)


def _average_squares(values: np.ndarray) -> np.ndarray:
    """The mean square over rows."""
    averages: np.ndarray = np.einsum("r...,r...->...", values, values) / len(values)
    return averages
