"""Lanes: whatever fails and wherever, every lane comes back, threads end and the Predictor stays usable."""

from __future__ import annotations

import itertools
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cmt_edge.deploy import Predictor, Preprocess
from cmt_edge.deploy.backends.fake import FakeSession
from cmt_edge.deploy.errors import ImageError, InputError
from cmt_edge.deploy.lanes import KEPT_LANES, Lanes
from helpers.bundles import LABELS, SPEC, tiny
from helpers.images import BLUE, GREEN, RED
from helpers.lanes import COUNT, SHAPES, SIZES, Checked, assert_tidy_and_usable, collect, grey, levels
from helpers.running import list_helper_threads

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


# --- one failure, at every position ---------------------------------------------------------------


@pytest.mark.parametrize("batch", SIZES)
@pytest.mark.parametrize(("workers", "in_flight"), SHAPES)
def test_a_bad_image_at_every_position(batch, workers, in_flight):
    p = tiny(batch, session=Checked())
    for bad in range(COUNT):
        images = [grey(i) if i != bad else b"no image" for i in range(COUNT)]
        answers, error = collect(p.stream(images, workers=workers, in_flight=in_flight))
        assert isinstance(error, ImageError)
        assert answers == list(range(bad))
        assert p.lanes.lent == 0
        assert not list_helper_threads()
    assert_tidy_and_usable(p)


@pytest.mark.parametrize("batch", SIZES)
@pytest.mark.parametrize("bad", [0, 4, COUNT - 1])
def test_a_bad_image_in_predict_and_in_a_single_call(batch, bad):
    session = Checked()
    p = tiny(batch, session=session)
    for _ in range(20):
        with pytest.raises(ImageError):
            p.predict([grey(i) if i != bad else b"no image" for i in range(COUNT)])
        with pytest.raises(ImageError):
            p(b"no image")
        assert p.lanes.lent == 0
    assert session.binds <= 2  # the lanes of bad images were used again
    assert_tidy_and_usable(p)


@pytest.mark.parametrize("batch", SIZES)
@pytest.mark.parametrize(("workers", "in_flight"), SHAPES)
def test_an_error_of_the_runtime_at_every_position(batch, workers, in_flight):
    for bad in range(1, COUNT):
        p = tiny(batch, session=Checked(bad))
        stream = p.stream(map(grey, range(COUNT)), workers=workers, in_flight=in_flight)
        answers, error = collect(stream)
        assert isinstance(error, RuntimeError)
        chunk = batch or 8
        assert answers == list(range(bad - bad % chunk))  # all answers of the groups before
        p.session.bad.clear()
        assert_tidy_and_usable(p)


@pytest.mark.parametrize("batch", SIZES)
@pytest.mark.parametrize(("workers", "in_flight"), SHAPES)
@pytest.mark.parametrize("error", [ConnectionError, KeyboardInterrupt])
def test_an_error_of_the_callers_iterable_at_every_position(batch, workers, in_flight, error):
    p = tiny(batch, session=Checked())

    def camera(bad: int):
        yield from map(grey, range(bad))
        raise error("unplugged")

    for bad in range(COUNT):
        answers, ended_by = collect(p.stream(camera(bad), workers=workers, in_flight=in_flight))
        assert isinstance(ended_by, error)
        assert answers == list(range(len(answers)))
        assert len(answers) == bad or error is KeyboardInterrupt  # an interrupt comes at once
        assert p.lanes.lent == 0
        assert not list_helper_threads()
    assert_tidy_and_usable(p)


@pytest.mark.parametrize("batch", SIZES)
@pytest.mark.parametrize(("workers", "in_flight"), SHAPES)
def test_leaving_the_loop_at_every_position(batch, workers, in_flight):
    p = tiny(batch, session=Checked())
    for end in range(1, COUNT + 1):
        stream = p.stream(map(grey, itertools.count()), workers=workers, in_flight=in_flight)
        assert levels(itertools.islice(stream, end)) == list(range(end))
        stream.close()
        assert p.lanes.lent == 0
        assert not list_helper_threads()
    assert_tidy_and_usable(p)


@pytest.mark.parametrize(("workers", "in_flight"), SHAPES)
def test_a_lane_that_cannot_be_bound_fails_at_its_turn(workers, in_flight):
    class Full(Checked):
        def bind(self, shape):
            if self.binds == 2:
                raise MemoryError("no more requests")
            return super().bind(shape)

    p = tiny(3, session=Full())
    kept = p.lanes.take(3)  # so that the stream has to bind anew
    images = map(grey, range(30))
    answers, error = collect(p.stream(images, workers=workers, in_flight=in_flight))
    if (workers, in_flight) == (0, 1):  # one lane suffices, again and again
        assert (answers, error) == (list(range(30)), None)
    else:
        assert isinstance(error, InputError)
        assert isinstance(error.__cause__, MemoryError)
        assert answers == list(range(len(answers)))
        assert answers
    p.lanes.give(kept)
    p.session.binds = 3
    assert_tidy_and_usable(p)


