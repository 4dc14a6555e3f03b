"""Images below a folder: what counts as one, and what is skipped."""

from __future__ import annotations

import os
import shlex
import stat
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from .decoding import EXTENSIONS
from .errors import DataError
from .files import open_regular

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


PICTURES = frozenset({"images", "imgs", "img"})
"""Names, in lower case, of a folder inside a class folder that holds the images of the class."""

MASKS = frozenset(
    {
        "masks",
        "mask",
        "labels",
        "label",
        "annotations",
        "annotation",
        "annots",
        "gt",
        "gtfine",
        "groundtruth",
        "ground_truth",
        "segmentation",
        "segmentations",
        "segmentationclass",
        "segmentationobject",
        "trimaps",
    }
)
"""Names, in lower case, of folders beside the pictures that hold images of what is to be found in them."""

LOOPS = "links to a folder above them"
"""What links are counted as that would lead a scan in a circle."""

ZIP_START = b"PK\x03\x04"
"""First bytes of a ZIP archive."""


@dataclass(frozen=True)
class Item:
    """One image of a collection.

    Attributes:
        name: its path relative to the collection's root.
        label: its class folder, which may hold its images in a folder ``images``; ``None`` in a flat folder.
        offset, size: where its bytes lie in the archive; -1 in a folder.
        state: of its file in a folder, see :func:`describe_state`; empty in an archive.
    """

    name: str
    label: str | None
    offset: int = -1
    size: int = -1
    state: str = ""


@dataclass
class Found:
    """What a scan found.

    Attributes:
        items: the images.
        skipped: how many files of each kind were skipped.
        known: what identifies the images so far.
        repeated: what identifies those of them that have more than one name.
    """

    items: list[Item] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    known: set[int] = field(default_factory=set)
    repeated: set[int] = field(default_factory=set)

    def add(self, item: Item, where: Path, identity: int | None) -> None:
        """Note an image; ``identity`` tells it from every other one, whatever it is called, if it is known.

        Raises:
            DataError: there are too many.
        """
        self.items.append(item)
        if identity in self.known:
            self.repeated.add(identity)
        elif identity is not None:
            self.known.add(identity)
        if len(self.items) > MAX_ITEMS:
            raise DataError(
                f"more than {MAX_ITEMS} images",
                where=where,
                remedy="use a part of it",
            )


def describe_state(size: int, modified_ns: int) -> str:
    """What changes when a file does: its size, and its time of change in nanoseconds."""
    return f"{size} {modified_ns}"


def is_junk(name: str) -> bool:
    return name.startswith(".") or name.lower() in JUNK


def find_kind(name: str) -> str:
    """What a file that is no image is counted as."""
    return PurePosixPath(name.strip()).suffix.lower() or "without an ending"


def is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def find_class(name: PurePosixPath) -> str | None:
    """The class of an image: the folder that it lies in, or the one above a folder of :data:`PICTURES`, as in
    ``n01443537/images/n01443537_0.JPEG`` of Tiny ImageNet."""
    folder = name.parent
    if folder.name.lower() in PICTURES and folder.parent.name:
        folder = folder.parent
    return folder.name or None


def must_unpack(archive: Path, command: str, place: Path) -> DataError:
    """The error for an archive that ``command`` unpacks to ``place``."""
    return DataError(
        "is compressed, so single images cannot be read from it",
        where=archive,
        remedy=f"unpack it once: {command}   then give {place}",
    )


def _is_zip(path: Path) -> bool:
    """Whether a file is a ZIP archive, whatever it is called."""
    try:
        with open_regular(path) as file:
            return file.read(len(ZIP_START)) == ZIP_START
    except OSError:
        return False


def require_folder(path: Path) -> None:
    """Raise :class:`DataError` unless there is a folder."""
    if os.path.isdir(path):
        return
    missing = not os.path.exists(path)
    if not missing and _is_zip(path):
        target = path.with_name(f"{path.name}_unpacked")
        command = f"unzip -q {shlex.quote(str(path))} -d {shlex.quote(str(target))}"
        raise must_unpack(path, command, target)
    raise DataError(
        "no such folder of images" if missing else "is neither a folder nor a .tar archive",
        where=path,
        remedy="give a folder of images, a folder of class folders, or a .tar of either",
    )


def scan_folder(path: Path) -> Found:
    """All images below a folder; links are followed, but not in a circle."""
    require_folder(path)
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
        seen = above.pop(folder, frozenset()) | {_identify(folder)}
        relative = Path(folder).relative_to(path)
        folders[:] = sorted(name for name in folders if not is_junk(name))
        for name in list(folders):
            inner = os.path.join(folder, name)
            if _is_among(inner, seen):
                folders.remove(name)
                found.skipped[LOOPS] += 1
            above[inner] = seen
        for name in files:
            if not is_junk(name):
                _add_file(found, path, relative / name)
    return found


def _is_among(folder: str, seen: frozenset[tuple[int, int]]) -> bool:
    """Whether a folder is one of those ``seen`` on the way to it. A real folder may be, too: a link to a
    folder above the root leads to the root again."""
    try:
        return _identify(folder) in seen
    except OSError:  # the walk tells that it cannot be read
        return False


def _identify(folder: str) -> tuple[int, int]:
    """What tells a folder from every other one, whatever it is called."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _add_file(found: Found, path: Path, relative: Path) -> None:
    """Count one file of a folder: as an image, or as what is skipped."""
    if not is_image(relative.name):
        found.skipped[find_kind(relative.name)] += 1
        return
    try:
        status = os.stat(path / relative)
    except (OSError, ValueError):
        status = None
    if status is not None and stat.S_ISREG(status.st_mode):
        found.add(
            Item(
                relative.as_posix(),
                find_class(PurePosixPath(relative)),
                state=describe_state(status.st_size, status.st_mtime_ns),
            ),
            path,
            identity=status.st_dev << 64 | status.st_ino if status.st_ino else None,
        )
    else:
        link = os.path.islink(path / relative)
        found.skipped["links that lead nowhere" if link else "no regular files"] += 1
