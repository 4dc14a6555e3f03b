"""Images that are NumPy arrays: which shapes are accepted, and the order of their colours."""

from __future__ import annotations

import numpy as np

from .errors import ImageError, InputError

COLORS = ("rgb", "bgr")
"""Orders of an array's channels; OpenCV's is ``"bgr"``."""

CHANNELS = (1, 2, 3, 4)
"""Accepted sizes of the last axis: grey, grey and alpha, three colours, three colours and alpha."""

MAGIC = (
    b"\xff\xd8\xff",
    b"\x89PNG",
    b"RIFF",
    b"GIF8",
    b"BM",
    b"II*\0",
    b"MM\0*",
)
"""First bytes of encoded images, which some libraries give as a uint8 array of one column."""


def check_color(color: str) -> str:
    """``color``, if it is one of :data:`COLORS`; raises :class:`InputError`."""
    if color not in COLORS:
        raise InputError(
            f"unknown order of colours {color!r}",
            remedy="use color='rgb', or color='bgr' for arrays from OpenCV",
        )
    return color


def view_as_rgb(array: np.ndarray, color: str = "rgb") -> np.ndarray:
    """A uint8 array as ``(H, W, 3)`` RGB, without copying it.

    Args:
        array: grey ``(H, W)`` or ``(H, W, 1)``, grey and alpha ``(H, W, 2)``, colour ``(H, W, 3)``, colour
            and alpha ``(H, W, 4)``. Alpha is dropped, as for encoded images.
        color: the order of three or four channels, one of :data:`COLORS`.

    Raises:
        ImageError: another dtype or shape, or encoded bytes.
    """
    _check(array)
    check_color(color)
    if array.ndim == 2:
        array = array[..., None]
    if array.shape[2] < 3:
        return np.broadcast_to(array[..., :1], (*array.shape[:2], 3))
    return array[..., :3] if color == "rgb" else array[..., 2::-1]


def _check(array: np.ndarray) -> None:
    """Raise :class:`ImageError` unless the array is one image."""
    if _is_encoded(array):
        raise ImageError(
            f"this uint8 array {array.shape} holds an encoded image, not pixels",
            remedy="give its bytes: array.tobytes()",
        )
    channels = array.shape[2] if array.ndim == 3 else 1
    right = array.ndim in (2, 3) and channels in CHANNELS and array.size > 0
    if array.dtype == np.uint8 and right:
        return
    raise ImageError(
        "an image array must be uint8 (H, W, 3), or (H, W) or (H, W, 1) for grey, (H, W, 2) or (H, W, 4)"
        f" with alpha; this is {array.dtype} {array.shape}",
        remedy=_remedy(array),
    )


def _is_encoded(array: np.ndarray) -> bool:
    """Whether the array holds the bytes of an encoded image, as ``cv2.imencode`` gives them."""
    if array.dtype != np.uint8 or array.size < 16:
        return False
    column = array.ndim == 2 and 1 in array.shape
    return (array.ndim == 1 or column) and array.reshape(-1)[:4].tobytes().startswith(MAGIC)


def _remedy(array: np.ndarray) -> str:
    """What to do with an array that is no image."""
    if array.dtype == np.uint8 and array.ndim == 4:
        return "give the images of a batch one by one: predict() takes them"
    if array.dtype == np.uint8 and array.ndim == 3 and array.shape[0] in CHANNELS:
        return "the channels come last: array.transpose(1, 2, 0)"
    return "for preprocessed float32 (N, 3, H, W) batches use Predictor.logits"
