"""Class folders of labelled images, matched with a bundle's labels."""

from __future__ import annotations

from collections.abc import Sequence

from ..bundle import LOGITS, Bundle
from ..errors import DataError, InputError
from ..images import ImageSet

BY_NAME = "name the folders like the labels, or match them in sorted order with --by-order"
"""The remedy where class folders and labels do not match."""


def match_labels(bundle: Bundle, data: ImageSet, by_order: bool) -> dict[str, int]:
    """Class folder -> logit index, by class id or readable name, or in sorted order.

    Raises:
        InputError: the bundle gives feature maps.
        DataError: the images have no class folders, or folders and labels do not match; shows both sides.
    """
    if bundle.head != LOGITS:
        raise InputError(
            "feature maps have no top-1",
            where=bundle.path,
            remedy="leave the images out, or export with --head logits",
        )
    folders = data.classes
    if not folders:
        raise DataError(
            "the images are not in class folders, so top-1 cannot be measured",
            where=data.path,
            remedy="sort them into one folder a class, or leave --data out",
        )
    return _match_by_order(bundle, data, folders) if by_order else _match_by_name(bundle, data, folders)


def _match_by_order(
    bundle: Bundle,
    data: ImageSet,
    folders: Sequence[str],
) -> dict[str, int]:
    count = len(bundle.class_ids)
    if len(folders) != count:
        raise DataError(
            f"{len(folders)} class folders for {count} labels",
            where=data.path,
            remedy=BY_NAME,
        )
    return {folder: i for i, folder in enumerate(folders)}


def _match_by_name(
    bundle: Bundle,
    data: ImageSet,
    folders: Sequence[str],
) -> dict[str, int]:
    """By class id or readable name; a name that several classes have names none of them."""
    ids, names = bundle.class_ids, bundle.labels
    shared = [folder for folder in folders if _is_shared(folder, ids, names)]
    if shared:
        unique = len(set(ids)) == len(ids)
        raise DataError(
            f"several classes are called {_format_some(shared)}",
            where=data.path,
            remedy="name the folders by class id"
            if unique
            else "export with labels that differ, and name the folders after them",
        )
    known = {name: i for i, name in enumerate(names)}
    known |= {cid: i for i, cid in enumerate(ids)}
    unknown = [f for f in folders if f not in known]
    if unknown:
        pairs = zip(ids, names, strict=True)
        labels = [name if name == cid else f"{cid} ({name})" for cid, name in pairs]
        raise DataError(
            "class folders do not match the bundle's labels",
            where=data.path,
            why=f"folders without a label: {_format_some(unknown)}; labels: {_format_some(labels)}",
            remedy=BY_NAME,
        )
    return {f: known[f] for f in folders}


def _is_shared(
    folder: str,
    ids: Sequence[str],
    names: Sequence[str],
) -> bool:
    """Whether a folder's name is that of several classes."""
    if folder in ids:
        return ids.count(folder) > 1
    return names.count(folder) > 1


def _format_some(names: Sequence[str], count: int = 8) -> str:
    rest = len(names) - count
    more = f" and {rest} more" if rest > 0 else ""
    return ", ".join(names[:count]) + more
