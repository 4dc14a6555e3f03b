"""Class folders of labelled images, matched with a bundle's labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from ..bundle import LOGITS, Bundle
from ..errors import DataError, InputError

BY_NAME = "name the folders like the labels, or match them in sorted order with --by-order"
"""The remedy where class folders and labels do not match."""


class LabelledImages(Protocol):
    """A collection of images with labels, :class:`~cmt_edge.deploy.images.ImageSet` for instance.

    Each item has a ``name`` and a ``label``.
    """

    @property
    def path(self) -> object:
        """Where the images are, for messages."""
        ...

    @property
    def items(self) -> Sequence[Any]:
        """The images, in order."""
        ...

    @property
    def classes(self) -> list[str]:
        """Sorted labels; empty where there are none."""
        ...

    @property
    def has_numbers(self) -> bool:
        """Whether the labels are numbers of logits, and no names."""
        ...

    @property
    def note(self) -> str:
        """What was skipped, in words; empty if nothing was."""
        ...

    def read(self, item: Any) -> bytes:
        """The encoded bytes of one image."""
        ...


def match_labels(bundle: Bundle, data: LabelledImages, by_order: bool) -> dict[str, int]:
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
    if data.has_numbers:
        return _match_by_number(bundle, data, folders, by_order)
    return _match_by_order(bundle, data, folders) if by_order else _match_by_name(bundle, data, folders)


def _match_by_number(
    bundle: Bundle,
    data: LabelledImages,
    labels: Sequence[str],
    by_order: bool,
) -> dict[str, int]:
    """Labels that are numbers of logits already."""
    if by_order:
        raise DataError(
            "the labels are numbers of classes, which have an order already",
            where=data.path,
            remedy="leave out --by-order",
        )
    count = len(bundle.class_ids)
    beyond = [label for label in labels if not 0 <= int(label) < count]
    if beyond:
        raise DataError(
            f"the labels are numbers of classes, but the bundle's {count} classes lack {format_some(beyond)}",
            where=data.path,
            remedy="give the data that the bundle's model was trained for",
        )
    return {label: int(label) for label in labels}


def _match_by_order(
    bundle: Bundle,
    data: LabelledImages,
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
    data: LabelledImages,
    folders: Sequence[str],
) -> dict[str, int]:
    """By class id or readable name; a name that several classes have names none of them."""
    ids, names = bundle.class_ids, bundle.labels
    shared = [folder for folder in folders if _is_shared(folder, ids, names)]
    if shared:
        unique = len(set(ids)) == len(ids)
        raise DataError(
            f"several classes are called {format_some(shared)}",
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
            why=f"folders without a label: {format_some(unknown)}; labels: {format_some(labels)}",
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


def format_some(names: Sequence[str], count: int = 8) -> str:
    """The first ``count`` names, and how many more there are."""
    rest = len(names) - count
    more = f" and {rest} more" if rest > 0 else ""
    return ", ".join(names[:count]) + more
