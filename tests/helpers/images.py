"""Encoded images, and folders of them."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from cmt_edge.calib.generated import generate
from cmt_edge.deploy.images import ImageSet

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(width: int = 40, height: int = 30) -> Image.Image:
    """A smooth, asymmetric RGB picture."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))


def make_png(width: int, height: int, *, depth: int, kind: int, rows: bytes) -> bytes:
    """A PNG with these rows, whether or not its header (bits of a sample, type of colour) fits them."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows, 9)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def coloured(name: str, shade: int = 0) -> bytes:
    """A plain image whose class the fake runtime knows; ``shade`` makes it a different file."""
    colour = tuple(max(0, v - shade) if v else 0 for v in COLOURS[name])
    return encoded(Image.new("RGB", (20, 20), colour))


def folder_of(path, content: dict[str, list[bytes]]):
    """Class folders with images."""
    for label, blobs in content.items():
        (path / label).mkdir(parents=True)
        for i, blob in enumerate(blobs):
            (path / label / f"{i:03}.png").write_bytes(blob)
    return ImageSet(path)


def coloured_folder(path: Path) -> Path:
    """Three images in each of the class folders ``red``, ``green`` and ``blue``."""
    folder_of(path, {name: [coloured(name, shade) for shade in range(3)] for name in COLOURS})
    return path


def plain(colour, size=(20, 20)) -> Image.Image:
    return Image.new("RGB", size, colour)


RED, GREEN, BLUE = (encoded(plain(c)) for c in ("red", "#00ff00", "blue"))


def labelled(folder: Path, classes: list[str], each: int = 2) -> Path:
    blobs = iter(generate(each * len(classes), 64, seed=11))
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(each):
            (folder / name / f"{i}.png").write_bytes(next(blobs))
    return folder


def grey(level: int) -> np.ndarray:
    """An image whose answer tells it from every other level."""
    return np.full((20, 20, 3), level, np.uint8)
