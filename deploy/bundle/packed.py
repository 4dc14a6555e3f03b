"""A bundle as one file: a zip archive whose members are stored, not compressed, each at a multiple of 64
bytes.

What is opened may come from a stranger, so the archive's directory is checked as a whole before anything of
it is written: no compression, hence no bombs; plain names only; no links; no member named twice; no two
members that share bytes. Then the members are unpacked into the cache, and the folder is checked as every
bundle is.

Source: APPNOTE.TXT 6.3.10, sections 4.3 and 4.4.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import struct
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from cmt_edge.startup import name_program

from ..cache import tell_unusable
from ..errors import BundleError, OutputError
from ..files import (
    CHUNK_BYTES,
    OUTPUT_FLAG,
    describe_irregular,
    find_cache_folder,
    find_shared_folder,
    hash_file,
    open_regular,
    put_folder,
    writing,
)
from ..locks import (
    TEMPORARY,
    Hold,
    clear_abandoned,
    hold_folder,
    locked,
    make_scratch,
    remove_if_abandoned,
    scratch_folder,
    try_lock,
)
from .belongings import describe_foreign, parse_listed, walk
from .manifest import MANIFEST, MAX_FILES, MAX_MANIFEST, is_plain
from .sections import MAX_TOTAL
from .signature import MAX_SIGNATURE, SIGNATURE

SUFFIX = ".cmt.zip"
"""End of the names of packed bundles."""
ALIGNMENT = 64
"""Each member begins at a multiple of this number of bytes, so that a reader can map it into memory."""
DATED = (1980, 1, 1, 0, 0, 0)
"""Date of every member, so that the same bundle always gives the same file."""
PADDING = 0xD935
"""Number of the extra field that holds padding, the one that Android's zipalign uses."""
MAX_DIRECTORY = 1 << 20
"""The largest size in bytes of an archive's directory."""
FOLDER = "unpacked"
"""Name of the folder in the cache."""
PRIVATE = 0o700
"""Permissions of the folders in the cache: only their owner may enter them."""
KEEP = 8
"""The number of unpacked bundles that stay in the cache, those that were opened last; more stay as long as
they are used."""
SCRATCH = "cmt-edge-"
"""Start of the names of folders among the temporary files."""

HASH = re.compile("[0-9a-f]{64}")
"""Matches the name of a folder of ours among the unpacked bundles: the SHA-256 of the file."""
END = struct.Struct("<4s4H2LH")
"""The record at the end of a zip archive: signature, disks, entries, size and place of the directory."""
LOCAL = struct.Struct("<4s5H3L2H")
"""The record before each member."""
LOCAL_SIGNATURE = b"PK\x03\x04"
"""The first bytes of that record."""
ENCRYPTED = 1
"""Bit in the flags of a member that needs a password."""


def locate_packed(folder: Path) -> Path:
    """Where the packed form of a bundle lies: beside its folder."""
    return folder.with_name(folder.name + SUFFIX)


def require_replaceable(file: Path) -> None:
    """Raise :class:`OutputError` where something else than a packed bundle of ours stands in the way, or one
    to which others have added files. A damaged one may be replaced."""
    if not os.path.lexists(file):
        return
    with writing(file, OUTPUT_FLAG):
        listed = None if file.is_symlink() else _read_listed(file)
        foreign = [] if listed is None else _find_foreign(file, listed)
    if listed is None:
        raise OutputError(
            "exists and is not a packed bundle, so it is not replaced",
            where=file,
            remedy="move it elsewhere, or choose another -o DIR, or --name",
        )
    if foreign:
        raise OutputError(
            f"holds what is not the bundle's, so it is not replaced: {describe_foreign(foreign)}",
            where=file,
            remedy="move it elsewhere, or choose another -o DIR, or --name",
        )


def _read_listed(file: Path) -> set[str] | None:
    """The names that the manifest at the begin of a packed bundle lists; ``None`` where no manifest of ours
    stands there. The rest of the file may be damaged or missing."""
    if describe_irregular(file) is not None:
        return None
    with open_regular(file) as content:
        header = content.read(LOCAL.size)
        if len(header) != LOCAL.size:
            return None
        signature, *_, size, name_length, extra_length = LOCAL.unpack(header)
        name = content.read(name_length)
        content.seek(extra_length, os.SEEK_CUR)
        is_packed = signature == LOCAL_SIGNATURE and name == MANIFEST.encode() and size <= MAX_MANIFEST
        return parse_listed(content.read(size)) if is_packed else None


