"""The orientation of a photograph, as EXIF and TIFF note it, and how an image is turned by it."""

from __future__ import annotations

from PIL import Image, TiffImagePlugin

from .faults import is_about_data
from .reduction import Turn

ORIENTATION = 0x0112
"""EXIF and TIFF tag of the orientation."""

UPRIGHT = 1
"""The orientation of an image that need not be turned."""

TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Orientation -> what turns an image upright."""

TURNED_BY = "cmt-edge-turned-by"
"""Key in the ``info`` of a TIFF image of the number of the frame that was decoded and its orientation, which
Pillow forgets when it has turned the image."""

UNTURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""Orientation -> what undoes Pillow's turning of a TIFF image."""


def view_as_stored(image: TiffImagePlugin.TiffImageFile) -> Image.Image:
    """A TIFF image as it lies in its file: Pillow turns it when it decodes it."""
    undo = UNTURN.get(image.info[TURNED_BY][1])
    return image if undo is None else image.transpose(undo)


def note_orientation(image: TiffImagePlugin.TiffImageFile) -> None:
    """Keep the orientation of the frame, which Pillow forgets once it has decoded and turned it."""
    frame = image.tell()
    known = image.info.get(TURNED_BY, (frame, UPRIGHT))
    usual = known[1] if known[0] == frame else UPRIGHT
    orientation = image.tag_v2.get(ORIENTATION) or usual
    image.info[TURNED_BY] = (frame, orientation)


def turn_upright(image: Image.Image) -> Image.Image:
    """Turn an image as its orientation says.

    Only that entry is used: a photograph whose other entries are wrong is a good photograph.
    """
    image.load()  # Pillow turns a TIFF image here, and then forgets its orientation
    turn = find_turn(image)
    return image if turn is None else image.transpose(turn)


def find_turn(image: Image.Image) -> Turn:
    """What turns an image upright; ``None`` also where its metadata cannot be read, for its pixels can."""
    try:
        return TURN.get(image.getexif().get(ORIENTATION, UPRIGHT))
    except Exception as exc:
        if not is_about_data(exc):
            raise
        return None
