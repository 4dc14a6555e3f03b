"""What lies in the folder of a bundle: its own files, what writers of ours left, what systems left, and files
that are none of ours.

Reading a bundle refuses what is not known. Replacing one deletes its folder, so it asks for more: nothing in
it may be a file that a user would miss. Links are never followed here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import NoReturn

from ..errors import OutputError
from ..files import hash_file, read_regular
from ..locks import TEMPORARY
from .manifest import ENGINES, MANIFEST, MAX_MANIFEST
from .signature import SIGNATURE

# fmt: off
REMADE_BY_SYSTEMS = (
    ".ds_store", "._*", "__macosx", "icon\r", ".localized", ".appledouble",
    "thumbs.db", "ehthumbs.db", "desktop.ini", ".directory", "@eadir",
    ".nfs*", ".fuse_hidden*", ".smbdelete*", "*:zone.identifier", "*:zone.identifier:$data",
)
"""Names, in lower case, of what file managers and network file systems make again by themselves. They may go
with the bundle that they lie in."""
FOLDERS_OF_SYSTEMS = ("__macosx", "@eadir", ".appledouble")
"""Those of them that are folders; what lies in any other folder may be a user's."""
LEFT_BY_SYSTEMS = (
    *REMADE_BY_SYSTEMS, ".apdisk", ".volumeicon.icns",
    ".spotlight-v100", ".fseventsd", ".documentrevisions-v100", ".temporaryitems", ".trash*",
    "$recycle.bin", "system volume information", "lost+found", "#recycle", "#snapshot", ".snapshot*", ".zfs",
    "..*", ".*.icloud",
    ".stfolder*", ".stversions", ".stignore", ".sync*", ".dropbox*", ".owncloud*", ".nextcloud*",
    ".git*", ".hg*", ".svn", ".dvc*", ".huggingface", ".cache", ".ipynb_checkpoints", ".idea", ".vscode",
    "*~", "~$*", "#*#", ".#*", ".~lock.*", ".*.sw?",
)
# fmt: on
"""Names, in lower case, of files and folders that are plainly no content of a bundle: what file managers,
network file systems and Kubernetes (``..data``), synchronisation, version control, download caches, notebooks
and editors leave beside its files. They are never read. Another hidden file is refused: nobody knows it."""

UNFINISHED = re.compile(rf"(.*/)?\.[^/]+\.[0-9a-f]{{8}}{re.escape(TEMPORARY)}")
"""Matches the name of a file that a writer of ours has not finished."""
UNNAMED = re.compile(rf"{ENGINES}/(engine-([0-9a-f]{{12}})\.plan|report-([0-9a-f]{{12}})\.(md|json))")
"""Matches the name of an engine or a report that ``cmt-build`` wrote: it holds the begin of the file's
SHA-256. A power loss may leave such files before the manifest names them."""
OWN_ENTRIES = frozenset({"checksum", "files", "preprocess"})
"""Entries that every manifest of ours has, and that of no other program."""
SHOWN_FOREIGN = 5
"""The largest number of files of others that a message lists."""


def find_extra(path: Path, listed: Collection[str]) -> list[str]:
    """Files and links in the bundle at ``path`` that neither its manifest lists nor a system or a writer of
    ours left."""
    known = _list_known(path, listed)
    return sorted(name for name in walk(path, LEFT_BY_SYSTEMS) if not _belongs(name, known, LEFT_BY_SYSTEMS))


def find_foreign(path: Path, listed: Collection[str]) -> list[str]:
    """Files, links and folders in the bundle at ``path`` that are none of ours and would be missed; of a
    folder that holds nothing of ours, only its own name.

    A file that is only called like an engine or a report of ours is not ours.

    Raises ``OSError`` where a folder or such a file cannot be looked into.
    """
    ours = {name for name in list_leftovers(path, listed) if is_certainly_ours(path, name)}
    known = {*listed, MANIFEST, SIGNATURE} | ours
    folders = {str(parent) for name in known for parent in PurePosixPath(name).parents}
    found = set()
    for name in walk(path, FOLDERS_OF_SYSTEMS, strictly=True):
        if not _belongs(name, known, REMADE_BY_SYSTEMS):
            parents = [str(parent) for parent in PurePosixPath(name).parents]
            others = [parent for parent in parents if parent not in (*folders, ".")]
            found.add(f"{others[-1]}/" if others else name)
    return sorted(found)


