"""What an int8 or a typed graph was made from: images, their synthesis, the precision of operations."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..record import OMITTED
from .values import Count, OutputDifference, Seed


@dataclass(frozen=True, kw_only=True)
class SynthesisEntry:
    """How synthetic images were made.

    Attributes:
        seed: of the images that the optimisation started from.
        steps, steps_asked: number of optimisation steps, done and planned.
        loss_before, loss_after: distance of the batch statistics from the model's.
        stopped_early: whether the time was up before ``steps_asked``.
        cached: whether the images were taken from the cache.
    """

    seed: Seed
    steps: Count
    steps_asked: Count
    loss_before: OutputDifference
    loss_after: OutputDifference
    stopped_early: bool
    cached: bool


@dataclass(frozen=True, kw_only=True)
class ImagesEntry:
    """Calibration images.

    Attributes:
        source: what the user gave; of a folder only the last two parts.
        images: number of images.
        fingerprint: hash over the contents of the images.
        synthesis: how they were made, of synthetic images only.
    """

    source: str
    images: Count
    fingerprint: str
    synthesis: SynthesisEntry | None = field(default=None, metadata=OMITTED)


@dataclass(frozen=True, kw_only=True)
class CalibrationEntry(ImagesEntry):
    """What an int8 graph was calibrated on, and how.

    Attributes:
        recipe: hash of all choices of the quantization.
        cached: whether the calibrated graph was taken from the cache.
        keep_float: groups of operations that stay in float.
        fits_16_bits: whether sums of two products with the weights fit 16 bits, so that runtimes compute
            them exactly on x86 processors without VNNI; only where the format is for a CPU.
    """

    recipe: str
    cached: bool
    keep_float: tuple[str, ...]
    fits_16_bits: bool | None = field(default=None, metadata=OMITTED)


@dataclass(frozen=True)
class Island:
    """An operation that stays float32 in a float16 graph.

    Attributes:
        node: name of the operation in the graph.
        op: its ONNX type.
        reason: readable.
        observed: the largest absolute value that decided it.
    """

    node: str
    op: str
    reason: str
    observed: OutputDifference


@dataclass(frozen=True, kw_only=True)
class ObservedEntry:
    """The images that activations were observed on, and the ``largest`` absolute value of any tensor."""

    source: str
    images: Count
    largest: OutputDifference
    synthesis: SynthesisEntry | None = field(default=None, metadata=OMITTED)


@dataclass(frozen=True, kw_only=True)
class TypingEntry:
    """The precision that was written into the graph.

    Attributes:
        operations: precision -> number of operations that compute in it.
        islands: operations that stay float32.
        observed: what the ranges were observed on; ``None`` where none were needed.
    """

    operations: dict[str, Count]
    islands: tuple[Island, ...]
    observed: ObservedEntry | None
