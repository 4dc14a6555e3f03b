"""The images that candidates answer, decoded once into files that a measuring process can read."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cmt_edge.calib import CalibrationSet
from cmt_edge.deploy import Preprocess
from cmt_edge.deploy.decoding import NamedBytes
from cmt_edge.deploy.images import choose_evenly, hash_image
from cmt_edge.deploy.preprocessing import decode_pixels
from cmt_edge.deploy.scale.records import Record
from cmt_edge.deploy.scale.sources import Source

from ..steps import Evaluation

QUICK_IMAGES = 1000
"""Number of labelled images, at most, that the ranking of groups uses."""
PROBES = 64
"""Number of calibration images, at most, that logit deviations are means over where labelled ones give the
top-1."""


class Images:
    """Images as an array in a file, which is made when it is first asked for.

    Attributes:
        fingerprint: of their contents.
        count: number of images.
        records: labelled images, where the workers of a cluster can read them; empty for others.
    """

    def __init__(
        self,
        path: Path,
        fingerprint: str,
        arrays: Callable[[], Iterator[np.ndarray]],
        count: int,
        records: Sequence[Record] = (),
    ) -> None:
        self.fingerprint, self.count, self.records = fingerprint, count, records
        self._path, self._arrays = path, arrays

    @property
    def path(self) -> Path:
        """A ``.npy`` file: ``(count, ...)``."""
        if not self._path.exists():
            self._write()
        return self._path

    def _write(self) -> None:
        arrays = self._arrays()
        first = next(arrays)
        partial = self._path.with_suffix(".part")
        target = np.lib.format.open_memmap(
            partial,
            "w+",
            first.dtype,
            (self.count, *first.shape),
        )
        for i, array in enumerate(itertools.chain([first], arrays)):
            target[i] = array
        del target
        partial.rename(self._path)


@dataclass(frozen=True)
class Questions:
    """What every candidate is asked.

    Attributes:
        probes: calibration images, on which logits are compared.
        judged: images whose top-1 counts.
        quick: some of them, for the ranking of groups.
        truth, quick_truth: int ``(N,)``, the classes of ``judged`` and ``quick``; ``None`` without labels.
    """

    probes: Images
    judged: Images
    quick: Images
    truth: np.ndarray | None = None
    quick_truth: np.ndarray | None = None


def make_questions(
    folder: Path,
    data: CalibrationSet,
    evaluation: Evaluation | None,
    limit: int | None,
    spec: Preprocess,
    elsewhere: bool = False,
) -> Questions:
    """The questions of one search.

    Args:
        folder: for the arrays.
        data: calibration images.
        evaluation: labelled images; without them the calibration images are judged.
        limit: the largest number of labelled images to use, evenly spread.
        spec: preprocessing.
        elsewhere: whether the workers of a cluster answer the labelled images, which are not read here then.
    """

    def batches() -> Iterator[np.ndarray]:
        return (batch[0] for batch in data.batches(spec))

    if evaluation is None:
        everything = Images(folder / "calibration.npy", data.fingerprint, batches, len(data))
        return Questions(everything, everything, everything)
    few = min(PROBES, len(data))
    probes = Images(
        folder / "probes.npy",
        f"{data.fingerprint} {few}",
        lambda: itertools.islice(batches(), few),
        few,
    )
    items = choose_evenly(evaluation.images.items, limit)
    quick = choose_evenly(items, QUICK_IMAGES)
    return Questions(
        probes,
        _decode(folder / "judged.npy", evaluation.images.select(items), spec, elsewhere),
        _decode(folder / "quick.npy", evaluation.images.select(quick), spec, elsewhere),
        _list_classes(items, evaluation.targets),
        _list_classes(quick, evaluation.targets),
    )


def _decode(
    path: Path,
    labelled: Source,
    spec: Preprocess,
    elsewhere: bool,
) -> Images:
    """Labelled images as pixels, uint8 ``(N, S, S, 3)``. Those that workers read are not read here: their
    names, sizes and times of change stand for their contents."""
    items = labelled.items
    states = (item.identify() if elsewhere else hash_image(labelled.read(item)) for item in items)
    contents = "".join(f"{state} {item.label}\n" for state, item in zip(states, items, strict=True))

    def decoded() -> Iterator[np.ndarray]:
        named = (NamedBytes(labelled.read(item), item.name) for item in items)
        return (decode_pixels(image, spec) for image in named)

    return Images(
        path,
        hashlib.sha256(contents.encode(errors="surrogateescape")).hexdigest(),
        decoded,
        len(items),
        items if elsewhere else (),
    )


def _list_classes(
    items: Sequence[Record],
    targets: dict[str, int],
) -> np.ndarray:
    """The logit that is right for each image, int ``(N,)``."""
    return np.array([targets[item.label] for item in items if item.label is not None])
