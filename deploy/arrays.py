"""Images that are NumPy arrays: which shapes are accepted, and the order of their colours."""

from __future__ import annotations

from typing import Any, Protocol

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


COLORS_FIRST = 3
"""Size of the first axis of a single image whose colours come before its rows and columns."""

AS_UINT8 = (
    "pixels are uint8 from 0 to 255: of values from 0 to 1 give (255 * array).round().astype('uint8');"
    " preprocessed float32 batches (N, 3, H, W) go to Predictor.logits"
)
"""The remedy for pixels of another type."""


class SupportsArray(Protocol):
    """What gives its pixels as an array when NumPy asks for them, such as a tensor of PyTorch."""

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray: ...


def check_color(color: str) -> str:
    """``color`` in lower case, if it is one of :data:`COLORS`; raises :class:`InputError`."""
    known = color.lower() if isinstance(color, str) else color
    if known not in COLORS:
        raise InputError(
            f"unknown order of colours {color!r}",
            remedy="use color='rgb', or color='bgr' for arrays from OpenCV",
        )
    return known


def view_as_array(source: Any) -> Any:
    """The array of an object that gives one, without copying it; any other image as it is.

    Raises:
        ImageError: the object does not give its array, as a tensor on a GPU.
    """
    if isinstance(source, np.ndarray) or not hasattr(type(source), "__array__"):
        return source
    try:
        return np.asarray(source)
    except Exception as exc:  # each library has exceptions of its own for what it cannot convert
        raise ImageError(
            f"this {type(source).__name__} does not give its pixels as an array",
            why=exc,
            remedy="give a uint8 array (H, W, 3); of a tensor: tensor.detach().cpu().numpy()",
        ) from exc


def is_single(array: np.ndarray) -> bool:
    """Whether an array is one image and not a batch; also where its colours come first, which is refused
    later."""
    return array.ndim < 3 or (
        array.ndim == 3 and (array.shape[2] in CHANNELS or array.shape[0] == COLORS_FIRST)
    )


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
    color = check_color(color)
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
        remedy=_describe_remedy(array),
    )


def _is_encoded(array: np.ndarray) -> bool:
    """Whether the array holds the bytes of an encoded image, as ``cv2.imencode`` gives them."""
    column = array.ndim == 2 and 1 in array.shape
    if not (array.ndim == 1 or column) or array.dtype != np.uint8 or array.size < 16:
        return False
    return array.reshape(-1)[:4].tobytes().startswith(MAGIC)


def _describe_remedy(array: np.ndarray) -> str:
    """What to do with an array that is no image."""
    if array.dtype == np.uint8 and array.ndim == 4:
        return "give the images of a batch one by one: predict() takes them"
    if array.ndim == 3 and array.shape[0] in CHANNELS and array.shape[2] not in CHANNELS:
        first = "the channels come last: array.transpose(1, 2, 0), or tensor.permute(1, 2, 0)"
        return first if array.dtype == np.uint8 else f"{first}; {AS_UINT8}"
    if array.dtype != np.uint8 and array.ndim in (2, 3):
        return AS_UINT8
    return "for preprocessed float32 (N, 3, H, W) batches use Predictor.logits"
