"""Where the time until the first answer of ``cmt-predict`` went."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import numpy as np

from cmt_edge import startup

from ..backends import Binding, ExecutedPrecision, Session
from ..predictor import Predictor

T = TypeVar("T")
"""What an inference returns."""


class TimedSession(Session):
    """Another session, and when its first inference began and ended."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.runtime, self.device = session.runtime, session.device
        self.parallelism, self.notes = session.parallelism, session.notes
        self.is_from_cache = session.is_from_cache
        self.first: tuple[float, float] | None = None
        """Begin and end of the first inference, seconds of ``time.perf_counter``."""

    def run(self, batch: np.ndarray) -> list[np.ndarray]:
        return self._time(partial(self._session.run, batch))

    def bind(self, shape: tuple[int, ...]) -> Binding:
        binding = self._session.bind(shape)
        return Binding(binding.batch, partial(self._time, binding.run))

    def executed(self, batch: np.ndarray, repeats: int = 10) -> ExecutedPrecision:
        return self._session.executed(batch, repeats)

    def close(self) -> None:
        self._session.close()

    def _time(self, call: Callable[[], T]) -> T:
        begin = time.perf_counter()
        result = call()
        if self.first is None:
            self.first = begin, time.perf_counter()
        return result


class Timeline:
    """When the parts of a command began. Make it once the command has been imported."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self._ready = self._begun
        self._session: TimedSession | None = None
        self._predictor: Predictor | None = None

    def watch(self, predictor: Predictor) -> None:
        """The bundle has been loaded; from now on its first inference is timed."""
        self._predictor = predictor
        self._session = TimedSession(predictor.session)
        predictor.lanes.session = self._session
        self._ready = time.perf_counter()

    def describe(self) -> str:
        """One line for standard error; empty where no inference has run."""
        loading = self._predictor and self._predictor.loading
        if not (loading and self._session and self._session.first):
            return ""
        begin, end = self._session.first
        source = (
            "opening the compiled model from the cache" if loading.is_from_cache else "compiling the model"
        )
        start = startup.began_s[0] if startup.began_s else self._begun
        parts = [("importing this program", self._begun - start)] if startup.began_s else []
        parts += [
            ("opening and hashing the bundle", loading.opening),
            ("importing the runtime", loading.importing),
            (source, loading.compiling),
            ("decoding the first image", begin - self._ready),
            ("its inference", end - begin),
        ]
        spent = ", ".join(f"{what} {seconds:.3f} s" for what, seconds in parts)
        return f"time: {spent}; first answer after {end - start:.3f} s"
