"""Preprocessing: arrays and pictures of every shape become the right model input or a typed error."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from cmt_edge.calib.generated import generate
from cmt_edge.deploy import Preprocess, preprocess
from cmt_edge.deploy.bundle import make_plain, read_record
from cmt_edge.deploy.decoding import MAX_SIDE, decode
from cmt_edge.deploy.errors import ImageError, InputError
from cmt_edge.deploy.preprocessing import decode_pixels, normalise
from helpers.images import encoded, make_png, photo
from helpers.specs import IMAGENET, PLAIN

MODES = ("RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "I;16")


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (3000, 2), (32, 32), (33, 31), (7, 5)])
@pytest.mark.parametrize("short", [None, 32, 36])
def test_odd_shapes(size, short):
    array = preprocess(encoded(photo(*size)), Preprocess(32, short, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
    assert array.shape == (3, 32, 32)
    assert np.isfinite(array).all()


def test_arrays_are_taken_as_rgb():
    array = np.asarray(photo())
    expected = preprocess(encoded(photo()), IMAGENET)
    np.testing.assert_array_equal(preprocess(array, IMAGENET), expected)
    np.testing.assert_array_equal(preprocess(np.asfortranarray(array), IMAGENET), expected)
    np.testing.assert_array_equal(preprocess(array[::-1], IMAGENET), preprocess(array[::-1].copy(), IMAGENET))


BAD_ARRAYS = {
    "float": np.zeros((8, 8, 3), np.float32),
    "int64": np.zeros((8, 8, 3), np.int64),
    "bool": np.zeros((8, 8, 3), bool),
    "uint16 grey": np.zeros((8, 8), np.uint16),
    "five channels": np.zeros((8, 8, 5), np.uint8),
    "no channel": np.zeros((8, 8, 0), np.uint8),
    "CHW": np.zeros((3, 8, 8), np.uint8),
    "batch": np.zeros((1, 8, 8, 3), np.uint8),
    "empty": np.zeros((0, 8, 3), np.uint8),
    "scalar": np.array(3, np.uint8),
}


@pytest.mark.parametrize("array", BAD_ARRAYS.values(), ids=BAD_ARRAYS.keys())
def test_wrong_arrays_are_image_errors(array):
    with pytest.raises(ImageError, match=r"uint8 \(H, W, 3\)"):
        preprocess(array, PLAIN)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
@pytest.mark.parametrize("spec", [IMAGENET, PLAIN, Preprocess(30, 30, (0.5,) * 3, (0.5,) * 3)])
def test_arrays_of_other_modes_are_taken_as_pillow_images_of_them(mode, spec):
    image = photo(40, 30).convert(mode)
    if "A" in mode:
        image.putalpha(photo(40, 30).convert("L"))
    array = np.asarray(image)
    want = preprocess(image, spec)
    np.testing.assert_array_equal(preprocess(array, spec), want)
    if mode == "L":
        np.testing.assert_array_equal(preprocess(array[..., None], spec), want)
    if array.shape[-1] in (3, 4):
        bgr = array[..., [2, 1, 0, 3][: array.shape[2]]]
        np.testing.assert_array_equal(preprocess(bgr, spec, color="bgr"), want)
    else:
        np.testing.assert_array_equal(preprocess(array, spec, color="bgr"), want)


def test_the_order_of_colours_is_that_of_arrays_only():
    for source in (photo(), encoded(photo()), io.BytesIO(encoded(photo()))):
        np.testing.assert_array_equal(preprocess(source, PLAIN, color="bgr"), preprocess(photo(), PLAIN))
    with pytest.raises(InputError, match="'gbr'"):
        preprocess(np.asarray(photo()), PLAIN, color="gbr")


@pytest.mark.parametrize("shape", [(-1,), (-1, 1), (1, -1)])
def test_encoded_bytes_in_an_array_are_no_picture(shape):
    """``cv2.imencode`` gives such arrays; one column of them would pass for a grey image."""
    array = np.frombuffer(encoded(photo()), np.uint8).reshape(shape)
    with pytest.raises(ImageError, match="encoded") as caught:
        preprocess(array, PLAIN)
    assert "tobytes" in caught.value.remedy


def test_what_is_no_image_is_told_what_to_give():
    for source, remedy in ((None, "imread"), ([photo()], "predict"), (3, "Pillow")):
        with pytest.raises(ImageError, match=type(source).__name__) as caught:
            preprocess(source, PLAIN)
        assert remedy in caught.value.remedy
    with pytest.raises(ImageError) as caught:
        preprocess(np.zeros((3, 8, 8), np.uint8), PLAIN)
    assert "transpose(1, 2, 0)" in caught.value.remedy


def test_source_is_left_unchanged():
    image, array = photo().convert("RGBA"), np.asarray(photo()).copy()
    preprocess(image, IMAGENET)
    preprocess(array, IMAGENET)
    assert image.mode == "RGBA"
    np.testing.assert_array_equal(array, np.asarray(photo()))
    buffer = io.BytesIO(encoded(photo()))
    np.testing.assert_array_equal(preprocess(buffer, IMAGENET), preprocess(buffer, IMAGENET))


def reference(data: bytes, spec: Preprocess) -> np.ndarray:
    """The usual evaluation transform, written out with Pillow and float64."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    size = spec.size
    if spec.short_side is None:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    else:
        w, h = image.size
        new = (
            (spec.short_side, int(spec.short_side * h / w))
            if w <= h
            else (int(spec.short_side * w / h), spec.short_side)
        )
        image = image.resize(new, Image.Resampling.BICUBIC)
        left, top = round((new[0] - size) / 2), round((new[1] - size) / 2)
        image = image.crop((left, top, left + size, top + size))
    values = np.asarray(image).astype(np.float64) / 255
    return ((values - spec.mean) / spec.std).transpose(2, 0, 1)


