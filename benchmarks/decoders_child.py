"""Decodes and resizes JPEG images with one tool, in the environment that has it; :mod:`decoders` starts it.

    python decoders_child.py WAY [LIBTURBOJPEG]

Each line that it reads is a job in JSON: ``file``, the ``size`` after resizing, the ``box`` that is then cut
out, ``rounds``, and where to keep the pixels (``keep``). It answers with a line that has the milliseconds of
each round.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Size = tuple[int, int]
Box = tuple[int, int, int, int]
Way = Callable[[bytes, Size, Box], Any]
"""Encoded bytes, the size after resizing, and the box in it -> pixels, uint8 ``(H, W, 3)`` RGB."""

GAP = 2
"""How many times the size after resizing an image that is decoded in part has at least."""
FACTORS = (8, 4, 2)
"""How many times smaller a decoder can make an image from its coefficients, largest first."""


def choose_factor(width: int, height: int, size: Size) -> int:
    """How many times smaller an image of these sides can be decoded; 1 for not at all."""
    fits = (f for f in FACTORS if width // f >= GAP * size[0] and height // f >= GAP * size[1])
    return next(fits, 1)


def finish(image: Any, whole: Size, scale: float, size: Size, box: Box) -> Any:
    """A decoded Pillow image, resized and cropped.

    An image that was decoded at ``scale`` of the ``whole`` size has its sides rounded up: only the part that
    shows the whole is resized.
    """
    from PIL import Image

    part = (0, 0, whole[0] * scale, whole[1] * scale)
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC, part).crop(box))


def make_pillow(reduced: bool) -> Way:
    from PIL import Image

    def decode(data: bytes, size: Size, box: Box) -> Any:
        image = Image.open(io.BytesIO(data))
        whole, factor = image.size, choose_factor(*image.size, size) if reduced else 1
        if factor > 1:
            image.draft("RGB", (image.width // factor, image.height // factor))
        return finish(image.convert("RGB"), whole, 1 / factor, size, box)

    return decode


def make_simplejpeg(reduced: bool) -> Way:
    import simplejpeg
    from PIL import Image

    def decode(data: bytes, size: Size, box: Box) -> Any:
        least = (GAP * size[1], GAP * size[0]) if reduced else (0, 0)
        pixels = simplejpeg.decode_jpeg(
            data, fastdct=False, fastupsample=False, min_height=least[0], min_width=least[1], min_factor=1
        )
        height, width = simplejpeg.decode_jpeg_header(data)[:2]
        eighths = 8 * pixels.shape[1] // width  # its sides are rounded up
        return finish(Image.fromarray(pixels), (width, height), eighths / 8, size, box)

    return decode


def make_turbojpeg(reduced: bool, library: str) -> Way:
    import turbojpeg
    from PIL import Image

    decoder = turbojpeg.TurboJPEG(library or None)

    def decode(data: bytes, size: Size, box: Box) -> Any:
        width, height = decoder.decode_header(data)[:2]
        factor = choose_factor(width, height, size) if reduced else 1
        pixels = decoder.decode(data, pixel_format=turbojpeg.TJPF_RGB, scaling_factor=(1, factor))
        return finish(Image.fromarray(pixels), (width, height), 1 / factor, size, box)

    return decode


def make_opencv(resizer: str) -> Way:
    """``resizer``: OpenCV's name of its interpolation, or ``pillow``."""
    import cv2
    from PIL import Image

    cv2.setNumThreads(1)
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION

    def decode(data: bytes, size: Size, box: Box) -> Any:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        if resizer == "pillow":
            image = Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
            return np.asarray(image.resize(size, Image.Resampling.BICUBIC).crop(box))
        small = cv2.resize(pixels, size, interpolation=getattr(cv2, resizer))
        left, top, right, bottom = box
        return cv2.cvtColor(small[top:bottom, left:right], cv2.COLOR_BGR2RGB)

    return decode


def make_vips(how: str) -> Way:
    """``how``: ``thumbnail`` decodes at a part of the size, ``cubic`` decodes whole and resizes, ``pillow``
    only decodes."""
    import pyvips
    from PIL import Image

    def decode(data: bytes, size: Size, box: Box) -> Any:
        left, top, right, bottom = box
        if how == "thumbnail":
            small = pyvips.Image.thumbnail_buffer(data, size[0], height=size[1], size="force", no_rotate=True)
            return small.crop(left, top, right - left, bottom - top).numpy()
        image = pyvips.Image.new_from_buffer(data, "", access="sequential")
        if how == "pillow":
            return np.asarray(Image.fromarray(image.numpy()).resize(size, Image.Resampling.BICUBIC).crop(box))
        small = image.resize(size[0] / image.width, vscale=size[1] / image.height, kernel="cubic")
        return small.crop(left, top, right - left, bottom - top).numpy()

    return decode


def make_way(name: str, library: str) -> Way:
    """The way of this name; raises whatever a missing package or library raises."""
    tool, _, how = name.partition(":")
    makers: dict[str, Callable[[], Way]] = {
        "pillow": lambda: make_pillow(how == "reduced"),
        "simplejpeg": lambda: make_simplejpeg(how == "reduced"),
        "turbojpeg": lambda: make_turbojpeg(how == "reduced", library),
        "opencv": lambda: make_opencv(how),
        "vips": lambda: make_vips(how),
    }
    return makers[tool]()


def main() -> None:
    way = make_way(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "")
    for line in sys.stdin:
        job = json.loads(line)
        data = Path(job["file"]).read_bytes()
        times = []
        for _ in range(job["rounds"]):
            start = time.perf_counter()
            pixels = way(data, tuple(job["size"]), tuple(job["box"]))
            times.append(1e3 * (time.perf_counter() - start))
        if job["keep"]:
            np.save(job["keep"], pixels)
        print(json.dumps({"ms": times}), flush=True)


if __name__ == "__main__":
    main()
