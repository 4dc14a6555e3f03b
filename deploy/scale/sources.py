"""Images from anywhere, with or without labels: folders, tar shards, shards in the manner of WebDataset,
Parquet. This is the one place that lists them; :mod:`.reading` is the one that reads them."""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TypeVar

from ..archives import split_archive
from ..decoding import EXTENSIONS
from ..errors import DataError
from ..folders import (
    MAX_ITEMS,
    Found,
    Item,
    describe_state,
    find_class,
    find_kind,
    is_image,
    require_folder,
)
from ..images import NO_IMAGES, ImageSet, arrange, describe_left_out
from ..parts import find_parts
from .places import Entry, LocalPlace, find_local_path, is_url, open_place
from .reading import Reader
from .records import Record
from .shards import AT_ONCE, LABEL, scan_shards
from .tables import ENDING, scan_tables

TAR = ".tar"
"""How the name of a shard ends."""

COLLECTIONS = (TAR, ENDING)
"""How the name of a file ends that holds many images."""

SHOWN_PARTS = 6
"""The largest number of parts of a data set that a message names."""

T = TypeVar("T")
"""What is made of an image."""


@dataclass(frozen=True)
class Source:
    """Images; with labels, see :class:`~cmt_edge.deploy.measure.labels.LabelledImages`.

    Attributes:
        path: what the user gave, without a password in it.
        address: what opens it, with the password.
        items: the images, in order.
        has_numbers: whether the labels are numbers of logits, and no names.
        skipped: how many files of each kind were left out.
        repeated: how many images links give more than one name, so that they count more than once.
    """

    path: str
    address: str
    items: list[Record]
    has_numbers: bool = False
    skipped: Counter[str] = field(default_factory=Counter, compare=False)
    repeated: int = 0
    reader: Reader = field(default_factory=Reader, repr=False, compare=False)

    @property
    def classes(self) -> list[str]:
        """Sorted labels."""
        return sorted({item.label for item in self.items if item.label is not None})

    @property
    def note(self) -> str:
        """What was skipped, and what counts more than once, in words; empty if nothing was."""
        return describe_left_out(self.path, self.skipped, self.repeated)

    @property
    def parts(self) -> dict[str, list[str]]:
        """The folders, shards or tables that hold parts of a data set, by ``"train"``, ``"validation"`` and
        ``"test"``; see :func:`~cmt_edge.deploy.parts.find_parts`."""
        return find_parts({posixpath.join(posixpath.dirname(item.name), "x") for item in self.items})

    @property
    def holds_tables(self) -> bool:
        """Whether the images are rows: a single one cannot be read without many others."""
        return any(item.row >= 0 for item in self.items)

    def select(self, items: list[Record], left_out: Counter[str] | None = None) -> Source:
        """The same place restricted to ``items``; ``left_out`` is added to what was skipped."""
        return replace(self, items=items, skipped=self.skipped + (left_out or Counter()))

    def read(self, item: Record) -> bytes:
        """The encoded bytes of one image; raises :class:`DataError`."""
        return self.reader.read(self.address, item)

    def read_each(self, use: Callable[[bytes], T]) -> list[T]:
        """What ``use`` makes of each image, in their order. Each part of a table is read once, and several
        images at once from elsewhere; raises :class:`DataError`."""

        def work(place: int) -> T:
            return use(self.read(self.items[place]))

        order = sorted(range(len(self.items)), key=lambda i: (self.items[i].file, self.items[i].row, i))
        is_far = is_url(self.address) and not self.holds_tables
        with ThreadPoolExecutor(AT_ONCE if is_far else 1) as pool:
            found = dict(zip(order, pool.map(work, order), strict=True))
        return [found[place] for place in range(len(self.items))]


def open_source(text: str | os.PathLike[str], labelled: bool = True) -> Source:
    """The images of a path or URL.

    * a folder of class folders, or ``ARCHIVE.tar[/FOLDER]``: as :class:`~cmt_edge.deploy.images.ImageSet`;
    * a folder of ``.tar`` files, or a single one whose images have ``.cls`` files: shards;
    * a ``.parquet`` file, or a folder of them: tables of images and labels;
    * a URL of any of these.

    Args:
        text: the path or URL.
        labelled: whether labels matter; otherwise they may be missing, and folders may be nested in any way.

    Raises:
        DataError: there are no images, some have no label, or the place cannot be read.
        RuntimeMissingError: it is a table or a URL, and pyarrow is not installed.
    """
    text = os.fspath(text)
    if not is_url(text):
        path = find_local_path(text)
        if not _holds_files(path):
            try:
                return convert_images(ImageSet(path, labelled=labelled))
            except DataError as exc:
                if exc.what != NO_IMAGES or not _holds_files_deeper(path):
                    raise
        text = str(path.absolute())
    place = open_place(text)
    entries = place.list()
    tables = [entry for entry in entries if entry.name.lower().endswith(ENDING)]
    shards = [entry for entry in entries if entry.name.lower().endswith(TAR)]
    _require_one_kind(place.url, entries)
    if not tables and not shards:
        return _list_files(place.url, text, entries, labelled)
    scan, files = (scan_tables, tables) if tables else (scan_shards, shards)
    items, has_numbers = scan(place, files, labelled)
    source = Source(place.url, text, items, has_numbers)
    _check(source, labelled)
    return source