def _find_foreign(file: Path, listed: set[str]) -> list[str]:
    """Members of a packed bundle that its manifest does not list; none where the archive's directory is
    damaged."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = set(archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return []
    is_whole = MANIFEST in names  # of one that was cut off, the directory of a member is found
    return sorted(names - listed - {MANIFEST, SIGNATURE}) if is_whole else []


def pack(folder: Path, members: Iterable[str], file: Path) -> None:
    """Write the bundle in ``folder`` as one file, completely or not at all.

    Args:
        folder: of the bundle.
        members: names of the manifest's files.
        file: is replaced where it is a packed bundle.

    Raises:
        OutputError: the file cannot be written, or something else than a packed bundle stands there.
    """
    require_replaceable(file)
    names = [MANIFEST]
    names += [SIGNATURE] if (folder / SIGNATURE).is_file() else []
    names += sorted(members)
    with writing(file, OUTPUT_FLAG):
        clear_abandoned(file.parent, f".{file.name}.", TEMPORARY)
        handle, temporary = tempfile.mkstemp(
            prefix=f".{file.name}.",
            suffix=TEMPORARY,
            dir=file.parent,
        )
        try:
            with os.fdopen(handle, "wb") as target:
                try_lock(handle)  # so that nobody takes it for abandoned
                with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
                    for name in names:
                        _add(archive, target, folder / name, name)
                target.flush()
                os.fsync(target.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, file)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _add(
    archive: zipfile.ZipFile,
    target: BinaryIO,
    source: Path,
    name: str,
) -> None:
    """Append one member at the next multiple of :data:`ALIGNMENT`."""
    entry = zipfile.ZipInfo(name, DATED)
    entry.external_attr = (stat.S_IFREG | 0o644) << 16
    entry.file_size = source.stat().st_size
    begin = target.tell() + LOCAL.size + len(name.encode())
    entry.extra = _make_padding(-begin % ALIGNMENT)
    with archive.open(entry, "w") as member, open(source, "rb") as content:
        shutil.copyfileobj(content, member, CHUNK_BYTES)


def _make_padding(length: int) -> bytes:
    """An extra field of ``length`` bytes; one more round where its own four bytes do not fit."""
    if 0 < length < 4:
        length += ALIGNMENT
    if not length:
        return b""
    return struct.pack("<2H", PADDING, length - 4) + bytes(length - 4)


def unpack(file: Path) -> tuple[Path, Hold]:
    """The folder of a packed bundle, and what keeps it: nobody removes the folder while this object lives.

    It lies in the cache, or, where nothing can be kept there or another user may write there, in the folder
    for temporary files. A folder that the cache already has is used only where it holds exactly the files of
    the archive, byte for byte.

    Raises:
        BundleError: the file is no packed bundle, or a hostile one.
        OutputError: there is no room for it.
    """
    members = _read_members(file)
    try:
        return _unpack_to_cache(file, members)
    except OSError as in_cache:
        try:
            return _unpack_to_scratch(file, members)
        except OSError as exc:
            raise OutputError(
                "there is no room to unpack it",
                where=file,
                why=f"cache: {in_cache.strerror or in_cache}; temporary files: {exc.strerror or exc}",
                remedy="free some space, or set CMT_EDGE_CACHE or TMPDIR to a folder that can be written",
            ) from exc


def make_title(file: Path) -> str:
    """Name of the bundle in a file: the file's name without what shows that it is packed."""
    name = file.name.lower()
    suffix = next((suffix for suffix in (SUFFIX, ".zip") if name.endswith(suffix)), "")
    title = file.name[: len(file.name) - len(suffix)]
    return title if title.strip(".") else "bundle"  # ".." is another folder


