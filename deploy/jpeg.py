"""The segments of a JPEG file: how many scans it has, and the file without its metadata.

Layout: ITU-T T.81, annex B. A segment is 0xFF, its code and a length of two bytes that counts itself; after
the header of a scan come its values, in which 0xFF is followed by 0 or by a restart marker.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

START = b"\xff\xd8"
"""First bytes of a JPEG file."""
SCAN, END = 0xDA, 0xD9
"""Codes of the header of a scan, and of the end of an image."""
EXIF_SEGMENT, ADOBE_SEGMENT = 0xE1, 0xEE
"""Codes of the segments that hold EXIF entries, and Adobe's description of the colours."""
METADATA = frozenset({*range(0xE1, 0xF0), 0xFE})
"""Codes of segments that may be left out: they describe the image, and no pixel depends on them. Adobe's is
the exception where it is whole."""
WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})
"""Codes of segments of two bytes."""
MAX_SCANS = 100
"""The largest number of scans that is accepted: each costs as much time as the pixels of the whole image,
and programs write about 10."""
FURTHEST_TABLE = 1 << 17
"""Bytes after a damaged segment among which the next table is looked for: two of the largest segments."""
LARGEST_THUMBNAIL = 512 * 512
"""Pixels of the largest image that may be a thumbnail."""

MAX_SEGMENTS = 20_000
"""The largest number of segments that are looked at; photographs have up to some hundred."""

_NEXT = re.compile(rb"\xff([\x01-\xfe])")
"""Matches the next marker, as libjpeg looks for it: bytes before it are skipped, and 0xFF may be repeated."""

_FILL = re.compile(rb"\xff+")
"""Matches what fills up a marker, and its own first byte."""

_WITH_LENGTH = frozenset(
    {*range(0xC0, 0xC8), *range(0xC9, 0xD0), *range(0xDA, 0xDE), *range(0xE0, 0xF0), 0xFE}
)
"""Codes of the segments whose length libjpeg reads. It ends at any other code, or passes over it while it
looks for a restart marker, so that no length behind one may hide a scan."""

_TABLE = re.compile(rb"\xff[\xd8\xd9\xdb\xc4\xc0-\xc2]")
"""Matches the markers that begin or end an image, define tables, or begin a frame."""


@dataclass(frozen=True)
class _Segment:
    """A segment: its code, and the bytes from its 0xFF to its end."""

    code: int
    start: int
    end: int


def has_many_scans(data: bytes) -> bool:
    """Whether an image has more than :data:`MAX_SCANS` scans, or more than :data:`MAX_SEGMENTS` segments.

    Nothing is decoded. Markers are found as libjpeg finds them: after each segment it skips what is no
    marker.
    """
    if data.count(b"\xff\xda") <= MAX_SCANS:  # no scan is without these bytes
        return False
    scans = segments = 0
    position = 2
    while (found := _NEXT.search(data, position)) is not None and found[1][0] != END:
        code = found[1][0]
        position = found.end()
        if code in _WITH_LENGTH:
            position += max(2, int.from_bytes(data[position : position + 2], "big"))
        scans += code == SCAN
        segments += code in _WITH_LENGTH
        if scans > MAX_SCANS or segments > MAX_SEGMENTS:
            return True
    return False


def has_long_header(data: bytes) -> bool:
    """Whether more than :data:`MAX_SEGMENTS` segments and skipped bytes precede the first scan in ``data``,
    the first bytes of a file: programs that read one after the other take long for them."""
    position = 2
    for _ in range(MAX_SEGMENTS):
        found = _NEXT.search(data, position)
        if found is None or found[1][0] in (SCAN, END):
            return found is None and len(data) - position > MAX_SEGMENTS
        if found.end() - position > MAX_SEGMENTS:
            return True
        position = found.end()
        if found[1][0] in _WITH_LENGTH:
            position += max(2, int.from_bytes(data[position : position + 2], "big"))
        if position >= len(data):
            return False
    return True


