"""Is the bundle still the model? Golden vectors always; top-1 on labelled images where there are some."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import numpy as np

from ..backends import has_runtime
from ..bundle import LOGITS, Bundle
from ..bundle.sections import DataCheck, GoldenCheck, RanOn, VerificationEntry
from ..errors import BundleError, DataError, InputError, RuntimeMissingError
from ..images import ImageSet, Item, digest
from ..predictor import Predictor
from ..preprocessing import NamedBytes, normalise, pixels, preprocess

ATOL = {"fp32": 1e-3, "fp16": 0.1, "bf16": 0.25, "int8": 1.5}
"""Default tolerance on golden logits: largest difference, in units of the standard deviation of the reference
logits."""
MAP_ATOL = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.1, "int8": 0.6}
"""The same for golden feature maps: root mean square over an image's map. The largest of 10^5 differences
says little about a map."""
MAX_DROP = 1.0
"""Default tolerance on top-1, percentage points."""
PIXEL_TOLERANCE = 2
"""Golden images may decode and resize up to so many grey levels apart (library versions differ in
rounding)."""
Z95 = 1.959964


@dataclass(frozen=True)
class Verification:
    """The result of :func:`verify`."""

    bundle: str
    precision: str
    runtime: RanOn
    golden: GoldenCheck
    data: DataCheck | None = None
    notes: tuple[str, ...] = ()
    reference_answers: dict[str, int] = field(default_factory=dict, repr=False)
    """Content digest -> top-1 of the reference on ``data``; what a bundle records, but no report shows."""

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
        )


def verify(
    bundle: Bundle,
    *,
    data: ImageSet | None = None,
    by_order: bool = False,
    backend: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    reference: Predictor | None = None,
    weights: str | None = None,
    max_drop: float = MAX_DROP,
    atol: float | None = None,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    candidate: Predictor | None = None,
) -> Verification:
    """Check a bundle against the reference.

    Args:
        bundle: opened, so its hashes hold.
        data: images in class folders; without it only the golden vectors are checked.
        by_order: class folders match the labels in sorted order instead of by name.
        backend, device, threads: as :meth:`cmt_edge.deploy.Predictor.load`.
        reference: a Predictor of the reference; default: what the bundle recorded for these very images, else
            the PyTorch model rebuilt here (``weights``: its checkpoint, where it came from a file).
        max_drop: allowed loss of top-1 in percentage points.
        atol: allowed golden logit difference; default by precision, see :data:`ATOL`.
        limit: use only so many images, evenly spread.
        progress: called with images done and total.
        candidate: what to check instead of the bundle as its runtime opens it; left open.

    Raises:
        DataError: unlabelled images, or class folders that do not match the labels.
        InputError: images were given for a bundle of feature maps.
        RuntimeMissingError: images were given but no reference for them is to be had.
    """
    opened = candidate or Predictor.load(bundle, backend=backend, device=device, threads=threads)
    with opened if candidate is None else nullcontext(opened) as predictor:
        golden = check_golden(bundle, predictor, atol)
        found = Verification(bundle.title, bundle.manifest.precision, RanOn(**predictor.info), golden)
        if data is None:
            return found
        targets = match_labels(bundle, data, by_order)
        items = _spread(data.items, limit)
        truth = np.array([targets[i.label] for i in items if i.label is not None])
        live = reference or _live_reference(bundle, data, items, weights, threads)
        try:
            answers = _run_both(predictor, live, bundle, data, items, progress)
        finally:
            if live is not None and live is not reference:
                live.close()
        check = _compare(
            truth, answers, max_drop, "the bundle's record" if live is None else live.info["runtime"]
        )
        return replace(found, data=check, reference_answers=answers.by_digest)


def _spread(items: list[Item], limit: int | None) -> list[Item]:
    """All of ``items``, or ``limit`` evenly spaced ones."""
    if limit is None or limit >= len(items):
        return items
    if limit < 1:
        raise InputError(f"a limit of {limit} images", remedy="ask for 1 or more")
    return [items[i * len(items) // limit] for i in range(limit)]


def check_golden(bundle: Bundle, predictor: Predictor, atol: float | None = None) -> GoldenCheck:
    """Decode, resize and numerics of the golden images."""
    golden = bundle.golden()
    spec = bundle.preprocess
    decoded = np.stack([pixels(source, spec) for source in golden.sources])
    pixel_diff = int(np.abs(decoded.astype(np.int16) - golden.pixels).max())
    ours = predictor.outputs(normalise(golden.pixels, spec))
    shapes = [[output.shape for output in side] for side in (ours, golden.outputs)]
    if shapes[0] != shapes[1]:
        raise BundleError(
            f"the outputs' shapes are {shapes[0]}, the golden ones' {shapes[1]}",
            where=bundle.path,
            remedy="export again",
        )
    differences = [distance(a, b) for a, b in zip(ours, golden.outputs, strict=True)]
    allowed = [tolerance(output, bundle.manifest.precision, atol) for output in golden.outputs]
    fits = [difference <= bound for difference, bound in zip(differences, allowed, strict=True)]
    worst = max(range(len(ours)), key=lambda i: (not fits[i], differences[i] / max(allowed[i], 1e-30)))
    passed = pixel_diff <= PIXEL_TOLERANCE and all(fits)
    return GoldenCheck(
        len(decoded), pixel_diff, differences[worst], allowed[worst], passed, bundle.outputs[worst]
    )


def distance(ours: np.ndarray, reference: np.ndarray) -> float:
    """How far apart: logits ``(K, classes)`` by the largest difference, maps ``(K, C, H, W)`` by the largest
    root mean square of an image."""
    if not np.isfinite(ours).all():
        return float("inf")
    difference = (ours - reference).reshape(len(reference), -1)
    return float(
        np.abs(difference).max() if reference.ndim == 2 else np.sqrt((difference**2).mean(axis=1)).max()
    )


def tolerance(reference: np.ndarray, precision: str, atol: float | None = None) -> float:
    """``atol``, or :data:`ATOL` (logits) or :data:`MAP_ATOL` (maps) standard deviations of an image's
    ``reference`` values."""
    allowed = (ATOL if reference.ndim == 2 else MAP_ATOL)[precision]
    return allowed * float(reference.reshape(len(reference), -1).std(axis=1).mean()) if atol is None else atol


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
    ids, names = bundle.class_ids, bundle.labels
    if by_order:
        if len(folders) != len(ids):
            raise DataError(
                f"{len(folders)} class folders for {len(ids)} labels", where=data.path, remedy=_BY_NAME
            )
        return {folder: i for i, folder in enumerate(folders)}
    known = {name: i for i, name in enumerate(names)} | {cid: i for i, cid in enumerate(ids)}
    shared = [f for f in folders if f not in ids and names.count(f) > 1]
    if shared:
        raise DataError(
            f"several classes are called {_some(shared)}",
            where=data.path,
            remedy="name the folders by class id",
        )
    unknown = [f for f in folders if f not in known]
    if unknown:
        raise DataError(
            "class folders do not match the bundle's labels",
            where=data.path,
            why=(
                f"folders without a label: {_some(unknown)}; labels:"
                f" {_some([n if n == c else f'{c} ({n})' for c, n in zip(ids, names, strict=True)])}"
            ),
            remedy=_BY_NAME,
        )
    return {f: known[f] for f in folders}


_BY_NAME = "name the folders like the labels, or match them in sorted order with --by-order"


def _some(names: Sequence[str], count: int = 8) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _live_reference(
    bundle: Bundle, data: ImageSet, items: list[Item], weights: str | None, threads: int | None
) -> Predictor | None:
    """``None`` if the bundle recorded the reference's answers for all ``items``, else the PyTorch model."""
    recorded = bundle.reference()
    if recorded and all(digest(data.read(item)) in recorded for item in items):
        return None
    if not has_runtime("torch"):
        raise RuntimeMissingError(
            "no reference for these images: the bundle recorded other ones and PyTorch is not installed here",
            remedy=(
                "verify on the exporting machine, pass --reference BUNDLE (an fp32 bundle), or leave"
                " --data out"
            ),
        )
    return Predictor.load(bundle, backend="torch", weights=weights, threads=threads)


