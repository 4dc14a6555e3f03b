"""Writing files so that a reader never sees half of one: temporary name in the same folder, flush, rename."""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from platformdirs import user_cache_path

from .errors import OutputError
from .locks import MARK, TEMPORARY, clear_abandoned, try_lock

CHUNK_BYTES = 1 << 20
"""The number of bytes that are read at once when a file is hashed or copied."""

MAX_TEXT_BYTES = 16 << 20
"""A larger file of labels or settings, in bytes, is not read."""

IRREGULAR = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
"""Kind of a file, as the system tells it -> what messages call it."""

OUTPUT_FLAG = "-o DIR"
"""What names another place for a bundle, or for a repository of models."""

STANDARD_STREAMS = (1, 2)
"""Descriptors of standard output and standard error."""

AT_FDCWD = -100
"""Linux's number for the working directory, from which paths are taken."""
RENAME_EXCHANGE = 2
"""Linux's flag of ``renameat2`` that lets two paths change places."""
OCCUPIED = (errno.EEXIST, errno.ENOTEMPTY)
"""Error numbers of a rename to a place where a folder lies."""
CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
"""Error numbers of systems and file systems that cannot exchange two paths."""

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


def find_cache_folder() -> Path:
    """Folder of what can be made again (downloads, calibrated graphs, timing caches); ``CMT_EDGE_CACHE``
    overrides it. It may be one that cannot be written to: see :func:`cmt_edge.deploy.cache.can_keep`."""
    override = os.environ.get("CMT_EDGE_CACHE")
    folder = expand_home(override) if override else user_cache_path("cmt-edge", appauthor=False)
    return NOWHERE if folder.parts[:1] == ("~",) else folder


def expand_home(text: str) -> Path:
    """The folder that a variable of the environment names: a ``~`` at its beginning is a user's home, which a
    shell leaves as it is in ``NAME="~/folder"``. Without such a home it is :data:`NOWHERE`, and not a folder
    of this name in the working directory."""
    expanded = os.path.expanduser(text)
    return NOWHERE if expanded.startswith("~") else Path(expanded)


def find_shared_folder(folder: Path) -> Path | None:
    """The first folder on the way to an existing ``folder`` in which another user could put something in
    place of what lies there; ``None`` where there is none, and on systems without owners of POSIX.

    The system's own user is trusted, and so is a group that has this user's name and no other members. A
    folder such as ``/tmp``, in which nobody can rename what others own, is no way either.

    Raises ``OSError``.
    """
    if not hasattr(os, "getuid"):
        return None
    folder = folder.resolve()
    for place in (*reversed(folder.parents), folder):
        status = place.stat()
        is_sticky = bool(status.st_mode & stat.S_ISVTX)
        others = stat.S_IWOTH if _is_own_group(status.st_gid) else stat.S_IWOTH | stat.S_IWGRP
        if status.st_uid not in (0, os.getuid()) or (status.st_mode & others and not is_sticky):
            return place
        if status.st_uid == os.getuid() and not status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            return None  # nobody else gets any further
    return None


def _is_own_group(number: int) -> bool:
    """Whether a group is the one that many systems give each user, with the user's name and no members."""
    import grp  # here, because there is no such module on Windows
    import pwd

    try:
        group, user = grp.getgrgid(number), pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return (group.gr_gid, group.gr_name) == (user.pw_gid, user.pw_name) and set(group.gr_mem) <= {
        user.pw_name
    }


