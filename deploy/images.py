"""Collections of images: a folder of class folders, a flat folder, or a ``.tar`` of either, read lazily.

A part of an archive is named like a folder inside it: ``photos.tar/train``.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import os
import posixpath
import re
import shlex
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, cast, overload

from .decoding import EXTENSIONS, MAX_BYTES, is_about_data
from .errors import DataError
from .files import open_regular
from .parts import find_parts, part_of

MAX_ITEMS = 5_000_000
"""Most images that a folder or an archive may hold."""

MAX_LINKS = 20
"""The largest number of links in an archive that may lead from one to the next."""

MAX_LINKED = 200_000
"""The largest number of files that the links in an archive may lead to, all together."""

MAX_HEADER = 1 << 20
"""The largest size in bytes of all headers of one member of an archive: long names, sparse maps and so on."""

LONG_NUMBER = re.compile(rb"\d{300}")
"""More digits than a file's name may have: ``tarfile`` takes quadratic time for them (CVE-2024-6232)."""

UNREADABLE = (
    tarfile.TarError,
    EOFError,
    OSError,
    ValueError,
    OverflowError,
    LookupError,
    RecursionError,
)
"""What Python raises for an archive that is damaged."""

JUNK = (
    "__macosx",
    "@eadir",
    "$recycle.bin",
    "system volume information",
    "lost+found",
    "thumbs.db",
)
"""Names, in lower case, that operating systems leave in folders; names with a dot in front are junk too."""

PICTURES = "images"
"""Name, in lower case, of a folder inside a class folder that holds the images of the class."""

SHOWN_KINDS = 6
"""The largest number of kinds of skipped files that are named."""

UNPACK = {
    ".tar.gz": ("gunzip -k", ".tar"),
    ".tgz": ("gunzip -k", ".tar"),
    ".tar.bz2": ("bunzip2 -k", ".tar"),
    ".tbz2": ("bunzip2 -k", ".tar"),
    ".tbz": ("bunzip2 -k", ".tar"),
    ".tar.xz": ("unxz -k", ".tar"),
    ".txz": ("unxz -k", ".tar"),
    ".tar.zst": ("zstd -d", ".tar"),
    ".zip": ("unzip -q", ""),
    ".7z": ("7z x", ""),
    ".rar": ("unrar x", ""),
}
"""Ending of a compressed archive -> the command that unpacks it, and the ending of what is then there, which
is "" for a folder."""

ZIP_START = b"PK\x03\x04"
"""First bytes of a ZIP archive."""

COMPRESSED = {
    b"\x1f\x8b": "gzip -dc",
    b"BZh": "bzip2 -dc",
    b"\xfd7zXZ": "xz -dc",
    b"\x28\xb5\x2f\xfd": "zstd -dc",
}
"""First bytes of a compressed file -> the command that writes its content to standard output."""


@dataclass(frozen=True)
class Item:
    """One image of a collection.

    Attributes:
        name: its path relative to the collection's root.
        label: its class folder, which may hold its images in a folder ``images``; ``None`` in a flat folder.
        offset, size: where its bytes lie in the archive; -1 in a folder.
    """

    name: str
    label: str | None
    offset: int = -1
    size: int = -1


class ImageSet(Sequence[Item]):
    """Images below ``path``, sorted by name. Thread-safe; no file stays open between two reads.

    Links to files and folders are followed. Hidden files, and what operating systems leave in folders, are
    ignored; other files that are no images are counted in :attr:`skipped`.

    Raises:
        DataError: the place does not exist or cannot be read, it holds no images, the archive is damaged or
            compressed, or (if ``labelled``) class folders are mixed with loose images, or a class is at
            several places.
    """

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
        self._archive, self._prefix = _split(self.path)
        if items is None:
            found = _scan_tar(self._archive, self._prefix) if self._archive else _scan_folder(self.path)
            items = sorted(found.items, key=lambda item: item.name)
            self.skipped = found.skipped
            _check_any(items, self)
            if labelled:
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

    @property
    def note(self) -> str:
        """What was skipped, in words; empty if nothing was."""
        if not self.skipped:
            return ""
        kinds = [f"{count} {kind}" for kind, count in self.skipped.most_common(SHOWN_KINDS)]
        total = sum(self.skipped.values())
        rest = total - sum(count for _, count in self.skipped.most_common(SHOWN_KINDS))
        kinds += [f"{rest} others"] if rest else []
        counted = "1 file was" if total == 1 else f"{total} files were"
        return f"{self.path}: {counted} skipped: {', '.join(kinds)}"

    @property
    def parts(self) -> dict[str, list[str]]:
        """The folders that hold parts of a data set, by ``"train"``, ``"validation"`` and ``"test"``.

        See :func:`~cmt_edge.deploy.parts.find_parts`.
        """
        return find_parts(item.name for item in self.items)

    def select(self, items: list[Item]) -> ImageSet:
        """The same place restricted to ``items``."""
        return ImageSet(self.path, items)

    def location(self, item: Item) -> Path:
        """Where an image lies, for messages; outside archives its path."""
        return self.path / item.name

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
                where=self.path / item.name,
                why=exc.strerror,
                remedy="check it",
            ) from exc


