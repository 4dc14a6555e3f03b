"""What the reference's outputs are: logits, probabilities, or nothing that can be exported."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from cmt_edge.cmt.outputs import (
    EXTREMES,
    HUGE,
    INDICES,
    LINEAR,
    PROBED,
    SIGMOIDS,
    SOFTMAXES,
    SORTS,
    Operation,
    Probe,
    TwoLabels,
    find_last_operation,
)
from cmt_edge.deploy.bundle import LOGITS, PROBABILITIES, SCORES
from cmt_edge.deploy.errors import InputError
from cmt_edge.deploy.measure.tolerance import EPS_FLOAT32, measure_resolution

SUM_TOLERANCE = 1e-3
"""Probabilities may sum to 1 plus or minus so much; the sum of 1000 float32 ones is much closer."""
COARSE_TOLERANCE = 5e-3
"""The same for probabilities that the model rounded to halves."""
SMALL = 1e-3
"""The factor at which a saturated sigmoid leaves its bounds, and a class index stays a whole number."""
ALIKE = 1e-2
"""Share by which two sums or bounds may differ that count as equal."""
NEAR_ZERO = 5e-3
"""The logarithm of a probability that counts as sure is so near to 0; halves round it."""
WHOLE_HALVES = 128
"""From this value on, numbers that were rounded to halves may be whole by chance."""
LOGITS_REMEDY = "let the model return its logits, as they are before argmax, sorting, softmax or sigmoid"
"""What to do about outputs that are neither logits nor probabilities."""


def require_finite(outputs: Sequence[np.ndarray]) -> None:
    """Raise :class:`InputError` where an output of the reference, ``(K, ...)``, is NaN or infinite."""
    for output in outputs:
        by_image = output.reshape(len(output), -1)
        finite = np.asarray(np.isfinite(by_image).all(axis=1))
        if not finite.all():
            raise InputError(
                f"the reference answers {len(finite) - finite.sum()} of {len(finite)} golden images with NaN"
                " or infinite values",
                why="the weights or the preprocessing are broken, or the model masks classes with infinity",
                remedy="correct the checkpoint, --mean and --std; let the model return finite logits",
            )


def identify_outputs(
    model: nn.Module,
    batch: np.ndarray,
    logits: np.ndarray,
) -> str:
    """What the values are that the reference answers golden images with.

    Args:
        model: the reference, in eval mode.
        batch: the golden images, float32 ``(K, 3, S, S)``.
        logits: what ``model`` makes of them, float32 ``(K, classes)``.

    Raises:
        InputError: the values are neither logits nor probabilities.
    """
    binary = isinstance(model, TwoLabels)
    inner = model.model if isinstance(model, TwoLabels) else model
    images = torch.from_numpy(batch)
    last = find_last_operation(inner, images[:PROBED])
    operation = last.name
    probe = Probe(inner, images)
    own = logits[:, 1:] if binary else logits
    _require_no_extreme(own, last)
    _require_no_losses(own)
    _require_classes_told_apart(own, operation)
    if operation not in (*SIGMOIDS, *LINEAR):
        _require_no_index(own, operation, probe)
        _require_no_ranking(own, operation, probe)
    if isinstance(model, TwoLabels):
        kind = PROBABILITIES if model.probability else LOGITS
    else:
        kind = find_kind(logits, operation)
    if kind == LOGITS and own.min() >= 0 and operation not in LINEAR:
        kind = _find_kind_by_bounds(own, probe)
    if kind == LOGITS and own.max() <= NEAR_ZERO and operation not in LINEAR:
        _require_no_log_probabilities(own, probe)
    _require_differences(own, operation, probe)
    return kind


def find_kind(logits: np.ndarray, operation: str) -> str:
    """What values are, as far as they tell by themselves.

    Args:
        logits: float32 ``(K, classes)``.
        operation: the model's last one, by PyTorch's name, where it is known.

    Raises:
        InputError: each row names one class and says nothing of the others.
    """
    if logits.min() < 0 or logits.max() > 1 + COARSE_TOLERANCE:
        return LOGITS
    allowed = COARSE_TOLERANCE if measure_resolution(logits) else SUM_TOLERANCE
    distances = np.abs(logits.sum(axis=1) - 1)
    if (distances <= allowed).all():
        if operation not in (
            *SOFTMAXES,
            *SIGMOIDS,
        ):  # these may be so sure that they round to 0 and 1
            _require_degrees(logits)
        return PROBABILITIES
    return SCORES if operation in SIGMOIDS else LOGITS


def _find_kind_by_bounds(own: np.ndarray, probe: Probe) -> str:
    """The kind of values that are not negative: logits leave any bounds when the model's last linear
    operation grows, and probabilities do not.

    Raises:
        InputError: the values stay within bounds which are not those of probabilities.
    """
    found = probe.answers(*HUGE).numpy()
    rows = np.concatenate([own, found])
    if not len(found) or rows.min() < 0 or not rows.any():
        return LOGITS
    largest, sums = float(rows.max()), rows.sum(axis=1)
    if rows.shape[1] > 1:
        _require_plain_sums(sums, largest)
    if largest <= 1 + COARSE_TOLERANCE:
        return SCORES if rows.shape[1] > 1 else LOGITS
    less = probe.answers(*HUGE[1:3]).numpy()
    before = max(float(less.max()), float(own.max()))
    if largest <= (1 + ALIKE) * before:
        raise InputError(
            f"every output of the reference lies between 0 and {largest:.4g}, whatever the image, as scaled"
            " probabilities do",
            why="logits have no such bounds, and probabilities lie between 0 and 1",
            remedy=f"{LOGITS_REMEDY}, or probabilities between 0 and 1",
        )
    return LOGITS


def _require_plain_sums(sums: np.ndarray, largest: float) -> None:
    """Refuse the outputs of several classes that are a part or a multiple of a softmax.

    ``sums`` are those of the images' outputs, and ``largest`` is the largest output.
    """
    total = float(sums.max())
    constant = total - float(sums.min()) <= SUM_TOLERANCE * total
    if constant:
        what = f"sum to {total:.4g} for every image, as multiples of probabilities do"
    elif largest <= 1 + COARSE_TOLERANCE and total <= 1 + COARSE_TOLERANCE:
        what = "are not negative and sum to less than 1, as a part of a softmax does"
    else:
        return
    raise InputError(
        f"the outputs of the reference {what}",
        why="a softmax of them would make wrong probabilities, and they are none themselves",
        remedy=f"{LOGITS_REMEDY}, or the probabilities of all classes, which sum to 1",
    )


def _require_classes_told_apart(own: np.ndarray, operation: str) -> None:
    """Refuse the softmax of a single output, which is always 1."""
    if own.shape[1] == 1 and operation in SOFTMAXES:
        raise InputError(
            "the reference has one output and takes its softmax, which is 1 for every image",
            remedy="let the model return the output itself, or its sigmoid",
        )


def _require_no_extreme(own: np.ndarray, last: Operation) -> None:
    """Refuse the largest of several logits, which looks like the logit of a binary classifier.

    The largest value of a map, ``(N, 1, H, W)``, is such a logit.
    """
    several = len(last.input_shape) == 2 and last.input_shape[1] > 1
    if own.shape[1] == 1 and several and last.name in EXTREMES:
        raise InputError(
            f"the reference has one output, which is the {last.name} of {last.input_shape[1]} values, and no"
            " logit",
            why="it does not say which class the value belongs to",
            remedy=LOGITS_REMEDY,
        )


def _require_no_losses(own: np.ndarray) -> None:
    """Refuse negated log-probabilities, of which the smallest is the best and not the largest."""
    if own.shape[1] < 2 or own.min() < 0:
        return
    sums = np.exp(-own.astype(np.float64)).sum(axis=1)
    allowed = COARSE_TOLERANCE if measure_resolution(own) else SUM_TOLERANCE
    if (np.abs(sums - 1) <= allowed).all():
        raise InputError(
            "the reference returns negated log-probabilities, which are no logits",
            why="the most probable class has the smallest of them, and a logit is the largest",
            remedy=LOGITS_REMEDY,
        )


def _require_no_log_probabilities(own: np.ndarray, probe: Probe) -> None:
    """Refuse logarithms of probabilities that a softmax or a sigmoid does not turn into these probabilities.

    A log_softmax is none of them: its softmax is right. Negated distances are none either where there are
    several: they grow in both directions, and the logarithm of a sigmoid reaches 0 in one of them.
    """
    found = probe.answers(*HUGE).numpy()
    rows = np.concatenate([own, found])
    if not len(found) or not own.any() or rows.max() > NEAR_ZERO:
        return
    several = own.shape[1] > 1
    if several and (_is_log_softmax(own) or not _reaches_zero(probe)):
        return
    other = "softmax" if several else "sigmoid"
    raise InputError(
        "no output of the reference is above 0, whatever the image, as logarithms of probabilities"
        " (logsigmoid) are",
        why=f"logits have no such bound, and the {other} of these outputs is not their probability",
        remedy=f"{LOGITS_REMEDY}, or the sigmoid of them",
    )


def _is_log_softmax(own: np.ndarray) -> bool:
    """Whether the outputs of every image are the logarithms of probabilities that sum to 1."""
    sums = np.exp(own.astype(np.float64)).sum(axis=1)
    allowed = COARSE_TOLERANCE if measure_resolution(own) else SUM_TOLERANCE
    return bool((np.abs(sums - 1) <= allowed).all())


def _reaches_zero(probe: Probe) -> bool:
    """Whether every output comes near to 0 when the model's last linear operation grows in one direction or
    the other."""
    below = probe.answers(HUGE[1]).numpy()
    above = probe.answers(HUGE[2]).numpy()
    if below.shape != above.shape or not len(below):
        return False
    return bool(np.maximum(below, above).min() >= -NEAR_ZERO)


def _require_no_index(own: np.ndarray, operation: str, probe: Probe) -> None:
    """Refuse a class index that was turned into a float32 number."""
    by_name = operation in INDICES
    could_be_any = own.shape[1] > 1 or not own.any() or not _is_whole(own)
    if could_be_any and not by_name:
        return
    if by_name or _is_whole(probe.answers(SMALL).numpy()):
        raise InputError(
            "the reference answers every golden image with a whole number, which is no logit",
            why="it returns the chosen class (an argmax) and no score of the others",
            remedy=LOGITS_REMEDY,
        )


def _is_whole(values: np.ndarray) -> bool:
    """Whether these are whole numbers, and not by rounding to halves."""
    if measure_resolution(values) and float(np.abs(values).max()) >= WHOLE_HALVES:
        return False
    return bool((values == np.round(values)).all())


def _require_no_ranking(own: np.ndarray, operation: str, probe: Probe) -> None:
    """Refuse outputs that are sorted, so that nobody knows which class each belongs to."""
    by_name = operation in SORTS and own.shape[1] > 1
    if by_name or (_is_sorted(own) and _is_sorted(probe.answers(*HUGE).numpy())):
        raise InputError(
            "the reference answers every golden image with sorted values, which are no logits",
            why="the best values alone do not say which class each of them belongs to (topk or sort)",
            remedy=LOGITS_REMEDY,
        )


def _is_sorted(rows: np.ndarray) -> bool:
    """Whether each of the rows of three classes or more falls, and at least one of them has different
    values."""
    if not len(rows) or rows.shape[1] < 3:
        return False
    steps = np.diff(rows, axis=1)
    return bool((steps <= 0).all() and (steps < 0).any())


def _require_differences(own: np.ndarray, operation: str, probe: Probe) -> None:
    """Refuse answers that are the same for all golden images, but for what rounding does to float32.

    A saturated sigmoid or softmax is excepted: it is very sure, and its smaller logits would differ.
    """
    rounding = EPS_FLOAT32 * float(np.abs(own).max())
    if len(own) < 2 or float(np.ptp(own, axis=0).max()) > rounding:
        return
    to_an_end = np.minimum(np.abs(own), np.abs(own - 1))
    saturated = bool((to_an_end <= EPS_FLOAT32).all())
    if saturated and operation in (*SIGMOIDS, *SOFTMAXES):
        return
    small = probe.answers(SMALL).numpy()
    if saturated and len(small) and (small != small[0]).any():
        return
    raise InputError(
        f"the reference answers all {len(own)} golden images with the same values",
        why="its outputs do not depend on the image, so that no export of it can be verified",
        remedy="load trained weights; check that the model uses its input, --mean and --std",
    )


def _require_degrees(probabilities: np.ndarray) -> None:
    """Refuse rows of a single 1 among zeros."""
    if np.isin(probabilities, (0, 1)).all():
        raise InputError(
            "the reference answers every golden image with a single 1 among zeros, which are no logits",
            why="it returns the chosen class (an argmax) and no score of the others",
            remedy=LOGITS_REMEDY,
        )
