"""Locks between processes, on files. Standard library only: ``fcntl`` where there is one, else ``msvcrt``.

The system drops a lock when its process ends, however it ends, so no lock is ever left behind. Whether the
process that made a file is still at work is therefore told by a lock on that file, which holds between
containers too, and never by a process number, which means another process there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

MARK = ".cmt-edge"
"""Stands in the name of every hidden file and folder of ours that lies beside a user's, so that none of the
user's is taken for ours."""
LOCK = f"{MARK}.lock"
"""What the name of a lock's file ends with."""
TEMPORARY = f"{MARK}.tmp"
"""What the name of a file or folder ends with while it is being written."""
POLL_S = 0.1
"""Seconds between two attempts, where the system cannot wait for a lock itself."""
NOT_SUPPORTED = {
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOLCK,
}
"""Error numbers of file systems that have no locks, such as some network drives."""


ABANDONED_S = 86400.0
"""Age in seconds from which on something is taken for left behind where the file system has no locks."""
UNLOCKED_S = 5.0
"""Age in seconds below which a file without a lock is spared: its process may be about to lock it."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold ``path`` against other processes and threads; those that want it too wait.

    The lock is a file beside it, whose name ends with :data:`LOCK`. Its folder is made, and the file is
    removed at the end.
    A file system without locks gives none: both writers then work, and the last one's result stays.

    Raises ``OSError`` where the folder cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(f"{path.name}{LOCK}")
    descriptor = _acquire(file)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows does not remove a file that others have open
            file.unlink()
        os.close(descriptor)


def clear_lock(path: Path) -> None:
    """Remove what a process left that was killed while it held ``path`` by :func:`locked`.

    Whoever finds ``path`` complete, and so takes no lock, calls this.
    """
    file = path.with_name(f"{path.name}{LOCK}")
    with contextlib.suppress(OSError):
        if not file.is_symlink():
            remove_if_abandoned(file)


def _acquire(file: Path) -> int:
    """A descriptor that holds the lock of ``file``."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            lock_descriptor(descriptor)
            if _is_still(file, descriptor):
                return descriptor
        except OSError as exc:
            if exc.errno in NOT_SUPPORTED:
                return descriptor
            os.close(descriptor)
            raise
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the holder before us removed this file: the lock is another file by now


def try_lock(descriptor: int) -> bool:
    """Lock an open file or folder until it is closed; ``False`` where another process holds it.

    A file system without locks lets everybody pass.
    """
    return _attempt(descriptor) is not False


def _attempt(descriptor: int) -> bool | None:
    """Whether an open file or folder could be locked; ``None`` where the file system has no locks."""
    try:
        lock_descriptor(descriptor, wait=False)
    except BlockingIOError:
        return False
    except OSError as exc:
        if exc.errno not in NOT_SUPPORTED:
            raise
        return None
    return True


@contextmanager
def scratch_folder(parent: Path, prefix: str, suffix: str = TEMPORARY) -> Iterator[Path]:
    """A new folder ``prefix*suffix`` in ``parent``, removed at the end unless it was moved away.

    Those that killed processes left there go first. What runs elsewhere, even in another container, keeps
    its own: each is locked as long as it is used.

    Raises ``OSError`` where ``parent`` cannot be written to.
    """
    clear_abandoned(parent, prefix, suffix)
    folder, descriptor = _make_locked_folder(parent, prefix, suffix)
    try:
        yield folder
    finally:
        _drop_folder(folder, descriptor)


def _make_locked_folder(
    parent: Path,
    prefix: str,
    suffix: str,
) -> tuple[Path, int | None]:
    """A new folder, and the descriptor that holds its lock; ``None`` where folders cannot be opened."""
    while True:
        folder = Path(tempfile.mkdtemp(suffix, prefix, parent))
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue
        except PermissionError:  # Windows
            return folder, None
        except OSError:
            folder.rmdir()
            raise
        try:
            if _attempt(descriptor) is not False and _is_still(folder, descriptor):
                return folder, descriptor
        except OSError:  # such as EBADF on a network drive: its age tells when it was left behind
            return folder, descriptor
        os.close(descriptor)  # another process takes it for abandoned: it has removed it, or is about to


