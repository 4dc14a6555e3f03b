"""What the verification of a bundle found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from ..record import OMITTED, Between
from .blocks import LayerError, LayerRun
from .values import LOGITS, Count, OutputDifference, Percent, Points, Precision, Size


@dataclass(frozen=True)
class RanOn:
    """Where a model ran: name and version of the ``runtime``, and the runtime's name of the ``device``."""

    runtime: str
    device: str

    @property
    def name(self) -> str:
        """The runtime without its version."""
        return self.runtime.split(" ")[0]

    def summary(self) -> str:
        """For a table: the runtime, and the device unless it is the CPU."""
        return self.runtime if self.device == "CPU" else f"{self.runtime} ({self.device})"


@dataclass(frozen=True)
class GoldenCheck:
    """Golden images: ``pixel_diff`` in grey levels (decode and resize), ``diff`` and ``atol`` by
    :func:`cmt_edge.deploy.measure.tolerance.measure_distance` (numerics).

    ``output`` is the one that comes closest to its tolerance: ``"logits"``, or a feature map.
    """

    images: Count
    pixel_diff: Annotated[int, Between(0, 255)]
    diff: OutputDifference
    atol: OutputDifference
    passed: bool
    output: str = LOGITS


@dataclass(frozen=True)
class ClassCheck:
    """The images of one class: ``label`` is its index among the logits, ``right`` and ``reference_right`` the
    number of its images that the bundle and the reference answered correctly."""

    label: Count
    images: Size
    reference_right: Count
    right: Count


@dataclass(frozen=True)
class Flip:
    """A number of ``images`` that the ``reference`` takes for one class and the ``bundle`` for another; both
    are indices among the logits."""

    reference: Count
    bundle: Count
    images: Size


@dataclass(frozen=True)
class DataCheck:
    """Labelled images; percentages. ``reference_*`` is the PyTorch model, ``drop`` = reference top-1 minus
    the bundle's.

    ``drop_ci`` is the 95 % interval of the paired difference (Newcombe 1998, method 10).
    ``reference_source`` says where the reference answers come from; the logit differences need a reference
    that runs here and are ``None`` otherwise. ``classes`` holds the classes whose top-1 fell most, and
    ``flips`` the most frequent changes of an answer, at most
    :data:`~cmt_edge.deploy.measure.confusion.MOST_LISTED` each. ``confusion`` counts all pairs of answers, a
    row for each answer of the reference and a column for each of the bundle's, where there are at most so
    many classes. Bundles of earlier versions have none of the three.
    """

    images: Count
    top1: Percent
    reference_top1: Percent
    agreement: Percent
    drop: Points
    drop_ci: tuple[Points, Points]
    max_drop: float
    passed: bool
    reference_source: str
    logit_max_diff: OutputDifference | None = None
    logit_mean_diff: OutputDifference | None = None
    classes: tuple[ClassCheck, ...] | None = field(default=None, metadata=OMITTED)
    flips: tuple[Flip, ...] | None = field(default=None, metadata=OMITTED)
    confusion: tuple[tuple[Count, ...], ...] | None = field(default=None, metadata=OMITTED)

    @property
    def doubt(self) -> str:
        """Why the images do not show that the drop is small enough; empty where they do, or where the drop
        itself is too large."""
        high = self.drop_ci[1]
        if not self.passed or high <= self.max_drop:
            return ""
        return (
            f"{self.images} images cannot show that the drop is at most {self.max_drop:g} points: it may be"
            f" up to {high:.2f} points (95 % interval); verify on more images"
        )


@dataclass(frozen=True, kw_only=True)
class VerificationEntry:
    """What the verification of a bundle found.

    Attributes:
        bundle: name or path of the bundle.
        precision: what was asked for.
        runtime: where the bundle ran.
        golden: the check of the golden images.
        data: the check of labelled images, where there were some.
        notes: readable.
        passed: whether every check passed.
        steps: step of the export -> largest difference of the outputs from the reference; only in a manifest.
        layers: the error of every block, in the order of the model, for one runtime after the other; only
            with ``--layers``.
        layer_runs: what that says of each bundle and runtime as a whole.
    """

    bundle: str
    precision: Precision
    runtime: RanOn
    golden: GoldenCheck
    data: DataCheck | None
    notes: tuple[str, ...]
    passed: bool
    steps: dict[str, OutputDifference] | None = field(default=None, metadata=OMITTED)
    layers: tuple[LayerError, ...] | None = field(default=None, metadata=OMITTED)
    layer_runs: tuple[LayerRun, ...] | None = field(default=None, metadata=OMITTED)
