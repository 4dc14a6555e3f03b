"""The answer for one image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .bundle import LOGITS


@dataclass(frozen=True)
class Prediction:
    """The answer for one image.

    Attributes:
        logits: float32 ``(classes,)``, what the model gives; for a ``kind`` other than ``"logits"`` these are
            the probabilities themselves.
        labels: class names in the order of the logits.
        source: the path, where the image was given as one.
        kind: what the model gives: ``"logits"``, ``"probabilities"`` (they sum to 1) or ``"scores"`` (each
            class has a probability of its own, so that several classes may be probable).

    >>> prediction = Prediction(np.array([0.0, 1.0, 3.0], np.float32), ["cat", "dog", "ship"])
    >>> [(label, round(probability, 2)) for label, probability in prediction.top(2)]
    [('ship', 0.84), ('dog', 0.11)]
    """

    logits: np.ndarray
    labels: Sequence[str] = field(repr=False)
    source: str | None = None
    kind: str = LOGITS

    @property
    def probabilities(self) -> np.ndarray:
        """Float32 ``(classes,)``: the softmax of logits; what the model gives where that is no logits."""
        if self.kind != LOGITS:
            return self.logits
        exponentials: np.ndarray = np.exp(self.logits - self.logits.max())
        chances: np.ndarray = exponentials / exponentials.sum()
        return chances

    @property
    def label(self) -> str:
        """Name of the most probable class."""
        return self.labels[int(self.logits.argmax())]

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The ``k`` most probable classes as ``(label, probability)``, the best first; fewer where there are
        fewer classes."""
        chances = self.probabilities
        best = np.argsort(-chances, kind="stable")[: max(k, 0)]
        return [(self.labels[int(i)], float(chances[i])) for i in best]