def make_scan_header(colours: int) -> bytes:
    """The first five bytes of the header of a scan that holds all ``colours``."""
    length = 2 * colours + 6
    return b"\xff\xda" + length.to_bytes(2, "big") + bytes([colours])


def strip_metadata(data: bytes, *, keep_exif: bool) -> bytes | None:
    """The file without segments that only describe the image, even where one is cut off; ``keep_exif`` keeps
    whole EXIF segments. ``None`` where there is no image behind them."""
    if not data.startswith(START):
        return None
    kept = [START]
    for segment in _iterate_tables(data, 2):
        whole = data[segment.start : segment.end]
        if segment.code == SCAN:
            return b"".join([*kept, data[segment.start :]])
        if segment.code not in METADATA or _is_needed(segment.code, whole, keep_exif):
            kept.append(whole)
    return None


def _is_needed(code: int, whole: bytes, keep_exif: bool) -> bool:
    """Whether a segment is kept although pixels rarely depend on it."""
    if code == ADOBE_SEGMENT:
        return whole[4:9] == b"Adobe" and len(whole) >= 16
    return keep_exif and code == EXIF_SEGMENT and whole[4:10] == b"Exif\0\0"


def _iterate_tables(data: bytes, position: int) -> Iterator[_Segment]:
    """The segments up to the first scan; after damaged metadata it goes on at the image's next table."""
    budget = iter(range(MAX_SEGMENTS))
    for _ in budget:
        segment = _read_segment(data, position)
        if segment is None:
            return
        is_whole = _is_marker(data, segment.end)
        if segment.code == SCAN or is_whole:
            yield segment
            if segment.code == SCAN:
                return
            position = segment.end
        elif segment.code in METADATA:
            position = _find_next_table(data, segment.start + 2, budget)
        else:
            return


def _find_next_table(data: bytes, position: int, budget: Iterator[int]) -> int:
    """Where the tables of the largest image begin that follows a damaged segment; the end of the data if
    there is none. A thumbnail in the segment has tables too, and it may be cut off.

    ``budget``: gives one item for each segment that may still be looked at.
    """
    best, most, in_thumbnail = len(data), 0, False
    for found in _TABLE.finditer(data, position, position + FURTHEST_TABLE):
        code = found[0][1]
        if code in (START[1], END):
            in_thumbnail = code == START[1]
            continue
        size = _read_declared_size(data, found.start(), budget)
        if size > most and (not in_thumbnail or size > LARGEST_THUMBNAIL):
            best, most = found.start(), size
    return best


def _read_declared_size(data: bytes, position: int, budget: Iterator[int]) -> int:
    """Height times width that the tables from ``position`` on declare; 0 unless a scan follows them."""
    size = 0
    for _ in budget:
        segment = _read_segment(data, position)
        if segment is None:
            return 0
        if segment.code == SCAN:
            return size
        if not _is_marker(data, segment.end):
            return 0
        if 0xC0 <= segment.code <= 0xC2 and segment.end - segment.start >= 9:
            height, width = (
                int.from_bytes(data[segment.start + i : segment.start + i + 2], "big") for i in (5, 7)
            )
            size = height * width
        position = segment.end
    return 0


def _read_segment(data: bytes, position: int) -> _Segment | None:
    """The segment at ``position``; its end may lie beyond the file's. ``None`` where none begins there."""
    if (fill := _FILL.match(data, position)) is not None:  # a marker may be filled up
        position = fill.end() - 1
    if not _is_marker(data, position):
        return None
    code = data[position + 1]
    if code in WITHOUT_LENGTH or code == END:
        return _Segment(code, position, position + 2)
    length = int.from_bytes(data[position + 2 : position + 4], "big")
    return _Segment(code, position, position + 2 + max(2, length))


def _is_marker(data: bytes, position: int) -> bool:
    """Whether a segment may begin at ``position``."""
    first, second = data[position : position + 1], data[position + 1 : position + 2]
    return first == b"\xff" and second not in (b"", b"\0")