def _unpack_to_cache(
    file: Path,
    members: list[Member],
) -> tuple[Path, Hold]:
    """The folder in the cache that holds the members of ``file``; raises ``OSError``."""
    parent = find_cache_folder() / FOLDER / hash_file(file)
    folder = parent / make_title(file)
    parent.parent.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
    parent.mkdir(mode=PRIVATE, exist_ok=True)
    hold = hold_folder(parent)
    _require_private(parent)
    with locked(parent):
        clear_abandoned(parent, ".", TEMPORARY)  # also where nothing needs to be unpacked
        if not _is_copy(folder, members, file):
            with scratch_folder(parent, ".") as temporary:
                put_folder(_extract(file, members, temporary / "bundle"), folder)
        os.utime(parent)
    _evict(parent)
    return folder, hold


def _unpack_to_scratch(file: Path, members: list[Member]) -> tuple[Path, Hold]:
    """A folder among the temporary files, which goes with its holder; raises ``OSError``."""
    place, hold = make_scratch(Path(tempfile.gettempdir()), SCRATCH)
    return _extract(file, members, place / make_title(file)), hold


def _require_private(folder: Path) -> None:
    """Raise ``OSError`` where another user could exchange what lies in a folder of the cache, and where the
    folder is a link to another one."""
    if folder.is_symlink():
        raise OSError(errno.ELOOP, f"{folder} is a link")
    shared = find_shared_folder(folder)
    if shared is not None:
        why = f"another user may write to {shared}"
        tell_unusable(folder.parent, why)
        raise OSError(errno.EPERM, why)


def _is_copy(folder: Path, members: list[Member], file: Path) -> bool:
    """Whether a folder in the cache holds exactly the members of an archive: the same names, none of them a
    link, and the same bytes."""
    try:
        names = {member.name for member in members}
        if folder.is_symlink() or set(walk(folder)) != names:
            return False
        with open(file, "rb") as archive:
            return all(_is_same(archive, member, folder / member.name) for member in members)
    except OSError:
        return False


def _is_same(archive: BinaryIO, member: Member, copy: Path) -> bool:
    if copy.is_symlink() or copy.stat().st_size != member.size:
        return False
    archive.seek(member.begin)
    left = member.size
    with open_regular(copy) as file:
        while left:
            chunk = archive.read(min(left, CHUNK_BYTES))
            if not chunk or chunk != file.read(len(chunk)):
                return False
            left -= len(chunk)
    return True


def _evict(used: Path) -> None:
    """Remove all but the :data:`KEEP` bundles in the cache that were opened last, and those that somebody
    holds."""
    with contextlib.suppress(OSError):
        folders = [path for path in used.parent.iterdir() if HASH.fullmatch(path.name)]
        others = [path for path in folders if path != used and path.is_dir() and not path.is_symlink()]
        others.sort(key=_find_last_use, reverse=True)
        for folder in others[KEEP - 1 :]:
            with contextlib.suppress(OSError):
                remove_if_abandoned(folder)


def _find_last_use(folder: Path) -> float:
    """When a bundle was opened last, in seconds; another process may just have removed it."""
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


def _extract(file: Path, members: list[Member], folder: Path) -> Path:
    """Write the members below a new folder."""
    folder.mkdir(parents=True)
    with open(file, "rb") as archive:
        for member in members:
            target = folder / member.name
            target.parent.mkdir(parents=True, exist_ok=True)
            archive.seek(member.begin)
            with open(target, "xb") as output:
                _copy(archive, output, member.size, file)
    return folder


def _copy(
    archive: BinaryIO,
    output: BinaryIO,
    size: int,
    file: Path,
) -> None:
    while size:
        try:
            chunk = archive.read(min(size, CHUNK_BYTES))
        except OSError as exc:
            raise _make_broken_error("cannot be read", file, exc.strerror or exc) from exc
        if not chunk:
            raise _make_broken_error("was cut off while it was read", file)
        output.write(chunk)
        size -= len(chunk)


# --- the archive's directory ----------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """A file in the archive: ``size`` bytes from ``begin`` on."""

    name: str
    begin: int
    size: int


