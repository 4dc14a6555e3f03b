"""An image of a source, and where its bytes lie: what travels to a worker."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

WHOLE = -1
"""The offset of an image that is a file of its own."""


@dataclass(frozen=True)
class Record:
    """One image.

    Attributes:
        name: its id: the path within the source, or the shard and the key, or the table and the row.
        label: name or number of its class; ``None`` where it has none.
        file: the file that holds it, in the file system of the source.
        offset, size: where its bytes lie in an archive; :data:`WHOLE` for a whole file.
        row: its row in a table; -1 elsewhere.
        state: changes when the file does.
        group: images of which equally many are chosen to calibrate: its label in a shard or a table, and
            otherwise its folder, within its shard.
    """

    name: str
    label: str | None
    file: str
    offset: int = WHOLE
    size: int = WHOLE
    row: int = -1
    state: str = ""
    group: str = ""

    def identify(self) -> str:
        """What tells this image, in this state, from every other."""
        parts = (self.name, self.file, self.offset, self.size, self.row, self.state)
        return "\0".join(map(str, parts))


@dataclass(frozen=True)
class Task:
    """Images that one worker answers in one go, ``chunk`` at a time, as a serial run does.

    Attributes:
        number: its place among the tasks.
        records: the images, in the order of the serial run.
        chunk: number of images that go through the model at once.
        digest: of all this.
    """

    number: int
    records: tuple[Record, ...]
    chunk: int

    @property
    def digest(self) -> str:
        total = hashlib.sha256(f"{self.chunk}".encode())
        for record in self.records:
            total.update(record.identify().encode(errors="surrogateescape"))
            total.update(b"\1")
        return total.hexdigest()


def divide(records: Sequence[Record], chunk: int, images: int) -> Iterator[Task]:
    """Tasks of at most about ``images`` images, each of whole chunks: the batches are those of a serial run,
    whatever the number of workers is."""
    size = chunk * max(1, images // chunk)
    for number, start in enumerate(range(0, len(records), size)):
        yield Task(number, tuple(records[start : start + size]), chunk)