@dataclass
class _Found:
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


def digest(data: bytes) -> str:
    """Name of an image by its content: the first 32 hex digits of its SHA-256."""
    return hashlib.sha256(data).hexdigest()[:32]


def is_archive(path: Path) -> bool:
    """Whether ``path`` is a ``.tar`` or a part of one; raises :class:`DataError` for a compressed archive."""
    return _split(path)[0] is not None


def _split(path: Path) -> tuple[Path | None, str]:
    """``(archive, folder inside it)`` if some part of ``path`` is a tar file, else ``(None, "")``."""
    for part in (path, *path.parents):
        lower = part.name.lower()
        if not lower.endswith((".tar", *UNPACK)) or not os.path.isfile(part):
            continue
        inner = path.relative_to(part).as_posix()
        inner = "" if inner == "." else inner + "/"
        if not lower.endswith(".tar"):
            raise _packed(part, inner)
        return part, inner
    return None, ""


def _packed(archive: Path, inner: str) -> DataError:
    """The error for a compressed archive, with the command that unpacks it."""
    ending = max((e for e in UNPACK if archive.name.lower().endswith(e)), key=len)
    command, left = UNPACK[ending]
    target = archive.with_name(archive.name[: -len(ending)] + left)
    source, place = shlex.quote(str(archive)), shlex.quote(str(target))
    into = {
        ".zip": f" -d {place}",
        ".7z": f" -o{place}",
        ".rar": f" {place}/",
    }.get(ending, "")
    return _must_unpack(archive, f"{command} {source}{into}", target / inner)


def _must_unpack(archive: Path, command: str, place: Path) -> DataError:
    """The error for an archive that ``command`` unpacks to ``place``."""
    return DataError(
        "is compressed, so single images cannot be read from it",
        where=archive,
        remedy=f"unpack it once: {command}   then give {place}",
    )


def _is_zip(path: Path) -> bool:
    """Whether a file that is not called so is a ZIP archive."""
    try:
        with open_regular(path) as file:
            return file.read(len(ZIP_START)) == ZIP_START
    except OSError:
        return False


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name.lower() in JUNK


def _kind(name: str) -> str:
    """What a file that is no image is counted as."""
    return PurePosixPath(name.strip()).suffix.lower() or "without an ending"


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _class_of(name: PurePosixPath) -> str | None:
    """The class of an image: the folder that it lies in, or the folder above ``images``, as in
    ``n01443537/images/n01443537_0.JPEG`` of Tiny ImageNet."""
    folder = name.parent
    if folder.name.lower() == PICTURES and folder.parent.name:
        folder = folder.parent
    return folder.name or None


def _scan_folder(path: Path) -> _Found:
    """All images below a folder; links are followed, but not in a circle."""
    if not os.path.isdir(path):
        missing = not os.path.exists(path)
        if not missing and _is_zip(path):
            target = path.with_name(f"{path.name}_unpacked")
            command = f"unzip -q {shlex.quote(str(path))} -d {shlex.quote(str(target))}"
            raise _must_unpack(path, command, target)
        raise DataError(
            "no such folder of images" if missing else "is neither a folder nor a .tar archive",
            where=path,
            remedy="give a folder of images, a folder of class folders, or a .tar of either",
        )
    found = _Found()

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
        folders[:] = sorted(name for name in folders if not _is_junk(name))
        for name in list(folders):
            inner = os.path.join(folder, name)
            if os.path.islink(inner) and _identity(inner) in seen:
                folders.remove(name)
                found.skipped["links to a folder above them"] += 1
            above[inner] = seen
        for name in files:
            if not _is_junk(name):
                _add_file(found, path, relative / name)
    return found


