"""Locks between processes, on files. Standard library only: ``fcntl`` where there is one, else ``msvcrt``.

The system drops a lock when its process ends, however it ends, so no lock is ever left behind.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

POLL_S = 0.1
"""Seconds between two attempts, where the system cannot wait for a lock itself."""
NOT_SUPPORTED = {
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOLCK,
}
"""Error numbers of file systems that have no locks, such as some network drives."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold ``path`` against other processes and threads; those that want it too wait.

    The lock is a file ``path.lock`` beside it, whose folder is made, and which is removed at the end.
    A file system without locks gives none: both writers then work, and the last one's result stays.

    Raises ``OSError`` where the folder cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(f"{path.name}.lock")
    descriptor = _acquired(file)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows does not remove a file that others have open
            file.unlink()
        os.close(descriptor)


def _acquired(file: Path) -> int:
    """A descriptor that holds the lock of ``file``."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
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
    try:
        lock_descriptor(descriptor, wait=False)
    except BlockingIOError:
        return False
    except OSError as exc:
        if exc.errno not in NOT_SUPPORTED:
            raise
    return True


def _is_still(file: Path, descriptor: int) -> bool:
    """Whether ``file`` is what was opened."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False


if sys.platform == "win32":
    import msvcrt

    def lock_descriptor(descriptor: int, wait: bool = True) -> None:
        """Lock an open file until it is closed.

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
    import fcntl

    def lock_descriptor(descriptor: int, wait: bool = True) -> None:
        """Lock an open file or folder until it is closed.

        Raises ``BlockingIOError`` where ``wait`` is false and another process holds it.
        """
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
