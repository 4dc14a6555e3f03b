"""Decoding of images: a path, encoded bytes, a file or an array becomes 8-bit RGB, or a typed error.

Formats and sizes are limited before Pillow decodes anything; the EXIF orientation is applied as asked.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from PIL import Image, JpegImagePlugin, TiffImagePlugin, UnidentifiedImageError

from .arrays import SupportsArray, is_single, view_as_array, view_as_rgb
from .errors import ImageError
from .faults import is_about_data
from .files import describe_irregular
from .headers import SMALL_BYTES, find_flood
from .jpeg import MAX_SCANS, START, has_many_scans, make_scan_header, strip_metadata
from .orientation import find_turn, note_orientation, turn_upright, view_as_stored
from .reduction import Box, LeastSize, Size, reduce_jpeg

Decodable: TypeAlias = "str | Path | bytes | bytearray | memoryview | BinaryIO | Image.Image | np.ndarray"
"""An image whose tensor, if it was one, has become an array."""

ImageLike: TypeAlias = "Decodable | SupportsArray"
"""What stands for one image: a path, encoded bytes, a file object, a Pillow image, or a uint8 array or tensor
as :func:`~cmt_edge.deploy.arrays.view_as_rgb` takes it."""

IMAGE_FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "BMP",
    "DIB",
    "GIF",
    "TIFF",
    "PPM",
    "AVIF",
)
"""Encodings that are accepted, by Pillow's names; its other decoders are never run."""

# fmt: off
EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif",
    ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif",
)
# fmt: on
"""Endings of the file names, in lower case, that count as images in a folder or an archive."""

MAX_PIXELS = 89_478_485
"""Largest accepted width x height in pixels, read from the header before anything is decoded; this is the
number at which Pillow warns."""

MAX_SIDE = 1 << 18
"""Largest accepted width and height in pixels: Pillow's resizing takes 32 bytes of memory for each pixel of a
side, whatever the other side is."""

MAX_BYTES = 256 << 20
"""Largest accepted encoded file in bytes."""

LFS_POINTER = b"version https://git-lfs"
"""First bytes of the small text file that Git LFS leaves where it has not fetched a file."""


class NamedBytes(io.BytesIO):
    """Encoded bytes whose ``filename`` appears in error messages."""

    def __init__(self, data: bytes, filename: str) -> None:
        super().__init__(data)
        self.filename = filename


@dataclass(frozen=True)
class Decoded:
    """A decoded image, which may have fewer pixels than its file.

    Attributes:
        image: upright, 8-bit RGB.
        size: of the whole image in the file, upright.
        box: the part of ``image`` that shows the whole image in the file; ``None``: all of it. A decoder
            rounds the size of a reduced image up.
    """

    image: Image.Image
    size: Size
    box: Box | None = None


def decode(source: ImageLike, exif: str, color: str = "rgb") -> Image.Image:
    """Decode all pixels, as :func:`decode_at_least` does."""
    return decode_at_least(source, exif, color).image


