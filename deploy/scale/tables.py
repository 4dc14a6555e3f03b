"""Images in Parquet tables: a column of encoded bytes and a column of labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..errors import DataError
from .places import Entry, Place, require_pyarrow
from .records import Record

ENDING = ".parquet"
"""How the name of a table ends."""

IMAGES = ("image", "img", "bytes", "jpg", "jpeg", "png")
"""Names of the column with the encoded images, the first one that a table has counts. A structure with a
member ``bytes`` is what Hugging Face's data sets have."""

LABELS = ("label", "labels", "cls", "class", "fine_label")
"""Names of the column with the labels, the first one that a table has counts."""

INNER = "bytes"
"""The member of a structure that holds an encoded image."""


def scan_tables(place: Place, entries: Sequence[Entry], labelled: bool = True) -> tuple[list[Record], bool]:
    """The images of all tables, by table and row, and whether their labels are numbers of classes.

    Args:
        place: where the tables are.
        entries: the tables.
        labelled: whether the labels matter; otherwise they may be missing.

    Raises:
        DataError: a table is damaged, or has no column of images; or (if ``labelled``) it has none of labels,
            or some tables number their classes, and others name them.
        RuntimeMissingError: pyarrow is not installed.
    """
    require_pyarrow(place.url)
    found = [_scan(place, entry, labelled) for entry in entries]
    kinds = {has_numbers for records, has_numbers in found if records}
    if labelled and len(kinds) > 1:
        raise DataError(
            "some tables number their classes, and others name them",
            where=place.url,
            remedy="give tables of one kind",
        )
    return [record for records, _ in found for record in records], True in kinds


def _scan(place: Place, entry: Entry, labelled: bool) -> tuple[list[Record], bool]:
    from pyarrow import ArrowException, parquet

    single = place.path == entry.path
    where = place.url if single else f"{place.url.rstrip('/')}/{entry.name}"
    try:
        with place.open(entry.path) as file:
            table = parquet.ParquetFile(file)
            schema = table.schema_arrow
            find_image_column(schema, where)
            has_labels = labelled or any(name in schema.names for name in LABELS)
            column = _find_column(schema, LABELS, "labels", where) if has_labels else None
            values = table.read([column])[column].to_pylist() if column else [None] * table.metadata.num_rows
    except ArrowException as exc:
        raise DataError(
            "cannot be read as Parquet", where=where, why=exc, remedy="check that it is complete"
        ) from exc
    names = _read_class_names(schema, column) if column else []
    labels = [
        _convert_label(value, names, f"{where}, row {row}") if labelled else _convert_any(value, names)
        for row, value in enumerate(values)
    ]
    records = [
        Record(
            str(row) if single else f"{entry.name}/{row}",
            label,
            entry.path,
            row=row,
            state=entry.state,
            group=label or "",
        )
        for row, label in enumerate(labels)
    ]
    return records, not names and all(isinstance(value, int) for value in values)


def find_image_column(schema: Any, where: str) -> str:
    """The column of encoded images."""
    from pyarrow import types

    name = _find_column(schema, IMAGES, "images", where)
    kind = schema.field(name).type
    if types.is_struct(kind) and kind.get_field_index(INNER) >= 0:
        kind = kind.field(INNER).type
    if types.is_binary(kind) or types.is_large_binary(kind):
        return name
    raise DataError(
        f"the column {name!r} is {kind}, and holds no encoded images",
        where=where,
        remedy=f"write bytes of JPEG or PNG files, or a structure with a member {INNER!r}",
    )


def _find_column(schema: Any, names: Sequence[str], what: str, where: str) -> str:
    for name in names:
        if name in schema.names:
            return name
    raise DataError(
        f"has no column of {what}",
        where=where,
        why=f"its columns are {', '.join(schema.names)}",
        remedy=f"call it {' or '.join(names[:2])}",
    )


def _read_class_names(schema: Any, column: str) -> list[str]:
    """What Hugging Face's ``datasets`` notes of the classes of a column; empty if it notes nothing."""
    try:
        noted = json.loads((schema.metadata or {})[b"huggingface"])
        names = noted["info"]["features"][column]["names"]
    except (KeyError, ValueError, TypeError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []


def _convert_label(value: Any, names: Sequence[str], where: str) -> str:
    """A label as text: the name of a numbered class, where the table knows it."""
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise DataError(f"{value!r} is no label", where=where, remedy="write a number or a name")
    if not names or isinstance(value, str):
        return str(value)
    if not 0 <= value < len(names):
        raise DataError(
            f"the table names {len(names)} classes, and {value} is none", where=where, remedy="check it"
        )
    return names[value]


def _convert_any(value: Any, names: Sequence[str]) -> str | None:
    """A label as text where labels do not matter: ``None`` for what is none."""
    try:
        return _convert_label(value, names, "")
    except DataError:
        return None
