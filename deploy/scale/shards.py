"""Images in tar shards: class folders inside, or ``key.jpg`` beside ``key.cls`` as WebDataset writes them."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ..archives import UNREADABLE, collect_members, read_members
from ..errors import DataError
from ..folders import Item, is_junk
from ..members import Members
from .places import Entry, Place
from .records import Record

LABEL = ".cls"
"""How the name of a member ends that holds the label of the images of its key."""

MAX_LABEL = 1024
"""The largest label in a shard, bytes."""

AT_ONCE = 8
"""Shards whose headers are read at once."""


def scan_shards(place: Place, entries: Sequence[Entry]) -> tuple[list[Record], bool]:
    """The images of all shards, by shard and then by name, and whether their labels are numbers of classes.

    Raises:
        DataError: a shard is damaged, an image has no label, or some labels are numbers and others names.
    """
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(lambda entry: _scan(place, entry), entries))
    items = [record for records, _ in found for record in records]
    are_labels_inside = {inside for records, inside in found if records}
    if len(are_labels_inside) > 1:
        raise DataError(
            f"some shards hold {LABEL} files, and others class folders",
            where=place.url,
            remedy="give shards of one kind",
        )
    has_numbers = True in are_labels_inside and all(_is_number(item.label) for item in items)
    return items, has_numbers


def _is_number(label: str | None) -> bool:
    return label is not None and label.isascii() and label.isdigit()


def _scan(place: Place, entry: Entry) -> tuple[list[Record], bool]:
    """The images of one shard, and whether their labels are members of it."""
    where = f"{place.url.rstrip('/')}/{entry.name}" if place.path != entry.path else place.url
    members = Members(Path(entry.name))
    try:
        with place.open(entry.path) as file:
            read_members(file, entry.size, members)
            labels = _collect_labels(_read_labels(file, members, where), where)
    except UNREADABLE as exc:
        raise DataError(
            "cannot be read as a tar archive",
            where=where,
            why=exc,
            remedy="check that it is complete, and not compressed",
        ) from exc
    images = collect_members(members, Path(entry.name), "").items
    single = place.path == entry.path
    records = [_make_record(entry, item, labels, single, where) for item in images]
    return sorted(records, key=lambda record: record.name), bool(labels)


def _read_labels(file: BinaryIO, members: Members, where: str) -> Iterator[tuple[str, str]]:
    """Key -> label, of the members that hold one."""
    for name, spot in members.walk(""):
        if not name.endswith(LABEL) or spot is None or any(map(is_junk, name.split("/"))):
            continue
        offset, size = spot
        if size > MAX_LABEL:
            raise DataError(f"a label has {size} bytes", where=f"{where}/{name}", remedy="check it")
        file.seek(offset)
        label = file.read(size).decode(errors="replace").strip()
        if not label:
            raise DataError("a label is empty", where=f"{where}/{name}", remedy="check it")
        yield find_key(name), str(int(label)) if _is_number(label) else label


def _collect_labels(found: Iterable[tuple[str, str]], where: str) -> dict[str, str]:
    """Key -> label; raises :class:`DataError` where a key has two, as ``1.0.cls`` and ``1.5.cls`` give it."""
    labels: dict[str, str] = {}
    for key, label in found:
        if labels.setdefault(key, label) != label:
            raise DataError(
                f"the key {key!r} has two labels",
                where=where,
                why=f"{labels[key]} and {label}; a key ends at the first dot of a file's name",
                remedy="write keys without dots",
            )
    return labels


def find_key(name: str) -> str:
    """The key of a member: its path up to the first dot of its name, as in WebDataset."""
    folder, last = posixpath.split(name)
    return posixpath.join(folder, last.partition(".")[0])


def _make_record(entry: Entry, item: Item, labels: dict[str, str], single: bool, where: str) -> Record:
    """``single``: whether the shard is all that was given, so that its name tells nothing."""
    label = item.label
    if labels:
        label = labels.get(find_key(item.name))
        if label is None:
            raise DataError(
                "an image has no label",
                where=f"{where}/{item.name}",
                remedy=f"write {find_key(PurePosixPath(item.name).name)}{LABEL} beside it",
            )
    name = item.name if single else f"{entry.name}/{item.name}"
    return Record(name, label, entry.path, item.offset, item.size, state=entry.state)
