"""Decoding a JPEG image at a half, a quarter or an eighth of its size.

A JPEG file holds the frequencies of blocks of 8 x 8 pixels. libjpeg can make 4 x 4, 2 x 2 or one pixel of
them, which takes a fraction of the time; Pillow calls this a draft.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from PIL import Image, JpegImagePlugin

Size: TypeAlias = tuple[int, int]
"""Width and height in pixels."""

Box: TypeAlias = tuple[float, float, float, float]
"""Left, top, right and bottom edge in pixels; an edge may lie within a pixel."""

LeastSize: TypeAlias = Callable[[Size], Size]
"""Says for the size of a whole image, upright, the least size at which it may be decoded."""

Turn: TypeAlias = "Image.Transpose | None"
"""What turns an image upright; ``None``: it is upright."""

# fmt: off
MOVED: dict[Image.Transpose, Callable[[float, float, float, float], tuple[float, float]]] = {
    Image.Transpose.FLIP_LEFT_RIGHT: lambda x, y, width, height: (width - x, y),
    Image.Transpose.FLIP_TOP_BOTTOM: lambda x, y, width, height: (x, height - y),
    Image.Transpose.ROTATE_90:       lambda x, y, width, height: (y, width - x),
    Image.Transpose.ROTATE_180:      lambda x, y, width, height: (width - x, height - y),
    Image.Transpose.ROTATE_270:      lambda x, y, width, height: (height - y, x),
    Image.Transpose.TRANSPOSE:       lambda x, y, width, height: (y, x),
    Image.Transpose.TRANSVERSE:      lambda x, y, width, height: (height - y, width - x),
}
# fmt: on
"""Turn -> where it puts a point of an image of this width and height."""

SIDEWAYS = frozenset(
    {
        Image.Transpose.ROTATE_90,
        Image.Transpose.ROTATE_270,
        Image.Transpose.TRANSPOSE,
        Image.Transpose.TRANSVERSE,
    }
)
"""Turns that make the width the height."""


def reduce_jpeg(
    image: JpegImagePlugin.JpegImageFile, turn: Turn, least: LeastSize
) -> tuple[Size, Box | None]:
    """Let an opened image, which is not decoded yet, be decoded at the smallest size that is allowed.

    Args:
        image: is given the smaller size.
        turn: what will turn it upright afterwards.
        least: the least size that is allowed.

    Returns:
        The size of the whole image, upright, and the part of the reduced one, upright, that shows all of it;
        ``None`` where the image is not reduced.
    """
    stored = image.size
    whole = swap(stored) if turn in SIDEWAYS else stored
    needed = least(whole)
    done = image.draft(None, swap(needed) if turn in SIDEWAYS else needed)
    if done is None or image.size == stored:
        return whole, None
    left, top, right, bottom = done[1]
    return whole, turn_box((left, top, right, bottom), image.size, turn)


def swap(size: Size) -> Size:
    """A size with the width as the height."""
    return size[1], size[0]


def turn_box(box: Box, size: Size, turn: Turn) -> Box:
    """Where a turn puts a part of an image of this size."""
    if turn is None:
        return box
    x0, y0 = MOVED[turn](box[0], box[1], *size)
    x1, y1 = MOVED[turn](box[2], box[3], *size)
    return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)
