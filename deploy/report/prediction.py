"""Predictions as text."""

from __future__ import annotations

from ..prediction import Prediction


def describe_prediction(prediction: Prediction, topk: int, width: int = 0) -> str:
    """One line: the image's name, padded to ``width``, then the most probable classes."""
    best = (f"{label} {100 * probability:.1f} %" for label, probability in prediction.top(topk))
    return f"{(prediction.source or '').ljust(width)}  {', '.join(best)}"
