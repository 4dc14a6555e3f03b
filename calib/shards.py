"""Statistics of calibration on the workers of a cluster, the same bit for bit as on one machine.

The images are cut into shards of :data:`SHARD_IMAGES`, whatever the number of workers is. A worker reads the
images of a shard, and measures on each of them what :class:`~.statistics.LocalStatistics` would; the shards
are merged in their order (:func:`~.statistics.merge`), so that it does not matter who measured which, or
when. A shard whose worker ended is given to another one.

Two things could differ without anybody noticing, and both end the run with an error: an image with another
content on a worker, and a worker that rounds differently. Images are compared by their digests, and each
worker first measures images that this machine measured, too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx

from cmt_edge.deploy.children import read_error
from cmt_edge.deploy.decoding import NamedBytes
from cmt_edge.deploy.errors import InputError
from cmt_edge.deploy.preprocessing import Preprocess, preprocess
from cmt_edge.deploy.scale.cluster import Cluster
from cmt_edge.deploy.scale.failures import raise_failures
from cmt_edge.deploy.scale.records import Record
from cmt_edge.deploy.scale.rounds import Job, Rounds
from cmt_edge.deploy.scale.waiting import Waiting

from .data import CalibrationSet
from .shard_worker import (
    Assignment,
    Probe,
    ShardResult,
    ShardWorker,
    hash_measured,
    make_shard_table,
    ship,
    unpack_measured,
)
from .statistics import Batches, Images, Measured, Meter, Request, merge

SHARD_IMAGES = 8
"""Images of a shard: few, so that 300 images occupy many workers to the end."""


@dataclass(frozen=True)
class Shard:
    """Images that a worker measures in one go; ``numbers`` are theirs in the calibration set."""

    place: int
    numbers: tuple[int, ...]


def divide(numbers: Sequence[int]) -> list[Shard]:
    """The shards of images with these numbers."""
    starts = range(0, len(numbers), SHARD_IMAGES)
    return [Shard(place, tuple(numbers[start : start + SHARD_IMAGES])) for place, start in enumerate(starts)]


class ClusterStatistics:
    """:class:`~.statistics.Statistics` that the workers of a cluster measure."""

    def __init__(
        self,
        cluster: Cluster,
        data: CalibrationSet,
        spec: Preprocess,
        *,
        workers: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        waiting: Waiting | None = None,
        worker: type = ShardWorker,
    ) -> None:
        """Nothing is started yet.

        Args:
            cluster: is connected to at the first request.
            data: the images. Workers read them from where they are; those in memory are sent.
            spec: their preprocessing.
            workers: the largest number of workers; one a core by default.
            progress: called with images done and total.
            waiting: how long a cluster without free cores is waited for.
            worker: the class that measures on a worker.
        """
        self._cluster, self._data, self._spec = cluster, data, spec
        self._workers, self._progress, self._worker = workers, progress, worker
        self._waiting = waiting or Waiting()
        self._source, self._records = _list_records(data)

    def __len__(self) -> int:
        return len(self._data)

    def list_batches(self) -> Images:
        """The images on this machine."""
        return Batches(self._data, self._spec, None)

    def measure(self, request: Request) -> Measured:
        """The statistics of all images that ``request`` names.

        Raises:
            ImageError, DataError: images cannot be read.
            InputError: an image is another one on a worker.
            GateError: a worker computes otherwise than this machine.
            StepError: ONNX Runtime cannot run the graph.
            ClusterError, ray.exceptions.RayError: the cluster cannot go on.
        """
        shards = divide(request.numbers)
        found: dict[int, Measured] = {}
        failures: dict[int, list[str | None]] = {}
        job = Job(self._worker, self._make_assignment(request), ship, 1, self._workers, self._waiting)
        rounds = Rounds(self._cluster, job)
        while missing := [s for s in shards if s.place not in found and s.place not in failures]:
            for block in rounds.run([self._make_table(shard) for shard in missing]):
                for result in _iterate_results(block):
                    self._take(result, shards[result.shard], found, failures)
                    self._report(shards, [*found, *failures])
        raise_failures(self._list_failures(shards, failures))
        return merge([found[shard.place] for shard in shards])

    def _take(
        self,
        result: ShardResult,
        shard: Shard,
        found: dict[int, Measured],
        failures: dict[int, list[str | None]],
    ) -> None:
        """Keep the statistics of one shard."""
        if result.fatal is not None:
            raise read_error(json.loads(result.fatal))
        if any(result.errors):
            failures[shard.place] = result.errors
            return
        for number, digest in zip(shard.numbers, result.digests, strict=True):
            if digest != self._data.digests[number]:
                raise InputError(
                    "the image is another one on a worker than on this machine, or was changed",
                    where=self._records[number].name,
                    remedy="put the images where every node finds the same: a shared file system",
                )
        found[shard.place] = unpack_measured(result.payload)

    def _report(self, shards: Sequence[Shard], done: Sequence[int]) -> None:
        if self._progress:
            total = sum(len(shard.numbers) for shard in shards)
            self._progress(sum(len(shards[place].numbers) for place in done), total)

    def _list_failures(
        self, shards: Sequence[Shard], failures: dict[int, list[str | None]]
    ) -> list[tuple[str, str]]:
        """The images that cannot be read, each with its error, in order."""
        return [
            (self._records[number].name, error)
            for place in sorted(failures)
            for number, error in zip(shards[place].numbers, failures[place], strict=True)
            if error is not None
        ]

    def _make_table(self, shard: Shard) -> Any:
        return make_shard_table(
            shard.place,
            shard.numbers,
            [self._records[number] for number in shard.numbers],
            [self._data.blobs[number] if self._data.blobs else None for number in shard.numbers],
        )

    def _make_assignment(self, request: Request) -> Assignment:
        """What workers are told of a request, with what this machine measures on its first images."""
        numbers = tuple(sorted({*request.observed[:1], *request.sampled[:1]}))
        batches = tuple(self._prepare(number) for number in numbers)
        probe = Probe(numbers, batches, hash_measured(Meter(request).measure(numbers, batches)))
        return Assignment(
            request.model.SerializeToString(),
            replace(request, model=onnx.ModelProto()),
            self._spec,
            self._source,
            probe,
        )

    def _prepare(self, number: int) -> np.ndarray:
        """An image on this machine, float32 ``(1, 3, S, S)``."""
        data, name = self._data.read(number)
        return preprocess(NamedBytes(data, name), self._spec)[None]


def _list_records(data: CalibrationSet) -> tuple[str, list[Record]]:
    """What opens the images' source, and where each image lies in it; nowhere for those in memory."""
    if data.blobs or data.files is None:
        return "", [Record(data.name_image(number), None, "") for number in range(len(data))]
    return data.files.address, data.files.items


def _iterate_results(table: Any) -> Iterator[ShardResult]:
    """The results in a block, which may hold those of several shards."""
    for row in table.to_pylist():
        yield ShardResult(**row)
