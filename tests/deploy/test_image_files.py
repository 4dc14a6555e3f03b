"""Files, bytes and file objects: each becomes the right picture or a typed error, and never a crash."""

from __future__ import annotations

import io
import re
import signal
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmt_edge.deploy import Preprocess, preprocess
from cmt_edge.deploy.decoding import IMAGE_FORMATS, MAX_BYTES, NamedBytes, decode
from cmt_edge.deploy.errors import DataError, ImageError
from helpers.images import encoded, make_png, photo
from helpers.specs import IMAGENET, PLAIN


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares its size and has no pixels."""
    return make_png(width, height, depth=8, kind=2, rows=b"\0" * 64)


DAMAGED = {
    "zero bytes": b"",
    "text": b"this is a text file, whatever its name says\n" * 20,
    "truncated JPEG": encoded(photo(), "JPEG")[:-200],
    "cut header": encoded(photo())[:20],
    "corrupt PNG": encoded(photo()).replace(b"IDAT", b"IDAX"),
    "flipped bits": bytes(b ^ 0x5A if 60 < i < 400 else b for i, b in enumerate(encoded(photo()))),
    "PDF": b"%PDF-1.4\n" + b"0" * 200,
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "EPS, which would start a program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED.keys())
@pytest.mark.parametrize("how", ["path", "bytes", "file object"])
def test_damaged_file_is_an_image_error(tmp_path, data, how):
    path = tmp_path / "picture.jpg"
    path.write_bytes(data)
    source = {"path": path, "bytes": data, "file object": io.BytesIO(data)}[how]
    with pytest.raises(ImageError) as caught:
        preprocess(source, IMAGENET)
    assert caught.value.exit_code == 2
    assert caught.value.remedy
    if how == "path":
        assert caught.value.where == str(path)


@pytest.mark.parametrize("kind", ["text", "PDF", "SVG"])
def test_what_is_no_image_is_told_the_formats(kind):
    with pytest.raises(ImageError, match="not an image") as caught:
        preprocess(DAMAGED[kind], IMAGENET)
    assert "JPEG, PNG" in caught.value.remedy


def test_missing_file_and_folder_name_the_path(tmp_path):
    for path, message in ((tmp_path / "absent.jpg", "no such image file"), (tmp_path, "is a folder")):
        with pytest.raises(ImageError, match=message) as caught:
            preprocess(path, IMAGENET)
        assert caught.value.where == str(path)
    assert issubclass(ImageError, DataError)


@pytest.mark.parametrize(
    "nonsense", [None, 3, ["a.jpg"], object(), "bad\0name.jpg", "x" * 5000], ids=lambda v: type(v).__name__
)
def test_nonsense_source_is_an_image_error(nonsense):
    with pytest.raises(ImageError):
        preprocess(nonsense, IMAGENET)


def test_name_of_archived_image_is_in_the_message():
    with pytest.raises(ImageError, match=r"train/cat/7\.jpg"):
        preprocess(NamedBytes(b"junk" * 9, "train/cat/7.jpg"), IMAGENET)


@pytest.mark.parametrize("size", [(30000, 30000), (10000, 10000), (100_000_000, 1)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_gigantic_image_fails_on_its_header(tmp_path, size):
    path = tmp_path / "huge.png"
    path.write_bytes(png_header(*size))
    start = time.process_time()
    with pytest.raises(ImageError, match="too large") as caught:
        preprocess(path, IMAGENET)
    assert time.process_time() - start < 1.0
    assert caught.value.where == str(path)


def test_file_beyond_the_byte_cap(tmp_path):
    path = tmp_path / "padded.bmp"
    path.write_bytes(encoded(photo(), "BMP"))
    with open(path, "r+b") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(ImageError, match="too large"):
        preprocess(path, IMAGENET)


def test_error_about_a_thread_like_image_names_the_file(tmp_path):
    """1 x 60000 pixels are few, but not after the short side was resized."""
    path = tmp_path / "thread.png"
    photo(60000, 1).save(path)
    with pytest.raises(ImageError, match="too large") as caught:
        preprocess(path, Preprocess(224, 256, (0, 0, 0), (1, 1, 1)))
    assert caught.value.where == str(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_every_format_decodes_to_the_same_picture(kind):
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    got = np.asarray(decode(encoded(photo(), kind, **options), PLAIN.exif)).astype(int)
    tolerance = {"JPEG": 6, "GIF": 60}.get(kind, 0)
    assert np.abs(got - np.asarray(photo()).astype(int)).max() <= tolerance


@pytest.mark.parametrize("exif", ["apply", "ignore"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(("orientation", "turn"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_exif_orientation(exif, kind, orientation, turn):
    image = photo()
    tags = Image.Exif()
    tags[0x0112] = orientation
    data = encoded(image, kind, exif=tags, **({"lossless": True} if kind == "WEBP" else {}))
    got = np.asarray(decode(data, exif))
    expected = np.rot90(np.asarray(image), turn) if exif == "apply" else np.asarray(image)
    np.testing.assert_array_equal(got, expected)


def test_sixteen_bit_grey_is_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    for kind in ("PNG", "TIFF"):
        got = np.asarray(decode(encoded(Image.fromarray(ramp), kind), PLAIN.exif))
        np.testing.assert_array_equal(got, np.repeat((ramp >> 8).astype(np.uint8)[..., None], 3, -1))


def test_sixteen_bit_grey_obeys_its_orientation():
    ramp = np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000
    tags = Image.Exif()
    tags[0x0112] = 6
    assert decode(encoded(Image.fromarray(ramp), "PNG", exif=tags), PLAIN.exif).size == (3, 4)


def test_integer_pixels_beyond_sixteen_bits_are_refused():
    for bad in (-1, 70000):
        with pytest.raises(ImageError, match=r"0\.\.65535"):
            decode(encoded(Image.fromarray(np.full((4, 4), bad, np.int32)), "TIFF"), PLAIN.exif)


def test_float_tiff_is_refused():
    with pytest.raises(ImageError, match="floating-point"):
        preprocess(encoded(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"), PLAIN)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK"])
def test_modes_are_converted_as_pillow_does(mode):
    image = photo().convert(mode)
    data = encoded(image, "TIFF")
    np.testing.assert_array_equal(np.asarray(decode(data, PLAIN.exif)), np.asarray(image.convert("RGB")))


def test_cmyk_jpeg():
    data = encoded(photo().convert("CMYK"), "JPEG", quality=100)
    expected = np.asarray(photo()).astype(int)
    assert np.abs(np.asarray(decode(data, PLAIN.exif)).astype(int) - expected).max() < 12


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("transparency", [0, b"\x00\x80\xff"], ids=["one entry", "alpha table"])
def test_palette_with_transparency_keeps_its_colours(transparency):
    image = Image.new("P", (6, 6))
    image.putpalette([200, 10, 20, 30, 210, 40, 50, 60, 220])
    image.putdata([i % 3 for i in range(36)])
    got = np.asarray(decode(encoded(image, "PNG", transparency=transparency), PLAIN.exif))
    assert {tuple(c) for c in got.reshape(-1, 3).tolist()} == {(200, 10, 20), (30, 210, 40), (50, 60, 220)}


def test_alpha_is_dropped_not_blended():
    image = photo()
    image.putalpha(0)
    np.testing.assert_array_equal(np.asarray(decode(encoded(image), PLAIN.exif)), np.asarray(photo()))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG", "MPO"])
def test_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (9, 7), c) for c in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    options = {"WEBP": {"lossless": True}, "MPO": {"quality": 100}}.get(kind, {})
    got = np.asarray(
        decode(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options), PLAIN.exif)
    )
    assert np.abs(got.astype(int) - [250, 0, 0]).max() <= 5


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_buffers_of_encoded_bytes(kind):
    np.testing.assert_array_equal(preprocess(kind(encoded(photo())), PLAIN), preprocess(photo(), PLAIN))


@pytest.mark.parametrize("how", ["path", "bytes"])
def test_git_lfs_pointer(tmp_path, how):
    data = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n"
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(ImageError, match="LFS") as caught:
        preprocess(tmp_path / "a.jpg" if how == "path" else data, PLAIN)
    assert "git lfs pull" in caught.value.remedy


AT = struct.pack("<I", 8 + 2 + 24 + 4)
"""Where the value of the second entry lies, if it does not fit into the entry."""
ENTRIES = {
    "XResolution is a signed rational": (0x11A, 10, AT, struct.pack("<ii", -1, 0)),
    "ImageWidth is text": (0x100, 2, b"abc\0", b""),
    "ImageWidth is negative": (0x100, 9, b"\xff" * 4, b""),
    "Compression is a float": (0x103, 11, struct.pack("<f", 1.5), b""),
    "Compression is a negative byte": (0x103, 6, b"\xff\0\0\0", b""),
    "XResolution is 0/0": (0x11A, 5, AT, struct.pack("<II", 0, 0)),
    "GPS directory beyond the end": (0x8825, 4, struct.pack("<I", 1 << 30), b""),
    "EXIF directory in a loop": (0x8769, 4, struct.pack("<I", 8), b""),
    "unknown type": (0x131, 99, b"\0" * 4, b""),
    "value beyond the end": (0x131, 2, struct.pack("<I", 1 << 20), b""),
    "orientation again, as text": (0x112, 2, b"abc\0", b""),
}


def photograph(tag: int, kind: int, value: bytes, data: bytes, orientation: int = 6) -> bytes:
    """A JPEG of 128 x 96 stored pixels with an orientation and one more entry."""
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + struct.pack("<H", 2)
    exif += struct.pack("<HHIHH", 0x112, 3, 1, orientation, 0)
    exif += struct.pack("<HHI", tag, kind, 1) + value + struct.pack("<I", 0) + data
    return encoded(Image.new("RGB", (128, 96)), "JPEG", exif=exif)


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES.keys())
@pytest.mark.parametrize("how", ["bytes", "Pillow image", "MPO"])
def test_one_bad_entry_does_not_spoil_a_photograph(entry, how):
    data = photograph(*entry)
    source = Image.open(io.BytesIO(data)) if how == "Pillow image" else data
    double = entry[0] == 0x112  # then nobody knows which of the two is right
    assert decode(source, PLAIN.exif).size in ({(96, 128), (128, 96)} if double else {(96, 128)})
    assert decode(data, "ignore").size == (128, 96)


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0XX", b"junk" * 9])
def test_unreadable_metadata_leave_the_stored_pixels(exif):
    assert decode(encoded(Image.new("RGB", (128, 96)), "JPEG", exif=exif), PLAIN.exif).size == (128, 96)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_unknown_orientation_leaves_the_stored_pixels(orientation):
    entry = (0x131, 2, b"abc\0", b"")
    assert decode(photograph(*entry, orientation=orientation), PLAIN.exif).size == (128, 96)


class TimeLimit(Exception):
    """What a task queue raises in the middle of whatever runs."""


def alarm(error: BaseException):
    def stop(*_):
        raise error

    return stop


@pytest.mark.parametrize(
    "error",
    [TimeLimit("limit"), TimeoutError("limit"), RuntimeError("limit"), ValueError("limit"), OSError("limit")],
    ids=lambda e: type(e).__name__,
)
def test_a_time_limit_comes_out_as_itself(error):
    """Whatever its type, also one that damaged files raise."""
    noise = np.random.default_rng(0).integers(0, 255, (2500, 2500, 3), np.uint8)
    data = encoded(Image.fromarray(noise), compress_level=1)

    def decode_until_stopped() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        for _ in range(100):
            decode(data, PLAIN.exif)

    previous = signal.signal(signal.SIGALRM, alarm(error))
    try:
        with pytest.raises(type(error)) as caught:
            decode_until_stopped()
        assert caught.value is error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def test_what_the_callers_file_raises_comes_out_as_itself():
    class Broken(io.RawIOBase):
        def read(self, *_):
            raise ConnectionError("storage is away")

        def seek(self, *_):
            return 0

    with pytest.raises(ConnectionError, match="away"):
        decode(Broken(), PLAIN.exif)


def test_the_page_on_security_names_every_image_format():
    page = Path(__file__).resolve().parents[2] / "SECURITY.md"
    named = re.search(r"opens (\w+) formats only \(([^)]*)\)", page.read_text(encoding="utf-8"))
    assert named is not None
    assert named[1] == "nine"
    assert [name.upper() for name in named[2].split(", ")] == list(IMAGE_FORMATS)
    assert len(IMAGE_FORMATS) == 9
