"""Is the bundle still the model? Golden vectors always; top-1 on labelled images where there are some."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from ..backends import LoadOptions
from ..bundle import GOLDEN, Bundle
from ..bundle.sections import (
    DataCheck,
    GoldenCheck,
    LayerError,
    LayerRun,
    RanOn,
    VerificationEntry,
)
from ..decoding import NamedBytes
from ..errors import BundleError, ImageError
from ..predictor import Predictor
from ..preprocessing import decode_pixels, normalise
from ..values import require_kind
from .answering import Answers, Labelled, open_reference, run_both
from .confusion import compare_classes, count_answers, count_flips
from .flipped import FlippedImage, choose_flipped, make_flipped
from .labels import LabelledImages
from .statistics import compute_paired_drop, compute_wilson_interval
from .tolerance import find_tolerance, measure_distance

MAX_DROP = 1.0
"""Default tolerance on top-1, percentage points."""

PIXEL_TOLERANCE = 2
"""Largest allowed difference of decoded and resized golden images, grey levels (library versions differ in
rounding)."""

LARGEST_DIFFERENCE = float(np.finfo(np.float32).max)
"""What stands for the difference of an output that is not finite: JSON has no number for infinity."""

DROP_ROUNDING_POINTS = 1e-9
"""Percentage points by which rounding may move a drop beyond the allowed one."""

SMALLEST_TOLERANCE = 1e-30
"""What a tolerance of 0 counts as where differences are compared with theirs."""

MANY_IMAGES = 30
"""Number of images from which the interval of the reference's top-1 is compared with chance."""


@dataclass(frozen=True)
class Verification:
    """The result of :func:`verify`."""

    bundle: str
    precision: str
    runtime: RanOn
    golden: GoldenCheck
    data: DataCheck | None = None
    notes: tuple[str, ...] = ()
    kind: str | None = None
    """What the output that differed most is, where it is no logits: probabilities or scores."""
    reference_answers: dict[str, int] = field(default_factory=dict, repr=False)
    """Content digest -> top-1 of the reference on ``data``; what a bundle records, but no report shows."""
    flipped: tuple[FlippedImage, ...] = field(default=(), repr=False)
    """Images with two answers, for a page; no manifest holds them."""
    layers: tuple[LayerError, ...] | None = None
    """The errors of the blocks, where they were compared."""
    layer_runs: tuple[LayerRun, ...] | None = None
    """What they say as a whole."""

    @property
    def passed(self) -> bool:
        return self.golden.passed and (self.data is None or self.data.passed)

    def entry(self, steps: dict[str, float] | None = None) -> VerificationEntry:
        """What manifests and reports hold; ``steps`` are the export's own checks, by name."""
        return VerificationEntry(
            bundle=self.bundle,
            precision=self.precision,
            runtime=self.runtime,
            golden=self.golden,
            data=self.data,
            notes=self.notes,
            passed=self.passed,
            steps=steps,
            layers=self.layers,
            layer_runs=self.layer_runs,
        )


def verify(
    bundle: Bundle,
    *,
    data: LabelledImages | None = None,
    by_order: bool = False,
    backend: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    reference: Predictor | None = None,
    weights: str | None = None,
    trusted_model: object = None,
    trusted_engine: bool = False,
    max_drop: float = MAX_DROP,
    atol: float | None = None,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    candidate: Predictor | None = None,
    flipped_images: int = 0,
    answer: Callable[[Predictor, Labelled], Answers] | None = None,
) -> Verification:
    """Check a bundle against the reference.

    >>> verify(Bundle.open("cmt_nano_fp32_openvino")).passed
    True

    Args:
        bundle: opened, so its hashes hold.
        data: images in class folders; without it only the golden vectors are checked.
        by_order: class folders match the labels in sorted order instead of by name.
        backend, device, threads, weights, trusted_model, trusted_engine: as
            :meth:`cmt_edge.deploy.Predictor.load`.
        reference: a Predictor of the reference; default: what the bundle recorded for these very images, else
            the PyTorch model rebuilt here, of ``weights`` and ``trusted_model``.
        max_drop: allowed loss of top-1 in percentage points.
        atol: allowed golden logit difference; default by precision, see ``tolerance.ATOL``.
        limit: the largest number of images to use, evenly spread.
        progress: called with images done and total.
        candidate: what to check instead of the bundle as its runtime opens it; it stays open.
        flipped_images: the largest number of images with two answers that the result keeps, made small.
        answer: what answers the labelled images for both sides, elsewhere; ``reference`` and ``progress`` are
            not used then. Default: this process.

    Raises:
        DataError: unlabelled images, or class folders that do not match the labels.
        InputError: images were given for a bundle of feature maps.
        RuntimeMissingError: images were given, but nothing here knows the reference's answers to them.
    """
    options = LoadOptions(device, threads, False, weights, trusted_model, trusted_engine)
    with _opened(candidate, bundle, backend, options) as predictor:
        found = _check_outputs(bundle, predictor, atol)
        if data is None:
            return found
        labelled = Labelled.of(bundle, data, by_order, limit)
        if answer is not None:
            answers = answer(predictor, labelled)
        else:
            with open_reference(reference, bundle, labelled, options) as live:
                answers = run_both(predictor, live, bundle, labelled, progress)
    flipped = _keep_flipped(labelled, answers, bundle, flipped_images)
    return replace(_judge(found, labelled.truth, answers, len(bundle.labels), max_drop), flipped=flipped)


