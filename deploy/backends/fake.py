"""A runtime without a model, for tests of the code around one. Your own tests may use it too.

It is instant and deterministic, it needs no package, and its answer depends on the image: each logit is a
fixed linear function of the mean of each colour channel. Equal images get equal answers, and a plain red,
green or blue image belongs to class 0, 1 or 2.

No command offers it: ``--backend fake`` is refused. In your tests ``backend="fake"`` opens a bundle without
loading its model::

    with Predictor.load("cmt_nano_fp32_openvino", backend="fake") as predictor:
        prediction = predictor("ship.jpg")

Without a bundle, give the :class:`FakeSession` to a Predictor:

>>> import numpy as np
>>> from cmt_edge.deploy import Predictor, Preprocess
>>> from cmt_edge.deploy.backends.fake import FakeSession
>>> spec = Preprocess(size=16, short_side=None, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
>>> labels = ["red", "green", "blue"]
>>> with Predictor(FakeSession(len(labels)), spec, labels) as predictor:
...     red = np.zeros((32, 32, 3), np.uint8)
...     red[..., 0] = 255
...     predictor(red).label
'red'

``FakeSession(3, delay_s=0.1)`` stands for a slow device. A subclass whose ``run`` raises stands for one that
fails.
"""

from __future__ import annotations

import time

import numpy as np

from ..bundle import Bundle
from ..bundle.sections import ExecutedPrecision
from .base import LoadOptions, Runtime, Session


class FakeSession(Session):
    """Logits from the mean of each colour channel; ``delay_s`` is the duration of an inference in seconds."""

    runtime = "fake 1"
    device = "none"

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


class Fake(Runtime):
    """Opens any bundle as a :class:`FakeSession` of its classes."""

    any_batch = True

    def check(self, device: str | None = None) -> str:
        return FakeSession.runtime

    def load(self, bundle: Bundle, options: LoadOptions) -> Session:
        return FakeSession(len(bundle.labels))


RUNTIME = Fake()
"""What the table of runtimes gives for ``"fake"``."""
