"""The one cache: results that can be made again, kept as files under a key.

An entry is written by one process at a time and appears complete or not at all; the entries that were used
last stay. A cache is never a reason to fail: what cannot be read is made again, and what cannot be kept is
returned all the same, with a :class:`CacheWarning`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

from .errors import CacheWarning, OutputError
from .files import find_cache_folder, read_regular, write_atomic, writing
from .locks import LOCK, TEMPORARY, clear_abandoned, locked

T = TypeVar("T")
"""The type of a result."""
Files = tuple[bytes, ...]
"""The contents of an entry's files, in the order of :attr:`Cache.suffixes`."""


MAX_ENTRY = 4 << 30
"""A larger file of the cache, in bytes, is not read; graphs are limited to half of it."""

KEY = re.compile(r"[0-9a-f]{16,64}")
"""Matches the key of an entry that may be dropped: a digest. A user may have named a folder with files of
other names."""
SWITCH = "CMT_EDGE_NO_CACHE"
"""Environment variable that does for every command what ``--no-cache`` does for one."""

_reported: set[Path] = set()
"""Places of which a :class:`CacheWarning` has told already."""


def is_cache_wanted(asked: bool = True) -> bool:
    """Whether results may be read from the cache and kept there: not if the caller says no, nor if the
    environment variable :data:`SWITCH` is set to anything but ``0``."""
    return asked and os.environ.get(SWITCH, "") in ("", "0")


def can_keep(folder: Path) -> bool:
    """Whether files can be kept in ``folder``, which is made; warns with :class:`CacheWarning` where not.

    To be asked before long work whose result would be kept.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as exc:
        tell_unusable(folder, exc)
        return False
    return True


def compute_digest(key: Any) -> str:
    """Hex SHA-256 of anything that JSON holds: the name of an entry."""
    text = json.dumps(key, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Cache:
    """A folder of entries.

    Attributes:
        folder: is made when the first entry is written.
        suffixes: an entry is one file for each, ``KEY`` and the suffix; they are written in this order, and
            an entry exists once the last is there.
        keep: the number of entries that stay, those that were used last.
        most_bytes: the total size of the entries that stay, in bytes; ``None`` for no limit. The entry that
            was used last stays however large it is.
    """

    folder: Path
    suffixes: tuple[str, ...]
    keep: int
    most_bytes: int | None = None

    def get(
        self,
        key: str,
        *,
        decode: Callable[[Files], T | None],
        make: Callable[[], T],
        encode: Callable[[T], Files],
        mode: int = 0o666,
        make_unkept: Callable[[], T] | None = None,
        waits: bool = True,
    ) -> T:
        """What is kept under ``key``, or is made now and kept.

        Others that ask for the same key meanwhile wait for this result, unless they say otherwise. What is
        kept is read without waiting.

        Args:
            key: the name of the entry.
            decode: makes the result of the files; an exception or ``None`` means that they are of no use.
            make: makes the result anew; what it raises is raised here.
            encode: makes the files of the result.
            mode: permissions of the files.
            make_unkept: makes the result where the folder cannot be written to; default: ``make``.
            waits: for another process that makes the same result, rather than to make it, too.
        """
        kept = self._decode(key, decode)
        if kept is not None:
            return kept
        if not waits:
            return self._make(key, make, encode, mode)
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self._locate_file(key, self.suffixes[-1])))
            except OSError as exc:  # what others have kept there can be used all the same
                kept = self._decode(key, decode)
                if kept is not None:
                    return kept
                tell_unusable(self.folder, exc)
                return (make_unkept or make)()
            found = self._decode(key, decode)
            if found is not None:
                return found
            return self._make(key, make, encode, mode)

    def _make(
        self,
        key: str,
        make: Callable[[], T],
        encode: Callable[[T], Files],
        mode: int,
    ) -> T:
        """What ``make`` gives, kept if that is possible."""
        result = make()
        try:
            self.write(key, encode(result), mode)
        except OutputError as exc:
            tell_unusable(self.folder, exc.why or exc)
        return result

    def _decode(
        self,
        key: str,
        decode: Callable[[Files], T | None],
    ) -> T | None:
        contents = self.read(key)
        if contents is None:
            return None
        with contextlib.suppress(Exception):  # whatever is wrong with an entry, it is made again
            return decode(contents)
        return None

    def read(self, key: str) -> Files | None:
        """The files of an entry, ``None`` where one is missing; marks the entry as used."""
        files = self._list_files(key)
        try:
            contents = tuple(read_regular(file, MAX_ENTRY) for file in files)
        except (OSError, MemoryError):
            return None
        with contextlib.suppress(OSError):
            for file in files:
                os.utime(file)
        return contents

    def write(self, key: str, contents: Sequence[bytes], mode: int = 0o666) -> None:
        """Keep an entry, and drop those beyond :attr:`keep` and :attr:`most_bytes`; raises
        :class:`OutputError`."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        for file, content in zip(self._list_files(key), contents, strict=True):
            write_atomic(file, content, mode)
        self._evict()

    def _evict(self) -> None:
        """Drop the entries that were not used for longest, their last file first, and what killed processes
        left.

        Whoever reads or writes such an entry at the same time finds it missing and makes it again.
        """
        last = self.suffixes[-1]
        entries = sorted(
            self.folder.glob(f"*{last}"),
            key=_find_last_use,
            reverse=True,
        )
        ours = [entry for entry in entries if KEY.fullmatch(entry.name.removesuffix(last))]
        for entry in ours[self._count_kept(ours) :]:
            for file in reversed(self._list_files(entry.name.removesuffix(last))):
                with contextlib.suppress(OSError):
                    file.unlink()
        clear_abandoned(self.folder, ".", TEMPORARY)
        clear_abandoned(self.folder, "", LOCK)

    def _count_kept(self, entries: Sequence[Path]) -> int:
        """How many of the entries stay, of which the first was used last."""
        if self.most_bytes is None:
            return self.keep
        sizes = accumulate(map(_measure_size, entries))
        return max(1, min(self.keep, sum(size <= self.most_bytes for size in sizes)))

    def _list_files(self, key: str) -> list[Path]:
        return [self._locate_file(key, suffix) for suffix in self.suffixes]

    def _locate_file(self, key: str, suffix: str) -> Path:
        return self.folder / f"{key}{suffix}"


