"""Collections of images: a folder of class folders, a flat folder, or a ``.tar`` of either, read lazily.

A part of an archive is named like a folder inside it: ``photos.tar/train``.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import overload

from .errors import DataError
from .preprocessing import EXTENSIONS, MAX_BYTES

MAX_ITEMS = 5_000_000
"""Most images that an archive may hold."""


@dataclass(frozen=True)
class Item:
    """One image of a collection.

    Attributes:
        name: its path relative to the collection's root.
        label: its class folder; ``None`` in a flat folder.
        offset, size: where its bytes lie in the archive; -1 in a folder.
    """

    name: str
    label: str | None
    offset: int = -1
    size: int = -1


class ImageSet(Sequence[Item]):
    """Images below ``path``, sorted by name. Thread-safe; no file stays open between two reads.

    Raises:
        DataError: the place does not exist or cannot be read, it holds no images, the archive is damaged, or
            class folders are mixed with loose images.
    """

    def __init__(self, path: str | Path, items: list[Item] | None = None) -> None:
        self.path = Path(path)
        self._archive, self._prefix = _split(self.path)
        if items is None:
            found = _scan_tar(self._archive, self._prefix) if self._archive else _scan_folder(self.path)
            items = sorted(found, key=lambda item: item.name)
            _check_labels(items, self.path)
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        return self.items[index]

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    @property
    def classes(self) -> list[str]:
        """Sorted names of the class folders; empty for a flat folder."""
        return sorted({item.label for item in self.items if item.label is not None})

    def select(self, items: list[Item]) -> ImageSet:
        """The same place restricted to ``items``."""
        return ImageSet(self.path, items)

    def read(self, item: Item) -> bytes:
        """The encoded bytes of one image; raises :class:`DataError` where they cannot be read."""
        try:
            if self._archive is None:
                return (self.path / item.name).read_bytes()
            with open(self._archive, "rb") as archive:
                archive.seek(item.offset)
                return archive.read(item.size)
        except OSError as exc:
            raise DataError(
                "cannot be read", where=self.path / item.name, why=exc.strerror, remedy="check it"
            ) from exc


def digest(data: bytes) -> str:
    """Name of an image by its content: the first 32 hex digits of its SHA-256."""
    return hashlib.sha256(data).hexdigest()[:32]


def _split(path: Path) -> tuple[Path | None, str]:
    """``(archive, folder inside it)`` if some part of ``path`` is a tar file, else ``(None, "")``."""
    for part in (path, *path.parents):
        if part.suffix == ".tar" and os.path.isfile(part):
            inner = path.relative_to(part).as_posix()
            return part, "" if inner == "." else inner + "/"
    return None, ""


def _scan_folder(path: Path) -> list[Item]:
    """All images below a folder; hidden files and folders are left out."""
    if not os.path.isdir(path):
        missing = not os.path.exists(path)
        raise DataError(
            "no such folder of images" if missing else "is neither a folder nor a .tar archive",
            where=path,
            remedy="give a folder of images, a folder of class folders, or a .tar of either",
        )
    items: list[Item] = []

    def fail(exc: OSError) -> None:
        raise DataError(
            "cannot be read", where=exc.filename, why=exc.strerror, remedy="check its permissions"
        )

    for folder, folders, files in os.walk(path, onerror=fail):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        relative = Path(folder).relative_to(path)
        for name in files:
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                items.append(Item((relative / name).as_posix(), relative.name or None))
    return items


def _scan_tar(archive: Path, prefix: str) -> list[Item]:
    """All images of an archive below the folder ``prefix``; hidden files and folders are left out."""
    items: list[Item] = []
    try:
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                item = _item_of(member, prefix)
                if item is None:
                    continue
                items.append(item)
                if len(items) > MAX_ITEMS:
                    raise DataError(f"more than {MAX_ITEMS} images", where=archive, remedy="use a part of it")
            end = tar.offset
        _check_end(archive, end)
    except (tarfile.TarError, EOFError, OSError) as exc:
        raise DataError(
            "cannot be read as a tar archive",
            where=archive,
            why=exc,
            remedy="check that it is complete and not compressed",
        ) from exc
    return items


def _item_of(member: tarfile.TarInfo, prefix: str) -> Item | None:
    """The image that a member of an archive is, if it is one."""
    text = PurePosixPath(member.name).as_posix().removeprefix("./")
    if not member.isfile() or not text.startswith(prefix) or not text.lower().endswith(EXTENSIONS):
        return None
    inner = PurePosixPath(text.removeprefix(prefix))
    if any(part.startswith(".") for part in inner.parts) or member.size > MAX_BYTES:
        return None
    return Item(inner.as_posix(), inner.parent.name or None, member.offset_data, member.size)


def _check_end(archive: Path, end: int) -> None:
    """Raise :class:`tarfile.ReadError` unless the archive really ends at byte ``end``: ``tarfile`` mistakes a
    damaged header for the end."""
    with open(archive, "rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"damaged at byte {end}, or cut off")


def _check_labels(items: list[Item], path: Path) -> None:
    """Check that the class folders mean one thing: each class is at one place, and no loose images lie beside
    them."""
    if not items:
        raise DataError("holds no images", where=path, remedy=f"supported: {' '.join(EXTENSIONS)}")
    loose = [item for item in items if item.label is None]
    if loose and len(loose) < len(items):
        raise DataError(
            "mixes loose images with class folders",
            where=path,
            why=f"for instance {loose[0].name}",
            remedy="move every image into its class folder",
        )
    places: dict[str, set[str]] = {}
    for item in items:
        if item.label is not None:
            places.setdefault(item.label, set()).add(str(PurePosixPath(item.name).parent))
    double = next((sorted(found) for found in places.values() if len(found) > 1), None)
    if double:
        splits = sorted({PurePosixPath(place).parts[0] for place in double})
        raise DataError(
            f"the same class is at several places: {', '.join(double)}",
            where=path,
            remedy=f"choose one: {path / splits[0]}",
        )