def decode_at_least(
    source: ImageLike,
    exif: str,
    color: str = "rgb",
    least: LeastSize | None = None,
) -> Decoded:
    """Decode to RGB; an animation gives its first frame.

    Modes: Pillow converts CMYK, grey and palette images; alpha is dropped, as the usual training loaders do;
    16-bit images are scaled to 8 bits. An exception that is not about the image, such as the caller's time
    limit, comes out as it is.

    Args:
        source: a path, encoded bytes, a file object, a Pillow image, or a uint8 array or tensor.
        exif: ``"apply"`` turns the image as its EXIF orientation says, ``"ignore"`` takes the stored pixels.
        color: the order of an array's channels, ``"rgb"`` or ``"bgr"``; other images know theirs.
        least: lets an encoded JPEG image be decoded at a half, a quarter or an eighth of its size, which
            takes a fraction of the time, where it then has at least this size; ``None`` decodes every pixel.
            Other encodings, arrays and Pillow images, which are the caller's own, always give every pixel.

    Raises:
        ImageError: missing, empty, damaged, not an image, of an unsupported kind, or beyond
            ``MAX_PIXELS``/``MAX_SIDE``/``MAX_BYTES``.
    """
    given: Decodable = view_as_array(source)
    if isinstance(given, np.ndarray):
        image = Image.fromarray(np.ascontiguousarray(view_as_rgb(given, color)))
        return Decoded(image, image.size)
    name = name_image(given)
    try:
        if isinstance(given, Image.Image):
            return _convert(given, exif, name)
        with _open(given, name) as image:
            return _convert(image, exif, name, least)
    except ImageError:
        raise
    except Exception as exc:  # damaged files make Pillow's decoders raise almost anything
        if not is_about_data(exc):
            raise
        repaired = _decode_without_metadata(given, exif, name, least)
        if repaired is not None:
            return repaired
        raise _make_undecodable_error(given, name, exc) from exc


def _decode_without_metadata(
    source: Decodable, exif: str, name: object, least: LeastSize | None
) -> Decoded | None:
    """A JPEG image whose pixels can be decoded once what only describes them is left out, or ``None``.

    First its EXIF segment is kept, which knows the orientation. Without it an image is taken as it lies.
    """
    data = _read_encoded(source)
    if not data.startswith(START):
        return None
    for keep_exif in (True, False):
        rest = strip_metadata(data, keep_exif=keep_exif)
        if rest is None:
            continue
        try:
            with _open(rest, name) as image:
                return _convert(image, exif, name, least)
        except ImageError:
            return None
        except Exception as exc:
            if not is_about_data(exc):
                raise
    return None


def _read_encoded(source: Decodable) -> bytes:
    """The encoded bytes of an image once more, empty where they cannot be had."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, (str, Path)):
        try:
            with open(source, "rb") as file:
                return file.read(MAX_BYTES)
        except OSError:  # it is gone
            return b""
    if isinstance(source, (Image.Image, np.ndarray)):
        return b""
    return _read_all(source) or b""


def _make_undecodable_error(source: ImageLike, name: object, exc: Exception) -> ImageError:
    """The error for an image that Pillow could not decode."""
    if isinstance(exc, Image.DecompressionBombError):
        return make_too_large_error(name, exc)
    if not isinstance(exc, UnidentifiedImageError):
        return ImageError(
            "cannot be decoded",
            where=name,
            why=str(exc) or type(exc).__name__,
            remedy="replace or remove the file",
        )
    if _read_first_bytes(source).startswith(LFS_POINTER):
        return ImageError(
            "is a Git LFS pointer; the image itself was not fetched",
            where=name,
            remedy="run: git lfs pull",
        )
    return ImageError(
        "is damaged or not an image",
        where=name,
        remedy=f"replace or remove it; formats: {', '.join(IMAGE_FORMATS)}",
    )


def _read_first_bytes(source: ImageLike) -> bytes:
    """The first bytes of a file or of encoded bytes, empty where they cannot be had again."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source[: len(LFS_POINTER)])
    if isinstance(source, io.BytesIO):
        return source.getvalue()[: len(LFS_POINTER)]
    if isinstance(source, (str, Path)):
        try:
            with open(source, "rb") as file:
                return file.read(len(LFS_POINTER))
        except OSError:
            return b""
    return b""


def take_snapshot(source: ImageLike, exif: str) -> ImageLike:
    """The image as it is now, whatever its owner does with the array, image, buffer or file afterwards.

    A path is returned as it is. Raises as :func:`decode`.
    """
    given: Decodable = view_as_array(source)
    if isinstance(given, np.ndarray):
        array: np.ndarray = given.copy()
        return array
    if isinstance(given, Image.Image):
        image = decode(given, exif).copy()
        image.info.clear()  # it is upright now
        return image
    if isinstance(given, (bytearray, memoryview)):
        return bytes(given)
    if isinstance(given, (str, Path, bytes)) or not hasattr(given, "read"):
        return given
    data = _read_content(given)
    return given if data is None else NamedBytes(data, str(name_image(given)))


