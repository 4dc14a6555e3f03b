"""Collections of images: a folder of class folders, a flat folder, or a ``.tar`` of either, read lazily.

Folders are scanned by :mod:`cmt_edge.deploy.folders`, archives by :mod:`cmt_edge.deploy.archives`.
"""

from __future__ import annotations

import hashlib
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from pathlib import Path, PurePosixPath
from typing import TypeVar, overload

from .archives import scan_archive, split_archive
from .decoding import EXTENSIONS
from .errors import DataError, InputError
from .faults import is_about_data
from .folders import MASKS, PICTURES, Found, Item, scan_folder
from .parts import find_part_kind, find_parts

T = TypeVar("T")
"""What there are several of."""

SHOWN_KINDS = 6
"""The largest number of kinds of skipped files that are named."""


NO_IMAGES = "holds no images"
"""What the error for a place without images says."""


class ImageSet(Sequence[Item]):
    """Images below ``path``, sorted by name. Thread-safe; no file stays open between two reads.

    Links to files and folders are followed. Hidden files, and what operating systems leave in folders, are
    ignored; other files that are no images are counted in :attr:`skipped`.

    Raises:
        DataError: the place does not exist or cannot be read, it holds no images, the archive is damaged or
            compressed, or (if ``labelled``) class folders are mixed with loose images, or a class is at
            several places.
    """

    has_numbers = False
    """Its labels are names."""

    def __init__(
        self,
        path: str | Path,
        items: list[Item] | None = None,
        *,
        labelled: bool = True,
    ) -> None:
        """``labelled``: whether the folders are classes; otherwise any nesting of folders is accepted."""
        self.path = Path(path)
        self.skipped: Counter[str] = Counter()
        """How many files of each kind were skipped."""
        self.repeated = 0
        """How many images links give more than one name, so that they count more than once."""
        self._archive, self._prefix = split_archive(self.path)
        if items is None:
            found = scan_archive(self._archive, self._prefix) if self._archive else scan_folder(self.path)
            items = arrange(found, str(self.path), labelled)
            self.skipped = found.skipped
            self.repeated = len(found.repeated)
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

    @property
    def note(self) -> str:
        """What was skipped, and what counts more than once, in words; empty if nothing was."""
        return describe_left_out(str(self.path), self.skipped, self.repeated)

    @property
    def parts(self) -> dict[str, list[str]]:
        """The folders that hold parts of a data set, by ``"train"``, ``"validation"`` and ``"test"``.

        See :func:`~cmt_edge.deploy.parts.find_parts`.
        """
        return find_parts(item.name for item in self.items)

    def select(self, items: list[Item]) -> ImageSet:
        """The same place restricted to ``items``."""
        return ImageSet(self.path, items)

    def locate(self, item: Item) -> str:
        """Where an image lies, for messages and answers: of an archive with names such as ``/etc/x.jpg`` or
        ``../x.jpg``, too, a place inside the archive, which is where the bytes come from."""
        name = item.name if self._archive is None else posixpath.normpath(f"/{item.name}").lstrip("/")
        return str(self.path / name)

    def read(self, item: Item) -> bytes:
        """The encoded bytes of one image; raises :class:`DataError` where they cannot be read."""
        try:
            if self._archive is None:
                return (self.path / item.name).read_bytes()
            with open(self._archive, "rb") as archive:
                archive.seek(item.offset)
                return archive.read(item.size)
        except OSError as exc:
            if not is_about_data(exc):
                raise
            raise DataError(
                "cannot be read",
                where=self.locate(item),
                why=exc.strerror,
                remedy="check it",
            ) from exc


def arrange(found: Found, where: str, labelled: bool) -> list[Item]:
    """The images of a scan, sorted by name; what is left out is added to what the scan skipped.

    Args:
        found: of a scan of folders.
        where: the place, for messages.
        labelled: whether the folders are classes; otherwise any nesting of folders is accepted.

    Raises:
        DataError: there are no images, or (if ``labelled``) class folders are mixed with loose images, or a
            class is at several places.
    """
    items = sorted(found.items, key=lambda item: item.name)
    _check_any(items, where, found)
    if labelled:
        items = _drop_masks(items, found.skipped)
        check_labels(items, where)
    return items


def describe_left_out(where: str, skipped: Counter[str], repeated: int) -> str:
    """What was skipped, and what counts more than once, in words; empty if nothing was."""
    parts = (_describe_skipped(skipped), _describe_repeated(repeated))
    told = "; ".join(part for part in parts if part)
    return f"{where}: {told}" if told else ""


def _describe_skipped(skipped: Counter[str]) -> str:
    if not skipped:
        return ""
    kinds = [f"{count} {kind}" for kind, count in skipped.most_common(SHOWN_KINDS)]
    total = sum(skipped.values())
    rest = total - sum(count for _, count in skipped.most_common(SHOWN_KINDS))
    kinds += [f"{rest} others"] if rest else []
    counted = "1 file was" if total == 1 else f"{total} files were"
    return f"{counted} skipped: {', '.join(kinds)}"