def _identity(folder: str) -> tuple[int, int]:
    """What tells a folder from every other one, whatever it is called."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _add_file(found: _Found, path: Path, relative: Path) -> None:
    """Count one file of a folder: as an image, or as what is skipped."""
    if not _is_image(relative.name):
        found.skipped[_kind(relative.name)] += 1
    elif os.path.isfile(path / relative):
        found.add(
            Item(relative.as_posix(), _class_of(PurePosixPath(relative))),
            path,
        )
    else:
        link = os.path.islink(path / relative)
        found.skipped["links that lead nowhere" if link else "no regular files"] += 1


def _scan_tar(archive: Path, prefix: str) -> _Found:
    """All images of an archive below the folder ``prefix``."""
    members = _Members(archive)
    try:
        with open_regular(archive) as file:
            end = _read_members(_Headers(file), members)
        _check_end(archive, end)
    except UNREADABLE as exc:
        if isinstance(exc, OSError) and not is_about_data(exc):
            raise
        raise _unreadable(archive, exc) from exc
    members.resolve()
    found = _Found()
    for name, place in members.files.items():
        if name.startswith(prefix):
            _add_member(
                found,
                archive,
                PurePosixPath(name.removeprefix(prefix)),
                place,
            )
    found.skipped["links that lead out of the archive"] += sum(
        name.startswith(prefix) and _is_image(name) for name in members.links
    )
    found.skipped += Counter()  # drops what was counted 0 times
    return found


def _read_members(headers: _Headers, members: _Members) -> int:
    """Note every member of an archive; returns the byte at which the archive says that it ends."""
    position = -1
    with tarfile.open(fileobj=cast(IO[bytes], headers), mode="r:") as tar:
        while (member := tar.next()) is not None:
            if tar.offset <= position:  # it would be read for ever
                raise tarfile.ReadError(f"the member at byte {member.offset} has a negative size")
            position = tar.offset
            members.add(member)
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep millions
            headers.allowed = MAX_HEADER
        return int(tar.offset)


class _Headers:
    """What ``tarfile`` reads an archive through: it reads headers only, and believes each size in them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._length = os.fstat(file.fileno()).st_size
        self.allowed = MAX_HEADER
        """Bytes that may still be read for the next member."""

    def read(self, size: int) -> bytes:
        """The next ``size`` bytes; raises ``tarfile.ReadError`` where a member would take too many."""
        if not 0 <= size <= self.allowed:
            raise tarfile.ReadError(f"the headers of one member take more than {MAX_HEADER} bytes")
        self.allowed -= size
        data = self._file.read(size)
        if size > tarfile.BLOCKSIZE and LONG_NUMBER.search(data):
            raise tarfile.ReadError("a header holds a number of hundreds of digits")
        return data

    def seek(self, position: int) -> int:
        """Go to a byte of the file; raises ``tarfile.ReadError`` where there is none."""
        if not 0 <= position <= self._length:
            raise tarfile.ReadError("unexpected end of data")
        return self._file.seek(position)

    def tell(self) -> int:
        """The byte that is read next."""
        return self._file.tell()


def _add_member(
    found: _Found,
    archive: Path,
    name: PurePosixPath,
    place: tuple[int, int] | None,
) -> None:
    """Count one file of an archive: as an image, or as what is skipped."""
    if any(map(_is_junk, name.parts)):
        return
    if not _is_image(name.name):
        found.skipped[_kind(name.name)] += 1
    elif place is None:
        found.skipped["sparse files"] += 1
    elif place[1] > MAX_BYTES:
        found.skipped[f"larger than {MAX_BYTES >> 20} MiB"] += 1
    else:
        found.add(
            Item(name.as_posix(), _class_of(name), *place),
            archive,
        )