def _read_content(file: BinaryIO) -> bytes | None:
    """The content of a file object as it is now; ``None`` where it cannot be read."""
    if type(file) in (io.BytesIO, NamedBytes):
        buffer: Any = file
        content: bytes = buffer.getvalue()  # shares its memory until somebody writes
        return content
    return _read_all(file)


def _read_all(file: BinaryIO) -> bytes | None:
    """The content of a file object up to the cap; ``None`` where it cannot be read, which decoding then
    explains."""
    try:
        if file.seekable():
            file.seek(0)
        data = file.read(MAX_BYTES + 1)
    except (
        AttributeError,
        ValueError,
    ):  # no whole file object, or a closed one
        return None
    return data if isinstance(data, bytes) else None


def list_images(images: Any) -> Any:
    """``images``, in a list if it is a single image, so that nobody iterates over its letters, bytes, lines
    or rows."""
    images = view_as_array(images)
    if isinstance(images, np.ndarray):
        single = is_single(images)
    else:
        kinds = (str, Path, bytes, bytearray, memoryview, Image.Image)
        single = isinstance(images, kinds) or hasattr(images, "read")
    return [images] if single else images


def name_image(source: ImageLike) -> object:
    """What messages call the image."""
    if isinstance(source, (str, Path)):
        return source
    return getattr(source, "filename", None) or "image"


def _open(
    source: str | Path | bytes | bytearray | memoryview | BinaryIO,
    name: object,
) -> Image.Image:
    """Read the header and check the sizes; nothing is decoded yet."""
    _require_kind(source, name)
    kind = describe_irregular(source) if isinstance(source, (str, Path)) else None
    if kind is not None:
        raise ImageError(
            f"is {kind}, not an image file",
            where=name,
            remedy="give a file; encoded bytes from elsewhere can be given as bytes",
        )
    count = _count_bytes(source)
    if count == 0:
        raise ImageError(
            "the image is empty (0 bytes)",
            where=name,
            remedy="replace or remove the file",
        )
    if count is not None and count > MAX_BYTES:
        raise make_too_large_error(name, f"{count} bytes, the cap is {MAX_BYTES}")
    encoded = io.BytesIO(source) if isinstance(source, (bytes, bytearray, memoryview)) else source
    if count is not None and count > SMALL_BYTES:
        _require_no_flood(encoded, count, name)
    image = Image.open(encoded, formats=IMAGE_FORMATS)
    try:
        require_modest_size(image.width, image.height, name)
    except ImageError:
        image.close()
        raise
    return image


def _require_no_flood(source: str | Path | BinaryIO, count: int, name: object) -> None:
    """Raise :class:`ImageError` for a file of ``count`` bytes that takes Pillow long before its pixels."""
    if isinstance(source, (str, Path)):
        with open(source, "rb") as file:
            flood = find_flood(file, count)
    else:
        flood = find_flood(source, count)
        source.seek(0)
    if flood is not None:
        raise ImageError(
            f"this image has far more {flood} than any program writes",
            where=name,
            remedy="replace or remove the file",
        )


def _require_kind(source: object, name: object) -> None:
    """Raise :class:`ImageError` unless the object can be an encoded image."""
    if isinstance(source, (str, Path, bytes, bytearray, memoryview)) or hasattr(source, "read"):
        return
    remedy = "give a path, encoded bytes, a file object, a Pillow image, or a uint8 array (H, W, 3)"
    if source is None:
        remedy = "check the source: cv2.imread() returns None for a file that it cannot read"
    elif isinstance(source, (list, tuple)):
        remedy = "give several images to predict() or stream()"
    raise ImageError(
        f"this is no image but of type {type(source).__name__}",
        where=name,
        remedy=remedy,
    )


