"""A runtime without a model, for tests of everything around one: instant, deterministic, image-dependent.

Its logits are a fixed linear function of the mean of each colour channel, so equal images get equal answers
and the class of a plain red, green or blue image is known. ``FakeSession.delay_s`` simulates a slow device.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from ..bundle import Bundle
from ..bundle.sections import ExecutedPrecision
from .base import LoadOptions, Session


def check(device: str | None = None) -> str:
    return "fake 1"


def compile(onnx: Path, folder: Path) -> list[Path]:
    """Nothing to prepare."""
    return []


class FakeSession(Session):
    runtime, device = "fake 1", "none"

    def __init__(self, classes: int, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self.matrix = np.eye(3, classes, dtype=np.float32) + np.arange(classes, dtype=np.float32) * 1e-3

    def run(self, batch: np.ndarray) -> list[np.ndarray]:
        if self.delay_s:
            time.sleep(self.delay_s)
        return [batch.mean((2, 3)) @ self.matrix]

    def executed(self, batch: np.ndarray, repeats: int = 10) -> ExecutedPrecision:
        self.run(batch)
        return ExecutedPrecision({"fp32": 1.0}, {"fp32": 1}, source="fake")


def load(bundle: Bundle, options: LoadOptions) -> Session:
    return FakeSession(len(bundle.labels))
