"""Calibration images as batches: chosen with a seed, read lazily, fingerprinted by content."""

from __future__ import annotations

import hashlib
import posixpath
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath

import numpy as np

from cmt_edge.deploy.bundle.sections import ImagesEntry, SynthesisEntry
from cmt_edge.deploy.decoding import NamedBytes
from cmt_edge.deploy.errors import DataError
from cmt_edge.deploy.folders import MASKS
from cmt_edge.deploy.images import hash_image
from cmt_edge.deploy.parts import TRAIN, VALIDATION, find_held_out, find_prefixes
from cmt_edge.deploy.preprocessing import Preprocess, preprocess
from cmt_edge.deploy.scale.records import Record
from cmt_edge.deploy.scale.sources import Source, is_collection, open_source

from .generated import generate

GENERATED = "generated"
"""The name that asks for images made by :mod:`cmt_edge.calib.generated` instead of a folder."""

SYNTHETIC = "synthetic"
"""The name that asks for images made from the model by :mod:`cmt_edge.calib.synthetic`."""

DEFAULT_COUNT = 300
"""Number of images unless another one is asked for."""

PICTURES = frozenset({"images", "image", "imgs", "img", "jpegimages", "leftimg8bit"})
"""Names, in lower case, of the folder that holds the pictures of a data set with masks."""

SHOWN_PARTS = 8
"""The largest number of parts of a data set that a message names."""

GENERATED_SEED = 20
"""Seed of generated images; the seed that is asked for is added to it."""


@dataclass(frozen=True)
class CalibrationSet:
    """Chosen images.

    Attributes:
        source: what the user gave, for the manifest (the last two parts of a path or URL, never all of it).
        fingerprint: SHA-256 over the contents of the chosen images, in order.
        count: number of images.
        synthesis: how synthetic images were made; ``None`` for others.
        files: where the images lie; they are read when they are needed.
        note: what was skipped in their folder, in words; empty if nothing was.
        blobs: encoded images in memory, where there are no files, and of tables.
        digests: of the contents of each image.
    """

    source: str
    fingerprint: str
    count: int
    synthesis: SynthesisEntry | None = None
    files: Source | None = field(default=None, repr=False)
    blobs: tuple[bytes, ...] = field(default=(), repr=False)
    note: str = field(default="", repr=False)
    digests: tuple[str, ...] = field(default=(), repr=False)

    @classmethod
    def choose(
        cls,
        data: str | Path,
        size: int | None,
        spec: Preprocess,
        seed: int = 0,
    ) -> CalibrationSet:
        """Choose images; each folder, or each label of shards and tables, gives the same number, as far as it
        has them.

        Labels need not be there: folders may be nested in any way, and images may lie beside them. Where
        ``images/`` lies beside ``masks/``, ``labels/`` or the like, only the pictures are taken. A folder
        such as ``test`` beside others is left out, with a note.

        The choice is among the images in the order of folder (or label) and name; of a table, of label and
        row. So the same images give the same choice wherever they lie, if that order is the same.

        Args:
            data: a path or URL of a folder, an archive, shards or tables, as
                :func:`~cmt_edge.deploy.scale.sources.open_source` takes it, or ``"generated"``.
            size: number of images (default: 300, or all where there are fewer).
            spec: the model's preprocessing.
            seed: of the choice, and of generated images.

        Raises:
            DataError: ``data`` has no images, or fewer than asked for; it holds several parts of a data set,
                as ``train`` and ``test`` or ``train_0.jpg`` and ``test_0.jpg``; or it is ``"synthetic"``,
                whose images need a model.
            RuntimeMissingError: it is a table or a URL, and pyarrow is not installed.
        """
        if size is not None and size < 1:
            raise DataError(
                f"{size} calibration images were asked for",
                remedy="ask for 1 or more",
            )
        if str(data) == GENERATED:
            blobs = generate(size or DEFAULT_COUNT, spec.size, seed=GENERATED_SEED + seed)
            return cls.of_blobs(GENERATED, blobs)
        if str(data) == SYNTHETIC:
            raise DataError(
                "synthetic images are made from a model",
                remedy="call cmt_edge.calib.synthetic.make_synthetic_set(model, ...)",
            )
        return cls._choose_files(data, size, seed)

    @classmethod
    def _choose_files(
        cls,
        data: str | Path,
        size: int | None,
        seed: int,
    ) -> CalibrationSet:
        """Images of a path or URL; see :meth:`choose`."""
        images = _drop_masks(open_source(data, labelled=False))
        _require_one_part(images)
        images = _drop_held_out(images)
        found = len(images.items)
        if size is not None and size > found:
            raise DataError(
                f"holds {found} images, {size} were asked for",
                where=images.path,
                remedy=f"give more images, or --calib-size {found}",
            )
        count = min(size or DEFAULT_COUNT, found)
        chosen = images.select(_choose_spread(images.items, count, seed))
        blobs = tuple(chosen.read_each(bytes)) if chosen.holds_tables else ()
        digests = tuple(map(hash_image, blobs) if blobs else chosen.read_each(hash_image))
        return cls(
            shorten_place(images.path),
            combine_digests(digests),
            count,
            files=chosen,
            note=images.note,
            blobs=blobs,
            digests=digests,
        )

    @classmethod
    def of_blobs(
        cls,
        source: str,
        images: Iterable[bytes],
        synthesis: SynthesisEntry | None = None,
    ) -> CalibrationSet:
        """A set of encoded images that are in memory."""
        blobs = tuple(images)
        digests = tuple(map(hash_image, blobs))
        return cls(
            source,
            combine_digests(digests),
            len(blobs),
            synthesis,
            blobs=blobs,
            digests=digests,
        )

    def batches(self, spec: Preprocess) -> Iterator[np.ndarray]:
        """Each image as float32 ``(1, 3, S, S)``, so that calibration never depends on the export's batch
        size."""
        for blob, name in self.encoded():
            yield preprocess(NamedBytes(blob, name), spec)[None]

    def encoded(self) -> Iterator[tuple[bytes, str]]:
        """Each image as in its file, with a name for messages."""
        return (self.read(number) for number in range(len(self)))

    def read(self, number: int) -> tuple[bytes, str]:
        """One image as in its file, with a name for messages."""
        if self.blobs or self.files is None:
            return self.blobs[number], self.name_image(number)
        return self.files.read(self.files.items[number]), self.name_image(number)

    def name_image(self, number: int) -> str:
        """What messages call an image."""
        return f"{self.source} image {number}" if self.files is None else self.files.items[number].name

    def __len__(self) -> int:
        return self.count

    def describe(self) -> ImagesEntry:
        """The manifest's entry."""
        return ImagesEntry(
            source=self.source,
            images=self.count,
            fingerprint=self.fingerprint,
            synthesis=self.synthesis,
        )