class _Members:
    """The files of an archive by name, with offset and size, and its links by name, with their targets."""

    def __init__(self, archive: Path) -> None:
        self.archive = archive
        self.files: dict[str, tuple[int, int] | None] = {}
        self.links: dict[str, str] = {}

    def add(self, member: tarfile.TarInfo) -> None:
        """Note one member; a later one of the same name replaces it, as in unpacking."""
        if member.size < 0:
            raise tarfile.ReadError(f"the member at byte {member.offset} has a negative size")
        name = _normal(member.name)
        self.files.pop(name, None)
        self.links.pop(name, None)
        if member.islnk():
            self.links[name] = _normal(member.linkname)
        elif member.issym():
            self.links[name] = _normal(posixpath.join(posixpath.dirname(name), member.linkname))
        elif member.isfile():
            self.files[name] = None if member.issparse() else (member.offset_data, member.size)
        if len(self.files) + len(self.links) > MAX_ITEMS * 2:
            raise DataError(
                f"more than {2 * MAX_ITEMS} members",
                where=member.name,
                remedy="use a part of it",
            )

    def resolve(self) -> None:
        """Replace links by what they lead to: a file, or all files of a folder. Those that lead out of the
        archive, or in a circle, are left."""
        added = 0
        for _ in range(MAX_LINKS):
            names = sorted(self.files)
            resolved = {}
            for link, target in self.links.items():
                if found := self._targets(target, names, MAX_LINKED - added):
                    resolved[link] = found
                    added += len(found)
            for link, found in resolved.items():
                del self.links[link]
                for inner, place in found.items():
                    self.files.setdefault(link + inner, place)
            if not resolved:
                break

    def _targets(self, target: str, names: list[str], most: int) -> dict[str, tuple[int, int] | None]:
        """The files that a link leads to, by what follows the link's own name; ``names``: those of all files,
        sorted. Raises :class:`DataError` for more than ``most``."""
        if target in self.files:
            return {"": self.files[target]}
        below = target + "/"
        first = bisect.bisect_left(names, below)
        found: dict[str, tuple[int, int] | None] = {}
        for name in itertools.islice(names, first, None):
            if not name.startswith(below):
                break
            found[name[len(target) :]] = self.files[name]
            if len(found) > most:
                raise DataError(
                    f"the links in the archive lead to more than {MAX_LINKED} files",
                    where=self.archive,
                    why=f"one of them leads to {target!r}",
                    remedy="replace the links by what they lead to",
                )
        return found


def _normal(name: str) -> str:
    """A member's name without ``./``."""
    return posixpath.normpath(name)


def _unreadable(archive: Path, exc: Exception) -> DataError:
    """The error for an archive that is damaged or compressed."""
    remedy = "check that it is complete"
    try:
        with open_regular(archive) as file:
            first = file.read(8)
    except OSError:
        first = b""
    command = next(
        (command for magic, command in COMPRESSED.items() if first.startswith(magic)),
        None,
    )
    if command is not None:
        target = archive.with_name(f"{archive.stem}_unpacked.tar")
        remedy = f"it is compressed: {command} {shlex.quote(str(archive))} > {shlex.quote(str(target))}"
    return DataError(
        "cannot be read as a tar archive",
        where=archive,
        why=exc,
        remedy=remedy,
    )


def _check_end(archive: Path, end: int) -> None:
    """Raise :class:`tarfile.ReadError` unless the archive really ends at byte ``end``: ``tarfile`` mistakes a
    damaged header for the end."""
    with open(archive, "rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"damaged at byte {end}, or cut off")


def _check_any(items: list[Item], images: ImageSet) -> None:
    """Raise :class:`DataError` if there are no images."""
    if not items:
        raise DataError(
            "holds no images",
            where=images.path,
            why=images.note.removeprefix(f"{images.path}: ") or None,
            remedy=f"supported: {' '.join(EXTENSIONS)}",
        )


def _check_labels(items: list[Item], path: Path) -> None:
    """Check that the class folders mean one thing: each class is at one place, and no loose images lie beside
    them."""
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
    for label, found in places.items():
        if len(found) == 1:
            continue
        double = sorted(found)
        raise DataError(
            f"the same class is at several places: {', '.join(double)}",
            where=path,
            remedy=_gather(label, double) if _are_parts(found, items) else _choice(path, double),
        )


def _are_parts(folders: set[str], items: Sequence[Item]) -> bool:
    """Whether the folders are parts of a data set, and not classes that are called like one."""
    parts = find_parts(item.name for item in items)
    return folders <= {folder for kind in parts.values() for folder in kind}


def _gather(part: str, places: Sequence[str]) -> str:
    """What to do where the parts of a data set lie inside the class folders, as in ``cat/test, dog/test``."""
    classes = [PurePosixPath(place).parent.name for place in places[:2]]
    links = ", ".join(f"{place} as {part}/{name}" for place, name in zip(places, classes, strict=False))
    return f"the parts lie inside the classes: copy or link {links} and so on, and give the folder {part}"


def _choice(path: Path, double: Sequence[str]) -> str:
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
    parts = {folder: part_of(PurePosixPath(folder).name) for folder in folders}
    ordered = sorted(folders, key=lambda folder: list(uses).index(parts[folder]))
    shown = [f"{path / folder}{uses[parts[folder]]}" for folder in ordered[:SHOWN_KINDS]]
    return f"choose one: {', '.join(shown)}"
