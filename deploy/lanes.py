"""The one way to a session: which batches it runs, who holds its bound inputs, and until when it is open.

A *lane* is a bound input with its inference, lent to one caller at a time. Every lane comes back, whatever
fails between: use it as a context manager, or call :meth:`Lanes.give` or :meth:`Lanes.drop`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TypeVar

import numpy as np

from .backends import Binding, Session
from .errors import BundleError, InputError
from .lifetimes import watch

DYNAMIC_CHUNK = 8
"""Images per inference where a model of any batch size has many to answer. It bounds the memory; larger
batches gained nothing on CPUs."""

KEPT_LANES = 4
"""Idle lanes of one batch size that are kept for the next callers."""

DRAIN_S = 30.0
"""Seconds that a process waits at its end for inferences in other threads."""

_Result = TypeVar("_Result")
"""What a call on a session returns."""


class Lanes:
    """All inferences of one session. Thread-safe.

    An inference takes no lock, because small models take less than a millisecond: adding to a set or a list
    and taking from it are atomic in Python. Whoever runs says so in ``_running`` *before* looking at
    ``_closed``, and whoever closes sets ``_closed`` *before* looking at ``_running``, so that at least one of
    the two sees the other.
    """

    def __init__(self, session: Session, batch: int, size: int, where: object = None) -> None:
        """``batch``: the fixed batch size of ``session``, ``0`` if it takes any. ``size``: height and width
        of an image in pixels. ``where``: the bundle, for messages."""
        self.session = session
        self.batch = batch
        self._where = where
        self._image = (3, size, size)
        self._idle: dict[int, list[Lane]] = {}  # by batch size
        self._alive = 0  # lanes, lent or idle
        self._running: set[object] = set()
        self._closed = self._freed = False
        self._ending: InputError | None = None  # why it was closed, where nobody called close()
        self._left: list[Lane] = []  # given back after the end, and not destroyed by the thread that does so
        self._lock = threading.Lock()
        self._quiet = threading.Condition(self._lock)
        watch(self)

    @property
    def chunk(self) -> int:
        """Images per inference where there are many."""
        return self.batch or DYNAMIC_CHUNK

    @property
    def idle(self) -> int:
        """Lanes that are kept for the next callers."""
        return sum(map(len, self._idle.values()))

    @property
    def lent(self) -> int:
        """Lanes that callers hold."""
        return self._alive - self.idle

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self.lent} lanes lent, {self.idle} idle"
        return f"Lanes(batch={self.batch}, {state})"

    def take(self, count: int) -> Lane:
        """Lend a lane for ``count`` images; a fixed batch size may give it more rows.

        Raises:
            InputError: the lanes are closed. Errors of the runtime come through as they are.
        """
        size = self.batch or count
        try:
            lane = self._idle[size].pop()
        except LookupError:
            lane = self._make(size)
        lane.lent = True
        return lane

    def give(self, lane: Lane) -> None:
        """Take a lane back that nobody writes to any more. A second time is harmless."""
        if not lane.lent:
            return
        lane.lent = False
        kept = self._idle[lane.rows]
        if lane.usable and len(kept) < KEPT_LANES and not self._closed:
            kept.append(lane)
            if self._closed:
                self._forget_idle()
        else:
            with self._lock:
                self._alive -= 1
            if self._closed:
                self._left.append(lane)

    def drop(self, lane: Lane) -> None:
        """Take a lane back that somebody may still write to: it is not lent again."""
        lane.usable = False
        self.give(lane)

    def run(self, batch: np.ndarray) -> list[np.ndarray]:
        """Contiguous float32 ``(N, 3, H, W)`` of any ``N`` -> one float32 array ``(N, ...)`` per output.

        Raises:
            InputError: the lanes are closed. Errors of the runtime come through as they are.
            BundleError: the model gives an answer more or less than there are images, or answers of different
                shapes.
        """
        if not len(batch):  # nothing to run, but the shapes are the model's
            return self._run_rest(batch)
        size = self.batch or len(batch)
        if len(batch) == size:
            return self.infer(size, self.session.run, batch)
        whole = len(batch) - len(batch) % size
        pieces = [batch[i : i + size] for i in range(0, whole, size)]
        parts = [self.infer(size, self.session.run, piece) for piece in pieces]
        if whole < len(batch):
            parts.append(self._run_rest(batch[whole:]))
        return [self._join(output) for output in zip(*parts, strict=True)]

    def infer(
        self,
        rows: int,
        call: Callable[..., list[np.ndarray]],
        *args: object,
    ) -> list[np.ndarray]:
        """An inference of ``rows`` images by the session, which :meth:`close` waits for: each output has one
        answer an image.

        A graph of any batch size may give more or fewer, and nobody knows whose they are then.

        Raises:
            BundleError: an output has more or fewer rows.
            InputError: the lanes are closed.
        """
        outputs = self.counted(call, *args)
        for output in outputs:
            if output.shape[:1] != (rows,):
                raise self._make_shape_error(
                    f"the model gives an output of shape {output.shape} for a batch of {rows}"
                )
        return outputs

    def _join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """The rows of one output, from several inferences."""
        shapes = {part.shape[1:] for part in parts}
        if len(shapes) > 1:
            shown = " and ".join(map(str, sorted(shapes)[:2]))
            raise self._make_shape_error(f"the model gives answers of different shapes: {shown}")
        return np.concatenate(parts)

    def _make_shape_error(self, what: str) -> BundleError:
        return BundleError(
            what,
            where=self._where,
            remedy="copy the whole bundle again, or export it again",
        )

    def _run_rest(self, rest: np.ndarray) -> list[np.ndarray]:
        """Run fewer images than fill a lane."""
        with self.take(max(1, len(rest))) as lane:
            lane.batch[: len(rest)] = rest
            return lane.run(len(rest))

    def counted(self, call: Callable[..., _Result], *args: object) -> _Result:
        """A call of the session that :meth:`close` waits for."""
        token = object()
        try:
            self._running.add(token)
            if self._closed:
                raise self._ending or InputError(
                    "this Predictor is closed",
                    remedy="load the bundle again",
                )
            return call(*args)
        finally:  # also where an interrupt comes just after the token was added
            self._running.discard(token)
            if self._closed:
                with self._lock:
                    self._quiet.notify_all()

    def close(self) -> None:
        """Free the session once its running calls have ended. What is asked for later is refused; lanes that
        are still lent may be given back."""
        self._closed = True
        self._forget_idle()
        with self._lock:
            self._quiet.wait_for(lambda: not self._running)
            if self._freed:
                return
            self._freed = True
        self.session.close()

    def abandon(self) -> None:
        """As :meth:`.lifetimes.Owner.abandon`: in a forked child the session has lost its threads."""
        self._ending = InputError(
            "this Predictor was loaded before the process was forked",
            remedy="load the bundle in the child process, or start the child with the method 'spawn'",
        )
        self._closed = self._freed = True
        self._running = set()
        self._lock = threading.Lock()
        self._quiet = threading.Condition(self._lock)

    def drain(self) -> bool:
        """As :meth:`.lifetimes.Owner.drain`."""
        if not self._closed:
            self._ending = InputError(
                "the process is ending",
                remedy="stop the threads that predict before the main thread ends",
            )
            self._closed = True
        busy = bool(self._running) or self.lent > 0
        with self._lock:
            self._quiet.wait_for(lambda: not self._running, DRAIN_S)
        return busy

    def _make(self, size: int) -> Lane:
        shape = (size, *self._image)
        try:
            lane = Lane(self, self.counted(self.session.bind, shape))
        except MemoryError as exc:
            raise InputError(
                f"there is no memory for an input of {' x '.join(map(str, shape))} values",
                why=str(exc) or None,
                remedy="give the process more memory, or take a bundle with a smaller batch or image size",
            ) from exc
        with self._lock:
            self._alive += 1
            self._idle.setdefault(size, [])
        return lane

    def _forget_idle(self) -> None:
        with self._lock:
            for kept in self._idle.values():
                with contextlib.suppress(IndexError):
                    while True:
                        kept.pop()
                        self._alive -= 1


class Lane:
    """A bound input and its inference, for one thread at a time; as a context manager it is given back.

    Attributes:
        rows: images that it holds.
        batch: float32 ``(rows, 3, H, W)``, to be filled; its first content is undefined.
        usable: whether it may be lent again. It may not after its inference failed, because nobody knows in
            which state the runtime's request is then.
        lent: whether a caller holds it; only :class:`Lanes` changes it.
    """

    __slots__ = (
        "_binding",
        "_lanes",
        "batch",
        "lent",
        "rows",
        "usable",
    )

    def __init__(self, lanes: Lanes, binding: Binding) -> None:
        self._lanes = lanes
        self._binding = binding
        self.batch = binding.batch
        self.rows = len(binding.batch)
        self.usable = True
        self.lent = False

    def run(self, count: int) -> list[np.ndarray]:
        """Each output, ``(count, ...)``, for the first ``count`` images in :attr:`batch`.

        What is missing in a fixed batch is filled with zeros, whose answers are cut off.
        """
        lanes = self._lanes
        try:
            if count == self.rows:
                return lanes.infer(count, self._binding.run)
            if count and not lanes.batch:
                return lanes.infer(count, lanes.session.run, self.batch[:count])
            self.batch[count:] = 0
            return [output[:count] for output in lanes.infer(self.rows, self._binding.run)]
        except BaseException:
            self.usable = False
            raise

    def __enter__(self) -> Lane:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lanes.give(self)
