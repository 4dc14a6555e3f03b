"""What calibration measures on its images, part by part, and how the parts are put together.

Every statistic is one of single images: the extremes of a tensor on an image, and rows of what layers read on
it. So parts of the images can be measured anywhere and in any order. :func:`merge` puts them together in the
order of the images, and whatever is summed or averaged is computed after that, from the same arrays in the
same order: the result is the same bit for bit, however the images were divided
(:mod:`cmt_edge.calib.shards` divides them among the workers of a cluster).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import onnx

from cmt_edge.deploy.errors import CmtEdgeError, StepError
from cmt_edge.deploy.preprocessing import Preprocess

from .data import CalibrationSet
from .running import Extremes, open_extremes
from .sampling import ROWS, Layer, Rows, open_rows, pick

KEPT_BYTES = 512 << 20
"""Preprocessed images are kept in memory up to this size, in bytes. 300 images of 192 x 192 are 130 MB."""


class Images(Protocol):
    """Preprocessed images, float32 ``(1, 3, S, S)`` each, such as a list of them or :class:`Batches`."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[np.ndarray]: ...


@dataclass(frozen=True)
class Request:
    """What is measured.

    Attributes:
        model: a float graph with one input.
        by_channel: tensors ``(N, C, H, W)`` of which each channel has its own extremes.
        whole: tensors that have one pair of extremes.
        observed: numbers of the images on which extremes are measured, in ascending order.
        layers: layers of which rows are taken.
        sampled: numbers of the images that give rows, in ascending order.
        wanted: the largest number of rows that all of these together give for a layer.
    """

    model: onnx.ModelProto
    by_channel: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    observed: tuple[int, ...] = ()
    layers: tuple[Layer, ...] = ()
    sampled: tuple[int, ...] = ()
    wanted: int = ROWS

    @property
    def tensors(self) -> tuple[str, ...]:
        """All tensors whose extremes are measured."""
        return (*self.by_channel, *self.whole)

    @property
    def numbers(self) -> list[int]:
        """Numbers of the images that are read, in ascending order."""
        return sorted({*self.observed, *self.sampled})


@dataclass(frozen=True)
class Measured:
    """What was measured on some images; empty where none of them was asked for.

    Attributes:
        extremes: of each tensor, on each image.
        rows: of each layer.
    """

    extremes: Extremes = field(default_factory=dict)
    rows: Rows = field(default_factory=dict)


class Statistics(Protocol):
    """Measures on the calibration images, which have numbers from 0 on."""

    def __len__(self) -> int: ...

    def measure(self, request: Request) -> Measured:
        """The statistics of all images that ``request`` names.

        Raises:
            StepError: ONNX Runtime cannot run the graph.
        """
        ...

    def list_batches(self) -> Images:
        """The images, preprocessed; they can be read several times."""
        ...


def merge(parts: Sequence[Measured]) -> Measured:
    """The statistics of all images, from those of parts that follow each other; exact, for any division."""
    extremes = [part.extremes for part in parts if part.extremes]
    rows = [part.rows for part in parts if part.rows]
    return Measured(
        {name: (_join(extremes, name, 0), _join(extremes, name, 1)) for name in next(iter(extremes), {})},
        {name: _lay_out(np.concatenate([part[name] for part in rows])) for name in next(iter(rows), {})},
    )


def _lay_out(rows: np.ndarray) -> np.ndarray:
    """Rows in one order in memory, wherever they come from: sums of products are taken in that order, so that
    their last bits depend on it. Rows ``(rows, C, K)`` of a depthwise conv lie as ``(rows, K, C)``, which is
    how they are sampled."""
    if rows.ndim == 3:
        by_tap = np.ascontiguousarray(rows.transpose(0, 2, 1))
        by_channel: np.ndarray = by_tap.transpose(0, 2, 1)
        return by_channel
    return np.ascontiguousarray(rows)


def _join(parts: Sequence[Extremes], name: str, side: int) -> np.ndarray:
    """The smallest values of a tensor in all parts, or the largest ones where ``side`` is 1."""
    return np.concatenate([part[name][side] for part in parts])


