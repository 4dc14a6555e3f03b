"""Writing files so that a reader never sees half of one: temporary name in the same folder, flush, rename."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from platformdirs import user_cache_path

from .errors import OutputError

CHUNK_BYTES = 1 << 20
"""The number of bytes that are read at once when a file is hashed or copied."""

BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""First bytes of a text file and its encoding. The mark of UTF-32 begins like that of UTF-16, so it comes
first."""


NOWHERE = Path(os.devnull) / "cmt-edge"
"""The cache of a user without a home: a folder that nobody can make."""


def cache_folder() -> Path:
    """Folder of what can be made again (downloads, calibrated graphs, timing caches); ``CMT_EDGE_CACHE``
    overrides it. It may be one that cannot be written to: see :func:`cmt_edge.deploy.cache.can_keep`."""
    override = os.environ.get("CMT_EDGE_CACHE")
    if override:
        return Path(override)
    folder = user_cache_path("cmt-edge", appauthor=False)
    return NOWHERE if folder.parts[0] == "~" else folder


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def read_text(path: Path) -> str:
    """The text of a file that an editor saved: UTF-8, or what its byte order mark says, which is left out.

    Raises:
        OSError: the file cannot be read.
        UnicodeDecodeError: it is not text of that encoding.
    """
    data = path.read_bytes()
    encoding = next(
        (name for mark, name in BYTE_ORDER_MARKS if data.startswith(mark)),
        "utf-8",
    )
    return data.decode(encoding).replace("\r\n", "\n")


def write_atomic(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write ``data`` to ``path`` completely or not at all, with permissions ``mode``; raises
    :class:`OutputError`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            with open(
                os.open(
                    temporary,
                    os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
                    mode,
                ),
                "wb",
            ) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Make a rename inside ``folder`` durable (a no-op where folders cannot be opened)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush every file below ``folder`` and the folders themselves to disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)


@contextmanager
def writing(where: Path) -> Iterator[None]:
    """Turn an operating-system error while writing to ``where`` into a typed one."""
    try:
        yield
    except OSError as exc:
        raise OutputError(
            "cannot write here",
            where=where,
            why=exc.strerror or exc,
            remedy="choose a writable folder with enough space: -o DIR",
        ) from exc
