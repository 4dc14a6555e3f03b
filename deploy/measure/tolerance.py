"""How far the outputs of a bundle are from the reference's, and how far they may be."""

from __future__ import annotations

import numpy as np

ATOL = {"fp32": 1e-3, "fp16": 0.1, "bf16": 0.25, "int8": 1.5}
"""Default tolerance on golden logits, by precision: the largest difference, in standard deviations of the
reference logits."""

MAP_ATOL = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.1, "int8": 0.6}
"""Default tolerance on golden feature maps, by precision: the root mean square over an image's map, in
standard deviations of the reference map. The largest of 10^5 differences says little about a map."""

MAX_PROBABILITY_DIFFERENCE = 0.2
"""The largest default tolerance on golden probabilities, whatever the precision: 20 percentage points."""

LEAST_SPREAD = 0.25
"""The least spread of the logits of two classes, below fp32, that tolerances are measured in. An unsure
classifier's logits are all alike and have no spread of their own; near a probability of one half, 0.25 logits
are 6 percentage points."""

SIGMOID_SLOPE = 0.25
"""How much the probability of two classes changes with their logit, at most: at one half."""

EPS_FLOAT32 = 1e-6
"""What rounding may do to a float32 result, relative to the largest one; eight steps of the type."""

EPS_FLOAT16 = 2.0**-10
"""One step of float16, relative to the value."""

EPS_BFLOAT16 = 2.0**-7
"""One step of bfloat16, relative to the value."""

WIDEST_SPREAD = 2.0
"""How many times as far as a bundle's outputs the golden ones may spread before the tolerance stops
growing."""


def measure_distance(ours: np.ndarray, reference: np.ndarray) -> float:
    """How far apart: logits ``(K, classes)`` by the largest difference, maps ``(K, C, H, W)`` by the largest
    root mean square of an image."""
    if not np.isfinite(ours).all():
        return float("inf")
    with np.errstate(over="ignore"):  # what overflows is infinitely far apart
        difference = (ours - reference).reshape(len(reference), -1)
        if reference.ndim == 2:
            return float(np.abs(difference).max())
        return float(np.sqrt((difference**2).mean(axis=1)).max())


def find_tolerance(
    reference: np.ndarray,
    precision: str,
    atol: float | None = None,
    kind: str | None = None,
    ours: np.ndarray | None = None,
) -> float:
    """``atol``, or :data:`ATOL` (logits) or :data:`MAP_ATOL` (maps) standard deviations of an image's
    ``reference`` values; of probabilities (a ``kind``) at most :data:`MAX_PROBABILITY_DIFFERENCE`.

    It is at least what rounding does to the largest value: values that are all alike have no deviation, and
    a model may round its own outputs to halves. Two classes have the spread of their difference over the
    images, too, and below fp32 :data:`LEAST_SPREAD`. Where ``ours`` is given, a reference that deviates far
    more than that allows no more for it: otherwise values of any size would pass.
    """
    if atol is not None:
        return atol
    allowed = (ATOL if reference.ndim == 2 else MAP_ATOL)[precision]
    spread = _measure_spread(reference, precision, kind)
    if ours is not None and np.isfinite(ours).all():
        spread = min(spread, WIDEST_SPREAD * _measure_spread(ours, precision, kind))
    rounding = max(measure_resolution(reference), EPS_FLOAT32)
    usual = allowed * spread if kind is None else min(allowed * spread, MAX_PROBABILITY_DIFFERENCE)
    return max(usual, rounding * float(np.abs(reference).max()))


def _measure_spread(outputs: np.ndarray, precision: str, kind: str | None) -> float:
    """The standard deviation of an image's values, the mean of all images, or the spread of two classes where
    that is larger; float64, which cannot overflow."""
    by_image = outputs.reshape(len(outputs), -1)
    spread = float(by_image.std(axis=1, dtype=np.float64).mean())
    if outputs.ndim == 2 and outputs.shape[1] == 2:
        spread = max(spread, _measure_spread_of_two(outputs, precision, kind))
    return spread


def _measure_spread_of_two(outputs: np.ndarray, precision: str, kind: str | None) -> float:
    """The spread of the outputs ``(K, 2)`` of two classes over the images, or the least one of a precision.

    One logit ``z`` stands there as ``(0, z)``: its whole difference is its own. Of two logits that vary, each
    has half of it.
    """
    differences = outputs[:, 1].astype(np.float64) - outputs[:, 0]
    own = 1.0 if kind is None and not outputs[:, 0].any() else 0.5
    least = 0.0 if precision == "fp32" else LEAST_SPREAD
    if kind is not None:
        least *= SIGMOID_SLOPE
    return max(own * float(differences.std()), least)


def measure_resolution(outputs: np.ndarray) -> float:
    """How far apart, relative to the largest value, two roundings of equal results may be: two steps of the
    coarsest type that holds every value of ``outputs``; 0 for plain float32."""
    values = outputs.astype(np.float32)
    if not values.any():
        return 0.0
    if not (values.view(np.uint32) & 0xFFFF).any():
        return 2 * EPS_BFLOAT16
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16).astype(np.float32)
    return 2 * EPS_FLOAT16 if np.array_equal(halves, values) else 0.0
