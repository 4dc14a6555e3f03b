"""JPEG images decoded at a part of their size: nearly the same pixels, and never fewer than asked for."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cmt_edge.calib.generated import generate
from cmt_edge.deploy import Preprocess
from cmt_edge.deploy.decoding import decode_at_least
from cmt_edge.deploy.errors import ImageError
from cmt_edge.deploy.orientation import TURN
from cmt_edge.deploy.preprocessing import decode_pixels
from cmt_edge.deploy.reduction import SIDEWAYS, turn_box

FULL = Preprocess(48, 56, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
REDUCED = replace(FULL, decode="reduced")
STRETCHED = replace(REDUCED, short_side=None)

MEAN_DIFFERENCE, LARGEST_DIFFERENCE = 0.5, 8
"""Grey levels by which a reduced image may differ here; turned or shifted by a pixel it differs by more."""


def make_photograph(width: int, height: int) -> Image.Image:
    """A generated picture with edges and texture."""
    (blob,) = generate(1, 512, seed=3)
    return Image.open(io.BytesIO(blob)).convert("RGB").resize((width, height))


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 92} if kind in ("JPEG", "MPO") else {}), **options)
    return buffer.getvalue()


def orient(image: Image.Image, orientation: int, **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, exif=exif, **options)


def compare(data: bytes, reduced: Preprocess) -> tuple[float, int]:
    """Mean and largest difference from the fully decoded image, in grey levels."""
    full = decode_pixels(data, replace(reduced, decode="full")).astype(int)
    difference = np.abs(decode_pixels(data, reduced) - full)
    return float(difference.mean()), int(difference.max())


def is_reduced(data: bytes, spec: Preprocess) -> bool:
    """Whether the image is decoded at a part of its size: more pixels than that are never the same ones."""
    least = 2 * (spec.short_side or spec.size)
    return decode_at_least(data, spec.exif, least=lambda _: (least, least)).box is not None


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("exif", ["apply", "ignore"])
@pytest.mark.parametrize("spec", [REDUCED, STRETCHED], ids=["cropped", "stretched"])
@pytest.mark.parametrize("size", [(640, 480), (641, 487), (455, 1201)])
def test_reduced_image_is_nearly_the_full_one(orientation, exif, spec, size):
    data = orient(make_photograph(*size), orientation)
    mean, largest = compare(data, replace(spec, exif=exif))
    assert is_reduced(data, spec)
    assert 0 < mean <= MEAN_DIFFERENCE
    assert largest <= LARGEST_DIFFERENCE


@pytest.mark.parametrize("size", [(641, 641), (1025, 777)])
def test_rounding_of_the_reduced_size_shifts_nothing(size):
    """A ramp, for which a quarter of a pixel is a grey level."""
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    ramp = Image.fromarray(np.stack([x, y, 255 - x], -1).round().astype(np.uint8))
    for orientation in range(1, 9):
        _, largest = compare(orient(ramp, orientation, subsampling=0), replace(STRETCHED, size=64))
        assert largest <= 1


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 600),
    st.integers(1, 600),
    st.integers(1, 90),
    st.integers(1, 90),
    st.sampled_from(range(1, 9)),
)
def test_no_fewer_pixels_than_asked_for(width, height, least_width, least_height, orientation):
    data = orient(Image.new("RGB", (width, height), "red"), orientation)
    asked = []

    def least(whole: tuple[int, int]) -> tuple[int, int]:
        asked.append(whole)
        return least_width, least_height

    found = decode_at_least(data, "apply", least=least)
    upright = decode_at_least(data, "apply")
    assert asked == [found.size] == [upright.size]
    if found.box is None:
        assert found.image.size == upright.image.size
        return
    assert found.image.width >= least_width
    assert found.image.height >= least_height
    left, top, right, bottom = found.box
    factor = upright.image.width / (right - left)
    assert factor in (2, 4, 8)
    assert (bottom - top) * factor == upright.image.height
    assert 0 <= left < right <= found.image.width
    assert 0 <= top < bottom <= found.image.height


@pytest.mark.parametrize("turn", TURN.values(), ids=lambda turn: turn.name)
def test_a_part_of_an_image_turns_as_pillow_turns_it(turn):
    marked = np.zeros((5, 7), np.uint8)
    marked[1:3, 2:6] = 255
    turned = np.asarray(Image.fromarray(marked).transpose(turn))
    left, top, right, bottom = map(int, turn_box((2, 1, 6, 3), (7, 5), turn))
    assert (turned[top:bottom, left:right] == 255).all()
    assert turned.sum() == marked.sum() == 255 * (right - left) * (bottom - top)
    assert (turned.shape == (7, 5)) is (turn in SIDEWAYS)


KINDS = {
    "grey": lambda image: encode(image.convert("L")),
    "CMYK": lambda image: encode(image.convert("CMYK")),
    "progressive": lambda image: encode(image, progressive=True),
    "no chroma subsampling": lambda image: encode(image, subsampling=0),
    "several pictures": lambda image: encode(image, "MPO", save_all=True, append_images=[image.rotate(90)]),
    "damaged metadata": lambda image: encode(image)[:2] + b"\xff\xe1\x00\x08Exif\0\0" + encode(image)[2:],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["bytes", "path", "file"])
def test_every_kind_of_jpeg_is_reduced(tmp_path, kind, how):
    data = KINDS[kind](make_photograph(641, 487))
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    source = {"bytes": data, "path": path, "file": io.BytesIO(data)}[how]
    assert is_reduced(data, REDUCED)
    full = decode_pixels(data, FULL).astype(int)
    assert 0 < np.abs(decode_pixels(source, REDUCED) - full).mean() <= MEAN_DIFFERENCE


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_other_encodings_are_decoded_in_full(kind):
    data = encode(make_photograph(640, 480), kind)
    assert np.array_equal(decode_pixels(data, REDUCED), decode_pixels(data, FULL))


def test_an_image_of_the_caller_is_decoded_in_full_and_stays_as_it_is():
    data = encode(make_photograph(640, 480))
    image = Image.open(io.BytesIO(data))
    full = decode_pixels(data, FULL)
    assert np.array_equal(decode_pixels(image, REDUCED), full)
    assert image.size == (640, 480)
    array = np.asarray(image)
    assert np.array_equal(decode_pixels(array, REDUCED), full)


@pytest.mark.parametrize(("gap", "reduced"), [(2.0, False), (1.9, True)])
def test_small_jpeg_and_the_gap(gap, reduced):
    """111 pixels halved are 55.5: 1.98 times 28."""
    data = encode(make_photograph(111, 111))
    spec = replace(STRETCHED, size=28, reducing_gap=gap)
    same = np.array_equal(decode_pixels(data, spec), decode_pixels(data, replace(spec, decode="full")))
    assert same is not reduced


def test_truncated_jpeg_is_an_image_error():
    data = encode(make_photograph(640, 480))
    for cut in (len(data) // 2, len(data) - 200, 300):
        with pytest.raises(ImageError):
            decode_pixels(data[:cut], REDUCED)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"decode": "half"}, "decode is 'half', expected 'full' or 'reduced'"),
        ({"reducing_gap": 0.5}, "reducing_gap is 0.5, expected 1 to 8"),
        ({"reducing_gap": float("nan")}, "reducing_gap is nan, expected 1 to 8"),
    ],
)
def test_values_that_cannot_be_applied_are_named(change, fault):
    assert replace(REDUCED, **change).fault() == fault
    assert REDUCED.fault() is None