def require_place(text: str | os.PathLike[str]) -> None:
    """Raise :class:`DataError` where no images can be: nothing is there, or no folder and no file that is
    read. No image is looked for and no other machine asked, so this takes no time."""
    if is_url(os.fspath(text)):
        return
    path = find_local_path(os.fspath(text))
    archive, _ = split_archive(path)
    if archive is None and not (is_collection(path.name) and path.is_file()):
        require_folder(path)


def is_collection(name: str) -> bool:
    """Whether a name is that of a shard or a table."""
    return name.lower().endswith(COLLECTIONS)


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
    return any(map(is_collection, names))


def _holds_files_deeper(path: Path) -> bool:
    """Whether there are tables or shards somewhere below a folder without images, as in ``data/`` of Hugging
    Face's data sets."""
    below = LocalPlace(str(path), str(path.absolute()))
    return os.path.isdir(path) and any(is_collection(entry.name) for entry in below.list())


def convert_images(images: ImageSet) -> Source:
    """The images of a folder, or of a part of an archive, of this machine; labels may be missing."""
    root = os.path.abspath(images.path)
    archive = (
        None
        if os.path.isdir(root)
        else str(next(p for p in (Path(root), *Path(root).parents) if os.path.isfile(p)))
    )
    whole = "" if archive is None else _describe_state(archive)
    items = [
        Record(
            item.name,
            item.label,
            archive or os.path.join(root, item.name),
            item.offset,
            item.size,
            state=whole or item.state,
            group=posixpath.dirname(item.name),
        )
        for item in images.items
    ]
    return Source(
        str(images.path),
        str(images.path),
        items,
        skipped=images.skipped,
        repeated=images.repeated,
    )


def _describe_state(file: str) -> str:
    status = os.stat(file)
    return describe_state(status.st_size, status.st_mtime_ns)


def _list_files(url: str, address: str, entries: Sequence[Entry], labelled: bool) -> Source:
    """Files in folders elsewhere, by the rules of those of this machine."""
    found = Found()
    files = {entry.name: entry for entry in entries}
    for entry in entries:
        if is_image(entry.name):
            item = Item(entry.name, find_class(PurePosixPath(entry.name)), state=entry.state)
            found.add(item, Path(url), None)
        else:
            found.skipped[find_kind(entry.name)] += 1
    items = [
        Record(
            item.name,
            item.label,
            files[item.name].path,
            state=item.state,
            group=posixpath.dirname(item.name),
        )
        for item in arrange(found, url, labelled)
    ]
    return Source(url, address, items, skipped=found.skipped)


def _check(source: Source, labelled: bool) -> None:
    """Raise :class:`DataError` unless there are images, not too many, each with a name of its own, and (if
    ``labelled``) with a label."""
    text, items = source.path, source.items
    if not items:
        raise DataError(
            NO_IMAGES,
            where=text,
            remedy=f"give class folders, .tar shards or .parquet tables of {', '.join(EXTENSIONS[:6])}",
        )
    if len(items) > MAX_ITEMS:
        raise DataError(f"more than {MAX_ITEMS} images", where=text, remedy="use a part of it")
    if len({item.name for item in items}) < len(items):
        raise DataError(
            "two images have one name",
            where=text,
            remedy="give each image, and each key in a shard, a name of its own",
        )
    if labelled:
        _require_labels(source)
        _require_one_part(source)


def _require_labels(source: Source) -> None:
    """Raise :class:`DataError` where some images have a label, and others have none."""
    bare = next((item for item in source.items if item.label is None), None)
    if bare is not None and any(item.label is not None for item in source.items):
        raise DataError(
            "some images have a label, and others have none",
            where=source.path,
            why=f"for instance {bare.name}",
            remedy="give each image its class folder, its .cls file or its label",
        )


def _require_one_part(source: Source) -> None:
    """Raise :class:`DataError` for shards or tables of several parts of a data set, as class folders of
    several parts are refused: top-1 would be that of a mixture."""
    parts = source.parts
    if parts:
        names = [f"{name} ({kind})" for kind, found in sorted(parts.items()) for name in found]
        more = f" and {len(names) - SHOWN_PARTS} more" if len(names) > SHOWN_PARTS else ""
        raise DataError(
            f"holds several parts of a data set: {', '.join(names[:SHOWN_PARTS])}{more}",
            where=source.path,
            why="a model looks better on what it was trained on",
            remedy="give each part a folder of its own, and name the one to measure on",
        )
