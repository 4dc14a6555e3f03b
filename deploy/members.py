"""The files of an archive as a tree, and a walk through it that follows links as a scan of folders does."""

from __future__ import annotations

import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from .errors import DataError
from .folders import LOOPS, MAX_ITEMS, is_image, is_junk

MAX_LINKS = 20
"""The largest number of links in an archive that may lead from one to the next."""

MAX_LINKED = 200_000
"""The largest number of files and folders that the links in an archive may lead to, all together."""

Place: TypeAlias = "tuple[int, int] | None"
"""Offset and size in bytes of a file in the archive; ``None`` for a sparse file."""

Folder: TypeAlias = "dict[str, Folder | Link | Place]"
"""What a folder holds, by name."""


@dataclass
class Link:
    """A link to the member ``target``; ``is_open`` while it is looked up, which it is again in a circle."""

    target: str
    is_open: bool = False


@dataclass
class _Frame:
    """A folder on the way of a walk: what is still to be visited, and whether a link led into it."""

    folder: Folder
    entries: Iterator[tuple[str, Folder | Link | Place]]
    is_linked: bool


class CircularLink(ValueError):
    """Links lead in a circle, or too many of them lead from one to the next."""


class Members:
    """The files of an archive by name, with offset and size, and its links by name, with their targets.

    Attributes:
        skipped: how many links were not followed, by reason; complete after :meth:`walk`.
    """

    def __init__(self, archive: Path) -> None:
        self.archive = archive
        self.skipped: Counter[str] = Counter()
        self._files: dict[str, Place] = {}
        self._links: dict[str, str] = {}
        self._root: Folder = {}
        self._known: dict[int, Folder | Place | CircularLink | KeyError] = {}
        self._linked = 0

    def add(self, member: tarfile.TarInfo) -> None:
        """Note one member; a later one of the same name replaces it, as in unpacking."""
        if member.size < 0:
            raise tarfile.ReadError(f"the member at byte {member.offset} has a negative size")
        name = posixpath.normpath(member.name)  # without ./
        self._files.pop(name, None)
        self._links.pop(name, None)
        if member.islnk():
            self._links[name] = posixpath.normpath(member.linkname)
        elif member.issym():
            target = posixpath.join(posixpath.dirname(name), member.linkname)
            self._links[name] = posixpath.normpath(target)
        elif member.isfile():
            self._files[name] = None if member.issparse() else (member.offset_data, member.size)
        if len(self._files) + len(self._links) > MAX_ITEMS * 2:
            raise DataError(
                f"more than {2 * MAX_ITEMS} members",
                where=member.name,
                remedy="use a part of it",
            )

    def walk(self, prefix: str) -> Iterator[tuple[str, Place]]:
        """Every file below the folder ``prefix``, by its name there, and where its bytes lie. Links are
        followed, but not to a folder on the way to them.

        Raises:
            DataError: the links lead to more than :data:`MAX_LINKED` files.
        """
        if not self._links:
            return (
                (n.removeprefix(prefix), place) for n, place in self._files.items() if n.startswith(prefix)
            )
        self._plant()
        try:
            start = self._find(prefix.rstrip("/") or ".", 0)
        except (CircularLink, KeyError):
            start = None
        return self._walk(start) if isinstance(start, dict) else iter(())

    def _plant(self) -> None:
        """Make the tree of all files and links."""
        for name, place in self._files.items():
            folder, last = self._make_folder(name)
            folder.setdefault(last, place)
        for name, target in self._links.items():
            folder, last = self._make_folder(name)
            folder.setdefault(last, Link(target))

    def _make_folder(self, name: str) -> tuple[Folder, str]:
        """The folder that a member lies in, and the member's name there."""
        *parts, last = name.split("/")
        folder = self._root
        for part in parts:
            inner = folder.get(part)
            if not isinstance(inner, dict):
                folder[part] = inner = {}
            folder = inner
        return folder, last

    def _walk(self, start: Folder) -> Iterator[tuple[str, Place]]:
        stack = [_Frame(start, iter(start.items()), False)]
        names: list[str] = []  # of the folders on the way, without the first
        seen = {id(start)}
        while stack:
            for name, child in stack[-1].entries:
                found = self._follow(child, name)
                is_linked = stack[-1].is_linked or isinstance(child, Link)
                if is_junk(name) or isinstance(found, Link):
                    continue
                self._count(is_linked, name)
                if not isinstance(found, dict):
                    yield "/".join((*names, name)), found
                elif id(found) in seen:
                    self.skipped[LOOPS] += 1
                else:
                    stack.append(_Frame(found, iter(found.items()), is_linked))
                    names.append(name)
                    seen.add(id(found))
                    break
            else:
                seen.remove(id(stack.pop().folder))
                del names[-1:]

    def _count(self, is_linked: bool, name: str) -> None:
        """Raise :class:`DataError` once the links lead to too much."""
        self._linked += is_linked
        if self._linked > MAX_LINKED:
            raise DataError(
                f"the links in the archive lead to more than {MAX_LINKED} files",
                where=self.archive,
                why=f"one of them leads to {name!r}",
                remedy="replace the links by what they lead to",
            )

    def _follow(
        self,
        child: Folder | Link | Place,
        name: str,
    ) -> Folder | Link | Place:
        """What a link leads to at last; the link itself where it leads to nothing, which is counted."""
        if not isinstance(child, Link):
            return child
        try:
            return self._resolve(child, 0)
        except CircularLink:
            self.skipped["links that lead in a circle"] += not is_junk(name)
        except KeyError:
            self.skipped["links that lead out of the archive"] += is_image(name) and not is_junk(name)
        return child

    def _resolve(self, link: Link, hops: int) -> Folder | Place:
        """What a link leads to; looked up once, because the names of links may be very long.

        Raises:
            CircularLink: links lead in a circle.
            KeyError: it leads out of the archive.
        """
        if id(link) not in self._known:
            if link.is_open or hops > MAX_LINKS:
                raise CircularLink(link.target)
            link.is_open = True
            try:
                self._known[id(link)] = self._find(link.target, hops + 1)
            except (CircularLink, KeyError) as exc:
                self._known[id(link)] = exc
            link.is_open = False
        found = self._known[id(link)]
        if isinstance(found, Exception):
            raise found
        return found

    def _find(self, name: str, hops: int) -> Folder | Place:
        """The folder or file of a name, which may lead through links. Raises as :meth:`_resolve` does."""
        found: Folder | Place = self._root
        for part in [] if name == "." else name.split("/"):
            if not isinstance(found, dict):
                raise KeyError(name)
            child = found[part]
            found = self._resolve(child, hops) if isinstance(child, Link) else child
        return found
