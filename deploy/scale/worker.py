"""What runs on a worker: a loaded model that answers tasks."""

from __future__ import annotations

import itertools
import json
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from cmt_edge.version import __version__

from ..bundle import Bundle
from ..children import describe_error
from ..decoding import NamedBytes
from ..errors import CmtEdgeError, DataError, GateError, RuntimeMissingError
from ..images import hash_image
from ..measure.host import describe_host
from ..measure.parity import check_golden
from ..predictor import Predictor
from ..preprocessing import preprocess
from .reading import Reader
from .records import Record, Task

RECORD_FIELDS = tuple(field.name for field in fields(Record))
"""The columns of a task's table that describe an image."""


@dataclass(frozen=True)
class Subject:
    """A model that workers load.

    Attributes:
        title: what messages call its bundle.
        bundle: the bundle as one file: its bytes, or where they are in Ray's store.
        backend, device, threads, weights, trusted_model, trusted_engine: as
            :meth:`cmt_edge.deploy.Predictor.load`.
        check: whether a worker first answers the golden images, and is refused where it computes otherwise.
        atol: allowed golden logit difference; default by precision.
        source: where the images are.
        version: of the package that started the run.
    """

    title: str
    bundle: Any
    backend: str | None = None
    device: str | None = None
    threads: int | None = 1
    weights: str | None = None
    trusted_model: str | None = None
    trusted_engine: bool = False
    check: bool = True
    atol: float | None = None
    source: str = ""
    version: str = __version__


def make_task_table(task: Task) -> Any:
    """A task as an Arrow table: one row an image. Texts are bytes there, because names of files may be no
    UTF-8."""
    import pyarrow

    rows = [asdict(record) for record in task.records]
    columns: dict[str, Any] = {name: [_encode(row[name]) for row in rows] for name in RECORD_FIELDS}
    columns["task"] = [task.number] * len(rows)
    columns["chunk"] = [task.chunk] * len(rows)
    return pyarrow.table(columns)


def read_task_table(table: Any) -> Task:
    """The task of a table of :func:`make_task_table`."""
    rows = table.to_pylist()
    numbers = {row["task"] for row in rows}
    if len(numbers) != 1:
        raise ValueError(f"a block holds {len(numbers)} tasks")
    records = tuple(Record(**{name: _decode(row[name]) for name in RECORD_FIELDS}) for row in rows)
    return Task(numbers.pop(), records, rows[0]["chunk"])


def _encode(value: Any) -> Any:
    """A field of a record as Arrow takes it."""
    return value.encode(errors="surrogateescape") if isinstance(value, str) else value


def _decode(value: Any) -> Any:
    """The field that :func:`_encode` was given."""
    return value.decode(errors="surrogateescape") if isinstance(value, bytes) else value