def describe_irregular(path: str | Path) -> str | None:
    """What lies at ``path`` where that is no regular file, in words; ``None`` for a regular file, and where
    nothing can be found.

    Reading anything else may never end, or do something: a named pipe waits for a writer, a device acts.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return None
    if stat.S_ISREG(mode):
        return None
    return IRREGULAR.get(stat.S_IFMT(mode), "no regular file")


def open_regular(path: Path, limit: int | None = None) -> BinaryIO:
    """Open a regular file for reading; it is asked what it is before anything waits for it.

    Args:
        path: may be a link to the file.
        limit: largest size in bytes.

    Raises:
        OSError: the file cannot be read, is no regular file, or is larger than ``limit``.
    """
    kind = describe_irregular(path)
    if kind is not None:
        raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", str(path))
    file = open(path, "rb", opener=_open_without_waiting)  # noqa: SIM115
    status = os.fstat(file.fileno())
    if stat.S_ISREG(status.st_mode) and (limit is None or status.st_size <= limit):
        return file
    file.close()
    why = f"it has {status.st_size} bytes, the cap is {limit}"
    raise OSError(
        errno.EFBIG,
        why if stat.S_ISREG(status.st_mode) else "it is no regular file",
        str(path),
    )


def _open_without_waiting(path: str, flags: int) -> int:
    """What ``open`` calls: a named pipe that took the file's place meanwhile does not block."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_regular(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most ``limit`` bytes; raises as :func:`open_regular`."""
    with open_regular(path, limit) as file:
        size = min(os.fstat(file.fileno()).st_size, limit)
        content = file.read(size + 1)  # not limit + 1: Python allocates what it is asked for
        while len(content) <= limit and (more := file.read(CHUNK_BYTES)):  # it grew
            content += more
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit} bytes", str(path))
    return content


def hash_file(path: Path) -> str:
    """Hex SHA-256 of a regular file, read in chunks; raises as :func:`open_regular`."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def read_text(path: Path) -> str:
    """The text of a file that an editor saved: UTF-8, or what its byte order mark says, which is left out.

    Raises:
        OSError: the file cannot be read, is no regular file, or is larger than :data:`MAX_TEXT_BYTES`.
        UnicodeDecodeError: it is not text of that encoding.
    """
    data = read_regular(path, MAX_TEXT_BYTES)
    encoding = next(
        (name for mark, name in BYTE_ORDER_MARKS if data.startswith(mark)),
        "utf-8",
    )
    return data.decode(encoding).replace("\r\n", "\n")


def write_output(path: Path, data: bytes) -> None:
    """Write ``data`` where a user asked for it.

    A regular file is replaced completely or not at all. A link stays, and the file that it leads to is
    replaced. A character device, a named pipe and the process's own standard output are written through: they
    are never replaced, not even where the user may replace them.

    Raises:
        OutputError: the place cannot be written to, is a folder, a socket or a disk, or is a named pipe that
            nobody reads.
    """
    require_writable(path)
    if _is_stream(path):
        with writing(path):
            _write_through(path, data)
    else:
        write_atomic(Path(os.path.realpath(path)), data)


def require_writable(path: Path) -> None:
    """Raise :class:`OutputError` where :func:`write_output` cannot write to ``path``."""
    if why := _find_obstacle(path):
        raise OutputError(
            "cannot write here",
            where=path,
            why=why,
            remedy="name a file in a folder that exists and can be written to",
        )


def _find_obstacle(path: Path) -> str:
    """Why nothing can be written to ``path``, empty if it can be."""
    if _is_stream(path):
        return "" if os.access(path, os.W_OK) else "it may not be written to"
    kind = describe_irregular(path)
    if kind is not None:
        return f"it is {kind}"
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        return "its folder does not exist"
    start = f".{target.name}."
    try:
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=start, suffix=TEMPORARY):
            return ""
    except OSError as exc:
        return exc.strerror or str(exc)


def _is_stream(path: Path) -> bool:
    """Whether ``path`` takes bytes one after another: a character device, a named pipe, or the file that is
    this process's standard output or standard error."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return False
    if stat.S_ISCHR(status.st_mode) or stat.S_ISFIFO(status.st_mode):
        return True
    return _find_standard_stream(status) is not None


def _find_standard_stream(status: os.stat_result) -> int | None:
    """The descriptor of the standard stream that is the file with this status, if one is."""
    for descriptor in STANDARD_STREAMS:
        with contextlib.suppress(OSError):
            if os.path.samestat(status, os.fstat(descriptor)):
                return descriptor
    return None


def _write_through(path: Path, data: bytes) -> None:
    """Write to a stream, which is not made, cut off or replaced; raises ``OSError``."""
    standard = _find_standard_stream(os.stat(path))
    if standard is not None:
        descriptor = os.dup(standard)
    else:
        waits = getattr(os, "O_NONBLOCK", 0)  # a named pipe that nobody reads fails and does not wait
        descriptor = os.open(path, os.O_WRONLY | waits | getattr(os, "O_NOCTTY", 0))
        os.set_blocking(descriptor, True)
    with open(descriptor, "wb") as stream:
        stream.write(data)


