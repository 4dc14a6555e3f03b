"""Images in a ``.tar`` archive: where the bytes of each lie.

A part of an archive is named like a folder inside it: ``photos.tar/train``.
"""

from __future__ import annotations

import os
import re
import shlex
import tarfile
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, cast

from .decoding import MAX_BYTES
from .errors import DataError
from .faults import is_about_data
from .files import open_regular
from .folders import Found, Item, find_class, find_kind, is_image, is_junk, must_unpack
from .members import Members

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

COMPRESSED = {
    b"\x1f\x8b": "gzip -dc",
    b"BZh": "bzip2 -dc",
    b"\xfd7zXZ": "xz -dc",
    b"\x28\xb5\x2f\xfd": "zstd -dc",
}
"""First bytes of a compressed file -> the command that writes its content to standard output."""


def split_archive(path: Path) -> tuple[Path | None, str]:
    """``(archive, folder inside it)`` if some part of ``path`` is a tar file, else ``(None, "")``."""
    for part in (path, *path.parents):
        lower = part.name.lower()
        if not lower.endswith((".tar", *UNPACK)) or not os.path.isfile(part):
            continue
        inner = path.relative_to(part).as_posix()
        inner = "" if inner == "." else inner + "/"
        if not lower.endswith(".tar"):
            raise _make_packed_error(part, inner)
        return part, inner
    return None, ""


def _make_packed_error(archive: Path, inner: str) -> DataError:
    """The error for a compressed archive, with the command that unpacks it."""
    ending = max((e for e in UNPACK if archive.name.lower().endswith(e)), key=len)
    command, left = UNPACK[ending]
    target = archive.with_name(archive.name[: -len(ending)] + left)
    source = shlex.quote(str(archive))
    place = shlex.quote(str(target))
    into = {
        ".zip": f" -d {place}",
        ".7z": f" -o{place}",
        ".rar": f" {place}/",
    }.get(ending, "")
    return must_unpack(archive, f"{command} {source}{into}", target / inner)


def scan_archive(archive: Path, prefix: str) -> Found:
    """All images of an archive below the folder ``prefix``."""
    members = Members(archive)
    try:
        with open_regular(archive) as file:
            read_members(file, os.fstat(file.fileno()).st_size, members)
    except UNREADABLE as exc:
        if isinstance(exc, OSError) and not is_about_data(exc):
            raise
        raise _make_unreadable_error(archive, exc) from exc
    return collect_members(members, archive, prefix)


def collect_members(members: Members, archive: Path, prefix: str) -> Found:
    """The images among ``members`` below the folder ``prefix``, and what is skipped."""
    found = Found()
    for name, place in members.walk(prefix):
        _add_member(found, archive, PurePosixPath(name), place)
    found.skipped += members.skipped
    found.skipped += Counter()  # drops what was counted 0 times
    return found


def read_members(file: BinaryIO, length: int, members: Members) -> None:
    """Note every member of an archive.

    Args:
        file: of ``length`` bytes, which can seek.
        members: where they are noted.

    Raises:
        One of :data:`UNREADABLE`: the archive is damaged or cut off.
    """
    end = _read_headers(_Headers(file, length), members)
    _check_end(file, end)


def _read_headers(headers: _Headers, members: Members) -> int:
    """Note every member of an archive; returns the byte at which the archive says that it ends."""
    position = -1
    with tarfile.open(fileobj=cast(IO[bytes], headers), mode="r:") as tar:
        is_empty = vars(tar)["firstmember"] is None  # Python 3.10's next() fails there
        while not is_empty and (member := tar.next()) is not None:
            if tar.offset <= position:  # it would be read for ever
                raise tarfile.ReadError(f"the member at byte {member.offset} has a negative size")
            position = tar.offset
            members.add(member)
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep millions
            headers.allowed = MAX_HEADER
        return int(tar.offset)


class _Headers:
    """What ``tarfile`` reads an archive through: it reads headers only, and believes each size in them."""

    def __init__(self, file: BinaryIO, length: int) -> None:
        self._file = file
        self._length = length
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
    found: Found,
    archive: Path,
    name: PurePosixPath,
    place: tuple[int, int] | None,
) -> None:
    """Count one file of an archive: as an image, or as what is skipped."""
    if any(map(is_junk, name.parts)):
        return
    if not is_image(name.name):
        found.skipped[find_kind(name.name)] += 1
    elif place is None:
        found.skipped["sparse files"] += 1
    elif place[1] > MAX_BYTES:
        found.skipped[f"larger than {MAX_BYTES >> 20} MiB"] += 1
    else:
        found.add(
            Item(name.as_posix(), find_class(name), *place),
            archive,
            identity=place[0],
        )


def _make_unreadable_error(archive: Path, exc: Exception) -> DataError:
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


def _check_end(file: BinaryIO, end: int) -> None:
    """Raise :class:`tarfile.ReadError` unless the archive really ends at byte ``end``: ``tarfile`` mistakes a
    damaged header for the end."""
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"damaged at byte {end}, or cut off")
