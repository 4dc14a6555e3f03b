"""Large files in which far more bytes describe an image than any program writes.

Pillow reads headers in Python, a chunk, a comment or an entry at a time: a file of 100 MB made of the
smallest of them takes minutes, or gigabytes of memory. What is looked at here is how many there are.

Two formats have pixels that Pillow reads in Python too: plain Netpbm and compressed BMP, some 5 MB a second.

Sources: PNG, section 5.3; TIFF 6.0, section 2, and the BigTIFF proposal; the manual pages of Netpbm; GIF89a,
sections 18 to 26; BITMAPINFOHEADER in Microsoft's documentation.
"""

from __future__ import annotations

import re
import struct
from typing import BinaryIO

from .jpeg import START as JPEG
from .jpeg import has_long_header

SMALL_BYTES = 256 << 10
"""Files of fewer bytes need not be looked at: whatever they hold, Pillow reads them in a second."""
LARGE_BYTES = 4 << 20
"""From this number of bytes on, formats other than plain Netpbm are looked at."""
HEADER_BYTES = 1 << 20
"""The number of bytes at the start of a file in which a header is looked for."""
MAX_CHUNKS = 100_000
"""The largest number of chunks of a PNG file; programs write about one for 8 KiB."""
MAX_ENTRY_VALUES = 1_000_000
"""The largest number of values of an entry of a TIFF file, such as the places of its strips."""
MAX_COMMENTS = 1_000
"""The largest number of comments in a plain Netpbm file."""

MAX_BLOCKS = 100_000
"""The largest number of blocks of a GIF file before its first picture, of up to 255 bytes each; a color
profile of 1 MB has 4,000."""
MAX_SLOW_BYTES = 32 << 20
"""The largest number of bytes of a file whose pixels Pillow reads in Python."""
RLE_BYTES_PER_PIXEL = 1.25
"""The largest number of bytes of a compressed BMP file for each pixel. Pixels that do not compress are
written as they are, so that programs write little more than one."""

PNG = b"\x89PNG\r\n\x1a\n"
"""First bytes of a PNG file."""
PLAIN_NETPBM = (b"P1", b"P2", b"P3")
"""First bytes of Netpbm's formats whose pixels are decimal numbers, with comments between them."""
NETPBM_HEADER = re.compile(rb"P\w{1,6}(?:\s|#[^\r\n]*[\r\n]){1,999}\d{1,9}(?:\s|#[^\r\n]*[\r\n]){1,999}\d")
"""Matches the header of a Netpbm file up to the height; comments may stand in it."""
TIFF_ORDERS = {b"II": "<", b"MM": ">"}
"""First bytes of a TIFF file -> the order of the bytes of its numbers, as :mod:`struct` calls it."""
GIF = (b"GIF87a", b"GIF89a")
"""First bytes of a GIF file."""
BMP_FILE_HEADER = 14
"""Bytes before the header of the picture in a file that begins with ``BM``; other files begin with it."""
BMP_HEADER = struct.Struct("<I2i2xHI")
"""The header of a picture in a BMP file: its size, width, height, bits of a pixel, and compression."""
BMP_HEADER_SIZES = (40, 52, 56, 64, 108, 124)
"""Sizes of such a header, as far as they have a compression."""
RLE = (1, 2)
"""Numbers of the compressions by runs of pixels."""
CHUNK = struct.Struct(">I4x")
"""What a chunk of a PNG file begins with: the number of its bytes, and its name."""
CHUNK_END = 4
"""Bytes of the checksum behind a chunk."""


def find_flood(file: BinaryIO, size: int) -> str | None:
    """What a file of ``size`` bytes has too many of, in words; ``None`` if nothing. The file's position
    changes."""
    file.seek(0)
    start = file.read(8)
    if start[:2] in PLAIN_NETPBM and _count_comments(file) > MAX_COMMENTS:
        return "comments"
    if start[:2] in PLAIN_NETPBM and size > MAX_SLOW_BYTES:
        return "plain numbers"
    return None if size <= LARGE_BYTES else _find_flood_of_large(file, start, size)


