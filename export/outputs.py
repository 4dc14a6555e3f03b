"""What the reference's outputs are: logits, probabilities, or nothing that can be exported."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cmt_edge.cmt.outputs import SIGMOIDS, SOFTMAXES
from cmt_edge.deploy.bundle import LOGITS, PROBABILITIES, SCORES
from cmt_edge.deploy.errors import InputError
from cmt_edge.deploy.measure.parity import measure_resolution

SUM_TOLERANCE = 1e-3
"""Probabilities may sum to 1 plus or minus so much; the sum of 1000 float32 ones is much closer."""
COARSE_TOLERANCE = 5e-3
"""The same for probabilities that the model rounded to halves."""
IN_UNIT_RANGE = (
    "every output of the reference lies between 0 and 1, but those of an image do not sum to 1: they are"
    " taken for logits, and a softmax makes probabilities of them; if they are probabilities already, let the"
    " model return its logits instead"
)
"""The note for logits that may be something else."""


def require_finite(outputs: Sequence[np.ndarray]) -> None:
    """Raise :class:`InputError` where an output of the reference, ``(K, ...)``, is NaN or infinite."""
    for output in outputs:
        finite = np.asarray(np.isfinite(output.reshape(len(output), -1)).all(axis=1))
        if not finite.all():
            raise InputError(
                f"the reference answers {len(finite) - finite.sum()} of {len(finite)} golden images with NaN"
                " or infinite values",
                why="the weights or the preprocessing are broken, or the model masks classes with infinity",
                remedy="correct the checkpoint, --mean and --std; let the model return finite logits",
            )


def find_kind(logits: np.ndarray, operation: str) -> str:
    """What the values are that the reference answers golden images with.

    Args:
        logits: float32 ``(K, classes)``.
        operation: the model's last one, by PyTorch's name, where it is known.

    Raises:
        InputError: each row names one class and says nothing of the others.
    """
    if logits.min() < 0 or logits.max() > 1 + COARSE_TOLERANCE:
        return LOGITS
    allowed = COARSE_TOLERANCE if measure_resolution(logits) else SUM_TOLERANCE
    if (np.abs(logits.sum(axis=1) - 1) <= allowed).all():
        if operation not in (
            *SOFTMAXES,
            *SIGMOIDS,
        ):  # these may be so sure that they round to 0 and 1
            _require_degrees(logits)
        return PROBABILITIES
    return SCORES if operation in SIGMOIDS else LOGITS


def _require_degrees(probabilities: np.ndarray) -> None:
    """Refuse rows of a single 1 among zeros."""
    if np.isin(probabilities, (0, 1)).all():
        raise InputError(
            "the reference answers every golden image with a single 1 among zeros, which are no logits",
            why="it returns the chosen class (an argmax) and no score of the others",
            remedy="let the model return its logits, as they are before argmax or softmax",
        )


def may_be_probabilities(logits: np.ndarray, kind: str) -> bool:
    """Whether values ``(K, classes)`` that are taken for logits all lie between 0 and 1."""
    return kind == LOGITS and bool(logits.min() >= 0 and logits.max() <= 1 and logits.any())
