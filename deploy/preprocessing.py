"""The only preprocessing in the project: calibration, verification, benchmarks and the Predictor all call it.

An image goes through four steps that can be checked one by one: decode (:mod:`cmt_edge.deploy.decoding`),
resize (Pillow's filter, with its antialiasing), centre crop, normalise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from .arrays import view_as_array, view_as_rgb
from .decoding import (
    MAX_PIXELS,
    Decoded,
    ImageLike,
    decode_at_least,
    make_too_large_error,
    name_image,
    require_modest_size,
)
from .escaping import SHOWN_CHARACTERS
from .reduction import LeastSize, Size

MAX_SIZE = 16384
"""Largest input height and width of a model in pixels."""

MAX_SHORT_SIDE = 32768
"""Largest short side in pixels that a bundle may ask images to be resized to."""

RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}
"""Name of an interpolation -> Pillow's filter."""

MEANS = (-10.0, 10.0)
"""The least and the largest mean of a channel, of values from 0 to 1. One beyond them, such as a mean of
values from 0 to 255, would leave nothing of the image."""

DEVIATIONS = (1e-4, 100.0)
"""The least and the largest standard deviation of a channel, of values from 0 to 1. The least lies below
1/255, which leaves the values as they are in the file."""

EXIF_POLICIES = ("apply", "ignore")
"""What may become of the orientation that a photograph records."""


DECODE_POLICIES = ("full", "reduced")
"""How many pixels of a large JPEG image are decoded."""

REDUCING_GAP = 2.0
"""How many times the size after resizing a reduced image has at least, unless a model says otherwise."""

REDUCING_GAPS = (1.0, 8.0)
"""The least and the largest gap that is accepted."""


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes a model input.

    Attributes:
        size: input height and width in pixels.
        short_side: the short side is resized to this many pixels and the centre ``size`` x ``size`` is
            cropped; ``None`` resizes to exactly ``size`` x ``size`` without keeping the aspect ratio.
        mean, std: per RGB channel, of values scaled to 0..1.
        exif: ``"apply"`` turns the image as its EXIF orientation says, ``"ignore"`` takes the stored pixels.
        interpolation: Pillow filter, a key of :data:`RESAMPLING`.
        decode: ``"full"`` decodes every pixel; ``"reduced"`` decodes an encoded JPEG image at a half, a
            quarter or an eighth of its size where enough pixels remain. Other images are decoded in full.
        reducing_gap: width and height of a reduced image are at least so many times those that it is then
            resized to, as Pillow's ``thumbnail`` has it.
    """

    size: int
    short_side: int | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    exif: str = "apply"
    interpolation: str = "bicubic"
    decode: str = "full"
    reducing_gap: float = REDUCING_GAP

    def to_json(self) -> dict[str, Any]:
        """The manifest's ``preprocess`` entry."""
        return asdict(self)

    def fault(self) -> str | None:
        """Which value is none that this version can apply, and what is expected; ``None`` if all are."""
        if not 1 <= self.size <= MAX_SIZE:
            return f"size is {self.size}, expected 1 to {MAX_SIZE}"
        if self.short_side is not None and not self.size <= self.short_side <= MAX_SHORT_SIDE:
            return f"short_side is {self.short_side}, expected {self.size} to {MAX_SHORT_SIDE}"
        low, high = REDUCING_GAPS
        if not low <= self.reducing_gap <= high:
            return f"reducing_gap is {self.reducing_gap:g}, expected {low:g} to {high:g}"
        return (
            _find_fault_of_word("exif", self.exif, EXIF_POLICIES)
            or _find_fault_of_word("interpolation", self.interpolation, RESAMPLING)
            or _find_fault_of_word("decode", self.decode, DECODE_POLICIES)
            or _find_fault_of_numbers("mean", self.mean, MEANS)
            or _find_fault_of_numbers("std", self.std, DEVIATIONS)
        )


def _find_fault_of_word(name: str, value: str, known: Iterable[str]) -> str | None:
    """``value`` where it is none of the known words."""
    if value in known:
        return None
    return f"{name} is {value[:SHOWN_CHARACTERS]!r}, expected {' or '.join(map(repr, known))}"


def _find_fault_of_numbers(
    name: str,
    values: tuple[float, ...],
    bounds: tuple[float, float],
) -> str | None:
    """The first of ``values`` that does not lie within ``bounds``."""
    low, high = bounds
    for i, value in enumerate(values):
        if not low <= value <= high:
            return f"{name}[{i}] is {value:g}, expected {low:g} to {high:g}"
    return None


