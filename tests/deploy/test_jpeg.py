"""Photographs whose metadata are damaged and whose pixels are good; JPEG files with thousands of scans."""

from __future__ import annotations

import io
import struct
import time

import numpy as np
import pytest
from PIL import Image

from cmt_edge.deploy import decoding, jpeg
from cmt_edge.deploy.decoding import NamedBytes, decode
from cmt_edge.deploy.errors import ImageError
from cmt_edge.deploy.jpeg import MAX_SCANS, has_many_scans, strip_metadata
from cmt_edge.deploy.preprocessing import Preprocess

SPEC = Preprocess(16, None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
STORED = Preprocess(16, None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), exif="ignore")
PICTURE = Image.fromarray(np.random.default_rng(3).integers(0, 255, (48, 64, 3), dtype=np.uint8))
SMALL = Image.fromarray(np.zeros((8, 8, 3), np.uint8))


def encoded(image: Image.Image = PICTURE, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


def exif(orientation: int = 6, thumbnail: bytes = b"") -> bytes:
    entries = Image.Exif()
    entries[0x0112] = orientation
    entries[0x010F] = "a maker " * 9
    return entries.tobytes() + thumbnail


PLAIN = encoded()
PIXELS = np.asarray(decode(PLAIN, SPEC.exif))


def segment(code: int, payload: bytes, length: int | None = None) -> bytes:
    """A segment, whose declared length may be wrong."""
    return bytes([0xFF, code]) + struct.pack(">H", len(payload) + 2 if length is None else length) + payload


def with_segment(*segments: bytes) -> bytes:
    """The picture with segments after its first bytes."""
    return PLAIN[:2] + b"".join(segments) + PLAIN[2:]


WHOLE = exif()
CUT = {
    **{
        f"cut to {n}, its length not": segment(0xE1, WHOLE[:n], len(WHOLE) + 2)
        for n in (0, 1, 6, 8, 12, 20, 60)
    },
    **{f"cut to {n}, and its length": segment(0xE1, WHOLE[:n]) for n in (0, 1, 6, 8, 12, 20)},
    "no length": b"\xff\xe1",
    "length 0": segment(0xE1, WHOLE, 0),
    "length 1": segment(0xE1, WHOLE, 1),
    "one byte too long": segment(0xE1, WHOLE, len(WHOLE) + 3),
    "far too long": segment(0xE1, WHOLE, 0xFFFF),
    "thumbnail, far too long": segment(0xE1, exif(thumbnail=encoded(SMALL)), 0xFFFF),
    "thumbnail with tables of its own": segment(0xE1, exif(thumbnail=encoded(SMALL)[2:]), 0xFFF0),
    "XMP": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x", 900),
    "multi-picture index": segment(0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff\1\1"),
    "colour profile": segment(0xE2, b"ICC_PROFILE\0"),
    "Photoshop": segment(0xED, b"Photoshop 3.0\x008BIM\4\4"),
    "Adobe": segment(0xEE, b"Adobe"),
    "comment": segment(0xFE, b"a comment", 999),
}
"""Damaged metadata before good pixels."""


@pytest.mark.parametrize("bad", CUT.values(), ids=CUT)
@pytest.mark.parametrize("how", ["bytes", "path", "file", "named bytes"])
def test_damaged_metadata_do_not_spoil_a_photograph(tmp_path, bad, how):
    data = with_segment(bad)
    (tmp_path / "a.jpg").write_bytes(data)
    with open(tmp_path / "a.jpg", "rb") as file:
        source = {
            "bytes": data,
            "path": tmp_path / "a.jpg",
            "file": file,
            "named bytes": NamedBytes(data, "a"),
        }
        image = np.asarray(decode(source[how], SPEC.exif))
    if image.shape != PIXELS.shape:  # an orientation that is whole is obeyed
        image = np.rot90(image)
    assert np.array_equal(image, PIXELS)


@pytest.mark.parametrize("name", [name for name in CUT if name not in ("length 0", "length 1")])
def test_an_orientation_is_kept_where_other_metadata_are_damaged(name):
    turned = decode(with_segment(segment(0xE1, WHOLE), CUT[name]), SPEC.exif)
    assert np.array_equal(np.rot90(np.asarray(turned)), PIXELS)


def test_adobe_colours_are_kept():
    """Without its Adobe segment these values would be taken for another colour space."""
    data = encoded(PICTURE.convert("CMYK"))
    expected = np.asarray(decode(data, SPEC.exif))
    bad = data[:2] + CUT["colour profile"] + data[2:]
    assert np.array_equal(np.asarray(decode(bad, SPEC.exif)), expected)


@pytest.mark.parametrize("cut", [3, 10, 200, len(PLAIN) // 2])
def test_pixels_that_are_missing_are_still_an_error(cut):
    with pytest.raises(ImageError):
        decode(PLAIN[:cut], SPEC.exif)
    with pytest.raises(ImageError):
        decode(with_segment(CUT["far too long"])[: cut + 100], SPEC.exif)


def test_a_thumbnail_never_stands_for_its_photograph():
    """The file ends within the photograph's tables; only the thumbnail in the metadata is whole."""
    data = with_segment(segment(0xE1, exif(thumbnail=encoded(SMALL)), 0xFFF0))
    with pytest.raises(ImageError):
        decode(data[: data.index(encoded(SMALL)) + len(encoded(SMALL)) + 20], SPEC.exif)


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"\xff\xd8", b"\xff\xd8\xff", b"\xff" * 99, b"\xff\xd8" + b"\xff" * 99]
)
def test_no_image_behind_the_metadata(data):
    assert strip_metadata(data, keep_exif=False) is None
    assert not has_many_scans(data)


def test_random_damage_is_an_image_or_an_image_error():
    random = np.random.default_rng(5)
    data = with_segment(segment(0xE1, exif(thumbnail=encoded(SMALL))))
    outcomes = set()
    for _ in range(300):
        broken = bytearray(data)
        for place in random.integers(2, 1200, 3):
            broken[place] = random.integers(256)
        try:
            outcomes.add(decode(bytes(broken), SPEC.exif).mode)
        except ImageError:
            outcomes.add("error")
    assert outcomes == {"RGB", "error"}


# --- scans ----------------------------------------------------------------------------------------


def scans(count: int, **options) -> bytes:
    """A progressive image whose last scan is repeated until there are ``count``."""
    data = encoded(progressive=True, **options)
    last = data.rindex(b"\xff\xda")
    missing = count - data.count(b"\xff\xda")
    return data[:-2] + data[last:-2] * missing + data[-2:]


@pytest.mark.parametrize("how", ["bytes", "path", "Pillow image"])
def test_thousands_of_scans_are_refused_at_once(tmp_path, how):
    data = scans(20_000)
    (tmp_path / "a.jpg").write_bytes(data)
    source = {"bytes": data, "path": tmp_path / "a.jpg", "Pillow image": Image.open(io.BytesIO(data))}[how]
    start = time.process_time()
    with pytest.raises(ImageError, match="too many scans"):
        decode(source, SPEC.exif)
    assert time.process_time() - start < 1


def test_the_largest_number_of_scans():
    assert decode(scans(MAX_SCANS), SPEC.exif).size == PICTURE.size
    with pytest.raises(ImageError, match="too many scans"):
        decode(scans(MAX_SCANS + 1), SPEC.exif)


def test_scans_behind_a_comment_count_too():
    """A comment that holds the code of the end must not hide what follows it."""
    data = scans(MAX_SCANS * 2)
    first = data.index(b"\xff\xda")
    assert has_many_scans(data[:first] + segment(0xFE, b"\xff\xd9") + data[first:])
    second = data.index(b"\xff\xda", first + 2)
    assert has_many_scans(data[:second] + segment(0xFE, b"\xff\xd9") + data[second:])


def test_what_only_looks_like_scans_does_not_count():
    trailing = encoded(progressive=True) + b"\xff\xda\0\x08" * 500
    commented = with_segment(segment(0xFE, b"\xff\xda" * 500))
    assert decode(trailing, SPEC.exif).size == decode(commented, SPEC.exif).size == PICTURE.size
    assert (
        decode(with_segment(segment(0xE1, b"\xff\xda" * 500), CUT["colour profile"]), SPEC.exif).size
        == PICTURE.size
    )


GARBAGE = {
    "a byte between the segments": segment(0xFE, b"ab") + b"\0",
    "a 0xFF and a zero": segment(0xFE, b"ab") + b"\xff\0",
    "a restart marker": b"\xff\xd0",
    "a marker without a length": b"\xff\x01",
    "many fill bytes": b"\xff" * 5000,
    "a code that no segment has, with a length": b"\xff\x02\xff\xff",
    "a second beginning": b"\xff\xd8",
    "too short a length": b"\xff\xfe\0\2\x11\x22",
}
"""What libjpeg passes over between two segments."""


@pytest.mark.parametrize("name", GARBAGE)
@pytest.mark.parametrize("where", ["first", "before the first scan", "before every scan"])
def test_garbage_between_segments_hides_no_scan(name, where):
    data = scans(MAX_SCANS * 2)
    first = data.index(b"\xff\xda")
    bad = GARBAGE[name]
    spoilt = {
        "first": data[:2] + bad + data[2:],
        "before the first scan": data[:first] + bad + data[first:],
        "before every scan": data.replace(b"\xff\xda", bad + b"\xff\xda"),
    }
    assert has_many_scans(spoilt[where])
    start = time.process_time()
    with pytest.raises(ImageError):
        decode(spoilt[where], SPEC.exif)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("name", [name for name in GARBAGE if name != "a second beginning"])
def test_garbage_alone_is_no_fault(name):
    data = scans(MAX_SCANS // 2)
    assert not has_many_scans(data[:2] + GARBAGE[name] + data[2:])


def test_a_plain_image_is_not_read_twice(monkeypatch):
    monkeypatch.setattr(decoding, "has_many_scans", lambda _: pytest.fail("it has one scan"))
    assert decode(PLAIN, SPEC.exif).size == PICTURE.size
    with pytest.raises(pytest.fail.Exception):
        decode(encoded(progressive=True), SPEC.exif)
    assert jpeg.MAX_SCANS == MAX_SCANS


# --- TIFF, and no pixels --------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", [[STORED] * 3, [SPEC, STORED, SPEC], [STORED, SPEC, STORED]])
def test_a_tiff_that_is_decoded_again_gives_the_same_answer(orientation, order):
    entries = Image.Exif()
    entries[0x0112] = orientation
    buffer = io.BytesIO()
    PICTURE.save(buffer, "TIFF", exif=entries)
    image = Image.open(io.BytesIO(buffer.getvalue()))
    for spec in order:
        alone = np.asarray(decode(buffer.getvalue(), spec.exif))
        assert np.array_equal(np.asarray(decode(image, spec.exif)), alone)
        assert spec is SPEC or np.array_equal(alone, np.asarray(PICTURE))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "1"])
@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_an_image_without_pixels_is_refused(mode, size):
    with pytest.raises(ImageError, match="no pixels"):
        decode(Image.new(mode, size), SPEC.exif)
    with pytest.raises(ImageError, match="must be uint8"):
        decode(np.zeros((*size, 3), np.uint8), SPEC.exif)