def _describe_repeated(repeated: int) -> str:
    if not repeated:
        return ""
    counted = "1 image counts" if repeated == 1 else f"{repeated} images count"
    return f"{counted} more than once, because links lead to the same file by several names"


def hash_image(data: bytes) -> str:
    """Name of an image by its content: the first 32 hex digits of its SHA-256."""
    return hashlib.sha256(data).hexdigest()[:32]


def choose_evenly(items: Sequence[T], limit: int | None) -> list[T]:
    """All of ``items``, or ``limit`` evenly spaced ones; raises :class:`InputError` for a limit below 1."""
    if limit is None or limit >= len(items):
        return list(items)
    if limit < 1:
        raise InputError(f"a limit of {limit} images", remedy="ask for 1 or more")
    return [items[i * len(items) // limit] for i in range(limit)]


def is_archive(path: Path) -> bool:
    """Whether ``path`` is a ``.tar`` or a part of one; raises :class:`DataError` for a compressed archive."""
    return split_archive(path)[0] is not None


def _drop_masks(items: list[Item], skipped: Counter[str]) -> list[Item]:
    """The images without those in folders such as ``cat/masks``, beside ``cat/images``: they are no class of
    their own."""
    masks = _find_masks({posixpath.dirname(item.name) for item in items})
    if not masks:
        return items
    kept = [item for item in items if posixpath.dirname(item.name) not in masks]
    names = ", ".join(sorted({f"{posixpath.basename(folder)}/" for folder in masks}))
    skipped[f"in {names} beside the pictures"] += len(items) - len(kept)
    return kept


def _find_masks(folders: Set[str]) -> set[str]:
    """The folders with images that are masks of those in a folder beside them, inside one class."""
    pictures = {folder for folder in folders if posixpath.basename(folder).lower() in PICTURES}
    classes = {posixpath.dirname(folder) for folder in pictures} - {""}
    masks = {folder for folder in folders if posixpath.basename(folder).lower() in MASKS}
    return {folder for folder in masks if posixpath.dirname(folder) in classes}


def _check_any(items: list[Item], where: str, found: Found) -> None:
    """Raise :class:`DataError` if there are no images."""
    if not items:
        raise DataError(
            NO_IMAGES,
            where=where,
            why=_describe_skipped(found.skipped) or None,
            remedy=f"supported: {' '.join(EXTENSIONS)}",
        )


def check_labels(items: Sequence[Item], path: str) -> None:
    """Check that the class folders mean one thing: each class is at one place, and no loose images lie beside
    them.

    Raises:
        DataError: they do not.
    """
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
            folder = str(PurePosixPath(item.name).parent)
            places.setdefault(item.label, set()).add(folder)
    for label, found in places.items():
        if len(found) == 1:
            continue
        double = sorted(found)
        choice = _describe_choice(path, double)
        if len(places) == 1:  # the folders above may as well be the classes
            above = ", ".join(PurePosixPath(place).parent.name for place in double[:2])
            choice = f"if {above} and so on are the classes, move their images out of {label}/; or {choice}"
        raise DataError(
            f"the same class is at several places: {', '.join(double)}",
            where=path,
            remedy=_gather(label, double) if _are_parts(found, items) else choice,
        )


def _are_parts(folders: set[str], items: Sequence[Item]) -> bool:
    """Whether the folders are parts of a data set, and not classes that are called like one."""
    parts = find_parts(item.name for item in items)
    return folders <= {folder for kind in parts.values() for folder in kind}


def _gather(part: str, places: Sequence[str]) -> str:
    """What to do where the parts of a data set lie inside the class folders, as in ``cat/test, dog/test``."""
    classes = [PurePosixPath(place).parent.name for place in places[:2]]
    pairs = zip(places, classes, strict=False)
    links = ", ".join(f"{place} as {part}/{name}" for place, name in pairs)
    return f"the parts lie inside the classes: copy or link {links} and so on, and give the folder {part}"


def _describe_choice(path: str, double: Sequence[str]) -> str:
    """Which folder to give instead of one in which a class is at several places: the part to train on first,
    the part to test on last."""
    uses = {
        "train": " to train or calibrate",
        "validation": " to choose settings",
        None: "",
        "test": " to evaluate",
    }
    shared = len(PurePosixPath(posixpath.commonpath(double)).parts)
    folders = sorted({"/".join(PurePosixPath(place).parts[: shared + 1]) for place in double})
    parts = {folder: find_part_kind(PurePosixPath(folder).name) for folder in folders}
    order = list(uses)
    ordered = sorted(folders, key=lambda folder: order.index(parts[folder]))
    shown = [f"{posixpath.join(path, folder)}{uses[parts[folder]]}" for folder in ordered[:SHOWN_KINDS]]
    return f"choose one: {', '.join(shown)}"
