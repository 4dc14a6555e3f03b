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


def scan_shards(place: Place, entries: Sequence[Entry], labelled: bool = True) -> tuple[list[Record], bool]:
    """The images of all shards, by shard and then by name, and whether their labels are numbers of classes.

    Args:
        place: where the shards are.
        entries: the shards.
        labelled: whether the labels matter; otherwise they may be missing.

    Raises:
        DataError: a shard is damaged, or (if ``labelled``) an image has no label, or two, or some shards have
            labels as members and others class folders.
    """
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(lambda entry: _scan(place, entry, labelled), entries))
    items = [record for records, _ in found for record in records]
    are_labels_inside = {inside for records, inside in found if records}
    if labelled and len(are_labels_inside) > 1:
        raise DataError(
            f"some shards hold {LABEL} files, and others class folders",
            where=place.url,
            remedy="give shards of one kind",
        )
    has_numbers = True in are_labels_inside and all(_is_number(item.label) for item in items)
    return items, has_numbers


def _is_number(label: str | None) -> bool:
    return label is not None and label.isascii() and label.isdigit()


def _scan(place: Place, entry: Entry, labelled: bool) -> tuple[list[Record], bool]:
    """The images of one shard, and whether their labels are members of it."""
    where = f"{place.url.rstrip('/')}/{entry.name}" if place.path != entry.path else place.url
    members = Members(Path(entry.name))
    try:
        with place.open(entry.path) as file:
            read_members(file, entry.size, members)
            labels = _collect_labels(_read_labels(file, members, where, labelled), where, labelled)
    except UNREADABLE as exc:
        raise DataError(
            "cannot be read as a tar archive",
            where=where,
            why=exc,
            remedy="check that it is complete, and not compressed",
        ) from exc
    images = collect_members(members, Path(entry.name), "").items
    single = place.path == entry.path
    if labels:
        _require_no_masks(images, where)
    if labelled:
        _require_labels(images, labels, where)
    records = [_make_record(entry, item, labels, single) for item in images]
    return sorted(records, key=lambda record: record.name), bool(labels)


def _read_labels(file: BinaryIO, members: Members, where: str, labelled: bool) -> Iterator[tuple[str, str]]:
    """Key -> label, of the members that hold one; raises :class:`DataError` (if ``labelled``) for one that
    cannot be a label."""
    for name, spot in members.walk(""):
        if not name.endswith(LABEL) or spot is None or any(map(is_junk, name.split("/"))):
            continue
        offset, size = spot
        label = ""
        if size <= MAX_LABEL:
            file.seek(offset)
            label = file.read(size).decode(errors="replace").strip()
        elif labelled:
            raise DataError(f"a label has {size} bytes", where=f"{where}/{name}", remedy="check it")
        if not label:
            if labelled:
                raise DataError("a label is empty", where=f"{where}/{name}", remedy="check it")
            continue
        yield find_key(name), str(int(label)) if _is_number(label) else label


def _collect_labels(found: Iterable[tuple[str, str]], where: str, labelled: bool) -> dict[str, str]:
    """Key -> label; raises :class:`DataError` (if ``labelled``) where a key has two, as ``1.0.cls`` and
    ``1.5.cls`` give it."""
    labels: dict[str, str] = {}
    for key, label in found:
        if labels.setdefault(key, label) != label and labelled:
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


def _require_no_masks(images: Sequence[Item], where: str) -> None:
    """Raise :class:`DataError` where a key has a second image beside ``key.jpg``, as ``key.seg.png``: nobody
    can tell whether it is a photograph."""
    plain = {
        find_key(item.name): item.name for item in images if posixpath.basename(item.name).count(".") == 1
    }
    for item in images:
        first = plain.get(find_key(item.name), item.name)
        if first != item.name and posixpath.basename(item.name).count(".") > 1:
            raise DataError(
                f"the key {find_key(item.name)!r} has several images",
                where=where,
                why=f"{first} and {item.name}",
                remedy="write shards without masks and the like, or give each image a key without dots",
            )


def _require_labels(images: Sequence[Item], labels: dict[str, str], where: str) -> None:
    """Raise :class:`DataError` for an image without a label in a shard that holds labels."""
    bare = next((item for item in images if labels and find_key(item.name) not in labels), None)
    if bare is not None:
        raise DataError(
            "an image has no label",
            where=f"{where}/{bare.name}",
            remedy=f"write {find_key(PurePosixPath(bare.name).name)}{LABEL} beside it",
        )


def _make_record(entry: Entry, item: Item, labels: dict[str, str], single: bool) -> Record:
    """``single``: whether the shard is all that was given, so that its name tells nothing."""
    label = labels.get(find_key(item.name)) if labels else item.label
    group = label or "" if labels else posixpath.dirname(item.name)
    name = item.name if single else f"{entry.name}/{item.name}"
    return Record(name, label, entry.path, item.offset, item.size, state=entry.state, group=group)