def _keep_flipped(
    labelled: Labelled,
    answers: Answers,
    bundle: Bundle,
    limit: int,
) -> tuple[FlippedImage, ...]:
    """Up to ``limit`` images with two answers, made small."""
    sides = labelled.truth, answers.theirs, answers.ours

    def read(place: int) -> NamedBytes:
        item = labelled.items[place]
        return NamedBytes(labelled.data.read(item), item.name)

    return make_flipped(choose_flipped(*sides, limit), *sides, read, bundle.preprocess)


def _check_outputs(bundle: Bundle, predictor: Predictor, atol: float | None) -> Verification:
    """What the golden vectors tell of a bundle."""
    golden = check_golden(bundle, predictor, atol)
    kinds = {output.name: output.kind for output in bundle.manifest.outputs}
    return Verification(
        bundle.title,
        bundle.manifest.precision,
        predictor.info,
        golden,
        notes=tuple(predictor.session.notes),
        kind=kinds.get(golden.output),
    )


@contextmanager
def _opened(
    candidate: Predictor | None,
    bundle: Bundle,
    backend: str | None,
    options: LoadOptions,
) -> Iterator[Predictor]:
    """The ``candidate``, which stays open, or the bundle as its runtime opens it."""
    if candidate is not None:
        yield candidate
        return
    with Predictor.load(
        bundle,
        backend=backend,
        device=options.device,
        threads=options.threads,
        weights=options.weights,
        trusted_model=options.trusted_model,
        trusted_engine=options.trusted_engine,
        cache=False,
    ) as predictor:
        yield predictor


def _judge(
    found: Verification,
    truth: np.ndarray,
    answers: Answers,
    classes: int,
    max_drop: float,
) -> Verification:
    """``found`` with the check of the labelled images."""
    check = _compare(truth, answers, classes, max_drop)
    return replace(
        found,
        data=check,
        notes=(*found.notes, *_write_notes(check, truth, classes)),
        reference_answers=answers.by_digest,
    )


def check_golden(bundle: Bundle, predictor: Predictor, atol: float | None = None) -> GoldenCheck:
    """Check decoding, resizing and numerics on the golden images.

    Raises :class:`BundleError` where the golden outputs or the model's are no probabilities, though the
    manifest says so.
    """
    golden = bundle.golden()
    pixel_diff = _compare_pixels(bundle)
    ours = predictor.outputs(normalise(golden.pixels, bundle.preprocess))
    _require_shapes(bundle, ours, golden.outputs)
    kinds = [output.kind for output in bundle.manifest.outputs]
    for kind, found, expected in zip(kinds, ours, golden.outputs, strict=True):
        require_kind(expected, kind, bundle.path)
        require_kind(found, kind, bundle.path)
    compared = [
        _Difference(
            name,
            measure_distance(found, expected),
            find_tolerance(expected, bundle.manifest.precision, atol, kind, found),
        )
        for name, kind, found, expected in zip(bundle.outputs, kinds, ours, golden.outputs, strict=True)
    ]
    worst = max(compared, key=_Difference.rank)
    return GoldenCheck(
        images=len(golden.sources),
        pixel_diff=pixel_diff,
        diff=min(worst.found, LARGEST_DIFFERENCE),
        atol=worst.allowed,
        passed=pixel_diff <= PIXEL_TOLERANCE and worst.fits,
        output=worst.output,
    )