def _read_members(file: Path) -> list[Member]:
    """Every member, in the order of the archive, once all rules hold.

    Raises:
        BundleError: a rule does not hold, or the file cannot be read.
    """
    try:
        if not file.is_file():
            raise _make_broken_error("is no regular file", file)
        size = file.stat().st_size
        if size > MAX_TOTAL:
            raise _make_broken_error(f"has {size} bytes, the cap is {MAX_TOTAL}", file)
        with open(file, "rb") as content:
            directory = _check_end(content, size, file)
            with zipfile.ZipFile(content) as archive:
                entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
            _check_names(entries, file)
            return _check_places(content, entries, directory, file)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as exc:
        raise _make_broken_error("is no packed bundle", file, exc) from exc


def _check_end(content: BinaryIO, size: int, file: Path) -> int:
    """The place of the archive's directory, whose size and number of entries are within the caps.

    The record must be the file's last bytes: ``zipfile`` would search for another one, and read a directory
    of any size.
    """
    if size < END.size:
        raise _make_broken_error("is no packed bundle", file, "it is too short")
    content.seek(size - END.size)
    signature, *disks, entries, length, place, comment = END.unpack(content.read(END.size))
    if signature != b"PK\x05\x06" or comment:
        raise _make_broken_error("is no packed bundle", file, "it does not end as one does")
    is_split = disks[:2] != [0, 0] or disks[2] != entries
    if is_split or entries > MAX_FILES + 2 or length > MAX_DIRECTORY:
        raise _make_broken_error("has too large a directory", file, f"{entries} entries, {length} bytes")
    if place + length != size - END.size:
        raise _make_broken_error("has bytes that belong to no member", file)
    return int(place)


def _check_names(entries: list[zipfile.ZipInfo], file: Path) -> None:
    """Plain names, each once, stored as they are."""
    names = [entry.orig_filename for entry in entries]
    if len({name.lower() for name in names}) != len(names):
        raise _make_broken_error("names a member twice", file)
    folders = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    if not folders.isdisjoint(names):
        raise _make_broken_error("names a file like a folder", file)
    if MANIFEST not in names:
        raise _make_broken_error("is no packed bundle", file, f"it has no {MANIFEST}")
    caps = {MANIFEST: MAX_MANIFEST, SIGNATURE: MAX_SIGNATURE}
    for entry in entries:
        name = entry.orig_filename
        if not is_plain(name):
            raise _make_broken_error(f"names a file outside the bundle: {name!r}", file)
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if entry.is_dir() or kind not in (0, stat.S_IFREG):
            raise _make_broken_error(f"holds {name!r}, which is no regular file", file)
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & ENCRYPTED:
            raise _make_broken_error(
                f"compresses or locks {name!r}, which packed bundles do not",
                file,
            )
        size = entry.file_size
        if size != entry.compress_size or size > caps.get(name, MAX_TOTAL):
            raise _make_broken_error(f"gives {name!r} a wrong size", file, f"{entry.file_size} bytes")


def _check_places(
    content: BinaryIO,
    entries: list[zipfile.ZipInfo],
    directory: int,
    file: Path,
) -> list[Member]:
    """Where each member lies; none begins before the one before it ends, and the last ends before the
    directory."""
    members: list[Member] = []
    free = 0
    for entry in entries:
        name = entry.orig_filename
        content.seek(entry.header_offset)
        header = content.read(LOCAL.size)
        if entry.header_offset < free or len(header) != LOCAL.size:
            raise _make_broken_error(f"lets {name!r} share bytes with another member", file)
        signature, *_, name_length, extra_length = LOCAL.unpack(header)
        local_name = content.read(name_length)
        begin = entry.header_offset + LOCAL.size + name_length + extra_length
        if signature != LOCAL_SIGNATURE or local_name != name.encode():
            raise _make_broken_error(f"calls {name!r} by two names", file)
        free = begin + entry.file_size
        if free > directory:
            raise _make_broken_error(f"lets {name!r} end after the archive's last member", file)
        members.append(Member(name, begin, entry.file_size))
    return members


def _make_broken_error(what: str, file: Path, why: object = None) -> BundleError:
    remedy = f"copy the file again, or pack the bundle again: {name_program('export')} --pack"
    if (file.parent / MANIFEST).is_file():
        remedy = f"give the folder that it lies in, {file.parent}"
    return BundleError(what, where=file, why=why, remedy=remedy)
