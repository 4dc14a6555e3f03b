"""A tensor of a graph in the layout of the module whose output it is, and how far it is from that."""

from __future__ import annotations

import math

import numpy as np

from ..bundle.sections import LAST, MAP, SAME, TOKENS

FARTHEST = float(np.finfo(np.float32).max)
"""What stands for a relative error that is not finite: JSON has no number for infinity."""


def find_layouts(tensor: tuple[int, ...], module: tuple[int, ...]) -> list[str]:
    """Layouts in which a tensor may hold what a module returns, by both shapes."""
    found = [SAME] if tensor == module else []
    if len(module) == 4:
        n, c, h, w = module
        found += [name for name, shape in ((TOKENS, (n, h * w, c)), (LAST, (n, h, w, c))) if tensor == shape]
    if len(module) == 3 and len(tensor) == 4:
        n, c, h, w = tensor
        found += [MAP] if module == (n, h * w, c) else []
    return found


def restore_layout(tensor: np.ndarray, layout: str, shape: tuple[int, ...]) -> np.ndarray:
    """``tensor`` in the layout of what a module returns, whose ``shape`` it takes.

    Raises ``ValueError`` where the tensor cannot have that layout.
    """
    if layout not in find_layouts(tensor.shape, shape):
        raise ValueError(f"a tensor {tensor.shape} does not hold {shape} as {layout!r}")
    result = tensor
    if layout == TOKENS:
        n, c, h, w = shape
        result = tensor.reshape(n, h, w, c).transpose(0, 3, 1, 2)
    elif layout == LAST:
        result = tensor.transpose(0, 3, 1, 2)
    elif layout == MAP:
        result = tensor.transpose(0, 2, 3, 1).reshape(shape)
    return result


class Distance:
    """Sums over pairs of tensors, in float64, from which relative error and cosine are computed."""

    def __init__(self) -> None:
        self._difference = self._ours = self._theirs = self._both = 0.0
        self.worst = 0.0
        """The largest relative error of one pair."""

    def add(self, ours: np.ndarray, theirs: np.ndarray) -> None:
        """Take in one pair of tensors of the same shape."""
        a, b = (np.asarray(side, np.float64).reshape(-1) for side in (ours, theirs))
        if a.shape != b.shape:
            raise ValueError(f"{ours.shape} and {theirs.shape} cannot be compared")
        with np.errstate(invalid="ignore", over="ignore"):
            gap = a - b
            sums = [float(x @ y) for x, y in ((gap, gap), (a, a), (b, b), (a, b))]
        self._difference += sums[0]
        self._ours += sums[1]
        self._theirs += sums[2]
        self._both += sums[3]
        self.worst = max(self.worst, _divide(sums[0], sums[2]))

    @property
    def relative_error(self) -> float:
        """``|ours - theirs| / |theirs|`` over all pairs, at most :data:`FARTHEST`."""
        return _divide(self._difference, self._theirs)

    @property
    def cosine(self) -> float:
        """Of the angle between both over all pairs; 0 where a side is zero or not finite."""
        lengths = math.sqrt(self._ours) * math.sqrt(self._theirs) if self._ours >= 0 else math.nan
        result = self._both / lengths if lengths else 0.0
        return result if math.isfinite(result) else 0.0


def _divide(difference: float, length: float) -> float:
    """The root of a quotient of squares; :data:`FARTHEST` where it is not finite."""
    if difference == 0:
        return 0.0
    result = math.sqrt(difference / length) if length > 0 and math.isfinite(difference) else math.inf
    return min(result, FARTHEST)