@pytest.mark.parametrize("size", [(40, 30), (30, 41), (100, 37), (32, 32), (16, 16), (333, 500)])
@pytest.mark.parametrize(
    "spec",
    [IMAGENET, Preprocess(32, None, IMAGENET.mean, IMAGENET.std), Preprocess(7, 8, (0, 0.5, 1), (1, 0.2, 3))],
)
def test_equals_the_usual_transform(size, spec):
    data = encoded(photo(*size))
    np.testing.assert_allclose(preprocess(data, spec), reference(data, spec), atol=1e-6, rtol=0)


def test_equals_the_usual_transform_on_textured_images():
    for data in generate(3, 80, seed=1):
        np.testing.assert_allclose(preprocess(data, IMAGENET), reference(data, IMAGENET), atol=1e-6, rtol=0)


def test_steps_compose_and_fill_the_given_array():
    data = generate(1, 50)[0]
    values = decode_pixels(data, IMAGENET)
    assert values.dtype == np.uint8
    assert values.shape == (32, 32, 3)
    expected = preprocess(data, IMAGENET)
    np.testing.assert_array_equal(normalise(values, IMAGENET), expected)
    np.testing.assert_array_equal(
        normalise(np.stack([values, values]), IMAGENET), np.stack([expected, expected])
    )
    batch = np.full((2, 3, 32, 32), np.nan, np.float32)
    preprocess(data, IMAGENET, out=batch[1])
    np.testing.assert_array_equal(batch[1], expected)
    assert np.isnan(batch[0]).all()
    assert expected.flags.c_contiguous


@st.composite
def pictures(draw):
    mode = draw(st.sampled_from(MODES))
    width, height = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    seed = np.random.default_rng(draw(st.integers(0, 99)))
    if mode == "I;16":
        return Image.fromarray(seed.integers(0, 65536, (height, width)).astype(np.uint16))
    return Image.fromarray(seed.integers(0, 256, (height, width, 3)).astype(np.uint8)).convert(mode)


