"""Where images lie: a path of this machine, or a URL such as ``s3://bucket/photos``.

Paths need no package. pyarrow opens the URLs that it knows (``s3``, ``gs``, ``hdfs`` and others), and fsspec
opens the rest.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast
from urllib.parse import unquote

from ..errors import DataError, RuntimeMissingError
from ..folders import describe_state, is_junk

READ_AHEAD = 1 << 18
"""Bytes that are read at once from a file elsewhere: headers of archives are small, and each request takes a
while."""

LOCAL_SCHEME = "file://"
"""What stands before a path of this machine that is written as a URL."""


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


class Place(Protocol):
    """A file or a folder."""

    @property
    def url(self) -> str:
        """For messages: without a password."""
        ...

    @property
    def path(self) -> str:
        """In its file system."""
        ...

    def list(self) -> list[Entry]:
        """Every file here, sorted by name; raises :class:`DataError` where there is nothing."""
        ...

    def open(self, path: str) -> AbstractContextManager[BinaryIO]:
        """A file to read and seek in; raises :class:`DataError`."""
        ...

    def has_state(self, path: str, state: str) -> bool:
        """Whether a file is still in the ``state`` of its :class:`Entry`; raises :class:`DataError`."""
        ...

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        """``size`` bytes of a file, all of them by default; raises :class:`DataError`."""
        ...


@dataclass(frozen=True)
class LocalPlace:
    """A :class:`Place` of this machine."""

    url: str
    path: str

    def list(self) -> list[Entry]:
        with _explaining(self.url):
            if os.path.isfile(self.path):
                return [_describe_file(self.path, os.path.basename(self.path))]
            os.stat(self.path)
            entries = [
                _describe_file(path, name)
                for path, name in _walk(self.path)
                if os.path.isfile(path) and not any(map(is_junk, name.split("/")))
            ]
        return sorted(entries, key=lambda entry: entry.name)

    @contextmanager
    def open(self, path: str) -> Iterator[BinaryIO]:
        with _explaining(path), open(path, "rb") as file:
            yield file

    def has_state(self, path: str, state: str) -> bool:
        """Only the size counts: another node may have a copy, with a time of its own."""
        with _explaining(path):
            return os.path.getsize(path) == int(state.split(maxsplit=1)[0])

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        with _explaining(path), open(path, "rb") as file:
            file.seek(offset)
            return file.read(-1 if size is None else size)


def _walk(root: str) -> Iterator[tuple[str, str]]:
    """Path of each file below a folder, and its name there. Links are followed, but not in a circle."""

    def fail(exc: OSError) -> None:
        raise exc

    seen: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        start = Path(folder).relative_to(root)
        for name in files:
            yield os.path.join(folder, name), (start / name).as_posix()


def _describe_file(path: str, name: str) -> Entry:
    status = os.stat(path)
    return Entry(path, name, status.st_size, describe_state(status.st_size, status.st_mtime_ns))


@dataclass(frozen=True)
class RemotePlace:
    """A :class:`Place` that a file system ``files`` of pyarrow knows as ``path``."""

    url: str
    files: Any
    path: str

    def list(self) -> list[Entry]:
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
        with _explaining(path), self.files.open_input_file(path) as file:
            yield cast(BinaryIO, io.BufferedReader(file, READ_AHEAD))

    def has_state(self, path: str, state: str) -> bool:
        with _explaining(path):
            info = self.files.get_file_info(path)
        return _describe_info(info) == state

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        with _explaining(path), self.files.open_input_file(path) as file:
            if size is None:
                return bytes(file.read())
            return bytes(file.read_at(size, offset))


def is_url(text: str) -> bool:
    """Whether ``text`` is a URL of another place than this machine's files."""
    return "://" in text and not text.startswith(LOCAL_SCHEME)


def find_local_path(text: str) -> Path:
    """The path that ``text`` names, which may be written as a URL with escapes (``file:///my%20photos``)."""
    if not text.startswith(LOCAL_SCHEME):
        return Path(text)
    path = Path(text.removeprefix(LOCAL_SCHEME))
    return path if os.path.lexists(path) else Path(unquote(str(path)))


def hide_credentials(text: str) -> str:
    """A URL without the name and the password in it, and without a query, which may hold keys and signatures;
    for messages and files. A path stays as it is."""
    scheme, slashes, rest = text.partition("://")
    if not slashes:
        return text
    address, mark, _ = rest.partition("?")
    place, at, more = address.partition("/")
    return f"{scheme}{slashes}{place.rpartition('@')[2]}{at}{more}{'?...' if mark else ''}"


@lru_cache(maxsize=8)
def open_place(text: str) -> Place:
    """The place of a URL or a path.

    Raises:
        DataError: nothing here opens such URLs.
        RuntimeMissingError: pyarrow is not installed, and it is a URL.
    """
    if not is_url(text):
        return LocalPlace(text, str(find_local_path(text).absolute()))
    require_pyarrow(hide_credentials(text))
    from pyarrow import ArrowException, fs

    try:
        files, path = fs.FileSystem.from_uri(text)
    except (ArrowException, ValueError, OSError):
        return _open_by_fsspec(text)
    return RemotePlace(hide_credentials(text), files, path)


def require_pyarrow(where: str) -> None:
    """Raise :class:`RuntimeMissingError` where pyarrow is not installed, which URLs and tables need."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as exc:
        raise RuntimeMissingError(
            "reading tables and URLs needs pyarrow, which is not installed",
            where=where,
            why=exc,
            remedy="pip install pyarrow fsspec",
        ) from exc


def _open_by_fsspec(url: str) -> Place:
    """A URL that pyarrow does not know."""
    try:
        import fsspec
        from pyarrow import fs

        files, path = fsspec.core.url_to_fs(url)
        return RemotePlace(hide_credentials(url), fs.PyFileSystem(fs.FSSpecHandler(files)), path)
    except (ImportError, ValueError, OSError) as exc:
        raise DataError(
            "cannot be opened",
            where=hide_credentials(url),
            why=exc,
            remedy="check the address; some of them need a package for fsspec, s3fs or gcsfs for instance",
        ) from exc


def _make_entry(info: Any, name: str) -> Entry:
    return Entry(info.path, name, info.size or 0, _describe_info(info))


def _describe_info(info: Any) -> str:
    return f"{info.size} {info.mtime_ns}"


@contextmanager
def _explaining(where: str) -> Iterator[None]:
    """Errors of a file system as a :class:`DataError`."""
    try:
        yield
    except FileNotFoundError as exc:
        raise DataError(
            "does not exist, or not on the machine that reads it",
            where=hide_credentials(where),
            why=exc,
            remedy="put the images where every node finds them: s3:// for instance, or a shared file system",
        ) from exc
    except OSError as exc:
        raise DataError(
            "cannot be read",
            where=hide_credentials(where),
            why=exc,
            remedy="check the address and the rights",
        ) from exc