def shorten_place(path: str) -> str:
    """The last two parts of a path or URL."""
    return "/".join(PurePath(path.partition("://")[2] or path).parts[-2:])


def _drop_masks(images: Source) -> Source:
    """The pictures of a data set for segmentation: masks are images, too, but no model will see any."""
    folders = {inner for item in images.items for inner in PurePosixPath(item.name).parents if inner.name}
    beside = {folder.parent for folder in folders if folder.name.lower() in PICTURES}
    masks = {folder for folder in folders if folder.name.lower() in MASKS and folder.parent in beside}
    if not masks:
        return images
    kept = [item for item in images.items if masks.isdisjoint(PurePosixPath(item.name).parents)]
    names = ", ".join(f"{folder}/" for folder in sorted(masks))
    return images.select(kept, Counter({f"in {names} beside the pictures": len(images.items) - len(kept)}))


def _require_one_part(images: Source) -> None:
    """Raise :class:`DataError` for a data set with several parts: whoever calibrates on the part that tests,
    measures too well."""
    parts = images.parts
    if parts:
        folders = [f"{name} ({kind})" for kind, names in sorted(parts.items()) for name in names]
        raise _make_parts_error(images, folders, _choose_part(images, parts))
    prefixes = find_prefixes(item.name for item in images.items)
    if prefixes:
        files = [f"{start}* ({kind})" for kind, start in sorted(prefixes.items())]
        best = prefixes.get(TRAIN) or prefixes[VALIDATION]
        raise _make_parts_error(
            images,
            files,
            f"move the files {best}* into a folder of their own and give that folder",
        )


def _make_parts_error(
    images: Source,
    parts: Sequence[str],
    remedy: str,
) -> DataError:
    """The error for a data set whose images are not all to train on."""
    shown = list(parts[:SHOWN_PARTS])
    if len(parts) > SHOWN_PARTS:
        shown.append(f"{len(parts) - SHOWN_PARTS} more")
    return DataError(
        f"holds several parts of a data set: {', '.join(shown)}",
        where=images.path,
        why="calibration on the images that test a model makes it look better than it is",
        remedy=remedy,
    )


def _choose_part(images: Source, parts: Mapping[str, Sequence[str]]) -> str:
    """What to give instead of a data set with several parts."""
    best = parts.get(TRAIN) or parts[VALIDATION]
    if is_collection(best[0]):
        return f"put {best[0]} and the like into a folder of their own and give that folder"
    if len({PurePosixPath(name).parent for name in best}) == 1:
        return f"give the part to train on: {posixpath.join(images.path, best[0])}"
    return (
        f"no single folder holds all images to train on: copy or link {best[0]}, {best[1]} and so on into a"
        " folder of their own and give that folder"
    )


def _drop_held_out(images: Source) -> Source:
    """The images outside folders such as ``test``, where no folder beside them is the part to train on."""
    held_out = find_held_out(item.name for item in images.items)
    if not held_out:
        return images
    folders = {PurePosixPath(name) for name in held_out}
    kept = [item for item in images.items if folders.isdisjoint(PurePosixPath(item.name).parents)]
    names = ", ".join(f"{name}/" for name in held_out)
    return images.select(
        kept, Counter({f"in {names}, by name a part to test on": len(images.items) - len(kept)})
    )


def _rank(item: Record) -> tuple[str, str, int]:
    """Where an image stands among all: by its group and its name within it, so that it does not matter over
    which shards a class is spread; and by the row in its table."""
    name = "" if item.row >= 0 else posixpath.basename(item.name)
    return posixpath.join(item.group, name), item.file, item.row


def _choose_spread(
    items: Sequence[Record],
    count: int,
    seed: int,
) -> list[Record]:
    """``count`` items, shuffled with ``seed``; the groups take turns."""
    rng = random.Random(seed)
    by_group: dict[str, list[Record]] = {}
    for item in sorted(items, key=_rank):
        by_group.setdefault(item.group, []).append(item)
    groups = list(by_group.values())
    for group in groups:
        rng.shuffle(group)
    chosen: list[Record] = []
    while len(chosen) < count:
        for group in groups:
            if group and len(chosen) < count:
                chosen.append(group.pop())
    return chosen


def combine_digests(digests: Iterable[str]) -> str:
    """One SHA-256, in hex, of many."""
    total = hashlib.sha256()
    for one in digests:
        total.update(one.encode())
    return total.hexdigest()
