"""Decoding ahead and several inferences in flight: answers in order, memory bounded, whatever fails.

All decisions are made in the thread that asks for the next answer, so nothing has to be signalled or polled.
That thread pulls images until enough are held, hands each image to a decoder and each full group to an
inference thread (which waits for its images), and then waits for the oldest group.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .lanes import Lane, Lanes


def stream(
    images: Iterable[Any],
    lanes: Lanes,
    decode: Callable[[Any, np.ndarray], Any],
    *,
    workers: int,
    in_flight: int,
) -> Iterator[tuple[Any, np.ndarray]]:
    """The name of each image and its first output, in order.

    At most ``max((in_flight + 1) * chunk, in_flight * chunk + 2 * workers)`` images are held that were not
    answered yet, ``chunk`` without threads. What fails (an image, an inference, ``images`` itself) raises
    after the answers to all images before it. However the stream ends, its threads end and its lanes are
    given back before the caller goes on.

    Args:
        images: may be endless; read in the caller's thread.
        lanes: run the inferences, ``lanes.chunk`` images each.
        decode: fills one row, float32 ``(3, H, W)``, with an image and returns a name for it. It may be
            called from several threads at once.
        workers: threads that decode. With 0 the caller's thread decodes, and it infers too unless
            ``in_flight`` is above 1.
        in_flight: inferences at once.
    """
    return _Stream(lanes, decode, workers, in_flight).answer(images)


@dataclass
class _Group:
    """The images of one inference, in order."""

    lane: Lane
    decoding: list[Any] = field(default_factory=list)
    answer: Any = None


class _Stream:
    def __init__(
        self,
        lanes: Lanes,
        decode: Callable[[Any, np.ndarray], Any],
        workers: int,
        in_flight: int,
    ) -> None:
        size = lanes.chunk
        threads = workers > 0 or in_flight > 1
        self._lanes = lanes
        self._decode = decode
        self._size = size
        self._decoders: _Threads | _Inline = _Inline()
        if workers > 0:
            self._decoders = _Threads(workers, "decode")
        self._requests: _Threads | _Inline = _Threads(in_flight, "infer") if threads else _Inline()
        self._ahead = in_flight * size + max(size, 2 * workers) if threads else size
        self._held = 0
        self._open: _Group | None = None  # is being filled
        self._pending: deque[_Group] = deque()  # from the oldest on, which may be in delivery
        self._failure: Exception | None = None
        self._interrupted = False  # a pool that was starting a thread may not know of it

    def answer(self, images: Iterable[Any]) -> Iterator[tuple[Any, np.ndarray]]:
        try:
            items = iter(images)
            more = True
            while more or self._pending:
                more = more and self._fill(items)
                if self._pending:
                    yield from self._deliver(self._pending[0])
            if self._failure is not None:
                raise self._failure
        except RuntimeError as exc:
            if isinstance(exc.__context__, KeyboardInterrupt):  # Ctrl-C inside one of Python's own locks
                self._interrupted = True
                raise exc.__context__ from None
            raise
        except (Exception, GeneratorExit):
            raise
        except BaseException:
            self._interrupted = True
            raise
        finally:
            self._failure = None  # its traceback holds this frame
            self._stop()

    def _fill(self, items: Iterator[Any]) -> bool:
        """Pull images until enough are held; whether there may be more."""
        while self._held < self._ahead:
            try:
                self._add(next(items))
            except StopIteration:
                return self._finish()
            except Exception as exc:  # raised again after the answers to what came before
                self._failure = exc
                if self._open is not None:  # where starting a thread failed, its work may still be queued
                    self._open.lane.usable = False
                return self._finish()
        return True

    def _add(self, image: Any) -> None:
        """Hand one image to a decoder; hand its group to an inference once it is full."""
        if self._open is None:
            self._open = _Group(self._lanes.take(self._size))
        group = self._open
        row = group.lane.batch[len(group.decoding)]
        group.decoding.append(self._decoders.submit(self._decode, image, row))
        self._held += 1
        if len(group.decoding) == self._size:
            self._start(group)

    def _finish(self) -> bool:
        """Start what was not full; there are no more images."""
        if self._open is not None and self._open.decoding:
            self._start(self._open)
        return False

    def _start(self, group: _Group) -> None:
        self._pending.append(group)
        self._open = None
        try:
            group.answer = self._requests.submit(self._infer, group)
        except Exception as exc:  # no thread could be started: raised at its turn
            group.answer = _Done(None, exc)

    def _infer(self, group: _Group) -> tuple[np.ndarray | None, BaseException | None]:
        """The answers to the images before the first that could not be decoded, and why it could not."""
        count, failure = 0, None
        for decoding in group.decoding:
            failure = decoding.exception()
            if failure is not None:
                break
            count += 1
        return (group.lane.run(count)[0] if count else None), failure

    def _deliver(self, group: _Group) -> Iterator[tuple[Any, np.ndarray]]:
        """Wait for the oldest group and hand out its answers."""
        answers, failure = group.answer.result()
        if failure is None:  # otherwise a decoder may still be writing there until the threads have ended
            self._lanes.give(group.lane)
            self._pending.popleft()
        self._held -= len(group.decoding)
        if answers is not None:
            named = zip(group.decoding, answers, strict=failure is None)
            yield from ((decoding.result(), answer) for decoding, answer in named)
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # its traceback holds this frame

    def _stop(self) -> None:
        """Cancel what has not begun, wait for what has, and give every lane back."""
        self._decoders.cancel()
        self._requests.cancel()
        ended = False
        try:
            ended = self._join()
        finally:
            give = self._lanes.give if ended and not self._interrupted else self._lanes.drop
            groups = [*self._pending, self._open] if self._open else [*self._pending]
            for group in groups:
                give(group.lane)
            self._pending.clear()
            self._open = None

    def _join(self) -> bool:
        """Wait for all threads; ``False`` in one of them, which cannot wait for itself.

        An abandoned stream may be collected in any thread, so also in its own ones.
        """
        if threading.get_ident() in self._decoders.idents | self._requests.idents:
            return False
        self._decoders.join()
        self._requests.join()
        return True


class _Threads:
    """A pool that knows its threads."""

    def __init__(self, count: int, name: str) -> None:
        idents = self.idents = set[int]()
        self._pool = ThreadPoolExecutor(
            count,
            name,
            initializer=lambda: idents.add(threading.get_ident()),
        )
        self.submit = self._pool.submit

    def cancel(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def join(self) -> None:
        self._pool.shutdown(wait=True)


class _Inline:
    """Does the work at once, in the caller's thread."""

    idents: frozenset[int] = frozenset()

    def submit(self, work: Callable[..., Any], *args: Any) -> _Done:
        try:
            return _Done(work(*args), None)
        except Exception as exc:
            return _Done(None, exc)

    def cancel(self) -> None:
        """There is nothing to cancel."""

    def join(self) -> None:
        """There is nothing to wait for."""


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