def decode_pixels(
    source: ImageLike,
    spec: Preprocess,
    color: str = "rgb",
) -> np.ndarray:
    """Decoded, resized and cropped: ``(size, size, 3)`` uint8, read-only. Arguments and errors are those of
    :func:`~cmt_edge.deploy.decoding.decode`.

    Where an array needs no resizing, the result is a view of it.
    """
    try:
        return _decode_pixels(source, spec, color)
    except MemoryError as exc:
        raise make_too_large_error(name_image(source), "there is no memory to decode and resize it") from exc


def _decode_pixels(source: ImageLike, spec: Preprocess, color: str) -> np.ndarray:
    source = view_as_array(source)
    if isinstance(source, np.ndarray):
        rgb = view_as_rgb(source, color)
        height, width = rgb.shape[:2]
        new, (left, top, right, bottom) = compute_geometry(width, height, spec, source)
        if new == (width, height):
            view: np.ndarray = rgb[top:bottom, left:right]
            view.flags.writeable = False
            return view
    return resize(decode_at_least(source, spec.exif, color, make_least_size(spec, source)), spec, source)


def resize(decoded: Decoded, spec: Preprocess, source: ImageLike) -> np.ndarray:
    """A decoded image as the model sees it before normalisation: uint8 ``(size, size, 3)``.

    ``source``: where it is from, which errors name.
    """
    new, box = compute_geometry(*decoded.size, spec, source)
    image = decoded.image
    if new != image.size or decoded.box is not None:
        image = image.resize(new, RESAMPLING[spec.interpolation], decoded.box)
    is_whole = box == (0, 0, *new)
    return np.asarray(image if is_whole else image.crop(box))


def make_least_size(spec: Preprocess, source: ImageLike) -> LeastSize | None:
    """The least size at which an image may be decoded; ``None`` for all of its pixels."""
    if spec.decode == "full":
        return None

    def find_least_size(whole: Size) -> Size:
        (width, height), _ = compute_geometry(*whole, spec, source)
        return math.ceil(spec.reducing_gap * width), math.ceil(spec.reducing_gap * height)

    return find_least_size


def compute_geometry(
    width: int, height: int, spec: Preprocess, source: ImageLike
) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """Width and height after resizing, and the box that is then cut out, in pixels."""
    size = spec.size
    require_modest_size(width, height, name_image(source))
    if spec.short_side is None:
        return (size, size), (0, 0, size, size)
    short = min(width, height)
    # the long side is truncated and the crop offset rounded, as in torchvision, which published models were
    # evaluated with
    new = (
        max(size, int(spec.short_side * width / short)),
        max(size, int(spec.short_side * height / short)),
    )
    if new[0] * new[1] > MAX_PIXELS:
        raise make_too_large_error(
            name_image(source),
            f"resizing {width} x {height} by its short side gives {new[0]} x {new[1]}",
        )
    left = round((new[0] - size) / 2)
    top = round((new[1] - size) / 2)
    return new, (left, top, left + size, top + size)


def normalise(
    values: np.ndarray,
    spec: Preprocess,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """``(..., H, W, 3)`` uint8 -> ``(..., 3, H, W)`` float32, ``(v / 255 - mean) / std``.

    ``out``: float32 of the result's shape, written without temporaries and returned; default: a new
    contiguous array.
    """
    scale, shift = _compute_affine(tuple(spec.mean), tuple(spec.std))
    planes = values.swapaxes(-1, -2).swapaxes(-2, -3)
    target: np.ndarray = np.empty(planes.shape, np.float32) if out is None else out
    # copied first: arithmetic on values this far apart in memory takes several times as long
    np.copyto(target, planes)
    np.multiply(target, scale, out=target)
    np.add(target, shift, out=target)
    return target


@lru_cache(maxsize=64)
def _compute_affine(
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> tuple[np.ndarray, np.ndarray]:
    """``scale, shift``, float32 ``(3, 1, 1)`` each: ``(v / 255 - mean) / std = v * scale + shift``."""
    scale = 1 / (255 * np.asarray(std))
    shift = -np.asarray(mean) / np.asarray(std)
    return _spread_over_pixels(scale), _spread_over_pixels(shift)


def _spread_over_pixels(values: np.ndarray) -> np.ndarray:
    """One number a channel as float32 ``(3, 1, 1)``."""
    return values.astype(np.float32).reshape(3, 1, 1)


def preprocess(
    source: ImageLike,
    spec: Preprocess,
    out: np.ndarray | None = None,
    color: str = "rgb",
) -> np.ndarray:
    """One image -> float32 ``(3, size, size)``, written into ``out`` if given. The other arguments and the
    errors are those of :func:`~cmt_edge.deploy.decoding.decode`.

    >>> spec = Preprocess(size=32, short_side=36, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    >>> preprocess("ship.jpg", spec).shape
    (3, 32, 32)
    """
    return normalise(decode_pixels(source, spec, color), spec, out)
