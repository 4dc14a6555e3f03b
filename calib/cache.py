"""A folder of results that can be made again: one writer an entry, the oldest entries go first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from cmt_edge.deploy.files import writing


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the entry ``path``, whose folder is made; others that want it wait. Raises
    :class:`~cmt_edge.deploy.errors.OutputError`."""
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def evict(folder: Path, pattern: str, keep: int) -> None:
    """Delete all but the ``keep`` entries matching ``pattern`` that were used last, and their locks."""
    entries = sorted(folder.glob(pattern), key=lambda p: p.stat().st_mtime, reverse=True)
    for old in entries[keep:]:
        old.unlink(missing_ok=True)
        old.with_name(old.name + ".lock").unlink(missing_ok=True)
