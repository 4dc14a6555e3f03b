"""A folder of answers: Parquet files, one a task, and a note of what they are answers of.

What is there is not computed again. A folder of something else is refused; a file that is damaged, or of
images that were changed, counts as absent.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, OutputError
from ..escaping import escape_line
from ..files import write_atomic, writing
from .records import Task

NOTE = "answers.json"
"""The file that says what a folder holds answers of."""

FLAG = "--answers DIR"
"""What names another folder."""

FORMAT = 1
"""Version of the files."""

DIGEST = b"cmt-edge-digest"
"""Key of a file's metadata with the SHA-256 of its contents."""

MAX_NOTE = 1 << 20
"""The largest note, bytes."""


@dataclass(frozen=True)
class Part:
    """The answers to one task.

    Attributes:
        digests: of the images' contents, see :func:`cmt_edge.deploy.images.hash_image`.
        logits: float32 ``(N, classes)``.
        worker: where they were computed.
    """

    digests: list[str]
    logits: np.ndarray
    worker: str


class AnswersFolder:
    """The answers of one model to the images of one source."""

    def __init__(self, path: Path, subject: Mapping[str, Any]) -> None:
        """Open or make a folder.

        Args:
            path: of the folder.
            subject: everything that the answers depend on, as JSON.

        Raises:
            InputError: the folder holds answers of something else, or its note is damaged.
            OutputError: the folder cannot be written to, or holds other files.
        """
        self.path = path
        content: dict[str, Any] = {"format": FORMAT, **subject}
        described = json.dumps(content, indent=1, sort_keys=True).encode()
        self._subject = hashlib.sha256(described).digest()
        note = path / NOTE
        if NOTE in require_answers(path, (NOTE,)):
            _require_same(note, content)
            return
        with writing(path, FLAG):
            path.mkdir(parents=True, exist_ok=True)
        write_atomic(note, described, flag=FLAG)

    def read(self, task: Task) -> Part | None:
        """The answers to a task; ``None`` where they are absent, damaged, or of other images."""
        from pyarrow import ArrowException, parquet

        path = self._locate(task)
        try:
            table = parquet.read_table(io.BytesIO(path.read_bytes()))
            metadata = table.schema.metadata or {}
            names = table["image"].to_pylist()
            part = Part(table["sha256"].to_pylist(), _read_logits(table), metadata[b"worker"].decode())
        except (OSError, ArrowException, KeyError, ValueError):
            return None
        is_whole = names == _list_names(task) and len(part.logits) == len(names)
        return part if is_whole and metadata.get(DIGEST) == self._digest(task, part) else None

    def write(self, task: Task, part: Part, labels: Sequence[str]) -> None:
        """Keep the answers to a task; the file is complete or absent."""
        import pyarrow
        from pyarrow import parquet

        top1 = part.logits.argmax(1)
        values = pyarrow.array(np.ascontiguousarray(part.logits).reshape(-1))
        columns = {
            "image": _list_names(task),
            "sha256": part.digests,
            "top1": pyarrow.array(top1, pyarrow.int32()),
            "label": [_make_text(labels[int(i)]) for i in top1],
            "logits": pyarrow.FixedSizeListArray.from_arrays(values, part.logits.shape[1]),
        }
        metadata = {DIGEST: self._digest(task, part), b"worker": part.worker.encode()}
        table = pyarrow.table(columns).replace_schema_metadata(metadata)
        buffer = pyarrow.BufferOutputStream()
        parquet.write_table(table, buffer, compression="zstd")
        write_atomic(self._locate(task), buffer.getvalue().to_pybytes(), flag=FLAG)

    def _locate(self, task: Task) -> Path:
        return self.path / f"part-{task.number:06}-{task.digest[:16]}.parquet"

    def _digest(self, task: Task, part: Part) -> bytes:
        """What tells whether a file holds what was written, for this very task and model."""
        total = hashlib.sha256(self._subject)
        total.update(task.digest.encode())
        total.update("".join(part.digests).encode())
        total.update(np.ascontiguousarray(part.logits).tobytes())
        total.update(part.worker.encode())
        return total.hexdigest().encode()


def require_answers(path: Path, known: Sequence[str]) -> set[str]:
    """What lies in a folder for answers; nothing where it does not exist yet.

    Files that another run is just writing do not count.

    Raises:
        OutputError: it holds something else than ``known``, and no note.
    """
    try:
        names = {entry.name for entry in os.scandir(path)}
    except OSError:  # the first writing explains it, unless there is nothing yet
        return set()
    others = {name for name in names if name not in known and not name.startswith(f".{NOTE}.")}
    if others and NOTE not in names:
        raise OutputError(
            "is not empty, and no folder of answers",
            where=path,
            why=f"it holds {escape_line(min(others))}",
            remedy=f"name a new folder: {FLAG}",
        )
    return names


def _list_names(task: Task) -> list[str]:
    """The names of a task's images."""
    return [_make_text(record.name) for record in task.records]


def _make_text(name: str) -> str:
    """A name as Arrow takes it: what is no UTF-8 in it is escaped."""
    return name.encode(errors="backslashreplace").decode()


def _read_logits(table: Any) -> np.ndarray:
    column = table["logits"].combine_chunks()
    values: np.ndarray = column.flatten().to_numpy(zero_copy_only=False)
    if values.dtype != np.float32:
        raise ValueError("the logits are no float32")
    return values.reshape(len(column), -1)


def _require_same(note: Path, content: Mapping[str, Any]) -> None:
    """Raise :class:`InputError` unless a note says the same as ``content``."""
    try:
        data = note.read_bytes()
        found = json.loads(data) if len(data) <= MAX_NOTE else None
    except (OSError, ValueError) as exc:
        raise InputError(
            "cannot be understood",
            where=note,
            why=exc,
            remedy=f"delete the folder, or name another one: {FLAG}",
        ) from exc
    if not isinstance(found, dict):
        found = {}
    wanted = json.loads(json.dumps(content))
    changed = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
    if changed:
        raise InputError(
            "holds answers of something else, which are never mixed with others",
            where=note.parent,
            why=f"another {', '.join(changed)}",
            remedy=f"name another folder, or delete this one: {FLAG}",
        )