class Hold:
    """Keeps what ``release`` gives back for as long as this object lives, or its process."""

    def __init__(self, release: Callable[[], object]) -> None:
        weakref.finalize(self, _release_in, os.getpid(), release)


def _release_in(process: int, release: Callable[[], object]) -> None:
    """Call ``release``, but not in a forked child: what it gives back is still its parent's."""
    if os.getpid() == process:
        release()


def make_scratch(
    parent: Path,
    prefix: str,
    suffix: str = TEMPORARY,
) -> tuple[Path, Hold]:
    """As :func:`scratch_folder`, for as long as the second result lives."""
    clear_abandoned(parent, prefix, suffix)
    folder, descriptor = _make_locked_folder(parent, prefix, suffix)
    return folder, Hold(partial(_drop_folder, folder, descriptor))


def _drop_folder(folder: Path, descriptor: int | None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if descriptor is not None:
        os.close(descriptor)


def hold_folder(folder: Path) -> Hold:
    """Make a folder where there is none, and keep it: while somebody holds it, :func:`remove_if_abandoned`
    leaves it alone. Any number of processes and threads may hold it.

    Raises ``OSError`` where the folder cannot be made or opened.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # it was removed just now
            continue
        except PermissionError:
            if os.name == "nt":  # folders cannot be opened there
                return Hold(lambda: None)
            raise
        with contextlib.suppress(OSError):  # a file system may have no locks
            lock_descriptor(descriptor, shared=True)
        if _is_still(folder, descriptor):
            return Hold(partial(os.close, descriptor))
        os.close(descriptor)


def clear_abandoned(parent: Path, prefix: str, suffix: str) -> None:
    """Remove the files and folders ``prefix*suffix`` in ``parent`` whose processes have ended.

    What cannot be removed stays, without an error.
    """
    try:
        with os.scandir(parent) as entries:
            found = [
                Path(entry.path)
                for entry in entries
                if entry.name.startswith(prefix) and entry.name.endswith(suffix) and not entry.is_symlink()
            ]
    except OSError:
        return
    for path in found:
        with contextlib.suppress(OSError):
            remove_if_abandoned(path)


def remove_if_abandoned(path: Path) -> None:
    """Remove a file or folder that no process holds; raises ``OSError``."""
    age = time.time() - path.stat().st_mtime
    if path.is_dir():
        flags = os.O_RDONLY
    elif path.is_file() and age > UNLOCKED_S:
        flags = os.O_RDWR | getattr(os, "O_NONBLOCK", 0)
    else:
        return
    descriptor = os.open(path, flags)
    try:
        free = _attempt(descriptor)
        is_used = free is False or (free is None and age < ABANDONED_S)
        if is_used or not _is_still(path, descriptor):
            return
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    finally:
        os.close(descriptor)


def _is_still(file: Path, descriptor: int) -> bool:
    """Whether ``file`` is what was opened."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False


if sys.platform == "win32":
    import msvcrt

    def lock_descriptor(
        descriptor: int,
        wait: bool = True,
        shared: bool = False,
    ) -> None:
        """Lock an open file until it is closed; ``shared`` locks cannot be had here.

        Raises ``BlockingIOError`` where ``wait`` is false and another process holds it.
        """
        while True:
            try:
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
                return
            except OSError as exc:
                if not wait:
                    raise BlockingIOError(exc.errno, exc.strerror) from exc
                time.sleep(POLL_S)

else:

    def lock_descriptor(
        descriptor: int,
        wait: bool = True,
        shared: bool = False,
    ) -> None:
        """Lock an open file or folder until it is closed; ``shared``: with others that do so too.

        Raises ``BlockingIOError`` where ``wait`` is false and another process holds it.
        """
        import fcntl  # here, because a command that locks nothing needs no module of POSIX

        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(descriptor, kind | (0 if wait else fcntl.LOCK_NB))