@dataclass(frozen=True)
class _Answers:
    """Top-1 of bundle and reference, ``(N,)`` each, content digests, and logit differences where both ran
    here."""

    ours: np.ndarray
    theirs: np.ndarray
    digests: list[str]
    diffs: np.ndarray | None

    @property
    def by_digest(self) -> dict[str, int]:
        """Content digest -> top-1 of the reference."""
        return dict(zip(self.digests, self.theirs.tolist(), strict=True))


def _run_both(
    predictor: Predictor,
    live: Predictor | None,
    bundle: Bundle,
    data: ImageSet,
    items: list[Item],
    progress: Callable[[int, int], None] | None,
) -> _Answers:
    """Both sides over ``items``, a chunk at a time."""
    recorded = bundle.reference() if live is None else {}
    ours, theirs, diffs = [], [], []
    digests: list[str] = []
    chunk = max(16, predictor.batch)
    for start in range(0, len(items), chunk):
        blobs = [data.read(item) for item in items[start : start + chunk]]
        batch = np.stack(
            [
                preprocess(NamedBytes(b, i.name), bundle.preprocess)
                for b, i in zip(blobs, items[start:], strict=False)
            ]
        )
        logits = predictor.logits(batch)
        ours.append(logits.argmax(1))
        digests += map(digest, blobs)
        if live is None:
            theirs.append(np.array([recorded[d] for d in digests[start:]]))
        else:
            expected = live.logits(batch)
            theirs.append(expected.argmax(1))
            diffs.append(np.abs(logits - expected))
        if progress:
            progress(min(start + chunk, len(items)), len(items))
    return _Answers(
        np.concatenate(ours), np.concatenate(theirs), digests, np.concatenate(diffs) if diffs else None
    )


def _compare(truth: np.ndarray, answers: _Answers, max_drop: float, source: str) -> DataCheck:
    ours, theirs, diffs = answers.ours, answers.theirs, answers.diffs
    difference = (theirs == truth).astype(np.float64) - (ours == truth)  # +1 lost, -1 gained
    n = len(truth)
    drop = 100 * float(difference.mean())
    half = 100 * Z95 * float(difference.std(ddof=1)) / n**0.5 if n > 1 else float("inf")
    return DataCheck(
        images=n,
        top1=100 * float((ours == truth).mean()),
        reference_top1=100 * float((theirs == truth).mean()),
        agreement=100 * float((ours == theirs).mean()),
        drop=drop,
        drop_ci=(max(-100.0, drop - half), min(100.0, drop + half)),
        max_drop=max_drop,
        passed=drop <= max_drop + 1e-9,
        reference_source=source,
        logit_max_diff=None if diffs is None else float(diffs.max()),
        logit_mean_diff=None if diffs is None else float(diffs.mean()),
    )
