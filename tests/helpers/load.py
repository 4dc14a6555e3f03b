"""A Predictor under load: are the answers of many threads those of one, and does memory stay flat?"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cmt_edge.deploy import Predictor

THREADS = 32
"""Threads that ask one Predictor at once."""
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
"""Bytes of a page of memory."""
SETTLING = 0.5
"""The part of a run at its start that does not count: allocators and runtimes keep what they take there."""
SAMPLES = 40
"""The number of times that a run is measured."""
BUSY = 8
"""Threads that predict in a soak."""
MOST_LEAKED = 1 << 30
"""Bytes that a work with a leak can lose."""

Work = Callable[[int], object]
"""Does one step; it is told the number of the step."""


def distinct_batches(count: int, size: int) -> list[np.ndarray]:
    """``count`` batches of one preprocessed image, float32 ``(1, 3, size, size)``, no two alike."""
    generator = np.random.default_rng(17)
    return [generator.standard_normal((1, 3, size, size), np.float32) for _ in range(count)]


def distinct_images(count: int) -> list[np.ndarray]:
    """``count`` images, uint8 ``(40, 48, 3)``, no two alike."""
    generator = np.random.default_rng(18)
    return [generator.integers(0, 256, (40, 48, 3), np.uint8) for _ in range(count)]


def answers_of(predictor: Predictor, inputs: Sequence[np.ndarray]) -> list[bytes]:
    """The bits of the logits of each input: a batch or an image, by the way that users give it."""
    return [_answer(predictor, given) for given in inputs]


def answers_of_threads(
    predictor: Predictor,
    inputs: Sequence[np.ndarray],
    threads: int = THREADS,
) -> list[bytes]:
    """As :func:`answers_of`, from ``threads`` threads that start at once; each has inputs of its own."""
    barrier = threading.Barrier(threads)
    answers: list[bytes] = [b""] * len(inputs)

    def work(first: int) -> None:
        barrier.wait()
        for i in range(first, len(inputs), threads):
            answers[i] = _answer(predictor, inputs[i])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    return answers


def _answer(predictor: Predictor, given: np.ndarray) -> bytes:
    logits = predictor.logits(given)[0] if given.dtype == np.float32 else predictor(given).logits
    return logits.tobytes()


@dataclass(frozen=True)
class Growth:
    """What a run took and did not give back.

    Attributes:
        steps: how many were done.
        bytes_a_step: slope of the resident memory over the steps, after the settling.
        descriptors_a_step: slope of the number of open descriptors.
    """

    steps: int
    bytes_a_step: float
    descriptors_a_step: float

    def complaint(self, most_bytes: float) -> str:
        """What is wrong with the run, empty where it is flat: at most ``most_bytes`` a step, and no more than
        one descriptor in the whole run."""
        if self.bytes_a_step > most_bytes:
            return f"memory grows by {self.bytes_a_step:.0f} bytes a step, more than {most_bytes:.0f}"
        if self.descriptors_a_step * self.steps > 1:
            return f"descriptors grow by {self.descriptors_a_step * self.steps:.0f} in {self.steps} steps"
        return ""


def soak(work: Work, steps: int, threads: int = 1) -> Growth:
    """Call ``work`` ``steps`` times, from that many threads, and measure memory and descriptors meanwhile."""
    numbers = itertools.count()
    block = max(1, steps // SAMPLES)
    done, memory, descriptors = [], [], []
    with ThreadPoolExecutor(threads) as pool:
        for finished in range(block, steps + 1, block):
            list(pool.map(work, itertools.islice(numbers, block)))
            done.append(finished)
            memory.append(resident_bytes())
            descriptors.append(open_descriptors())
    return Growth(done[-1], slope(done, memory), slope(done, descriptors))


def slope(at: Sequence[float], values: Sequence[float]) -> float:
    """The median slope between two of the points (Theil-Sen), without those of the settling.

    A single jump, as an allocator makes it, hardly moves it; a leak does.
    """
    first = int(len(at) * SETTLING)
    points = list(zip(at[first:], values[first:], strict=True))
    pairs = itertools.combinations(points, 2)
    return float(np.median([(v1 - v0) / (x1 - x0) for (x0, v0), (x1, v1) in pairs]))


def resident_bytes() -> int:
    """Memory of this process that lies in RAM, without what the allocator keeps of freed memory.

    After a load of ONNX Runtime glibc keeps up to 12 MB or gives them back, as it happens: a run that begins
    in one of the two states and ends in the other would look like a leak.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    if trim is not None:
        trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def open_descriptors() -> int:
    """Descriptors that this process holds."""
    return len(os.listdir("/proc/self/fd"))


def predicting(predictor: Predictor, images: Sequence[bytes]) -> Work:
    """A step that predicts one image."""
    return lambda number: predictor(images[number % len(images)])


def loading(path: Path, backend: str, image: bytes) -> Work:
    """A step that loads the bundle, predicts an image and closes."""

    def work(number: int) -> None:
        with Predictor.load(path, backend=backend, throughput=bool(number % 2)) as predictor:
            predictor(image)

    return work


def leaking(work: Work, bytes_a_step: int = 0, descriptors_a_step: float = 0.0) -> Iterator[Work]:
    """The same work with a leak: what shows that a leak of that size is found.

    Yields the work once, and frees everything when the generator is closed. The leak is in mapped memory:
    what an allocator gives may be memory that earlier steps have freed, and then the process does not grow.
    """
    kept = mmap.mmap(-1, MOST_LEAKED, flags=mmap.MAP_PRIVATE)  # only what is written takes memory
    opened: list[int] = []

    def leaky(number: int) -> None:
        work(number)
        kept.write(b"\1" * bytes_a_step)
        if len(opened) < (number + 1) * descriptors_a_step:
            opened.append(os.open(os.devnull, os.O_RDONLY))

    try:
        yield leaky
    finally:
        kept.close()
        for descriptor in opened:
            os.close(descriptor)