def describe_foreign(names: Iterable[str]) -> str:
    """The first :data:`SHOWN_FOREIGN` of some names, for a message."""
    names = list(names)
    shown = ", ".join(names[:SHOWN_FOREIGN])
    return shown if len(names) <= SHOWN_FOREIGN else f"{shown} and {len(names) - SHOWN_FOREIGN} more"


def list_leftovers(path: Path, listed: Collection[str]) -> set[str]:
    """Files that a power loss may leave: unfinished ones, and engines that the manifest was to name next.
    They are never read."""
    return {
        name
        for name in walk(path, LEFT_BY_SYSTEMS)
        if name not in listed
        and (UNFINISHED.fullmatch(name) or UNNAMED.fullmatch(name))
        and not (path / name).is_symlink()
    }


def is_certainly_ours(path: Path, name: str) -> bool:
    """Whether one of :func:`list_leftovers` was written by us: an engine's name is that of its content.

    Raises ``OSError`` where it cannot be read.
    """
    match = UNNAMED.fullmatch(name)
    if match is None:
        return UNFINISHED.fullmatch(name) is not None
    return hash_file(path / name).startswith(match[2] or match[3])


def read_listed(manifest: Path) -> set[str] | None:
    """The names of the files that a bundle's manifest lists, whole or damaged; ``None`` where ``manifest`` is
    none of ours: other programs have files of this name too."""
    try:
        data = read_regular(manifest, MAX_MANIFEST)
    except OSError:
        return None
    return parse_listed(data)


def parse_listed(data: bytes) -> set[str] | None:
    """As :func:`read_listed`, from the content of a file."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or not content.keys() >= OWN_ENTRIES:
        return None
    files = content["files"]
    return set(files) if isinstance(files, dict) else set()


def require_no_links(path: Path, names: Iterable[str]) -> None:
    """Raise :class:`OutputError` where a folder between the bundle at ``path`` and one of the files ``names``
    is a link: what is written or deleted there would lie outside the bundle."""
    for name in names:
        for parent in PurePosixPath(name).parents:
            if str(parent) != "." and (path / parent).is_symlink():
                raise OutputError(
                    f"{parent} is a link, and nothing of a bundle is written or deleted through a link",
                    where=path,
                    remedy="put a folder in its place, or copy the bundle with what links lead to: cp -rL",
                )


def walk(path: Path, tolerated: Collection[str] = (), strictly: bool = False) -> Iterator[str]:
    """Every file and link below ``path``, by its relative name.

    Args:
        path: a folder.
        tolerated: patterns of names; folders of such names are not entered.
        strictly: raise ``OSError`` for a folder that cannot be looked into, which is otherwise left out.
    """
    for folder, folders, files in os.walk(path, onerror=_fail if strictly else None):
        relative = Path(folder).relative_to(path)
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        plain = [name for name in folders if name not in links]
        folders[:] = [name for name in plain if not _matches(name, tolerated)]
        yield from ((relative / name).as_posix() for name in [*files, *links])


def _fail(error: OSError) -> NoReturn:
    raise error


def _list_known(path: Path, listed: Collection[str]) -> set[str]:
    return {*listed, MANIFEST, SIGNATURE} | list_leftovers(path, listed)


def _belongs(name: str, known: Collection[str], tolerated: Collection[str]) -> bool:
    """Whether a file or link is a member, a folder of members, or something that a system left."""
    if name in known or _matches(PurePosixPath(name).name, tolerated):
        return True
    return any(member.startswith(name + "/") for member in known)


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)
