"""Files whose headers take longer than their pixels, and large files that are right."""

from __future__ import annotations

import io
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmt_edge.deploy import headers
from cmt_edge.deploy.decoding import decode
from cmt_edge.deploy.errors import ImageError
from cmt_edge.deploy.headers import find_flood

PICTURE = Image.fromarray(np.random.default_rng(3).integers(0, 255, (48, 64, 3), dtype=np.uint8))


def encode(form: str, image: Image.Image = PICTURE, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def segment(code: int, payload: bytes) -> bytes:
    """A segment of a JPEG file."""
    return bytes([0xFF, code]) + struct.pack(">H", len(payload) + 2) + payload


def chunk(name: bytes, data: bytes = b"") -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


PNG_HEAD = encode("PNG")[:33]
PNG_PIXELS = encode("PNG")[33:]


def strips(order: str, count: int) -> bytes:
    """A TIFF file of 8 pixels in each of ``count`` rows, which are strips of their own."""
    first = 8 + 2 + 12 * 9 + 4
    values = [(256, 4, 1, 8), (257, 4, 1, count), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    values += [(273, 4, count, first), (277, 3, 1, 1), (278, 4, 1, 1), (279, 4, count, first + 4 * count)]
    mark = b"II*\0" if order == "<" else b"MM\0*"
    entries = b"".join(
        struct.pack(f"{order}HHI", *entry[:3])
        + (struct.pack(f"{order}I", entry[3]) if entry[1] == 4 else struct.pack(f"{order}HH", entry[3], 0))
        for entry in values
    )
    places = struct.pack(f"{order}I", first + 8 * count) * count + struct.pack(f"{order}I", 8) * count
    return mark + struct.pack(f"{order}IH", 8, 9) + entries + bytes(4) + places + bytes(8)


def rle(payload: bytes, width: int, height: int, file_header: bool = True) -> bytes:
    """A BMP file of runs of pixels."""
    colors = b"".join(bytes([i, i, i, 0]) for i in range(256))
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(payload), 0, 0, 256, 0) + colors
    start = 14 + len(info)
    head = b"BM" + struct.pack("<IHHI", start + len(payload), 0, 0, start) if file_header else b""
    return head + info + payload


def gif(blocks: bytes) -> bytes:
    """A GIF file with blocks before its picture."""
    made = encode("GIF", PICTURE.convert("P"))
    start = 13 + (3 << (made[10] & 7) + 1 if made[10] & 0x80 else 0)
    return made[:start] + blocks + made[start:]


FLOODS = {
    "comments of GIF": gif(b"!\xfe\x01a\0" * 2_000_000),
    "empty comments of GIF": gif(b"!\xfe\0" * 2_000_000),
    "a comment of GIF in tiny blocks": gif(b"!\xfe" + b"\x01a" * 12_000_000 + b"\0"),
    "runs of one pixel": rle((b"\1\5" * 4000 + b"\0\0") * 1000 + b"\0\1", 4000, 1000),
    "moves to nowhere": rle(b"\0\2\0\0" * 4_000_000, 64, 48),
    "moves in a large picture": rle(b"\0\2\0\0" * 10_000_000, 9400, 9400),
    "moves without a header of a file": rle(b"\0\2\0\0" * 4_000_000, 64, 48, file_header=False),
    "plain numbers": b"P2 4000 4000 255\n" + b"1 " * (17 << 20),
    "plain bits": b"P1 9000 9000\n" + b"1" * (33 << 20),
    "space between plain numbers": b"P3 64 64 255\n" + b" " * (33 << 20),
    "beginnings": b"\xff\xd8" * (8 << 20),
    "fill bytes": b"\xff\xd8" + b"\xff" * (16 << 20),
    "zeros": b"\xff\xd8" + bytes(16 << 20),
    "empty comments": b"\xff\xd8" + segment(0xFE, b"") * (4 << 20),
    "damaged tables": b"\xff\xd8" + b"\xff\xe1\0\x10" * 2000 + b"\xff\xdb\0\2" * (4 << 20),
    "a comment of Netpbm": b"P3\n" + b"#" * (16 << 20),
    "comments of Netpbm": b"P6\n" + b"#\n" * (8 << 20),
    "space of Netpbm": b"P5\n" + b" " * (16 << 20),
    "comments behind the sizes": b"P3 4 4 255\n" + b"#" * (16 << 20),
    "comments between the pixels": b"P3 64 64 255\n" + b"1 #\n" * (1 << 20),
    "chunks before the pixels": PNG_HEAD + chunk(b"teSt") * 1_000_000 + PNG_PIXELS,
    "empty pixels": PNG_HEAD + chunk(b"IDAT") * 1_000_000 + PNG_PIXELS,
    "chunks behind the pixels": PNG_HEAD + PNG_PIXELS[:-12] + chunk(b"teSt") * 1_000_000 + PNG_PIXELS[-12:],
    "strips": strips("<", 2_000_000),
    "strips, the other order": strips(">", 2_000_000),
}
"""Files that take Pillow long for what is no pixel."""


@pytest.mark.parametrize("name", FLOODS)
@pytest.mark.parametrize("how", ["bytes", "path"])
def test_floods_are_refused_soon(tmp_path, name, how):
    (tmp_path / "a").write_bytes(FLOODS[name])
    start = time.process_time()
    with pytest.raises(ImageError):
        decode(FLOODS[name] if how == "bytes" else tmp_path / "a", "apply")
    assert time.process_time() - start < 2


def large(count: int = 1500) -> Image.Image:
    return Image.fromarray(np.random.default_rng(5).integers(0, 255, (count, count, 3), dtype=np.uint8))


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM", "BMP", "JPEG"])
def test_large_images_are_read(form: str, tmp_path: Path) -> None:
    options = {"quality": 100, "subsampling": 0} if form == "JPEG" else {}
    (tmp_path / "a").write_bytes(encode(form, large(), **options))
    assert (tmp_path / "a").stat().st_size > headers.LARGE_BYTES
    assert decode(tmp_path / "a", "apply").size == (1500, 1500)


def test_large_metadata_are_no_flood() -> None:
    photograph = encode("JPEG")
    assert decode(photograph[:2] + segment(0xE2, bytes(65000)) * 300 + photograph[2:], "apply").size == (
        64,
        48,
    )
    profile = b"!\xff\x0bICCRGBG1012" + (b"\xff" + bytes(255)) * 20_000 + b"\0"
    assert decode(gif(profile), "apply").size == (64, 48)
    rows = b"".join(b"\0\xfe" + bytes(254) + b"\0\0" for _ in range(20_000))
    assert decode(rle(rows + b"\0\1", 254, 20_000), "apply").size == (254, 20_000)
    assert decode(b"P2 1500 1500 255\n" + b"255 " * 2_250_000, "apply").size == (1500, 1500)
    header = b"P6\n# made by a camera\n# in two lines\n2000 1000\n255\n"
    assert decode(header + bytes(6_000_000), "apply").size == (2000, 1000)
    text = chunk(b"tEXt", b"a\0" + b"b" * 9000)
    assert decode(PNG_HEAD + text * 700 + PNG_PIXELS, "apply").size == (64, 48)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"I",
        b"GIF89a",
        b"GIF89a" + bytes(4) + b"\xf7",
        b"BM",
        b"BM" + bytes(20),
        b"II*\0",
        b"II+\0",
        b"MM\0*\xff\xff\xff\xff",
        b"II+\0" + b"\xff" * 12,
        PNG_HEAD[:8],
    ],
)
def test_headers_that_are_cut_off(data: bytes) -> None:
    assert find_flood(io.BytesIO(data), headers.LARGE_BYTES + 1) is None


def test_an_entry_of_a_big_tiff() -> None:
    entry = struct.pack("<HHQQ", 273, 4, 1 << 40, 16)
    data = b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 1) + entry
    assert find_flood(io.BytesIO(data), headers.LARGE_BYTES + 1) == "values of an entry"