class Answerer:
    """Answers tasks with one loaded model; Ray makes one of each worker."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._predictor: Predictor | None = None
        self._reader = Reader()

    def __call__(self, table: Any) -> Any:
        """The answers to a task: a table with one row an image, or one row that holds an error."""
        task = read_task_table(table)
        try:
            return self._answer(task)
        except CmtEdgeError as exc:
            return make_answer_table(task.number, fatal=json.dumps(describe_error(exc)))

    def _answer(self, task: Task) -> Any:
        predictor = self._open()
        digests: list[str] = []
        logits: list[np.ndarray] = []
        failures: dict[int, DataError] = {}
        for start in range(0, len(task.records), task.chunk):
            part = task.records[start : start + task.chunk]
            rows, names, failed = self._prepare(part, predictor)
            failures |= {start + place: error for place, error in failed.items()}
            digests += names
            if not failures:  # a run with unreadable images ends with an error
                logits.append(predictor.logits(np.stack(rows)))
        if failures:
            errors = [
                json.dumps(describe_error(failures[i])) if i in failures else None
                for i in range(len(digests))
            ]
            return make_answer_table(task.number, errors=errors)
        return make_answer_table(
            task.number,
            digests=digests,
            logits=np.concatenate(logits),
            worker=describe_worker(predictor),
        )

    def _prepare(
        self,
        records: Sequence[Record],
        predictor: Predictor,
    ) -> tuple[list[np.ndarray], list[str], dict[int, DataError]]:
        """Inputs of the model, content digests, and by their place the images that cannot be read."""
        rows, digests = [], []
        failures: dict[int, DataError] = {}
        for place, record in enumerate(records):
            digest = ""
            try:
                data = self._reader.read(self._subject.source, record)
                digest = hash_image(data)
                rows.append(preprocess(NamedBytes(data, record.name), predictor.spec))
            except DataError as exc:
                failures[place] = exc
            digests.append(digest)
        return rows, digests, failures

    def _open(self) -> Predictor:
        """The model, loaded at the first task: what fails then is an answer, and not the end of a worker."""
        if self._predictor is None:
            self._predictor = _load(self._subject)
        return self._predictor


def _load(subject: Subject) -> Predictor:
    """The Predictor of a worker, with the golden images checked."""
    if subject.version != __version__:
        raise RuntimeMissingError(
            f"a worker on {socket.gethostname()} has cmt-edge {__version__}, this run {subject.version}",
            remedy="install one version on every node",
        )
    with _unpacked(subject) as path:
        bundle = Bundle.open(path)
        predictor = Predictor.load(
            bundle,
            backend=subject.backend,
            device=subject.device,
            threads=subject.threads,
            weights=subject.weights,
            trusted_model=subject.trusted_model,
            trusted_engine=subject.trusted_engine,
            cache=False,
        )
        if subject.check and not check_golden(bundle, predictor, subject.atol).passed:
            raise GateError(
                f"a worker on {socket.gethostname()} gives other answers to the golden images than recorded",
                where=subject.title,
                remedy="verify the bundle there, and compare the versions of the runtime",
            )
    return predictor


@contextmanager
def _unpacked(subject: Subject) -> Iterator[Path]:
    """The bundle of a subject as a file; errors name the place that the user knows."""
    import ray

    with tempfile.TemporaryDirectory(prefix="cmt-edge-") as folder:
        path = Path(folder) / "bundle.cmtb"
        path.write_bytes(ray.get(subject.bundle))
        try:
            yield path
        except CmtEdgeError as exc:
            if exc.where and str(path) in exc.where:
                exc.where = subject.title
            raise


def describe_worker(predictor: Predictor) -> str:
    """Where answers were computed, for the answers' notes."""
    host = describe_host()
    return json.dumps(
        {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "cpu": host.cpu,
            "flags": list(host.flags),
            "runtime": predictor.info.runtime,
        }
    )


def make_answer_table(
    number: int,
    *,
    digests: Sequence[str] = (),
    logits: np.ndarray | None = None,
    errors: Sequence[str | None] = (),
    fatal: str | None = None,
    worker: str = "",
) -> Any:
    """What a worker gives back; see :class:`Answered`."""
    import pyarrow

    rows = len(logits) if logits is not None else max(1, len(errors))
    width = 0 if logits is None else logits.shape[1]
    data = [row.tobytes() for row in logits] if logits is not None else [b""] * rows
    return pyarrow.table(
        {
            "task": pyarrow.array([number] * rows, pyarrow.int64()),
            "digest": pyarrow.array(digests or [""] * rows, pyarrow.string()),
            "logits": pyarrow.array(data, pyarrow.binary()),
            "width": pyarrow.array([width] * rows, pyarrow.int64()),
            "error": pyarrow.array(errors or [None] * rows, pyarrow.string()),
            "fatal": pyarrow.array([fatal] * rows, pyarrow.string()),
            "worker": pyarrow.array([worker] * rows, pyarrow.string()),
        }
    )


@dataclass(frozen=True)
class Answered:
    """The answers to one task.

    Attributes:
        task: its number.
        digests: of the images' contents.
        logits: float32 ``(N, classes)``; empty where an image could not be read.
        errors: for each image why it cannot be read, or ``None``.
        fatal: why the worker cannot answer anything.
        worker: where it was computed.
    """

    task: int
    digests: list[str]
    logits: np.ndarray
    errors: list[str | None]
    fatal: str | None
    worker: str


def iterate_answered(table: Any) -> Iterator[Answered]:
    """The answers in a block, which may hold several tasks."""
    numbers = np.asarray(table["task"])
    starts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
    for start, end in itertools.pairwise(starts):
        if start == end:
            continue
        rows = table.slice(start, end - start)
        width = rows["width"][0].as_py()
        data = b"".join(rows["logits"].to_pylist())
        yield Answered(
            int(numbers[start]),
            rows["digest"].to_pylist(),
            np.frombuffer(data, np.float32).reshape(-1, width) if width else np.empty((0, 0), np.float32),
            rows["error"].to_pylist(),
            rows["fatal"][0].as_py(),
            rows["worker"][0].as_py(),
        )
