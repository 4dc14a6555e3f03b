"""What runs on a worker of a cluster: it reads, decodes and preprocesses calibration images, and measures on
them."""

from __future__ import annotations

import hashlib
import io
import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import onnx

from cmt_edge.deploy.children import describe_error
from cmt_edge.deploy.decoding import NamedBytes
from cmt_edge.deploy.errors import CmtEdgeError, DataError, GateError, RuntimeMissingError
from cmt_edge.deploy.images import hash_image
from cmt_edge.deploy.preprocessing import Preprocess, preprocess
from cmt_edge.deploy.scale.reading import Reader
from cmt_edge.deploy.scale.records import Record
from cmt_edge.version import __version__

from .statistics import Measured, Meter, Request

RECORD_FIELDS = tuple(field.name for field in fields(Record))
"""The columns of a shard's table that describe an image."""


@dataclass(frozen=True)
class Probe:
    """Images that every worker measures before its first shard, as the machine did that runs the command.

    Attributes:
        numbers: of the images, in ascending order.
        batches: the images, float32 ``(1, 3, S, S)`` each.
        expected: :func:`hash_measured` of what was measured there.
    """

    numbers: tuple[int, ...]
    batches: tuple[np.ndarray, ...]
    expected: str


@dataclass(frozen=True)
class Assignment:
    """What workers measure.

    Attributes:
        graph: the serialized graph, or where it lies in Ray's store.
        request: what is measured, without the graph.
        spec: preprocessing of the images.
        source: where the images are.
        probe: shows whether a worker computes the same as the machine that runs the command.
        threads: of a worker.
        version: of the package that started the run.
    """

    graph: Any
    request: Request
    spec: Preprocess
    source: str
    probe: Probe
    threads: int = 1
    version: str = __version__


def ship(ray: Any, assignment: Assignment) -> Assignment:
    """The assignment with its graph in Ray's store."""
    return replace(assignment, graph=ray.put(assignment.graph))


def make_shard_table(
    shard: int,
    numbers: Sequence[int],
    records: Sequence[Record],
    blobs: Sequence[bytes | None],
) -> Any:
    """A shard as an Arrow table: one row an image. ``blobs``: images that are in no file."""
    import pyarrow

    columns: dict[str, Any] = {name: [getattr(record, name) for record in records] for name in RECORD_FIELDS}
    columns["shard"] = [shard] * len(numbers)
    columns["number"] = list(numbers)
    columns["blob"] = pyarrow.array(list(blobs), pyarrow.large_binary())
    return pyarrow.table(columns)


class ShardWorker:
    """Measures shards; Ray makes one of each worker."""

    def __init__(self, assignment: Assignment) -> None:
        self._assignment = assignment
        self._meter: Meter | None = None
        self._reader = Reader()

    def __call__(self, table: Any) -> Any:
        """The statistics of a shard: a table of one row, which may hold errors instead."""
        rows = table.to_pylist()
        shards = {row["shard"] for row in rows}
        if len(shards) != 1:
            raise ValueError(f"a block holds {len(shards)} shards")
        shard = shards.pop()
        try:
            return self._measure(shard, rows)
        except CmtEdgeError as exc:
            return _make_result_table(shard, fatal=json.dumps(describe_error(exc)))

    def _measure(self, shard: int, rows: Sequence[dict[str, Any]]) -> Any:
        meter = self._open()
        batches, digests, errors = [], [], []
        for row in rows:
            record, error = Record(**{name: row[name] for name in RECORD_FIELDS}), None
            try:
                data = row["blob"] or self._reader.read(self._assignment.source, record)
                digests.append(hash_image(data))
                batches.append(preprocess(NamedBytes(data, record.name), self._assignment.spec)[None])
            except DataError as exc:
                error = json.dumps(describe_error(exc))
            errors.append(error)
        if any(errors):
            return _make_result_table(shard, errors=errors)
        found = meter.measure([row["number"] for row in rows], batches)
        return _make_result_table(shard, digests=digests, payload=pack_measured(found))

    def _open(self) -> Meter:
        """The graphs, opened for the first shard: what fails then is an answer, and not the end of a
        worker."""
        if self._meter is None:
            import ray

            given = self._assignment
            if given.version != __version__:
                raise RuntimeMissingError(
                    f"a worker on {socket.gethostname()} has cmt-edge {__version__}, this run"
                    f" {given.version}",
                    remedy="install one version on every node",
                )
            model = onnx.load_from_string(ray.get(given.graph))
            meter = Meter(replace(given.request, model=model), given.threads)
            require_same(meter, given.probe)
            self._meter = meter
        return self._meter


def require_same(meter: Meter, probe: Probe) -> None:
    """Raise :class:`GateError` unless this machine measures the same bits as the one that made ``probe``."""
    found = meter.measure(probe.numbers, probe.batches)
    if hash_measured(found) != probe.expected:
        raise GateError(
            f"a worker on {socket.gethostname()} measures other values than the machine that runs this"
            " command",
            why="another kind of processor, or another version of ONNX Runtime, rounds differently",
            remedy="use nodes of one kind, with the same packages, and run the command on one of them; or"
            " leave --ray out",
        )


def hash_measured(measured: Measured) -> str:
    """SHA-256, in hex, of statistics: equal only if they are the same bit for bit."""
    return hashlib.sha256(pack_measured(measured)).hexdigest()


def pack_measured(measured: Measured) -> bytes:
    """Statistics as bytes, which :func:`unpack_measured` reads."""
    arrays: dict[str, np.ndarray] = {}
    for i, (low, high) in enumerate(measured.extremes.values()):
        arrays |= {f"low {i}": low, f"high {i}": high}
    arrays |= {f"rows {i}": rows for i, rows in enumerate(measured.rows.values())}
    names = json.dumps([list(measured.extremes), list(measured.rows)])
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, names=np.array(names), **arrays)
    return buffer.getvalue()


def unpack_measured(data: bytes) -> Measured:
    """The statistics of :func:`pack_measured`."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        extremes, rows = json.loads(str(arrays["names"]))
        return Measured(
            {name: (arrays[f"low {i}"], arrays[f"high {i}"]) for i, name in enumerate(extremes)},
            {name: arrays[f"rows {i}"] for i, name in enumerate(rows)},
        )


def _make_result_table(
    shard: int,
    *,
    digests: Sequence[str] = (),
    payload: bytes = b"",
    errors: Sequence[str | None] = (),
    fatal: str | None = None,
) -> Any:
    """What a worker gives back, in one row; see :class:`ShardResult`."""
    import pyarrow

    return pyarrow.table(
        {
            "shard": pyarrow.array([shard], pyarrow.int64()),
            "digests": pyarrow.array([list(digests)], pyarrow.list_(pyarrow.string())),
            "payload": pyarrow.array([payload], pyarrow.large_binary()),
            "errors": pyarrow.array([list(errors)], pyarrow.list_(pyarrow.string())),
            "fatal": pyarrow.array([fatal], pyarrow.string()),
        }
    )


@dataclass(frozen=True)
class ShardResult:
    """The answer to one shard.

    Attributes:
        shard: its number.
        digests: of the images' contents.
        payload: the statistics, see :func:`unpack_measured`; empty where an image could not be read.
        errors: for each image why it cannot be read, or ``None``; empty if all could be read.
        fatal: why the worker cannot measure anything.
    """

    shard: int
    digests: list[str]
    payload: bytes
    errors: list[str | None]
    fatal: str | None