def write_atomic(path: Path, data: bytes, mode: int = 0o666, flag: str | None = None) -> None:
    """Write ``data`` to ``path`` completely or not at all, with permissions ``mode``; raises
    :class:`OutputError`, with ``flag`` as what names another place.

    A link is replaced by the file. Anything else that is no regular file is refused. What killed processes
    left of the same file is removed.
    """
    start = f".{path.name}."
    with writing(path, flag):
        _require_replaceable(path)
        clear_abandoned(path.parent, start, TEMPORARY)
        temporary = path.with_name(f"{start}{secrets.token_hex(4)}{TEMPORARY}")
        try:
            _write_new(temporary, data, mode)
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


def _require_replaceable(path: Path) -> None:
    """Raise ``OSError`` where something stands that no file may replace: a device, a named pipe, a socket."""
    kind = None if path.is_symlink() else describe_irregular(path)
    if kind is not None:
        raise OSError(errno.EINVAL, f"it is {kind}, which is not replaced", str(path))


def _write_new(path: Path, data: bytes, mode: int) -> None:
    """Write a new file to disk, locked meanwhile, so that nobody takes it for abandoned."""
    descriptor = os.open(
        path,
        os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0),
        mode,
    )
    with open(descriptor, "wb") as file:
        with contextlib.suppress(OSError):  # a file system may have no locks
            try_lock(descriptor)
        file.write(data)
        file.flush()
        os.fsync(descriptor)
        with contextlib.suppress(OSError):
            os.utime(path)  # it may have taken long: from here on its age alone spares it


def put_folder(folder: Path, target: Path) -> Path | None:
    """Move ``folder`` to ``target`` in one step; the folder that was there takes its place, and its path is
    returned.

    At every moment ``target`` is the old folder or the new one. Only where the system cannot exchange two
    folders (some network drives, systems other than Linux) there is a moment without any, see
    :func:`_exchange_in_two_steps`.

    Raises ``OSError``.
    """
    while True:
        try:
            folder.rename(target)
            return None
        except OSError as exc:
            if exc.errno not in OCCUPIED:
                raise
        try:
            if not _exchange(folder, target):
                _exchange_in_two_steps(folder, target)
            return folder
        except FileNotFoundError:  # what was there has gone meanwhile
            if not folder.exists():
                raise


def _exchange(first: Path, second: Path) -> bool:
    """Let two paths change places in one step; ``False`` where the system cannot."""
    rename = renameat2()
    if rename is None:
        return False
    if rename(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(second))


@functools.cache
def renameat2() -> Any:
    """Linux's system call ``renameat2``, which Python does not offer; ``None`` elsewhere."""
    if sys.platform != "linux":
        return None
    function = getattr(
        ctypes.CDLL(None, use_errno=True),
        "renameat2",
        None,
    )
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return function


def _exchange_in_two_steps(folder: Path, target: Path) -> None:
    """As :func:`put_folder`, with a moment in which :func:`make_aside_path` exists and ``target`` does not.

    A process that is killed in that moment leaves it so; :func:`put_back` undoes that.
    """
    old = make_aside_path(target)
    shutil.rmtree(old, ignore_errors=True)
    try:
        target.rename(old)
        folder.rename(target)
        old.rename(folder)
    except BaseException:
        put_back(target)
        raise


def make_aside_path(target: Path) -> Path:
    """Where ``target`` lies while another folder takes its place in two steps."""
    target = target.absolute()
    return target.parent / f".{target.name}{MARK}.old"


def put_back(target: Path) -> None:
    """Undo what a process that was killed between two steps left: ``target`` comes back, or the older one
    goes where there is a newer one.

    Raises ``OSError``.
    """
    old = make_aside_path(target)
    if old.is_symlink() or not old.is_dir():
        return
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.rename(target)


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
def writing(where: Path, flag: str | None = None) -> Iterator[None]:
    """Turn an operating-system error while writing to ``where`` into a typed one; ``flag`` is what names
    another place."""
    try:
        yield
    except OSError as exc:
        raise OutputError(
            "cannot write here",
            where=where,
            why=exc.strerror or exc,
            remedy="choose a writable folder with enough space" + (f": {flag}" if flag else ""),
        ) from exc
