"""Writing a bundle: assembled beside its place, the manifest last, moved there in one step."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from ..errors import OutputError
from ..files import (
    OUTPUT_FLAG,
    hash_file,
    put_back,
    put_folder,
    sync_folder,
    sync_tree,
    write_atomic,
    writing,
)
from ..locks import TEMPORARY, locked, scratch_folder
from ..signals import unwound_by_signals
from .belongings import describe_foreign, find_foreign, read_listed
from .bundle import Bundle, read_state
from .manifest import ENGINES, MANIFEST, Manifest
from .sections import FileEntry
from .signature import SIGNATURE, make_statement, read_private_key, sign

BACKDATE_NS = 10 * 10**9
"""Nanoseconds by which a hashed file is dated back: more than the tick of any file system's clock."""


def require_outside_bundles(target: Path) -> None:
    """Raise :class:`OutputError` where ``target`` lies inside a bundle: a file that its manifest does not
    name breaks it."""
    for folder in target.resolve().parents:
        if read_listed(folder / MANIFEST) is not None:
            raise OutputError(
                f"lies inside the bundle {folder}, which one more file would break",
                where=target,
                remedy="choose a place outside the bundle",
            )


class BundleWriter:
    """Collects the files of a bundle in a hidden folder beside ``target`` and moves them there in one step.

    Use as a context manager: on any error or interruption the hidden folder is removed and an existing bundle
    stays as it was. Stale folders of runs that were killed are removed when the next one starts. Several
    writers of one target do not disturb each other: the last to finish stays.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.folder = target
        self._hashes = _Hashes()
        self._stack = ExitStack()

    def check(self) -> None:
        """Raise :class:`OutputError` where something else than a bundle of ours stands in the way, or a
        bundle that holds files of others, which would go with it, or where the place lies in another bundle.

        A damaged bundle may be replaced: files that its manifest lists may be missing or changed.
        """
        require_outside_bundles(self.target)
        with writing(
            self.target, OUTPUT_FLAG
        ):  # a folder that may not be entered does not tell what it holds
            if not (self.target.is_symlink() or self.target.exists()):
                return
            listed = None if self.target.is_symlink() else read_listed(self.target / MANIFEST)
            foreign = None if listed is None else find_foreign(self.target, listed)
        if foreign is None:
            raise OutputError(
                "exists and is not a bundle, so it is not replaced",
                where=self.target,
                remedy="choose another -o DIR, or --name",
            )
        if foreign:
            raise OutputError(
                f"holds what is not the bundle's, so it is not replaced: {describe_foreign(foreign)}",
                where=self.target,
                remedy="move it elsewhere, or choose another -o DIR, or --name",
            )

    def __enter__(self) -> BundleWriter:
        with self._stack as stack:  # undone where something fails here
            self._enter(stack)
            self._stack = stack.pop_all()
        return self

    def _enter(self, stack: ExitStack) -> None:
        self.check()
        parent = self.target.parent
        with writing(parent, OUTPUT_FLAG):
            parent.mkdir(parents=True, exist_ok=True)
            with self._alone():
                put_back(self.target)
            self.folder = stack.enter_context(scratch_folder(parent, f".{self.target.name}.", TEMPORARY))
            self.folder.chmod(0o755)
        stack.enter_context(unwound_by_signals())

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def staged(self, manifest: Manifest) -> Bundle:
        """The unfinished bundle, to be verified and measured before :meth:`commit`.

        Its ``name`` is the one that it will have. A file is hashed when it is first seen here, and again only
        if it has changed since.
        """
        paths = sorted(
            path for path in self.folder.rglob("*") if path.is_file() and path != self.folder / SIGNATURE
        )
        with writing(self.target, OUTPUT_FLAG):
            names = [path.relative_to(self.folder).as_posix() for path in paths]
            files = dict(zip(names, map(self._hashes.entry, paths), strict=True))
        return Bundle(
            self.folder,
            replace(manifest, files=files),
            self.target,
        )

    def commit(self, manifest: Manifest, key: Path | None = None) -> Bundle:
        """Write the manifest last, with the hash of every file, and move the folder into place.

        Args:
            manifest: of the bundle; its ``files`` are filled in.
            key: file of the private key that signs the bundle, if one shall.
        """
        with writing(self.target, OUTPUT_FLAG):
            manifest = self.staged(manifest).manifest
            data = manifest.to_bytes()
            if key is not None:
                signature = sign(make_statement(json.loads(data), ENGINES), read_private_key(key))
                write_atomic(self.folder / SIGNATURE, signature.to_bytes())
            write_atomic(self.folder / MANIFEST, data)
            sync_tree(self.folder)
            state = read_state(self.folder)
            self._put_in_place()
        return Bundle(self.target, manifest, state=state)

    def _put_in_place(self) -> None:
        """Make the folder the bundle at the target; what was there becomes the hidden folder, which goes."""
        with self._alone():
            self.check()  # hours may have passed
            put_folder(self.folder, self.target)
            sync_folder(self.target.parent)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other writers from the target meanwhile."""
        with locked(self.target.with_name(f".{self.target.name}")):
            yield


class _Hashes:
    """Sizes and hashes of files, each computed once while the file stays the same.

    A file is dated back before it is hashed, so that whatever is written to it later gives it another date:
    even a change of equal length within the same tick of the file system's clock is noticed.
    """

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple[int, ...], FileEntry]] = {}

    def entry(self, path: Path) -> FileEntry:
        """Size and SHA-256 of the file as it is now."""
        stamp, entry = self._known.get(path, (None, None))
        if entry is None or stamp != _stamp(path):
            entry = self._hash(path)
        return entry

    def _hash(self, path: Path) -> FileEntry:
        dated = _date_back(path)
        stamp = _stamp(path)
        entry = FileEntry(path.stat().st_size, hash_file(path))
        if dated and stamp == _stamp(path):
            self._known[path] = stamp, entry
        return entry


def _date_back(path: Path) -> bool:
    """Date a file back by :data:`BACKDATE_NS`; whether the file system let us."""
    status = path.stat()
    try:
        os.utime(
            path,
            ns=(status.st_atime_ns, status.st_mtime_ns - BACKDATE_NS),
        )
    except OSError:
        return False
    return True


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file is written to or replaced."""
    status = path.stat()
    return (
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
        status.st_ino,
    )
