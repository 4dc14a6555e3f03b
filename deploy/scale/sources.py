"""Labelled images from anywhere: class folders, tar shards, shards in the manner of WebDataset, Parquet."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ..decoding import EXTENSIONS
from ..errors import DataError
from ..folders import MAX_ITEMS, find_class, is_image
from ..images import ImageSet
from .places import Entry, is_url, open_place
from .reading import Reader
from .records import Record
from .shards import LABEL, scan_shards
from .tables import ENDING, scan_tables

TAR = ".tar"
"""How the name of a shard ends."""


@dataclass(frozen=True)
class Source:
    """Images with labels; see :class:`~cmt_edge.deploy.measure.labels.LabelledImages`.

    Attributes:
        path: what the user gave, without a password in it.
        address: what opens it, with the password.
        items: the images, in order.
        has_numbers: whether the labels are numbers of logits, and no names.
        note: what was skipped, in words; empty if nothing was.
    """

    path: str
    address: str
    items: list[Record]
    has_numbers: bool = False
    note: str = ""
    reader: Reader = field(default_factory=Reader, repr=False, compare=False)

    @property
    def classes(self) -> list[str]:
        """Sorted labels."""
        return sorted({item.label for item in self.items if item.label is not None})

    def read(self, item: Record) -> bytes:
        """The encoded bytes of one image; raises :class:`DataError`."""
        return self.reader.read(self.address, item)


def open_source(text: str) -> Source:
    """The images of a path or URL.

    * a folder of class folders, or ``ARCHIVE.tar[/FOLDER]``: as :class:`~cmt_edge.deploy.images.ImageSet`;
    * a folder of ``.tar`` files, or a single one whose images have ``.cls`` files: shards;
    * a ``.parquet`` file, or a folder of them: tables of images and labels;
    * a URL of any of these.

    Raises:
        DataError: there are no images, some have no label, or the place cannot be read.
    """
    if not is_url(text):
        path = Path(text.removeprefix("file://"))
        if not _holds_files(path):
            return convert_images(ImageSet(path))
        text = str(path.absolute())
    place = open_place(text)
    entries = place.list()
    tables = [entry for entry in entries if entry.name.lower().endswith(ENDING)]
    shards = [entry for entry in entries if entry.name.lower().endswith(TAR)]
    _require_one_kind(place.url, entries)
    if tables:
        items, has_numbers = scan_tables(place, tables)
    elif shards:
        items, has_numbers = scan_shards(place, shards)
    else:
        items, has_numbers = _list_files(entries), False
    _check(place.url, items)
    return Source(place.url, text, items, has_numbers)


def _require_one_kind(url: str, entries: Sequence[Entry]) -> None:
    """Raise :class:`DataError` for images, shards and tables in one place: which of them counts would be
    guessed."""
    examples: dict[str, str] = {}
    for entry in entries:
        name = entry.name.lower()
        if name.endswith(ENDING):
            examples.setdefault("tables", entry.name)
        elif name.endswith(TAR):
            examples.setdefault("shards", entry.name)
        elif is_image(name):
            examples.setdefault("images", entry.name)
    if len(examples) > 1:
        raise DataError(
            f"holds {' and '.join(examples)}, and only one kind of them can be meant",
            where=url,
            why=f"for instance {', '.join(examples.values())}",
            remedy="give each kind a folder of its own",
        )


def _holds_files(path: Path) -> bool:
    """Whether a path of this machine leads to tables or shards."""
    if path.name.lower().endswith(TAR) and os.path.isfile(path):
        return LABEL in ImageSet(path, labelled=False).skipped
    if path.name.lower().endswith(ENDING):
        return os.path.isfile(path)
    try:
        names = [entry.name.lower() for entry in os.scandir(path) if entry.is_file()]
    except OSError:  # ImageSet explains it
        return False
    return any(name.endswith((ENDING, TAR)) for name in names)


def convert_images(images: ImageSet) -> Source:
    """The images of a folder, or of a part of an archive, of this machine; labels may be missing."""
    root = Path(os.path.abspath(images.path))
    archive = (
        None if os.path.isdir(root) else str(next(p for p in (root, *root.parents) if os.path.isfile(p)))
    )
    whole = _describe_state(archive) if archive else ""
    items = []
    for item in images.items:
        file = archive or os.path.join(root, item.name)
        state = whole or _describe_state(file)
        items.append(Record(item.name, item.label, file, item.offset, item.size, state=state))
    return Source(str(images.path), str(images.path), items, note=images.note)


def _describe_state(file: str) -> str:
    status = os.stat(file)
    return f"{status.st_size} {status.st_mtime_ns}"


def _list_files(entries: Sequence[Entry]) -> list[Record]:
    """Files in class folders elsewhere."""
    return [
        Record(entry.name, find_class(PurePosixPath(entry.name)), entry.path, state=entry.state)
        for entry in entries
        if is_image(entry.name)
    ]


def _check(text: str, items: Sequence[Record]) -> None:
    """Raise :class:`DataError` unless there are images, not too many, each with a label and a name."""
    if not items:
        raise DataError(
            "holds no images",
            where=text,
            remedy=f"give class folders, .tar shards or .parquet tables of {', '.join(EXTENSIONS[:6])}",
        )
    if len(items) > MAX_ITEMS:
        raise DataError(f"more than {MAX_ITEMS} images", where=text, remedy="use a part of it")
    bare = next((item for item in items if item.label is None), None)
    if bare is not None and any(item.label is not None for item in items):
        raise DataError(
            "some images have a label, and others have none",
            where=text,
            why=f"for instance {bare.name}",
            remedy="give each image its class folder, its .cls file or its label",
        )
    names = {item.name for item in items}
    if len(names) < len(items):
        raise DataError(
            "two images have one name",
            where=text,
            remedy="give each image, and each key in a shard, a name of its own",
        )