class JsonCache:
    """Results that JSON can hold, under keys that JSON holds; what was asked for once stays in memory.

    Without a folder the results last as long as this object.
    """

    def __init__(self, folder: Path | None, keep: int) -> None:
        self._files = Cache(folder, (".json",), keep) if folder else None
        self._known: dict[str, Any] = {}

    def get(
        self,
        key: Any,
        *,
        make: Callable[[], T],
        read: Callable[[Any], T],
        plain: Callable[[T], Any],
    ) -> T:
        """What is kept under ``key``, or is made now and kept.

        Args:
            key: anything that JSON holds.
            make: makes the result anew; what it raises is raised here.
            read: makes the result of what JSON holds; an exception means that it is of no use.
            plain: makes what JSON can hold of the result.
        """
        name = compute_digest(key)
        if name not in self._known:
            self._known[name] = (
                make()
                if self._files is None
                else self._files.get(
                    name,
                    decode=lambda files: read(json.loads(files[0])),
                    make=make,
                    encode=lambda result: (json.dumps(plain(result)).encode(),),
                )
            )
        result: T = self._known[name]
        return result


def _find_last_use(file: Path) -> float:
    """When an entry was used last, seconds; another process may just have dropped it."""
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def _measure_size(file: Path) -> int:
    """Size in bytes; another process may just have dropped the file."""
    try:
        return file.stat().st_size
    except OSError:
        return 0


def tell_unusable(folder: Path, why: object) -> None:
    """Say once that a folder cannot be used; once for all folders of the user's cache."""
    root = find_cache_folder()
    warn_once(
        root if root in folder.parents else folder,
        f"the cache {folder} cannot be used ({why}): results are not kept for the next run;"
        " CMT_EDGE_CACHE=FOLDER names another place",
    )


def warn_once(place: Path, message: str) -> None:
    """Warn with :class:`CacheWarning`, unless ``place``, or a folder that it lies in, was told of already."""
    if not _reported.isdisjoint((place, *place.parents)):
        return
    _reported.add(place)
    warnings.warn(message, CacheWarning, stacklevel=4)