@st.composite
def specs(draw):
    size = draw(st.integers(1, 48))
    short = draw(st.none() | st.integers(size, size + 30))
    mean = draw(st.tuples(*[st.floats(-2, 2)] * 3))
    std = draw(st.tuples(*[st.floats(0.01, 10)] * 3))
    return Preprocess(size, short, mean, std, draw(st.sampled_from(["apply", "ignore"])))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(pictures(), specs())
def test_any_image_and_spec_gives_a_finite_model_input(image, spec):
    array = preprocess(image, spec)
    if image.mode not in ("YCbCr", "HSV", "CMYK"):
        np.testing.assert_array_equal(preprocess(encoded(image), spec), array)
    assert array.shape == (3, spec.size, spec.size)
    assert array.dtype == np.float32
    assert np.isfinite(array).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(specs())
def test_json_round_trip(spec):
    assert read_record(Preprocess, json.loads(json.dumps(spec.to_json())), "file") == spec
    assert spec.fault() is None


@pytest.mark.parametrize("short", [None, 12])
def test_interpolation_is_the_one_asked_for(short):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    sharp, soft = (
        decode_pixels(image, Preprocess(8, short, (0, 0, 0), (1, 1, 1), interpolation=i))
        for i in ("bicubic", "bilinear")
    )
    assert (sharp != soft).any()
    if short is None:
        np.testing.assert_array_equal(soft, np.asarray(image.resize((8, 8), Image.Resampling.BILINEAR)))
    spec = Preprocess(8, short, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), interpolation="bilinear")
    assert read_record(Preprocess, json.loads(json.dumps(make_plain(spec))), "file") == spec


# --- sides ----------------------------------------------------------------------------------------


def thin_png(width: int, height: int) -> bytes:
    """A small file of many pixels, one bit each."""
    return make_png(width, height, depth=1, kind=0, rows=bytes(height * ((width + 7) // 8 + 1)))


@pytest.mark.parametrize("size", [(80_000_000, 1), (1, 80_000_000), (MAX_SIDE + 1, 1), (1, MAX_SIDE + 1)])
@pytest.mark.parametrize("spec", [PLAIN, IMAGENET], ids=["stretched", "cropped"])
def test_a_side_that_is_too_long_is_refused_before_it_is_decoded(size, spec, monkeypatch):
    monkeypatch.setattr(Image.Image, "resize", lambda *_, **__: pytest.fail("it was resized"))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(ImageError, match="the cap of a side"):
        decode_pixels(thin_png(*size), spec)


def test_the_longest_side():
    assert decode_pixels(thin_png(MAX_SIDE, 1), PLAIN).shape == (8, 8, 3)


@pytest.mark.parametrize("shape", [(1, MAX_SIDE + 1, 3), (MAX_SIDE + 1, 1, 3)])
@pytest.mark.parametrize("as_pillow", [False, True])
def test_the_cap_of_a_side_holds_for_arrays_too(shape, as_pillow):
    array = np.zeros(shape, np.uint8)
    with pytest.raises(ImageError, match="the cap of a side"):
        decode_pixels(Image.fromarray(array) if as_pillow else array, PLAIN)


@pytest.mark.parametrize("step", ["resize", "crop", "convert"])
def test_missing_memory_is_about_the_image(step, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    image = Image.new("L", (50, 60))
    monkeypatch.setattr(Image.Image, step, fail)
    with pytest.raises(ImageError):
        decode_pixels(image, IMAGENET)


def test_16_bits_need_no_wider_copy():
    """Eight more bytes a pixel would be 700 MB for the largest image."""
    import tracemalloc

    pixels = np.full((500, 700), 0xABCD, np.uint16)
    image = Image.fromarray(pixels)
    tracemalloc.start()
    try:
        assert np.asarray(decode(image, "ignore"))[0, 0, 0] == 0xAB
        assert tracemalloc.get_traced_memory()[1] < 7 * pixels.size
    finally:
        tracemalloc.stop()
