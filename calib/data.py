"""Calibration images as batches: chosen with a seed, read lazily, fingerprinted by content."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cmt_edge.deploy.bundle.sections import ImagesEntry, SynthesisEntry
from cmt_edge.deploy.errors import DataError
from cmt_edge.deploy.images import ImageSet, Item, digest
from cmt_edge.deploy.preprocessing import NamedBytes, Preprocess, preprocess

from .generated import generate

GENERATED = "generated"
"""The name that asks for images made by :mod:`cmt_edge.calib.generated` instead of a folder."""
SYNTHETIC = "synthetic"
"""The name that asks for images made from the model by :mod:`cmt_edge.calib.synthetic`."""
DEFAULT_SIZE = 300
GENERATED_SEED = 20


@dataclass(frozen=True)
class CalibrationSet:
    """Chosen images.

    Attributes:
        source: what the user gave, for the manifest (a folder's last two parts, never a whole path).
        fingerprint: SHA-256 over the contents of the chosen images, in order.
        count: number of images.
        synthesis: of synthetic images, how they came about.
    """

    source: str
    fingerprint: str
    count: int
    synthesis: SynthesisEntry | None = None
    _images: ImageSet | None = field(default=None, repr=False)
    _blobs: tuple[bytes, ...] = field(default=(), repr=False)

    @classmethod
    def choose(cls, data: str | Path, size: int | None, spec: Preprocess, seed: int = 0) -> CalibrationSet:
        """``size`` images of ``data`` (default: 300, or all where there are fewer), the classes in equal
        parts.

        ``data`` is a folder, ``ARCHIVE.tar[/FOLDER]``, or ``"generated"``.

        Raises:
            DataError: no images, or fewer than asked for; ``"synthetic"``, whose images are made from a
                model.
        """
        if size is not None and size < 1:
            raise DataError(f"{size} calibration images were asked for", remedy="ask for 1 or more")
        if str(data) == GENERATED:
            blobs = tuple(generate(size or DEFAULT_SIZE, spec.size, seed=GENERATED_SEED + seed))
            return cls(GENERATED, fingerprint(map(digest, blobs)), len(blobs), _blobs=blobs)
        if str(data) == SYNTHETIC:
            raise DataError(
                "synthetic images are made from a model",
                remedy="call cmt_edge.calib.synthetic.synthetic_set(model, ...)",
            )
        images = ImageSet(data)
        if size is not None and size > len(images):
            raise DataError(
                f"holds {len(images)} images, {size} were asked for",
                where=data,
                remedy=f"give more images, or --calib-size {len(images)}",
            )
        chosen = images.select(_spread(images.items, min(size or DEFAULT_SIZE, len(images)), seed))
        total = fingerprint(digest(chosen.read(item)) for item in chosen)
        return cls("/".join(Path(data).parts[-2:]), total, len(chosen), _images=chosen)

    def batches(self, spec: Preprocess) -> Iterator[np.ndarray]:
        """Each image as float32 ``(1, 3, S, S)``: calibration never depends on the export's batch size."""
        for blob, name in self._encoded():
            yield preprocess(NamedBytes(blob, name), spec)[None]

    def _encoded(self) -> Iterator[tuple[bytes, str]]:
        if self._images is None:
            yield from ((blob, f"{self.source} image {i}") for i, blob in enumerate(self._blobs))
        else:
            yield from ((self._images.read(item), item.name) for item in self._images)

    def __len__(self) -> int:
        return self.count

    def describe(self) -> ImagesEntry:
        """For the manifest."""
        return ImagesEntry(
            source=self.source,
            images=self.count,
            fingerprint=self.fingerprint,
            synthesis=self.synthesis,
        )


def _spread(items: list[Item], count: int, seed: int) -> list[Item]:
    """``count`` items, shuffled with ``seed``, taking the classes in turn."""
    rng = random.Random(seed)
    by_class: dict[str | None, list[Item]] = {}
    for item in items:
        by_class.setdefault(item.label, []).append(item)
    groups = list(by_class.values())
    for group in groups:
        rng.shuffle(group)
    chosen: list[Item] = []
    while len(chosen) < count:
        for group in groups:
            if group and len(chosen) < count:
                chosen.append(group.pop())
    return chosen


def fingerprint(digests: Iterable[str]) -> str:
    """One hex SHA-256 of many."""
    total = hashlib.sha256()
    for one in digests:
        total.update(one.encode())
    return total.hexdigest()
