"""Calibration images as batches: chosen with a seed, read lazily, fingerprinted by content."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from cmt_edge.deploy.bundle.sections import ImagesEntry, SynthesisEntry
from cmt_edge.deploy.decoding import NamedBytes
from cmt_edge.deploy.errors import DataError
from cmt_edge.deploy.folders import Item
from cmt_edge.deploy.images import ImageSet, digest
from cmt_edge.deploy.preprocessing import Preprocess, preprocess

from .generated import generate

GENERATED = "generated"
"""The name that asks for images made by :mod:`cmt_edge.calib.generated` instead of a folder."""

SYNTHETIC = "synthetic"
"""The name that asks for images made from the model by :mod:`cmt_edge.calib.synthetic`."""

DEFAULT_COUNT = 300
"""Number of images unless another one is asked for."""

PICTURES = frozenset({"images", "image", "imgs", "img", "jpegimages", "leftimg8bit"})
"""Names, in lower case, of the folder that holds the pictures of a data set with masks."""

MASKS = frozenset(
    {
        "masks",
        "mask",
        "labels",
        "label",
        "annotations",
        "annotation",
        "annots",
        "gt",
        "gtfine",
        "groundtruth",
        "ground_truth",
        "segmentation",
        "segmentations",
        "segmentationclass",
        "segmentationobject",
        "trimaps",
    }
)
"""Names, in lower case, of folders beside the pictures that hold images of what is to be found in them."""

GENERATED_SEED = 20
"""Seed of generated images; the seed that is asked for is added to it."""


@dataclass(frozen=True)
class CalibrationSet:
    """Chosen images.

    Attributes:
        source: what the user gave, for the manifest (a folder's last two parts, never a whole path).
        fingerprint: SHA-256 over the contents of the chosen images, in order.
        count: number of images.
        synthesis: how synthetic images were made; ``None`` for others.
        files: images that are read when they are needed.
        note: what was skipped in their folder, in words; empty if nothing was.
        blobs: encoded images in memory, where there are no files.
    """

    source: str
    fingerprint: str
    count: int
    synthesis: SynthesisEntry | None = None
    files: ImageSet | None = field(default=None, repr=False)
    blobs: tuple[bytes, ...] = field(default=(), repr=False)
    note: str = field(default="", repr=False)

    @classmethod
    def choose(
        cls,
        data: str | Path,
        size: int | None,
        spec: Preprocess,
        seed: int = 0,
    ) -> CalibrationSet:
        """Choose images; each folder gives the same number, as far as it has them.

        Labels do not matter here: folders may be nested in any way, and images may lie beside them. Where
        ``images/`` lies beside ``masks/``, ``labels/`` or the like, only the pictures are taken.

        Args:
            data: a folder, ``ARCHIVE.tar[/FOLDER]``, or ``"generated"``.
            size: number of images (default: 300, or all where there are fewer).
            spec: the model's preprocessing.
            seed: of the choice, and of generated images.

        Raises:
            DataError: ``data`` has no images, or fewer than asked for; it holds several parts of a data set,
                as ``train`` and ``test``; or it is ``"synthetic"``, whose images need a model.
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
                remedy="call cmt_edge.calib.synthetic.synthetic_set(model, ...)",
            )
        return cls._choose_files(data, size, seed)

    @classmethod
    def _choose_files(cls, data: str | Path, size: int | None, seed: int) -> CalibrationSet:
        """Images of a folder or an archive; see :meth:`choose`."""
        images = _without_masks(ImageSet(data, labelled=False))
        _require_one_part(images)
        if size is not None and size > len(images):
            raise DataError(
                f"holds {len(images)} images, {size} were asked for",
                where=data,
                remedy=f"give more images, or --calib-size {len(images)}",
            )
        count = min(size or DEFAULT_COUNT, len(images))
        chosen = images.select(_spread(images.items, count, seed))
        total = combine_digests(digest(chosen.read(item)) for item in chosen)
        return cls(
            "/".join(Path(data).parts[-2:]),
            total,
            len(chosen),
            files=chosen,
            note=images.note,
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
        return cls(
            source,
            combine_digests(map(digest, blobs)),
            len(blobs),
            synthesis,
            blobs=blobs,
        )

    def batches(self, spec: Preprocess) -> Iterator[np.ndarray]:
        """Each image as float32 ``(1, 3, S, S)``, so that calibration never depends on the export's batch
        size."""
        for blob, name in self._encoded():
            yield preprocess(NamedBytes(blob, name), spec)[None]

    def _encoded(self) -> Iterator[tuple[bytes, str]]:
        """Each image as in its file, with a name for messages."""
        if self.files is None:
            for i, blob in enumerate(self.blobs):
                yield blob, f"{self.source} image {i}"
        else:
            for item in self.files:
                yield self.files.read(item), item.name

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


def _without_masks(images: ImageSet) -> ImageSet:
    """The pictures of a data set for segmentation: masks are images, too, but no model will see any."""
    folders = {inner for item in images for inner in PurePosixPath(item.name).parents if inner.name}
    beside = {folder.parent for folder in folders if folder.name.lower() in PICTURES}
    masks = {folder for folder in folders if folder.name.lower() in MASKS and folder.parent in beside}
    if not masks:
        return images
    kept = [item for item in images if masks.isdisjoint(PurePosixPath(item.name).parents)]
    pictures = images.select(kept)
    names = ", ".join(f"{folder}/" for folder in sorted(masks))
    pictures.skipped = images.skipped + Counter({f"in {names} beside the pictures": len(images) - len(kept)})
    return pictures


def _require_one_part(images: ImageSet) -> None:
    """Raise :class:`DataError` for a data set with several parts: whoever calibrates on the part that tests,
    measures too well."""
    parts = images.parts
    if not parts:
        return
    found = ", ".join(f"{name} ({kind})" for kind, names in sorted(parts.items()) for name in names)
    best = (parts.get("train") or parts.get("validation") or [""])[0]
    raise DataError(
        f"holds several parts of a data set: {found}",
        where=images.path,
        why="calibration on the images that test a model makes it look better than it is",
        remedy=f"give the part to train on: {images.path / best}",
    )


def _spread(items: list[Item], count: int, seed: int) -> list[Item]:
    """``count`` items, shuffled with ``seed``; the folders take turns."""
    rng = random.Random(seed)
    by_folder: dict[PurePosixPath, list[Item]] = {}
    for item in items:
        by_folder.setdefault(PurePosixPath(item.name).parent, []).append(item)
    groups = list(by_folder.values())
    for group in groups:
        rng.shuffle(group)
    chosen: list[Item] = []
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