@pytest.mark.parametrize("allowed", range(6))
def test_threads_that_cannot_be_started(monkeypatch, allowed):
    """All answers that can still be given come first."""
    start = threading.Thread.start
    left = itertools.count(allowed, -1)

    def limited(thread):
        if thread.name.startswith(("decode", "infer")) and next(left) <= 0:
            raise RuntimeError("can't start new thread")
        start(thread)

    p = tiny(3, session=Checked())
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", limited)
        answers, error = collect(p.stream(map(grey, range(30)), workers=3, in_flight=3))
    assert isinstance(error, RuntimeError) or answers == list(range(30))
    assert answers == list(range(len(answers)))
    assert_tidy_and_usable(p)


# --- many callers at once -------------------------------------------------------------------------


@pytest.mark.parametrize("batch", SIZES)
def test_bad_images_of_one_thread_do_not_disturb_the_others(batch):
    p = tiny(batch, session=Checked())

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(25):
            numbers = [rng.randrange(30) for _ in range(rng.randrange(1, 12))]
            images: list = list(map(grey, numbers))
            bad = rng.choice([None, rng.randrange(len(numbers))])
            if bad is not None:
                images[bad] = b"no image"
            shape = {"workers": rng.randrange(3), "in_flight": rng.randrange(1, 4)}
            answers, error = collect(p.stream(images, **shape))
            assert answers == numbers[:bad]
            assert isinstance(error, ImageError) == (bad is not None)
            assert levels([p(grey(numbers[0]))]) == numbers[:1]
            logits = p.logits(p.prepare(map(grey, numbers)))
            assert [round(float(row[0]) * 255 / 8) for row in logits] == numbers

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert_tidy_and_usable(p)
    assert p.lanes.idle <= 2 * KEPT_LANES


@pytest.mark.parametrize("batch", SIZES)
@pytest.mark.parametrize(("workers", "in_flight"), SHAPES)
def test_closing_in_the_middle_of_a_stream(batch, workers, in_flight):
    """From another thread, at any moment: answers until then, one typed error, nothing kept."""
    for delay in (0.0, 0.001, 0.004):
        p = tiny(batch, session=Checked(delay_s=0.0005))
        closer = threading.Timer(delay, p.close)
        closer.start()
        stream = p.stream(map(grey, itertools.cycle(range(20))), workers=workers, in_flight=in_flight)
        answers, error = collect(stream)
        closer.join()
        assert isinstance(error, InputError)
        assert "closed" in str(error)
        assert answers == list(itertools.islice(itertools.cycle(range(20)), len(answers)))
        assert p.lanes.lent == p.lanes.idle == 0


def test_closing_waits_for_inferences_and_bindings_but_not_for_lent_lanes():
    events = []

    class Slow(FakeSession):
        def bind(self, shape):
            time.sleep(0.25)
            events.append("bound")
            return super().bind(shape)

        def run(self, batch):
            time.sleep(0.05)
            events.append("ran")
            return super().run(batch)

        def close(self):
            events.append("closed")

    p = tiny(session=Slow(3))
    p.lanes.take(1)  # lent and never given back
    with ThreadPoolExecutor(2) as pool:
        binding = pool.submit(p.lanes.take, 1)
        running = pool.submit(p.logits, np.zeros((1, 3, SPEC.size, SPEC.size), np.float32))
        time.sleep(0.02)
        p.close()
        assert events[-1] == "closed"
        assert sorted(events) == ["bound", "bound", "closed", "ran"]
        lane = binding.result()
        assert running.result().shape == (1, 3)
    with pytest.raises(InputError, match="closed"):
        lane.run(1)
    p.lanes.give(lane)
    assert p.lanes.idle == 0


def test_several_threads_close_once():
    class Counting(FakeSession):
        closed = 0

        def close(self):
            time.sleep(0.01)
            self.closed += 1

    for _ in range(20):
        session = Counting(3)
        p = tiny(session=session)
        p(RED)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _, p=p: p.close(), range(4)))
        assert session.closed == 1


def test_no_lane_of_a_closed_session_is_kept():
    """Lanes are given back while another thread closes."""
    for _ in range(200):
        lanes = Lanes(FakeSession(3), 1, 16)
        lent = [lanes.take(1) for _ in range(3)]
        with ThreadPoolExecutor(2) as pool:
            pool.submit(lambda lanes=lanes, lent=lent: [lanes.give(lane) for lane in lent])
            pool.submit(lanes.close)
        assert lanes.idle == lanes.lent == 0


