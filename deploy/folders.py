"""Images below a folder: what counts as one, and what is skipped."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from .decoding import EXTENSIONS
from .errors import DataError

MAX_ITEMS = 5_000_000
"""Most images that a folder or an archive may hold."""

JUNK = (
    "__macosx",
    "@eadir",
    "$recycle.bin",
    "system volume information",
    "lost+found",
    "thumbs.db",
)
"""Names, in lower case, that operating systems leave in folders; names with a dot in front are junk too."""


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


@dataclass
class Found:
    """What a scan found."""

    items: list[Item] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def add(self, item: Item, where: Path) -> None:
        self.items.append(item)
        if len(self.items) > MAX_ITEMS:
            raise DataError(
                f"more than {MAX_ITEMS} images",
                where=where,
                remedy="use a part of it",
            )


def is_junk(name: str) -> bool:
    return name.startswith(".") or name.lower() in JUNK


def kind_of(name: str) -> str:
    """What a file that is no image is counted as."""
    return PurePosixPath(name.strip()).suffix.lower() or "without an ending"


def is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def scan_folder(path: Path) -> Found:
    """All images below a folder; links are followed, but not in a circle."""
    if not os.path.isdir(path):
        missing = not os.path.exists(path)
        raise DataError(
            "no such folder of images" if missing else "is neither a folder nor a .tar archive",
            where=path,
            remedy="give a folder of images, a folder of class folders, or a .tar of either",
        )
    found = Found()

    def fail(exc: OSError) -> None:
        raise DataError(
            "cannot be read",
            where=exc.filename,
            why=exc.strerror,
            remedy="check its permissions",
        )

    above: dict[str, frozenset[tuple[int, int]]] = {}
    for folder, folders, files in os.walk(path, onerror=fail, followlinks=True):
        seen = above.pop(folder, frozenset()) | {_identity(folder)}
        relative = Path(folder).relative_to(path)
        folders[:] = sorted(name for name in folders if not is_junk(name))
        for name in list(folders):
            inner = os.path.join(folder, name)
            if os.path.islink(inner) and _identity(inner) in seen:
                folders.remove(name)
                found.skipped["links to a folder above them"] += 1
            above[inner] = seen
        for name in files:
            if not is_junk(name):
                _add_file(found, path, relative / name)
    return found


def _identity(folder: str) -> tuple[int, int]:
    """What tells a folder from every other one, whatever it is called."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _add_file(found: Found, path: Path, relative: Path) -> None:
    """Count one file of a folder: as an image, or as what is skipped."""
    if not is_image(relative.name):
        found.skipped[kind_of(relative.name)] += 1
    elif os.path.isfile(path / relative):
        found.add(
            Item(relative.as_posix(), relative.parent.name or None),
            path,
        )
    else:
        link = os.path.islink(path / relative)
        found.skipped["links that lead nowhere" if link else "no regular files"] += 1
