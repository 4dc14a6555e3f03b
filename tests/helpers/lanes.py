"""A runtime that fails where it is told to, and what streams over it answer."""

from __future__ import annotations

import threading

import numpy as np

from cmt_edge.deploy import Predictor
from cmt_edge.deploy.backends.base import Binding
from cmt_edge.deploy.backends.fake import FakeSession
from helpers.running import list_helper_threads

SIZES = [0, 1, 3]
"""Batch sizes; 0 is dynamic."""
SHAPES = [(0, 1), (0, 3), (1, 1), (2, 1), (2, 2), (4, 3)]
"""Decode threads and inferences in flight."""
COUNT = 11
"""Images of a stream: more than a chunk of a dynamic batch."""


def grey(level: int) -> np.ndarray:
    """An image whose answer tells it from every other level."""
    return np.full((20, 20, 3), 8 * level, np.uint8)


def levels(predictions) -> list[int]:
    """Which greys these are the answers to."""
    return [round(float(p.logits[0]) * 255 / 8) for p in predictions]


def collect(stream) -> tuple[list[int], BaseException | None]:
    """The answers, and what ended the stream."""
    answers = []
    try:
        for answer in stream:
            answers.append(answer)
    except BaseException as exc:
        return levels(answers), exc
    return levels(answers), None


def assert_tidy_and_usable(p: Predictor) -> None:
    """No thread and no lane is left, and the Predictor answers rightly."""
    assert not list_helper_threads()
    assert p.lanes.lent == 0
    assert levels(p.predict(map(grey, range(9)))) == list(range(9))
    assert levels(p.stream(map(grey, range(9)), workers=2, in_flight=2)) == list(range(9))
    assert levels([p(grey(4))]) == [4]
    assert p.lanes.lent == 0


class Checked(FakeSession):
    """Fails on greys of certain levels, and where two threads use one bound input at once."""

    def __init__(self, *bad: int, error: type[BaseException] = RuntimeError, delay_s: float = 0.0) -> None:
        super().__init__(3, delay_s)
        self.bad, self.error = set(bad), error
        self.binds = 0

    def run(self, batch):
        if self.bad & {round(float(row.mean()) * 255 / 8) for row in batch}:
            raise self.error("the device went away")
        return super().run(batch)

    def bind(self, shape):
        self.binds += 1
        batch = np.empty(shape, np.float32)
        busy = threading.Lock()

        def run() -> list[np.ndarray]:
            assert busy.acquire(blocking=False), "two threads use one lane"
            try:
                return self.run(batch)
            finally:
                busy.release()

        return Binding(batch, run)
