"""Bound inputs of a session: filled again and again, as many as one likes, independent of each other."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from cmt_edge.calib.generated import generate
from cmt_edge.deploy import Predictor, Preprocess
from cmt_edge.deploy.backends.fake import FakeSession
from cmt_edge.deploy.errors import InputError

SPEC = Preprocess(16, None, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
GREY = np.full((16, 16, 3), 90, np.uint8)


@pytest.fixture(
    scope="module",
    params=[(b, n) for b in ("fp32_bundle", "onnx_bundle") for n in ("openvino", "onnxruntime", "torch")],
    ids="-".join,
)
def predictor(request):
    """A static and a dynamic bundle in every runtime."""
    which, name = request.param
    with Predictor.load(request.getfixturevalue(which), backend=name, threads=1) as p:
        yield p


def batches(predictor, count: int, size: int) -> list[np.ndarray]:
    side = predictor.spec.size
    rng = np.random.default_rng(0)
    return [rng.standard_normal((size, 3, side, side), dtype=np.float32) for _ in range(count)]


def sizes(predictor) -> list[int]:
    return [predictor.batch] if predictor.batch else [1, 2, 5]


def test_a_binding_gives_what_run_gives_each_time_it_is_filled(predictor):
    for size in sizes(predictor):
        given = batches(predictor, 3, size)
        binding = predictor.session.bind(given[0].shape)
        assert binding.batch.shape == given[0].shape
        assert binding.batch.dtype == np.float32
        assert binding.batch.flags.c_contiguous
        for batch in given:
            binding.batch[:] = batch
            for ours, expected in zip(binding.run(), predictor.session.run(batch), strict=True):
                np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=0)
            np.testing.assert_array_equal(binding.batch, batch)


def test_bindings_do_not_disturb_each_other(predictor):
    size = sizes(predictor)[0]
    given = batches(predictor, 3, size)
    bindings = [predictor.session.bind(given[0].shape) for _ in given]
    for binding, batch in zip(bindings, given, strict=True):
        binding.batch[:] = batch
    answers = [binding.run()[0] for binding in bindings]
    kept = [answer.copy() for answer in answers]
    for binding in reversed(bindings):
        binding.run()
    for answer, before, batch in zip(answers, kept, given, strict=True):
        np.testing.assert_array_equal(answer, before)  # an answer is the caller's own
        np.testing.assert_allclose(answer, predictor.session.run(batch)[0], atol=1e-5, rtol=0)


def test_runs_of_changing_sizes_give_the_answers_of_each_alone(predictor):
    if predictor.batch:
        pytest.skip("a bundle of one batch size")
    given = batches(predictor, 1, 6)[0]
    alone = np.concatenate([predictor.session.run(given[i : i + 1])[0] for i in range(6)])
    for size in (2, 1, 3, 6, 1, 2):
        np.testing.assert_allclose(predictor.session.run(given[:size])[0], alone[:size], atol=1e-4, rtol=0)


def test_single_images_and_streams_agree_for_any_batch_size(predictor):
    images = generate(11, predictor.spec.size, seed=2)
    single = np.stack([predictor(image).logits for image in images])
    streamed = np.stack([p.logits for p in predictor.stream(images)])
    np.testing.assert_allclose(streamed, single, atol=1e-4, rtol=0)


def test_a_binding_that_nobody_uses_is_freed(fp32_bundle):
    with Predictor.load(fp32_bundle, backend="openvino", threads=1) as p:
        binding = p.session.bind((1, 3, p.spec.size, p.spec.size))
        binding.batch[:] = 0
        binding.run()
        batch = weakref.ref(binding.batch)
        del binding
        gc.collect()
        assert batch() is None


class Counting(FakeSession):
    """Notes what was bound."""

    def __init__(self) -> None:
        super().__init__(3)
        self.bound: list[int] = []

    def bind(self, shape):
        self.bound.append(shape[0])
        return super().bind(shape)


@pytest.mark.parametrize(("batch", "single", "several"), [(1, 1, 1), (4, 4, 4), (0, 1, 8)])
def test_a_predictor_binds_once_for_each_size_it_needs(batch, single, several):
    session = Counting()
    p = Predictor(session, SPEC, ["r", "g", "b"], batch=batch)
    for _ in range(5):
        p(GREY)
        p.predict([GREY] * 3)
    assert session.bound == list(dict.fromkeys([single, several]))


def test_a_stream_that_outlives_its_predictor_is_told_in_its_turn():
    session = Counting()
    p = Predictor(session, SPEC, ["r", "g", "b"])
    stream = p.stream([GREY] * 50, workers=1, in_flight=1)
    next(stream)
    p.close()
    bound = len(session.bound)
    with pytest.raises(InputError, match="closed"):
        list(stream)
    assert len(session.bound) == bound  # nothing of a closed session is asked for
    assert p.lanes.idle == p.lanes.lent == 0  # nor kept
