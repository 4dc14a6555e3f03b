"""What may go into a model, and what may come out of it: checks of arrays of numbers."""

from __future__ import annotations

import math

import numpy as np

from cmt_edge.startup import name_program

from .bundle import PROBABILITIES, SCORES
from .errors import BundleError, InputError

PROBABILITY_ROUNDING = 0.01
"""How far a model's probabilities, and the sum of those of an image, may lie outside what probabilities can
be: twice of what a model does that rounds its own to bfloat16."""
FEW_VALUES = 4096
"""The largest number of values that are looked at one by one, which is faster than adding them up."""


def require_batch(batch: object, size: int) -> None:
    """Raise :class:`InputError` unless ``batch`` is finite float32 ``(N, 3, size, size)``."""
    if not isinstance(batch, np.ndarray):
        found = type(batch).__name__
    elif batch.dtype != np.float32 or batch.shape[1:] != (3, size, size):
        found = f"{batch.dtype} {batch.shape}"
    elif not _is_finite(batch):
        raise InputError(
            "the input holds NaN or infinite values",
            remedy="check how it was normalised",
        )
    else:
        return
    raise InputError(
        f"expected a float32 array (N, 3, {size}, {size}), got {found}",
        remedy="preprocess images with cmt_edge.deploy.preprocessing, or pass them to predict()",
    )


def require_finite(
    outputs: list[np.ndarray],
    where: object,
) -> list[np.ndarray]:
    """The outputs of a model as they are; raises :class:`BundleError` for NaN and infinity, which are no
    answer. ``where``: the bundle, for the message."""
    if all(map(_is_finite, outputs)):
        return outputs
    raise BundleError(
        "the model gives NaN or infinite values for this input",
        where=where,
        remedy=f"check the bundle: {name_program('verify')} BUNDLE; a bundle of another precision may do,"
        " --precision fp32",
    )


def require_kind(values: np.ndarray, kind: str | None, where: object) -> None:
    """Raise :class:`BundleError` where values are not what a bundle says of them.

    Args:
        values: float32 ``(N, classes)``, what the model gives, or should give.
        kind: ``"probabilities"``, which lie between 0 and 1 and sum to 1, ``"scores"``, which lie between 0
            and 1, or anything else for values of any size.
        where: the bundle, for the message.
    """
    if kind not in (PROBABILITIES, SCORES) or not values.size or not np.isfinite(values).all():
        return  # what is not finite is another fault
    least, most = float(values.min()), float(values.max())
    why = None
    if not -PROBABILITY_ROUNDING <= least <= most <= 1 + PROBABILITY_ROUNDING:
        why = f"they lie between {least:.4g} and {most:.4g}, and probabilities between 0 and 1"
    elif kind == PROBABILITIES:
        sums = values.sum(axis=1, dtype=np.float64)
        worst = float(sums[np.abs(sums - 1).argmax()])
        if abs(worst - 1) > PROBABILITY_ROUNDING:
            why = f"those of an image sum to {worst:.4g}"
    if why is not None:
        raise BundleError(
            f"the manifest says that the model gives {kind}, but its answers are none",
            where=where,
            why=why,
            remedy="export the model again",
        )


def _is_finite(batch: np.ndarray) -> bool:
    """Whether no value is NaN or infinite; of many values in one pass without a temporary, because small
    models take a millisecond."""
    if batch.size <= FEW_VALUES:
        return bool(np.isfinite(batch).all())
    with np.errstate(all="ignore"):
        total = np.add.reduce(batch, axis=None)
    return math.isfinite(total) or bool(np.isfinite(batch).all())  # finite values may have an infinite sum