class Meter:
    """Measures what a request names on some of its images. Each of its two graphs is opened when it is first
    needed."""

    def __init__(self, request: Request, threads: int | None = None) -> None:
        self._request, self._threads = request, threads
        self._observed, self._sampled = set(request.observed), list(request.sampled)
        self._extremes: Callable[[Iterable[np.ndarray]], Extremes] | None = None
        self._rows: Callable[[int, np.ndarray], Rows] | None = None

    def measure_extremes(self, batches: Iterable[np.ndarray]) -> Extremes:
        """Extremes on one image or more."""
        if self._extremes is None:
            asked = self._request
            self._extremes = open_extremes(
                asked.model, asked.by_channel, asked.whole, guard_calibration, self._threads
            )
        return self._extremes(batches)

    def take_rows(self, number: int, batch: np.ndarray) -> Rows:
        """Rows of an image that gives some."""
        if self._rows is None:
            asked = self._request
            self._rows = open_rows(
                asked.model,
                asked.layers,
                len(asked.sampled),
                asked.wanted,
                guard_calibration,
                self._threads,
            )
        return self._rows(self._sampled.index(number), batch)

    def measure(self, numbers: Sequence[int], batches: Sequence[np.ndarray]) -> Measured:
        """The statistics of images with these numbers, which are in ascending order."""
        observed = [batch for number, batch in zip(numbers, batches, strict=True) if number in self._observed]
        extremes = self.measure_extremes(observed) if observed and self._request.tensors else {}
        rows = [
            Measured(rows=self.take_rows(number, batch))
            for number, batch in zip(numbers, batches, strict=True)
            if number in self._sampled
        ]
        return Measured(extremes, merge(rows).rows)


class Batches:
    """Preprocessed images that may be read several times.

    They are decoded once and kept as float32 up to :data:`KEPT_BYTES`; beyond that they are decoded again at
    every reading.
    """

    def __init__(
        self,
        data: CalibrationSet,
        spec: Preprocess,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._data, self._spec, self._progress = data, spec, progress
        image_bytes = 3 * spec.size**2 * np.dtype(np.float32).itemsize
        self._keeps = len(data) * image_bytes <= KEPT_BYTES
        self._kept: list[np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[np.ndarray]:
        source = self._kept if self._kept is not None else self._data.batches(self._spec)
        keeps = self._keeps and self._kept is None
        read = []
        for i, batch in enumerate(source):
            if keeps:
                read.append(batch)
            if self._progress:
                self._progress(i + 1, len(self))
            yield batch
        if keeps:
            self._kept = read


class LocalStatistics:
    """:class:`Statistics` of images that are on this machine, ``(1, 3, S, S)`` each."""

    def __init__(self, batches: Images) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def list_batches(self) -> Images:
        return self._batches

    def measure(self, request: Request) -> Measured:
        """One graph after the other, so that only one is open at a time."""
        extremes: Extremes = {}
        if request.tensors:
            observed = iterate_chosen(self._batches, request.observed)
            extremes = Meter(request).measure_extremes(observed)
        rows: list[Measured] = []
        if request.layers:
            meter = Meter(request)
            images = pick(self._batches, request.sampled)
            pairs = zip(request.sampled, images, strict=True)
            rows = [Measured(rows=meter.take_rows(number, image)) for number, image in pairs]
        return Measured(extremes, merge(rows).rows)


def iterate_chosen(batches: Iterable[np.ndarray], numbers: Collection[int]) -> Iterator[np.ndarray]:
    """The batches of these numbers, one at a time."""
    wanted = set(numbers)
    return (batch for i, batch in enumerate(batches) if i in wanted)


@contextmanager
def guard(tool: str) -> Iterator[None]:
    """Failures of a tool become one :class:`StepError`; errors of cmt-edge, which images raise, stay as they
    are."""
    try:
        yield
    except CmtEdgeError:
        raise
    except Exception as exc:
        raise StepError(
            f"calibration failed in {tool}",
            why=f"{type(exc).__name__}: {exc}",
            remedy="export fp32 or bf16, and report the model",
        ) from exc


def guard_calibration() -> AbstractContextManager[None]:
    """:func:`guard` for ONNX Runtime."""
    return guard("ONNX Runtime")