def _count_bytes(
    source: str | Path | bytes | bytearray | memoryview | BinaryIO,
) -> int | None:
    """Size of the encoded image; ``None`` where only reading it would tell."""
    if isinstance(source, (str, Path)):
        path = Path(source)
        if not path.is_file():
            raise ImageError(
                "no such image file",
                where=path,
                remedy="check the path",
            )
        return path.stat().st_size
    if isinstance(source, (bytes, bytearray)):
        return len(source)
    if isinstance(source, memoryview):
        return source.nbytes
    return source.getbuffer().nbytes if isinstance(source, io.BytesIO) else None


def require_modest_size(width: int, height: int, name: object) -> None:
    """Raise :class:`ImageError` for an image of too many pixels, or with too long a side."""
    if width * height > MAX_PIXELS:
        raise make_too_large_error(name, f"{width} x {height} pixels, the cap is {MAX_PIXELS}")
    if max(width, height) > MAX_SIDE:
        raise make_too_large_error(name, f"{width} x {height} pixels, the cap of a side is {MAX_SIDE}")


def make_too_large_error(name: object, why: object) -> ImageError:
    return ImageError(
        "the image is too large",
        where=name,
        why=why,
        remedy="make it smaller before using it",
    )


def _convert(image: Image.Image, exif: str, name: object, least: LeastSize | None = None) -> Decoded:
    """Decode an opened image: upright as ``exif`` says, in 8-bit RGB, and reduced as far as ``least``
    allows."""
    if 0 in image.size:
        raise ImageError(
            f"the image has no pixels: it is {image.width} x {image.height}",
            where=name,
            remedy="replace it",
        )
    _require_few_scans(image, name)
    size, box = image.size, None
    if least is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
        size, box = reduce_jpeg(image, find_turn(image) if exif == "apply" else None, least)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        note_orientation(image)
    if exif == "apply":
        image = turn_upright(image)
    elif isinstance(image, TiffImagePlugin.TiffImageFile):
        image = view_as_stored(image)
    if image.mode == "F":
        raise ImageError(
            "floating-point pixels have no defined range",
            where=name,
            remedy="save it as 8 or 16 bits",
        )
    if image.mode.startswith("I"):
        image = _scale_to_8_bits(image, name)
    image.load()  # the file is closed when the caller gets it
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return Decoded(rgb, size if box else rgb.size, box)


def _require_few_scans(image: Image.Image, name: object) -> None:
    """Raise :class:`ImageError` for a JPEG image that is not decoded yet and has far more scans than any
    program writes: each takes the time of a whole image."""
    if not isinstance(image, JpegImagePlugin.JpegImageFile) or not image.tile or image.fp is None:
        return
    position = image.fp.tell()
    if type(image) is JpegImagePlugin.JpegImageFile and "progressive" not in image.info:
        whole = make_scan_header(image.layers)
        image.fp.seek(max(0, position - 2 * image.layers - 8))  # Pillow has read the header of the first scan
        start = image.fp.read(len(whole))
        image.fp.seek(position)
        if start == whole:
            return  # the first scan holds all colours, and nothing after it is decoded
    image.fp.seek(image.tile[0].offset)
    data = image.fp.read(MAX_BYTES)
    image.fp.seek(position)
    if has_many_scans(data):
        raise ImageError(
            "this JPEG has too many scans",
            where=name,
            why=f"more than {MAX_SCANS}; progressive images have about 10",
            remedy="save it again with another program",
        )


def _scale_to_8_bits(image: Image.Image, name: object) -> Image.Image:
    """Scale 16-bit grey values, which Pillow would clip, to 8 bits."""
    values = np.asarray(image)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise ImageError(
            "the pixels are integers outside 0..65535",
            where=name,
            remedy="save it as 8 or 16 bits",
        )
    return Image.fromarray((values >> 8).astype(np.uint8))