def _find_flood_of_large(file: BinaryIO, start: bytes, size: int) -> str | None:
    """As :func:`find_flood`, for a large file and its first bytes."""
    file.seek(0)
    flood, is_flooded = "chunks", False
    if start.startswith(JPEG):
        flood, is_flooded = "segments before the image", has_long_header(file.read(HEADER_BYTES))
    elif start.startswith(b"P") and start[1:2].isalnum():
        flood, is_flooded = "bytes before the sizes", not NETPBM_HEADER.match(file.read(HEADER_BYTES))
    elif start == PNG:
        is_flooded = _has_many_chunks(file, size)
    elif start[:6] in GIF:
        flood, is_flooded = "blocks before the picture", _has_many_blocks(file)
    elif start[:2] in TIFF_ORDERS:
        flood, is_flooded = "values of an entry", _has_long_entry(file, TIFF_ORDERS[start[:2]])
    elif (header := _read_bmp(file)) is not None:
        flood, is_flooded = "runs of pixels", _has_many_runs(header, size)
    return flood if is_flooded else None


def _count_comments(file: BinaryIO) -> int:
    count = 0
    while count <= MAX_COMMENTS and (part := file.read(HEADER_BYTES)):
        count += part.count(b"#")
    return count


def _has_many_chunks(file: BinaryIO, size: int) -> bool:
    position = len(PNG)
    for _ in range(MAX_CHUNKS):
        file.seek(position)
        head = file.read(CHUNK.size)
        if len(head) < CHUNK.size or position >= size:
            return False
        position += CHUNK.size + CHUNK.unpack(head)[0] + CHUNK_END
    return True


def _has_many_blocks(file: BinaryIO) -> bool:
    """Whether more than :data:`MAX_BLOCKS` blocks of a GIF file stand before its first picture."""
    file.seek(0)
    head = file.read(13).ljust(13, b"\0")
    data = memoryview(head + file.read(MAX_BLOCKS * 256))
    position = len(head)
    if head[10] & 0x80:  # the colors of all pictures
        position += 3 << (head[10] & 7) + 1
    blocks = 0
    while position + 1 < len(data) and data[position] == 0x21:  # an extension and its kind
        position += 2
        while position < len(data) and data[position] and blocks <= MAX_BLOCKS:
            position += 1 + data[position]
            blocks += 1
        position += 1
        blocks += 1
        if blocks > MAX_BLOCKS:
            return True
    return False


def _read_bmp(file: BinaryIO) -> tuple[int, int, int] | None:
    """Width, height and compression of a BMP file; ``None`` for another file."""
    file.seek(0)
    head = file.read(BMP_FILE_HEADER + BMP_HEADER.size)
    head = head[BMP_FILE_HEADER if head.startswith(b"BM") else 0 :]
    if len(head) < BMP_HEADER.size:
        return None
    size, width, height, _, compression = BMP_HEADER.unpack_from(head)
    return (abs(width), abs(height), compression) if size in BMP_HEADER_SIZES else None


def _has_many_runs(header: tuple[int, int, int], size: int) -> bool:
    """Whether a compressed BMP file has more bytes than its pixels need, or more than are read in seconds."""
    width, height, compression = header
    most = RLE_BYTES_PER_PIXEL * width * height + 4 * height + SMALL_BYTES
    return compression in RLE and size > min(most, MAX_SLOW_BYTES)


def _has_long_entry(file: BinaryIO, order: str) -> bool:
    """Whether an entry of the first directory of a TIFF file has more than :data:`MAX_ENTRY_VALUES`."""
    head = file.read(16).ljust(16, b"\0")
    is_big = struct.unpack_from(f"{order}H", head, 2)[0] == 43
    (place,) = struct.unpack_from(
        f"{order}{'Q' if is_big else 'I'}",
        head,
        8 if is_big else 4,
    )
    counter, entry = (f"{order}Q", f"{order}4xQ8x") if is_big else (f"{order}H", f"{order}4xI4x")
    file.seek(min(place, 1 << 62))
    found = file.read(struct.calcsize(counter))
    if len(found) < struct.calcsize(counter):
        return False
    (entries,) = struct.unpack(counter, found)
    size = struct.calcsize(entry)
    data = file.read(min(entries, 1 << 16) * size)
    whole = len(data) // struct.calcsize(entry) * struct.calcsize(entry)
    return any(count > MAX_ENTRY_VALUES for (count,) in struct.iter_unpack(entry, data[:whole]))
