"""What decoding JPEG images at a part of their size was measured to change."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from ..record import OMITTED, Between
from .values import Count, OutputDifference, Percent, Points, Size

GreyLevels = Annotated[float, Between(0, 255)]
"""A difference of pixels, of values from 0 to 255."""


@dataclass(frozen=True, kw_only=True)
class DecodingEntry:
    """The reference model's answers to images that were decoded at a part of their size, against those to
    the same images decoded in full.

    Attributes:
        images: that were looked at.
        reduced: those of them that are large enough to be reduced; the differences are theirs.
        pixel_mean, pixel_max: differences after resizing, grey levels.
        output_mean: mean difference of the outputs, in standard deviations of the outputs.
        agreement: share of the same top-1 answers; ``None`` for feature maps.
        drop, drop_ci: top-1 with full decoding minus top-1 with reduced decoding, and its 95 % interval as in
            :class:`~cmt_edge.deploy.bundle.sections.DataCheck`; ``None`` without labels.
    """

    images: Size
    reduced: Count
    pixel_mean: GreyLevels
    pixel_max: GreyLevels
    output_mean: OutputDifference
    agreement: Percent | None = None
    drop: Points | None = field(default=None, metadata=OMITTED)
    drop_ci: tuple[Points, Points] | None = field(default=None, metadata=OMITTED)
