"""Where a bundle and its reference answer differently: by class, and from which answer to which."""

from __future__ import annotations

from collections import Counter

import numpy as np

from ..bundle.sections import ClassCheck, Flip

MOST_LISTED = 20
"""The largest number of classes, and of changed answers, that are recorded, and of classes whose answers are
all counted; a manifest stays small."""


def compare_classes(truth: np.ndarray, reference: np.ndarray, bundle: np.ndarray) -> tuple[ClassCheck, ...]:
    """The classes whose top-1 falls most, the worst first; equal ones in the order of the logits.

    Args:
        truth, reference, bundle: int ``(N,)``, the label of each image and the two answers to it.
    """
    checks = [
        ClassCheck(
            label,
            int((truth == label).sum()),
            int(((truth == label) & (reference == label)).sum()),
            int(((truth == label) & (bundle == label)).sum()),
        )
        for label in np.unique(truth).tolist()
    ]
    checks.sort(key=lambda check: (check.right - check.reference_right) / check.images)
    return tuple(checks[:MOST_LISTED])


def count_flips(reference: np.ndarray, bundle: np.ndarray) -> tuple[Flip, ...]:
    """The changes of an answer, the most frequent first; equal ones in the order of the logits.

    Args:
        reference, bundle: int ``(N,)``, the two answers to each image.
    """
    changed = reference != bundle
    pairs = Counter(zip(reference[changed].tolist(), bundle[changed].tolist(), strict=True))
    ordered = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
    return tuple(Flip(*pair, images) for pair, images in ordered[:MOST_LISTED])


def count_answers(
    reference: np.ndarray,
    bundle: np.ndarray,
    classes: int,
) -> tuple[tuple[int, ...], ...] | None:
    """How many images have each pair of answers: a row an answer of the reference, a column the bundle's.

    ``None`` for more than :data:`MOST_LISTED` ``classes``.

    Args:
        reference, bundle: int ``(N,)``, the two answers to each image.
        classes: number of classes.
    """
    if classes > MOST_LISTED:
        return None
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (reference, bundle), 1)
    return tuple(map(tuple, counts.tolist()))
