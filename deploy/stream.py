"""Decoding ahead and several inferences in flight: answers in order, memory bounded, whatever fails.

All decisions are taken in the thread that asks for the next answer, so nothing has to be signalled or polled:
it pulls images until enough are held, hands each to a decoder and each full group to an inference thread
(which waits for its images), and then waits for the oldest group.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .backends.base import Binding


@dataclass(frozen=True)
class Stages:
    """What a stream is made of; every callable may be called from several threads at once.

    Attributes:
        size: images an inference.
        decode: fills one row, float32 ``(3, H, W)``, with an image; gives a name for it.
        infer: the answers, ``(count, ...)``, to the first ``count`` rows.
        take, give: borrow and return the input of an inference, whose ``batch`` is float32 ``(size, 3, H,
            W)``.
    """

    size: int
    decode: Callable[[Any, np.ndarray], Any]
    infer: Callable[[Binding, int], np.ndarray]
    take: Callable[[], Binding]
    give: Callable[[Binding], object]


@dataclass
class _Group:
    """The images of one inference, in order."""

    binding: Binding
    decoding: list[Any] = field(default_factory=list)
    answer: Any = None


def stream(
    images: Iterable[Any], stages: Stages, *, workers: int, in_flight: int
) -> Iterator[tuple[Any, np.ndarray]]:
    """The name and the answer of each image, in order.

    ``workers`` threads decode; with 0 the caller's thread does, and infers too unless ``in_flight`` is above
    1. At most ``max((in_flight + 1) * size, in_flight * size + 2 * workers)`` images are held that were not
    answered yet, ``size`` without threads. What fails (an image, an inference, ``images`` itself) raises
    after the answers of all images before it.
    """
    return _Stream(stages, workers, in_flight).answers(images)


class _Stream:
    def __init__(self, stages: Stages, workers: int, in_flight: int) -> None:
        threads = workers > 0 or in_flight > 1
        self._stages = stages
        self._decoders: _Threads | _Inline = _Threads(workers, "decode") if workers > 0 else _Inline()
        self._requests: _Threads | _Inline = _Threads(in_flight, "infer") if threads else _Inline()
        self._ahead = in_flight * stages.size + max(stages.size, 2 * workers) if threads else stages.size
        self._held = 0
        self._open: _Group | None = None
        self._pending: deque[_Group] = deque()
        self._failure: Exception | None = None

    def answers(self, images: Iterable[Any]) -> Iterator[tuple[Any, np.ndarray]]:
        try:
            items = iter(images)
            more = True
            while more or self._pending:
                more = more and self._fill(items)
                if self._pending:
                    yield from self._deliver(self._pending.popleft())
            if self._failure is not None:
                raise self._failure
        finally:
            self._failure = None  # its traceback holds this frame
            self._stop()

    def _fill(self, items: Iterator[Any]) -> bool:
        """Pull images until enough are held; whether there may be more."""
        while self._held < self._ahead:
            try:
                image = next(items)
            except StopIteration:
                return self._end()
            except Exception as exc:  # raised again after the answers to what came before
                self._failure = exc
                return self._end()
            self._add(image)
        return True

    def _add(self, image: Any) -> None:
        group = self._open = self._open or _Group(self._stages.take())
        row = group.binding.batch[len(group.decoding)]
        group.decoding.append(self._decoders.submit(self._stages.decode, image, row))
        self._held += 1
        if len(group.decoding) == self._stages.size:
            self._start(group)

    def _end(self) -> bool:
        if self._open:
            self._start(self._open)
        return False

    def _start(self, group: _Group) -> None:
        self._open = None
        group.answer = self._requests.submit(self._infer, group)
        self._pending.append(group)

    def _infer(self, group: _Group) -> tuple[np.ndarray | None, BaseException | None]:
        """The answers to the images before the first that could not be decoded, and why it could not."""
        count, failure = 0, None
        for decoding in group.decoding:
            failure = decoding.exception()
            if failure is not None:
                break
            count += 1
        return (self._stages.infer(group.binding, count) if count else None), failure

    def _deliver(self, group: _Group) -> Iterator[tuple[Any, np.ndarray]]:
        answers, failure = group.answer.result()
        self._held -= len(group.decoding)
        if failure is None:  # otherwise a decoder may still be writing there
            self._stages.give(group.binding)
        if answers is not None:
            yield from (
                (decoding.result(), answer)
                for decoding, answer in zip(group.decoding, answers, strict=failure is None)
            )
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # its traceback holds this frame

    def _stop(self) -> None:
        """Cancel what has not begun, wait for what has."""
        self._decoders.cancel()
        self._requests.cancel()
        for threads in (self._decoders, self._requests):
            # an abandoned stream may be collected in any thread, even its own ones, and these cannot wait for
            # themselves
            if threading.get_ident() not in self._decoders.idents | self._requests.idents:
                threads.join()


class _Threads:
    """A pool that knows its threads."""

    def __init__(self, count: int, name: str) -> None:
        idents = self.idents = set[int]()
        self._pool = ThreadPoolExecutor(count, name, initializer=lambda: idents.add(threading.get_ident()))
        self.submit = self._pool.submit

    def cancel(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def join(self) -> None:
        self._pool.shutdown(wait=True)


class _Inline:
    """Does the work at once, in the caller's thread."""

    idents: set[int] = set()

    def submit(self, work: Callable[..., Any], *args: Any) -> _Done:
        try:
            return _Done(work(*args), None)
        except Exception as exc:
            return _Done(None, exc)

    def cancel(self) -> None:
        pass

    join = cancel


@dataclass(frozen=True)
class _Done:
    """The part of a finished Future that a stream uses."""

    value: Any
    failure: Exception | None

    def result(self) -> Any:
        if self.failure is not None:
            raise self.failure
        return self.value

    def exception(self) -> Exception | None:
        return self.failure