# --- one lane -------------------------------------------------------------------------------------


def test_a_lane_given_back_twice_is_lent_once():
    lanes = Lanes(FakeSession(3), 1, 16)
    lane = lanes.take(1)
    lanes.give(lane)
    lanes.give(lane)
    assert lanes.idle == 1
    first, second = lanes.take(1), lanes.take(1)
    assert first is lane
    assert second is not lane
    assert lanes.lent == 2


def test_a_lane_whose_inference_failed_or_that_was_dropped_is_not_lent_again():
    lanes = Lanes(Checked(0), 1, 16)
    lane = lanes.take(1)
    lane.batch[:] = 0
    with pytest.raises(RuntimeError, match="went away"), lane:
        lane.run(1)
    assert lanes.idle == lanes.lent == 0
    other = lanes.take(1)
    lanes.drop(other)
    assert lanes.idle == lanes.lent == 0
    assert lanes.take(1) not in (lane, other)


@pytest.mark.parametrize(("batch", "count", "rows"), [(1, 1, 1), (4, 1, 4), (4, 4, 4), (0, 1, 1), (0, 8, 8)])
def test_a_lane_has_the_rows_of_its_model(batch, count, rows):
    lanes = Lanes(FakeSession(3), batch, 16)
    with lanes.take(count) as lane:
        assert lane.batch.shape == (rows, 3, 16, 16)
        assert lanes.lent == 1
        lane.batch[:] = np.nan
        lane.batch[:count] = 0.5
        assert np.isfinite(lane.run(count)[0]).all()
    assert lanes.lent == 0


def test_idle_lanes_are_bounded():
    lanes = Lanes(FakeSession(3), 1, 16)
    many = [lanes.take(1) for _ in range(3 * KEPT_LANES)]
    assert lanes.lent == 3 * KEPT_LANES
    for lane in many:
        lanes.give(lane)
    assert (lanes.idle, lanes.lent) == (KEPT_LANES, 0)


# --- real runtimes --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("which", ["fp32_bundle", "onnx_bundle"])
@pytest.mark.parametrize("throughput", [False, True])
def test_bad_images_in_runtimes(request, which, name, throughput):
    """Static and dynamic bundles, for latency and for throughput."""
    bundle = request.getfixturevalue(which)
    with Predictor.load(bundle, backend=name, throughput=throughput) as p:
        want = {blob: p(blob).logits for blob in (RED, GREEN, BLUE)}
        for bad in (0, 3, 9):
            images = list(itertools.islice(itertools.cycle([RED, GREEN, BLUE]), COUNT))
            images[bad] = b"no image"
            for workers in (0, 2):
                answers = []
                with pytest.raises(ImageError):
                    answers.extend(p.stream(images, workers=workers))
                with pytest.raises(ImageError):
                    p(images[bad])
                assert p.lanes.lent == 0
            for blob, logits in want.items():
                np.testing.assert_allclose(p(blob).logits, logits, atol=1e-5, rtol=0)
        answers = [answer.logits for answer in p.stream([RED, GREEN, BLUE] * 5)]
        np.testing.assert_allclose(answers, [*want.values()] * 5, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["openvino", "onnxruntime", "torch"])
@pytest.mark.parametrize("which", ["fp32_bundle", "onnx_bundle"])
def test_no_images_give_no_answers_of_the_right_shape(request, which, name):
    with Predictor.load(request.getfixturevalue(which), backend=name, threads=1) as p:
        assert p.logits(np.empty((0, 3, p.spec.size, p.spec.size), np.float32)).shape == (0, len(p.labels))


def test_outputs_are_cut_and_joined_for_every_number_of_images():
    spec = Preprocess(16, None, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    for batch, count in itertools.product((0, 1, 3, 4), range(10)):
        p = Predictor(FakeSession(3), spec, LABELS, batch=batch)
        given = np.random.default_rng(count).random((count, 3, 16, 16), dtype=np.float32)
        np.testing.assert_allclose(p.logits(given), FakeSession(3).run(given)[0].reshape(count, 3), atol=1e-6)
        assert p.lanes.lent == 0


def test_a_predictor_says_what_it_serves_and_how_busy_it_is():
    p = tiny()
    with p.lanes.take(1):
        assert repr(p) == f"Predictor({len(LABELS)} labels, fake 1, Lanes(batch=1, 1 lanes lent, 0 idle))"
    p.close()
    assert repr(p.lanes) == "Lanes(batch=1, closed)"
