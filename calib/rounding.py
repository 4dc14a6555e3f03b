"""Weights rounded one column after the other, so that later ones make up for the errors of earlier ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cmt_edge.deploy.backends.pair_limits import LARGEST_SUM

from .factors import HIGHEST, LOWEST

DAMPING = 0.05
"""What is added to the diagonal of the second moments of a layer's inputs, relative to their mean: directions
in which the sampled rows hardly vary must not count as free."""

BLOCK = 64
"""The number of columns whose corrections are gathered before they are applied to all that follow."""


def round_columns(
    weights: np.ndarray, moments: np.ndarray, partners: Sequence[np.ndarray] = ()
) -> np.ndarray:
    """Integers near ``weights`` whose products with the layer's inputs stay near.

    One column is rounded after the other, and those that follow make up for its error.

    With second moments ``H == (I + U) D (I + U)^T``, ``U`` strictly upper triangular, the error ``e H e^T``
    is the sum of ``D_k (e_k + sum_j<k e_j U_jk)^2``: column ``k`` is best rounded after ``sum_j<k e_j U_jk``
    was added to it (LDLQ: Chee et al., QuIP, NeurIPS 2023, who show that GPTQ does the same).

    Args:
        weights: ``(groups, outputs, K)``, in steps of their scales.
        moments: second moments of the inputs, ``(groups, K, K)``.
        partners: each of them column -> another one, or -1: the sum of both integers stays within
            :data:`cmt_edge.deploy.backends.pair_limits.LARGEST_SUM`. Without them sums may be any.
    """
    exact = np.ascontiguousarray(weights.transpose(0, 2, 1), np.float64)  # (groups, K, outputs)
    wanted, result = exact.copy(), np.empty_like(exact)
    feedback = _factor_moments(moments)
    count = exact.shape[1]
    for start in range(0, count, BLOCK):
        end = min(start + BLOCK, count)
        block, errors = wanted[:, start:end], np.empty_like(wanted[:, start:end])
        for i in range(end - start):
            column = start + i
            result[:, column] = np.clip(np.rint(block[:, i]), *_find_bounds(result, column, partners))
            errors[:, i] = exact[:, column] - result[:, column]
            block[:, i + 1 :] += feedback[:, column, column + 1 : end, None] * errors[:, None, i]
        wanted[:, end:] += feedback[:, start:end, end:].transpose(0, 2, 1) @ errors
    rounded: np.ndarray = result.transpose(0, 2, 1)
    return rounded


def _find_bounds(result: np.ndarray, column: int, partners: Sequence[np.ndarray]) -> tuple[Any, Any]:
    """The lowest and the highest integers of a column, where those before it are known. Zero is one."""
    low: Any = LOWEST + 1
    high: Any = HIGHEST
    for others in partners:
        if 0 <= others[column] < column:
            other = result[:, others[column]]
            low = np.maximum(low, -LARGEST_SUM - other)
            high = np.minimum(high, LARGEST_SUM - other)
    return low, high


def _factor_moments(moments: np.ndarray) -> np.ndarray:
    """``U`` of :func:`round_columns`, with a diagonal of ones, ``(groups, K, K)``."""
    damped = moments.astype(np.float64)
    diagonal = np.einsum("gkk->gk", damped)
    diagonal += DAMPING * diagonal.mean(axis=1, keepdims=True) + 1e-12
    turned = np.linalg.cholesky(damped[:, ::-1, ::-1])
    upper = turned[:, ::-1, ::-1]
    unit: np.ndarray = upper / np.einsum("gkk->gk", upper)[:, None]
    return unit
