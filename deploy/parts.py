"""Which folders and files hold parts of a data set, as ``train`` and ``test``, by their names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

TRAIN, VALIDATION, TEST = "train", "validation", "test"
"""The kinds of parts."""

STRONG = {
    "train": TRAIN,
    "training": TRAIN,
    "trainval": TRAIN,
    "trn": TRAIN,
    "val": VALIDATION,
    "validation": VALIDATION,
    "test": TEST,
    "testing": TEST,
    "tst": TEST,
    "eval": TEST,
    "evaluation": TEST,
    "holdout": TEST,
}
"""Words, in lower case, that name a part and hardly ever anything else -> its kind."""

WEAK = {
    "tr": TRAIN,
    "valid": VALIDATION,
    "dev": VALIDATION,
    "te": TEST,
    "held": TEST,
    "unseen": TEST,
    "private": TEST,
}
"""Words, in lower case, that may as well name a class or a language -> the kind of part that they name where
a word of :data:`STRONG` names a folder beside them, or where all folders are parts."""

# fmt: off
FILLERS = frozenset((
    "set", "sets", "data", "dataset", "images", "image", "imgs", "img", "jpg", "jpeg", "png", "split",
    "part", "folder", "files", "public", "out", "final", "full", "all", "new", "old", "my", "the", "of",
    "small", "mini", "tiny", "large", "big", "cropped", "crop", "aligned", "resized", "labeled", "labelled",
    "original", "orig", "augmented", "aug", "clean", "extra", "version", "ver", "v",
    "tar", "shard", "shards", "parquet",
))
# fmt: on
"""Words, in lower case, that do not change which part a name means; single letters do not, either."""

COMPOUNDS = ("dataset", "images", "image", "split", "data", "imgs", "set")
"""Endings that are written together with a word, as in ``trainset``."""

WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
"""One word of a name: words end at a change of case, a digit, or anything else that is no letter."""

PREFIX = re.compile(
    rf"({'|'.join(sorted(STRONG, key=len, reverse=True))})(?:{'|'.join(COMPOUNDS)})?[^a-z]",
    re.IGNORECASE,
)
"""The start of the name of a file that belongs to a part, as ``train_0.jpg``."""


@dataclass(frozen=True)
class _Meaning:
    """What a folder's name says.

    Attributes:
        kind: of the part.
        weak: whether the name may as well be that of a class.
        rest: its words that have nothing to do with parts, as ``cats`` of ``cats_train``.
    """

    kind: str
    weak: bool
    rest: frozenset[str]


def find_parts(names: Iterable[str]) -> dict[str, list[str]]:
    """The folders that hold parts of a data set, by kind: ``"train"``, ``"validation"`` and ``"test"``.

    A folder counts only where another part lies beside it, because a class may be called "train". Parts may
    lie in several folders, as in ``cat/train, cat/test, dog/train, dog/test``; parts inside a part do not
    count.

    Args:
        names: paths of files below the data set, with ``/``.
    """
    found: dict[str, list[str]] = {}
    known: set[PurePosixPath] = set()
    for parent, folders, _ in _iterate_siblings(names):
        if not known.isdisjoint((parent, *parent.parents)):
            continue
        kinds = _find_kinds(folders)
        if len(set(kinds.values())) > 1:
            for folder, kind in kinds.items():
                known.add(parent / folder)
                found.setdefault(kind, []).append(str(parent / folder))
    return found


def find_held_out(names: Iterable[str]) -> list[str]:
    """The folders that hold a part for testing or validation where no folder beside them says that it holds
    the part to train on, as ``test`` in ``test, extra``. Arguments as for :func:`find_parts`."""
    found: list[str] = []
    for parent, folders, has_files in _iterate_siblings(names):
        kinds = {
            folder: meant.kind
            for folder in folders
            if (meant := _find_meaning(folder)) is not None and not meant.weak and not meant.rest
        }
        others = has_files or len(kinds) < len(folders)
        different = set(kinds.values())
        if others and len(different) == 1 and TRAIN not in different:
            found += [str(parent / folder) for folder in kinds]
    return found


def find_prefixes(names: Iterable[str]) -> dict[str, str]:
    """Kind of part -> the start of the names of its files, where one folder holds files of several parts, as
    ``train_0.jpg`` and ``test_0.jpg``; otherwise empty. Arguments as for :func:`find_parts`."""
    by_folder: dict[str, dict[str, str]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        if start := PREFIX.match(file):
            kind = STRONG[start[1].lower()]
            by_folder.setdefault(folder, {}).setdefault(kind, start[0])
    several = [kinds for _, kinds in sorted(by_folder.items()) if len(kinds) > 1]
    return next(iter(several), {})


def find_part_kind(folder: str) -> str | None:
    """The kind of part that a folder's name can mean, whatever lies beside it; ``None`` for others."""
    meant = _find_meaning(folder)
    return None if meant is None else meant.kind


def _iterate_siblings(names: Iterable[str]) -> Iterator[tuple[PurePosixPath, list[str], bool]]:
    """Each folder, the outer ones first, with the names of the folders in it, and whether it has files."""
    with_files = {PurePosixPath(name).parent for name in names}
    inside: dict[PurePosixPath, set[str]] = {}
    for folder in with_files:
        for inner in (folder, *folder.parents):
            if inner.name:
                inside.setdefault(inner.parent, set()).add(inner.name)
    for parent in sorted(inside, key=lambda folder: (len(folder.parts), str(folder))):
        yield parent, sorted(inside[parent]), parent in with_files


def _find_kinds(folders: list[str]) -> dict[str, str]:
    """The folders of one parent that are parts -> their kinds."""
    meant = {folder: meaning for folder in folders if (meaning := _find_meaning(folder)) is not None}
    paired = {
        folder: meaning
        for folder, meaning in meant.items()
        if not meaning.rest
        or any(other.kind != meaning.kind and other.rest == meaning.rest for other in meant.values())
    }
    weak = all(meaning.weak for meaning in paired.values())
    if weak and len(paired) != len(folders):
        return {}
    return {folder: meaning.kind for folder, meaning in paired.items()}


def _find_meaning(folder: str) -> _Meaning | None:
    """What a name says of parts; ``None`` if nothing."""
    words = [_strip_ending(word.lower()) for word in WORD.findall(folder)]
    strong = [STRONG[word] for word in words if word in STRONG]
    weak = [WEAK[word] for word in words if word in WEAK]
    kinds = strong or weak
    if not kinds:
        return None
    known = {*STRONG, *WEAK, *FILLERS}
    rest = {word for word in words if word not in known and len(word) > 1}
    kind = next(known for known in (TRAIN, VALIDATION, TEST) if known in kinds)
    return _Meaning(kind, not strong, frozenset(rest))


def _strip_ending(word: str) -> str:
    """``train`` for ``trainset``; other words as they are."""
    for ending in COMPOUNDS:
        start = word.removesuffix(ending)
        if start != word and start in STRONG | WEAK:
            return start
    return word
