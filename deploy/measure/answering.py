"""What a bundle and its reference answer to labelled images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backends import LoadOptions, has_runtime
from ..bundle import REFERENCE, Bundle
from ..decoding import NamedBytes
from ..errors import RuntimeMissingError
from ..images import choose_evenly, hash_image
from ..predictor import Predictor
from ..preprocessing import preprocess
from .labels import LabelledImages, match_labels

CHUNK_IMAGES = 16
"""Labelled images that go through both sides at once, at least."""

NO_REFERENCE_REMEDY = (
    "verify on the exporting machine, pass --reference BUNDLE (an fp32 bundle), or leave --data out"
)
"""The remedy where nothing here knows the reference's answers."""


@dataclass(frozen=True)
class Labelled:
    """The images that are compared; ``truth`` holds their labels, int ``(N,)``."""

    data: LabelledImages
    items: list[Any]
    truth: np.ndarray

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        data: LabelledImages,
        by_order: bool,
        limit: int | None,
    ) -> Labelled:
        targets = match_labels(bundle, data, by_order)
        items = choose_evenly(data.items, limit)
        truth = np.array([targets[item.label] for item in items if item.label is not None])
        return cls(data, items, truth)


@contextmanager
def open_reference(
    given: Predictor | None,
    bundle: Bundle,
    labelled: Labelled,
    options: LoadOptions,
) -> Iterator[Predictor | None]:
    """The ``given`` reference, ``None`` if the bundle recorded the reference's answers for all images, else
    the PyTorch model, which is closed at the end."""
    if given is not None or _is_recorded(bundle, labelled):
        yield given
        return
    if not has_runtime("torch"):
        raise make_no_reference_error(bundle)
    with Predictor.load(
        bundle,
        backend="torch",
        weights=options.weights,
        trusted_model=options.trusted_model,
        threads=options.threads,
    ) as predictor:
        yield predictor


def make_no_reference_error(bundle: Bundle) -> RuntimeMissingError:
    """The error where neither the bundle nor this machine knows the reference's answers."""
    slim = bundle.manifest.slim
    what, remedy = "the bundle recorded other ones", NO_REFERENCE_REMEDY
    if slim is not None and REFERENCE in slim.files:
        what = f"{REFERENCE} was left out of this slim bundle"
        remedy = f"verify the bundle that is exported without --slim, or {remedy}"
    return RuntimeMissingError(
        f"no reference for these images: {what} and PyTorch is not installed here",
        where=bundle.path,
        remedy=remedy,
    )


def _is_recorded(bundle: Bundle, labelled: Labelled) -> bool:
    recorded = bundle.reference()
    if not recorded:
        return False
    digests = (hash_image(labelled.data.read(item)) for item in labelled.items)
    return all(digest in recorded for digest in digests)


@dataclass(frozen=True)
class Answers:
    """Top-1 of bundle and reference, ``(N,)`` each, content digests, logit differences where both ran here,
    and where the reference's answers are from."""

    ours: np.ndarray
    theirs: np.ndarray
    digests: list[str]
    diffs: np.ndarray | None
    source: str

    @property
    def by_digest(self) -> dict[str, int]:
        """Content digest -> top-1 of the reference."""
        return dict(zip(self.digests, self.theirs.tolist(), strict=True))


def count_chunk(predictor: Predictor) -> int:
    """Number of labelled images that go through ``predictor`` at once."""
    return max(CHUNK_IMAGES, predictor.batch)


def run_both(
    predictor: Predictor,
    live: Predictor | None,
    bundle: Bundle,
    labelled: Labelled,
    progress: Callable[[int, int], None] | None,
) -> Answers:
    """Both sides over the images, a chunk at a time."""
    recorded = bundle.reference() if live is None else {}
    ours, theirs, diffs = [], [], []
    digests: list[str] = []
    items = labelled.items
    chunk = count_chunk(predictor)
    for start in range(0, len(items), chunk):
        part = items[start : start + chunk]
        blobs = [labelled.data.read(item) for item in part]
        names = [hash_image(blob) for blob in blobs]
        batch = _preprocess_all(bundle, part, blobs)
        logits = predictor.logits(batch)
        ours.append(logits.argmax(1))
        digests += names
        if live is None:
            theirs.append(np.array([recorded[name] for name in names]))
        else:
            expected = live.logits(batch)
            theirs.append(expected.argmax(1))
            diffs.append(np.abs(logits - expected))
        if progress:
            progress(min(start + chunk, len(items)), len(items))
    return Answers(
        np.concatenate(ours),
        np.concatenate(theirs),
        digests,
        np.concatenate(diffs) if diffs else None,
        "the bundle's record" if live is None else live.info.runtime,
    )


def _preprocess_all(bundle: Bundle, items: Sequence[Any], blobs: Sequence[bytes]) -> np.ndarray:
    """Encoded images as a batch, float32 ``(N, 3, S, S)``; errors name the image."""
    pairs = zip(blobs, items, strict=True)
    named = [NamedBytes(blob, item.name) for blob, item in pairs]
    return np.stack([preprocess(image, bundle.preprocess) for image in named])
