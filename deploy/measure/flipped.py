"""Images that the reference and a bundle answer differently, small enough to stand in a report."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated

import numpy as np
from PIL import Image

from ..bundle.record import Matches
from ..bundle.sections import Count
from ..decoding import NamedBytes
from ..preprocessing import Preprocess, decode_pixels

MOST_SHOWN = 24
"""The largest number of images that a report shows."""
SIDE = 96
"""The longest side of an image in a report, pixels."""
QUALITY = 80
"""JPEG quality of an image in a report, 1 to 95."""
NAMED_PARTS = 2
"""Number of the last parts of an image's path that a report names."""
MAX_JPEG = 40_000
"""The largest number of characters of a JPEG file in base64. One of :data:`SIDE` pixels has about 4,000."""

Jpeg = Annotated[
    str,
    Matches(
        rf"/9j/[A-Za-z0-9+/]{{1,{MAX_JPEG}}}={{0,2}}",
        f"a JPEG file in base64, at most {MAX_JPEG} characters",
    ),
]
"""A JPEG file in base64; ``/9j/`` is how all of them begin."""


@dataclass(frozen=True)
class FlippedImage:
    """An image with two answers.

    Attributes:
        name: the last parts of its path.
        label: index of its class among the logits.
        reference, bundle: indices of the two answers.
        jpeg: what the model sees of it, without the metadata of the original file.
    """

    name: str
    label: Count
    reference: Count
    bundle: Count
    jpeg: Jpeg


def choose_flipped(
    truth: np.ndarray,
    reference: np.ndarray,
    bundle: np.ndarray,
    limit: int,
) -> list[int]:
    """Places of up to ``limit`` images with two answers: first those that only the reference gets right, then
    those that only the bundle does, then the others.

    Args:
        truth, reference, bundle: int ``(N,)``, the label of each image and the two answers to it.
        limit: the largest number of places.
    """
    changed = np.flatnonzero(reference != bundle)
    is_lost = reference[changed] == truth[changed]
    is_gained = bundle[changed] == truth[changed]
    order = np.argsort(np.select([is_lost, is_gained], [0, 1], 2), kind="stable")
    places: list[int] = changed[order][:limit].tolist()
    return places


def make_flipped(
    places: list[int],
    truth: np.ndarray,
    reference: np.ndarray,
    bundle: np.ndarray,
    read: Callable[[int], NamedBytes],
    spec: Preprocess,
) -> tuple[FlippedImage, ...]:
    """The images at ``places``.

    Args:
        places: as :func:`choose_flipped` gives them.
        truth, reference, bundle: as there.
        read: gives the encoded image at a place.
        spec: how the model sees an image.

    Raises:
        ImageError: an image cannot be decoded.
    """
    images = [read(place) for place in places]
    return tuple(
        FlippedImage(
            name="/".join(PurePosixPath(image.filename).parts[-NAMED_PARTS:]),
            label=int(truth[place]),
            reference=int(reference[place]),
            bundle=int(bundle[place]),
            jpeg=make_thumbnail(image, spec),
        )
        for place, image in zip(places, images, strict=True)
    )


def make_thumbnail(image: NamedBytes, spec: Preprocess) -> str:
    """What the model sees of an image, as a small JPEG file in base64."""
    seen = Image.fromarray(decode_pixels(image, spec))
    seen.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    seen.save(file, "JPEG", quality=QUALITY)
    return base64.b64encode(file.getvalue()).decode()
