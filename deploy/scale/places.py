"""Where images lie: a path that every node sees, or a URL such as ``s3://bucket/photos``.

pyarrow opens what it knows (``s3``, ``gs``, ``hdfs`` and others); fsspec opens the rest.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..errors import DataError
from ..folders import is_junk

READ_AHEAD = 1 << 18
"""Bytes that are read at once from a file elsewhere: headers of archives are small, and each request takes a
while."""


@dataclass(frozen=True)
class Entry:
    """A file.

    Attributes:
        path: in its file system.
        name: below the folder that was listed.
        size: bytes.
        state: changes when the file does.
    """

    path: str
    name: str
    size: int
    state: str


@dataclass(frozen=True)
class Place:
    """A file or folder, which its file system ``files`` knows as ``path``."""

    url: str
    files: Any
    path: str

    def list(self) -> list[Entry]:
        """Every file here, sorted by name; raises :class:`DataError` where there is nothing."""
        from pyarrow import fs

        with _explaining(self.url):
            whole = self.files.get_file_info(self.path)
            if whole.type == fs.FileType.File:
                return [_make_entry(whole, whole.base_name)]
            selector = fs.FileSelector(self.path, recursive=True, allow_not_found=False)
            found = self.files.get_file_info(selector)
        start = self.path.rstrip("/") + "/"
        entries = [
            _make_entry(info, info.path.removeprefix(start))
            for info in found
            if info.type == fs.FileType.File
        ]
        kept = [entry for entry in entries if not any(map(is_junk, entry.name.split("/")))]
        return sorted(kept, key=lambda entry: entry.name)

    @contextmanager
    def open(self, path: str) -> Iterator[BinaryIO]:
        """A file to read and seek in; raises :class:`DataError`."""
        with _explaining(path), self.files.open_input_file(path) as file:
            yield cast(BinaryIO, io.BufferedReader(file, READ_AHEAD))

    def has_state(self, path: str, state: str) -> bool:
        """Whether a file is still in the ``state`` of its :class:`Entry`. Of a file of this machine only the
        size counts: another node may have a copy, with a time of its own."""
        with _explaining(path):
            info = self.files.get_file_info(path)
        found = _describe_state(info)
        return (
            found.split(maxsplit=1)[0] == state.split(maxsplit=1)[0]
            if not is_url(self.url)
            else found == state
        )

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        """``size`` bytes of a file, all of them by default; raises :class:`DataError`."""
        with _explaining(path), self.files.open_input_file(path) as file:
            if size is None:
                return bytes(file.read())
            return bytes(file.read_at(size, offset))


def is_url(text: str) -> bool:
    """Whether ``text`` is a URL of another place than this machine's files."""
    return "://" in text and not text.startswith("file://")


def hide_credentials(text: str) -> str:
    """A URL without the name and the password in it, for messages and files."""
    scheme, slashes, rest = text.partition("://")
    place, at, more = rest.partition("/")
    return f"{scheme}{slashes}{place.rpartition('@')[2]}{at}{more}" if slashes else text


@lru_cache(maxsize=8)
def open_place(text: str) -> Place:
    """The place of a URL or a path.

    Raises:
        DataError: nothing here opens such URLs.
    """
    from pyarrow import ArrowException, fs

    if not is_url(text):
        return Place(text, fs.LocalFileSystem(), str(Path(text.removeprefix("file://")).absolute()))
    try:
        files, path = fs.FileSystem.from_uri(text)
    except (ArrowException, ValueError, OSError):
        return _open_by_fsspec(text)
    return Place(hide_credentials(text), files, path)


def _open_by_fsspec(url: str) -> Place:
    """A URL that pyarrow does not know."""
    try:
        import fsspec
        from pyarrow import fs

        files, path = fsspec.core.url_to_fs(url)
        return Place(hide_credentials(url), fs.PyFileSystem(fs.FSSpecHandler(files)), path)
    except (ImportError, ValueError, OSError) as exc:
        raise DataError(
            "cannot be opened",
            where=hide_credentials(url),
            why=exc,
            remedy="check the address; some of them need a package for fsspec, s3fs or gcsfs for instance",
        ) from exc


def _make_entry(info: Any, name: str) -> Entry:
    return Entry(info.path, name, info.size or 0, _describe_state(info))


def _describe_state(info: Any) -> str:
    return f"{info.size} {info.mtime_ns}"


@contextmanager
def _explaining(where: str) -> Iterator[None]:
    """Errors of a file system as a :class:`DataError`."""
    try:
        yield
    except FileNotFoundError as exc:
        raise DataError(
            "does not exist, or not on the machine that reads it",
            where=where,
            why=exc,
            remedy="put the images where every node finds them: s3:// for instance, or a shared file system",
        ) from exc
    except OSError as exc:
        raise DataError(
            "cannot be read", where=where, why=exc, remedy="check the address and the rights"
        ) from exc