@dataclass(frozen=True)
class _Difference:
    """How far an output is from the golden one, and how far it may be."""

    output: str
    found: float
    allowed: float

    @property
    def fits(self) -> bool:
        return self.found <= self.allowed

    def rank(self) -> tuple[bool, float]:
        """What the worst output has the largest of: one that does not fit is worse than all that do."""
        return not self.fits, self.found / max(self.allowed, SMALLEST_TOLERANCE)


def _compare_pixels(bundle: Bundle) -> int:
    """Grey levels by which golden images that are decoded and resized here differ from the recorded ones."""
    golden = bundle.golden()
    try:
        images = [decode_pixels(source, bundle.preprocess) for source in golden.sources]
        decoded = np.stack(images)
    except ImageError as exc:
        raise BundleError(
            "holds a golden image that cannot be decoded",
            where=bundle.file(GOLDEN),
            why=exc.what if exc.why is None else f"{exc.what}: {exc.why}",
            remedy="copy the whole bundle again, or export it again",
        ) from exc
    differences = decoded.astype(np.int16) - golden.pixels
    return int(np.abs(differences).max())


def _require_shapes(
    bundle: Bundle,
    ours: Sequence[np.ndarray],
    expected: Sequence[np.ndarray],
) -> None:
    found, golden = ([output.shape for output in side] for side in (ours, expected))
    if found != golden:
        raise BundleError(
            f"the outputs' shapes are {found}, the golden ones' {golden}",
            where=bundle.path,
            remedy="export again",
        )


def _compare(truth: np.ndarray, answers: Answers, classes: int, max_drop: float) -> DataCheck:
    ours, theirs, diffs = answers.ours, answers.theirs, answers.diffs
    drop = compute_paired_drop(theirs == truth, ours == truth)
    return DataCheck(
        images=len(truth),
        top1=100 * float((ours == truth).mean()),
        reference_top1=100 * float((theirs == truth).mean()),
        agreement=100 * float((ours == theirs).mean()),
        drop=drop.mean,
        drop_ci=(drop.interval.low, drop.interval.high),
        max_drop=max_drop,
        passed=drop.mean <= max_drop + DROP_ROUNDING_POINTS,
        reference_source=answers.source,
        logit_max_diff=None if diffs is None else float(diffs.max()),
        logit_mean_diff=None if diffs is None else float(diffs.mean()),
        classes=compare_classes(truth, theirs, ours),
        flips=count_flips(theirs, ours),
        confusion=count_answers(theirs, ours, classes),
    )


def _write_notes(check: DataCheck, truth: np.ndarray, classes: int) -> tuple[str, ...]:
    """What the figures do not tell by themselves: a reference that knows nothing of the images, and a drop
    that so few images cannot show."""
    notes = (_write_chance_note(check, truth, classes), check.doubt)
    return tuple(note for note in notes if note)


def _write_chance_note(check: DataCheck, truth: np.ndarray, classes: int) -> str:
    """A sentence where the reference is at chance level on the images, else empty.

    Chance is the share of the most frequent class; images of a single class count as drawn from all. Where
    chance is below one half and there are many images, a figure that could be chance counts too.
    """
    counts = np.bincount(truth, minlength=1)
    single = np.count_nonzero(counts) == 1
    chance = 1 / classes if single else float(counts.max() / len(truth))
    right = check.reference_top1 / 100
    if len(truth) >= MANY_IMAGES and chance < 0.5:
        at_chance = compute_wilson_interval(right, len(truth)).low <= chance
    else:
        at_chance = right <= chance
    if classes < 2 or not at_chance:
        return ""
    guess = "drawing a class at random" if single else "naming the most frequent class"
    return (
        f"the REFERENCE itself is right on only {check.reference_top1:.2f} % of these images, no better than"
        f" {guess} ({100 * chance:.2f} %): the labels, the preprocessing or the weights are wrong"
    )
