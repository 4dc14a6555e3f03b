"""Pixels and batches: what a runtime is given, to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cmt_edge.deploy import Predictor, Preprocess
from cmt_edge.deploy.errors import InputError
from cmt_edge.deploy.preprocessing import decode_pixels, normalise
from helpers.bundles import SPEC, tiny
from helpers.images import BLUE, RED


def normalise_plainly(values: np.ndarray, spec: Preprocess) -> np.ndarray:
    """The formula in one expression each: what results have to equal to the last bit."""
    scale = (1 / (255 * np.asarray(spec.std))).astype(np.float32).reshape(3, 1, 1)
    shift = (-np.asarray(spec.mean) / np.asarray(spec.std)).astype(np.float32).reshape(3, 1, 1)
    return np.multiply(np.moveaxis(values, -1, -3), scale, dtype=np.float32) + shift


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), max_size=2),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    mean=st.tuples(*[st.floats(0, 1)] * 3),
    std=st.tuples(*[st.floats(0.01, 2)] * 3),
    seed=st.integers(0, 99),
)
def test_normalising_is_bit_identical(shape, height, width, mean, std, seed):
    spec = Preprocess(8, None, mean, std)
    values = np.random.default_rng(seed).integers(0, 256, (*shape, height, width, 3), np.uint8)
    want = normalise_plainly(values, spec)
    fresh = normalise(values, spec)
    assert fresh.flags.c_contiguous
    out = np.full(want.shape, np.nan, np.float32)
    assert normalise(values, spec, out) is out
    for got in (fresh, out, normalise(values[..., ::-1, :], spec)[..., ::-1]):
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("short", [None, 16, 19, 24])
@pytest.mark.parametrize("shape", [(16, 16), (19, 19), (19, 33), (24, 24), (47, 24), (7, 90)])
def test_arrays_give_the_pixels_of_pictures(short, shape):

    spec = Preprocess(16, short, SPEC.mean, SPEC.std)
    array = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    kept = array.copy()
    for source in (array, array[::-1, ::-1], np.asfortranarray(array)):
        result = decode_pixels(source, spec)
        np.testing.assert_array_equal(
            result, decode_pixels(Image.fromarray(np.ascontiguousarray(source)), spec)
        )
        assert not result.flags.writeable
        assert source.flags.writeable
    np.testing.assert_array_equal(array, kept)


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_batches_of_every_kind_of_memory(onnx_bundle, name):
    """Read-only, not contiguous, changed in place, of changing size: the runtime sees the values of this
    call."""
    with Predictor.load(onnx_bundle, backend=name, threads=1) as p:
        batch = np.random.default_rng(0).standard_normal((3, 3, 64, 64)).astype(np.float32)
        want = np.concatenate([p.logits(b[None]) for b in batch])
        fixed = batch.copy()
        fixed.flags.writeable = False
        for source in (batch, fixed, np.asfortranarray(batch), np.repeat(batch, 2, 0)[::2]):
            np.testing.assert_allclose(p.logits(source), want, atol=1e-4, rtol=0)
        batch[...] = batch[::-1].copy()
        np.testing.assert_allclose(p.logits(batch), want[::-1], atol=1e-4, rtol=0)
        np.testing.assert_allclose(p.logits(batch[:1]), want[2:], atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("values", [[np.inf, -np.inf], [np.nan], [np.inf], [-np.inf, 3e38], [np.nan, np.inf]])
def test_no_sum_hides_what_is_not_finite(values):
    p = tiny(0)
    batch = np.full((2, 3, SPEC.size, SPEC.size), 3e38, np.float32)  # finite, though its sum is not
    assert p.outputs(batch)[0].shape == (2, 3)
    batch[0, 0, 0, : len(values)] = values
    with pytest.raises(InputError, match="infinite"):
        p.outputs(batch)


def test_prepare_takes_lists_and_generators():
    p = tiny()
    listed = p.prepare([RED, BLUE])
    np.testing.assert_array_equal(p.prepare(iter([RED, BLUE])), listed)
    assert listed.shape == (2, 3, SPEC.size, SPEC.size)
    assert p.prepare([]).shape == p.prepare(iter([])).shape == (0, 3, SPEC.size, SPEC.size)
