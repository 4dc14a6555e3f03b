"""What decoding JPEG images at a part of their size changes, and the gate for it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from cmt_edge.calib import CalibrationSet
from cmt_edge.deploy import Preprocess
from cmt_edge.deploy.backends.torch import TorchSession
from cmt_edge.deploy.bundle import LOGITS
from cmt_edge.deploy.bundle.sections import DecodingEntry
from cmt_edge.deploy.decoding import NamedBytes, decode_at_least
from cmt_edge.deploy.errors import GateError
from cmt_edge.deploy.images import choose_evenly
from cmt_edge.deploy.measure.statistics import compute_paired_drop
from cmt_edge.deploy.preprocessing import decode_pixels, make_least_size, normalise

from ..config import ExportConfig
from .reference import Evaluation, Reference

CHECKED_IMAGES = 256
"""The largest number of given images that are compared: each is decoded twice and answered twice."""

ANSWERED_AT_ONCE = 16
"""Images of a batch of the reference."""

MOST_GREY_LEVELS = 1.0
"""Allowed mean difference of the pixels after resizing. Photographs of a camera differ by 0.3, and by 0.8 the
one that differs most (``benchmarks/photographs.py``)."""

MOST_DEVIATIONS = 0.05
"""Allowed mean difference of the outputs in their standard deviations: about what int8 may change."""

ProgressCallback = Callable[[int, int], None]
"""Called with how many are done, and of how many."""


@dataclass(frozen=True)
class _Source:
    """An encoded image; ``target``: the class that its label names, where it has one."""

    image: NamedBytes
    target: int | None = None


@dataclass(frozen=True)
class _Decoded:
    """How many images there are; those of them that are reduced, ``(N, S, S, 3)`` uint8 after resizing and
    cropping, decoded in full and reduced; and the class of each, where it is known."""

    images: int
    full: np.ndarray
    reduced: np.ndarray
    targets: list[int | None]


def compare_decoding(
    config: ExportConfig,
    reference: Reference,
    evaluation: Evaluation | None,
    data: CalibrationSet | None,
    progress: ProgressCallback,
) -> DecodingEntry:
    """Compare the reference's answers to images that are decoded as ``config`` asks for with those to the
    same images decoded in full.

    The images are those for evaluation, or else those for calibration, and the golden photograph.

    Raises:
        GateError: the difference is larger than allowed.
    """
    found = _decode_both(_choose_sources(config, reference, evaluation, data), config.preprocess)
    difference = np.abs(found.reduced.astype(np.int16) - found.full)
    answers = _answer(reference, normalise(found.reduced, config.preprocess), progress)
    expected = _answer(reference, normalise(found.full, config.preprocess), progress)
    entry = DecodingEntry(
        images=found.images,
        reduced=len(found.reduced),
        pixel_mean=float(difference.mean()),
        pixel_max=float(difference.max()),
        output_mean=max(map(_compare_outputs, answers, expected)),
    )
    if config.head == LOGITS:
        entry = _add_top1(entry, answers[0].argmax(1), expected[0].argmax(1), found.targets)
    require_faithful(entry, config.allowed_drop)
    return entry


def _choose_sources(
    config: ExportConfig,
    reference: Reference,
    evaluation: Evaluation | None,
    data: CalibrationSet | None,
) -> Iterator[_Source]:
    """The golden photograph, and up to :data:`CHECKED_IMAGES` of the images that were given."""
    yield _Source(NamedBytes(reference.golden.sources[-1], "the golden photograph"))
    if evaluation is not None:
        images = evaluation.images
        for item in choose_evenly(images.items, min(CHECKED_IMAGES, config.eval_limit or CHECKED_IMAGES)):
            target = None if item.label is None else evaluation.targets[item.label]
            yield _Source(NamedBytes(images.read(item), item.name), target)
    elif data is not None:
        every = math.ceil(len(data) / CHECKED_IMAGES)
        for blob, name in itertools.islice(data.encoded(), 0, None, every):
            yield _Source(NamedBytes(blob, name))


def is_reduced(image: NamedBytes, spec: Preprocess) -> bool:
    """Whether an image is decoded at a part of its size."""
    return decode_at_least(image, spec.exif, least=make_least_size(spec, image)).box is not None


def _decode_both(sources: Iterable[_Source], spec: Preprocess) -> _Decoded:
    """The images that are large enough to be reduced, decoded in both ways; one is held at a time."""
    count = 0
    full, reduced, targets = [], [], []
    for source in sources:
        count += 1
        if is_reduced(source.image, spec):
            reduced.append(decode_pixels(source.image, spec))
            full.append(decode_pixels(source.image, replace(spec, decode="full")))
            targets.append(source.target)
    return _Decoded(count, np.stack(full), np.stack(reduced), targets)


def _answer(
    reference: Reference,
    batch: np.ndarray,
    progress: ProgressCallback,
) -> list[np.ndarray]:
    """The reference's outputs, float32 ``(N, ...)`` each."""
    session = TorchSession(reference.model)
    parts = []
    for start in range(0, len(batch), ANSWERED_AT_ONCE):
        parts.append(session.run(batch[start : start + ANSWERED_AT_ONCE]))
        progress(min(start + ANSWERED_AT_ONCE, len(batch)), len(batch))
    return [np.concatenate(output) for output in zip(*parts, strict=True)]


def _compare_outputs(found: np.ndarray, expected: np.ndarray) -> float:
    """Mean difference in standard deviations of what is expected."""
    spread = float(expected.std(dtype=np.float64))
    return float(np.abs(found - expected).mean(dtype=np.float64)) / max(spread, 1e-30)


def _add_top1(
    entry: DecodingEntry,
    answers: np.ndarray,
    expected: np.ndarray,
    targets: Iterable[int | None],
) -> DecodingEntry:
    """The entry with the shares of equal and of right answers."""
    entry = replace(entry, agreement=100 * float((answers == expected).mean()))
    labelled = [(i, target) for i, target in enumerate(targets) if target is not None]
    if not labelled:
        return entry
    rows, truth = map(np.array, zip(*labelled, strict=True))
    drop = compute_paired_drop(expected[rows] == truth, answers[rows] == truth)
    return replace(entry, drop=drop.mean, drop_ci=(drop.interval.low, drop.interval.high))


def require_faithful(entry: DecodingEntry, max_drop: float) -> None:
    """Raise :class:`~cmt_edge.deploy.errors.GateError` where reduced decoding changes too much."""
    faults = []
    if entry.pixel_mean > MOST_GREY_LEVELS:
        faults.append(
            f"pixels differ by {entry.pixel_mean:.2f} grey levels on average (allowed {MOST_GREY_LEVELS:g})"
        )
    if not entry.output_mean <= MOST_DEVIATIONS:
        faults.append(
            f"outputs differ by {entry.output_mean:.3f} standard deviations on average (allowed"
            f" {MOST_DEVIATIONS:g})"
        )
    if entry.drop is not None and entry.drop > max_drop:
        faults.append(f"top-1 drops by {entry.drop:.2f} points (allowed {max_drop:g})")
    if faults:
        raise GateError(
            f"reduced decoding changes {entry.reduced} of {entry.images} images by more than allowed",
            why="; ".join(faults),
            remedy="nothing was written; use --decode full, or a larger --reducing-gap",
        )
