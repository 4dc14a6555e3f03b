"""By how much int8 weights must be rounded more coarsely, so that sums of two products fit 16 bits.

Kernels for x86 processors without VNNI multiply unsigned by signed bytes, and add the products of two
neighbouring weights in 16 bits, which saturate (``vpmaddubsw``). An activation reaches 255 there, so that the
sum of the two weights must stay within 128: ``255 * 128 < 2 ** 15``. Where two neighbours of an output
channel exceed it, all weights of that channel get a larger scale.
"""

from __future__ import annotations

import numpy as np

LARGEST_SUM = 128
"""The largest magnitude of the sum of two neighbouring weights whose products with 255 fit 16 bits."""

LARGEST_WEIGHT = 127
"""To this magnitude the largest sum of a channel is reduced. Rounding each of both weights adds at most a
half."""


def find_factors(values: np.ndarray, outputs: int, inputs: int) -> np.ndarray | None:
    """By how much the scale of each output channel grows, float64, of the rank of ``values``; ``None`` where
    none has to.

    Args:
        values: int8 weights.
        outputs: the axis of the output channels.
        inputs: the axis of the input channels, neighbours of which are added.
    """
    columns = np.moveaxis(values, (outputs, inputs), (0, 1)).astype(np.int16)  # (outputs, inputs, ...)
    count = columns.shape[1] // 2 * 2
    sums = np.abs(columns[:, :count:2] + columns[:, 1:count:2]).reshape(len(columns), -1)
    largest = sums.max(axis=1, initial=0)
    if (largest <= LARGEST_SUM).all():
        return None
    shape = [1] * values.ndim
    shape[outputs] = -1
    factors = np.where(largest > LARGEST_SUM, largest / LARGEST_WEIGHT, 1.0)
    return factors.reshape(shape)
