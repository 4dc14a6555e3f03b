"""Reads the bytes of images, wherever they lie; a worker has one reader."""

from __future__ import annotations

from typing import Any

from ..errors import DataError
from .places import open_place
from .records import WHOLE, Record
from .tables import INNER, find_image_column


class Reader:
    """Reads single images. Of a table it keeps the row group that it read last: neighbours lie in it."""

    def __init__(self) -> None:
        self._file = ""
        self._first = 0  # the first row of what is kept
        self._kept: Any = None
        self._checked: set[tuple[str, str]] = set()  # files, each with its state

    def read(self, source: str, record: Record) -> bytes:
        """The encoded bytes of an image of ``source``.

        Raises:
            DataError: they cannot be read, or the file was changed since it was listed.
        """
        if (
            record.offset != WHOLE or record.row >= 0
        ):  # its label does not tell whether it is another image now
            self._require_unchanged(source, record)
        if record.row >= 0:
            return self._read_row(source, record)
        size = None if record.offset == WHOLE else record.size
        data = open_place(source).read(record.file, max(0, record.offset), size)
        if size is not None and len(data) != size:
            raise _make_changed_error(record)
        return data

    def _require_unchanged(self, source: str, record: Record) -> None:
        """Raise :class:`DataError` where a shard or a table is another one than listed; once for each."""
        key = (record.file, record.state)
        if key not in self._checked:
            if not open_place(source).has_state(record.file, record.state):
                raise _make_changed_error(record)
            self._checked.add(key)

    def _read_row(self, source: str, record: Record) -> bytes:
        if record.file != self._file or not 0 <= record.row - self._first < len(self._kept):
            self._load(source, record)
        value = self._kept[record.row - self._first].as_py()
        if value is None:
            raise DataError("the table holds no bytes", where=record.name, remedy="write the encoded image")
        return bytes(value)

    def _load(self, source: str, record: Record) -> None:
        """Keep the row group that holds a row."""
        from pyarrow import ArrowException, parquet, types

        try:
            with open_place(source).open(record.file) as file:
                table = parquet.ParquetFile(file)
                name = find_image_column(table.schema_arrow, record.file)
                group, first = _find_group(table.metadata, record)
                column = table.read_row_group(group, [name])[name].combine_chunks()
        except ArrowException as exc:
            raise DataError(
                "cannot be read as Parquet", where=record.file, why=exc, remedy="check it"
            ) from exc
        if types.is_struct(column.type):
            column = column.field(INNER)
        self._file, self._first, self._kept = record.file, first, column


def _find_group(metadata: Any, record: Record) -> tuple[int, int]:
    """The row group of a row, and its first row."""
    first = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if record.row < first + rows:
            return group, first
        first += rows
    raise _make_changed_error(record)


def _make_changed_error(record: Record) -> DataError:
    return DataError(
        "was changed since its images were listed",
        where=record.file,
        remedy="run the command again",
    )
