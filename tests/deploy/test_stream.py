"""Streams: equal to ``predict`` whatever the threads do, in order, bounded, and tidy after every failure."""

from __future__ import annotations

import gc
import io
import itertools
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmt_edge.calib.generated import generate
from cmt_edge.deploy import Predictor, Preprocess
from cmt_edge.deploy.backends.fake import FakeSession
from cmt_edge.deploy.errors import ImageError, InputError
from helpers.bundles import LABELS, levels, make_bundle, tiny
from helpers.images import BLUE, GREEN, RED, grey
from helpers.running import list_helper_threads

pytestmark = pytest.mark.usefixtures("no_thread_is_left")

SIZES = [0, 1, 3]
"""Batch sizes; 0 is dynamic."""


SHAPES = [(0, 1), (0, 3), (1, 1), (2, 1), (2, 2), (1, 4), (4, 3)]
"""Decode threads and inferences in flight."""


def bound(batch: int, workers: int, in_flight: int) -> int:
    """What the documentation of ``stream`` says it holds at most."""
    size = batch or 8
    return in_flight * size + max(size, 2 * workers)


class Busy(FakeSession):
    """Counts the inferences at once. None ends before ``awaited`` of them were there, or 10 s are over: where
    other work keeps the cores busy, they begin slowly."""

    def __init__(self, delay_s: float = 0.02, awaited: int = 1) -> None:
        super().__init__(3, delay_s)
        self.awaited, self.gathered = awaited, threading.Event()
        self.lock = threading.Lock()
        self.now = self.most = self.calls = 0
        self.closed_while_busy: bool | None = None

    def run(self, batch):
        with self.lock:
            self.now += 1
            self.calls += 1
            self.most = max(self.most, self.now)
            if self.most >= self.awaited:
                self.gathered.set()
        try:
            self.gathered.wait(10)
            self.gathered.set()
            return super().run(batch)
        finally:
            with self.lock:
                self.now -= 1

    def close(self):
        self.closed_while_busy = self.now > 0


# --- answers --------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 30),
    batch=st.integers(0, 5),
    workers=st.integers(0, 4),
    in_flight=st.integers(1, 4),
    bad=st.none() | st.integers(0, 29),
)
def test_stream_is_predict_up_to_the_first_error(count, batch, workers, in_flight, bad):
    images: list = [grey(8 * i) for i in range(count)]
    want = levels(tiny(batch).predict(images))
    end = count
    if bad is not None and bad < count:
        images[bad], end = b"no image", bad
    stream = tiny(batch).stream(images, workers=workers, in_flight=in_flight)
    np.testing.assert_array_equal(levels(itertools.islice(stream, end)), want[:end])
    with pytest.raises(StopIteration if end == count else ImageError):
        next(stream)
    assert next(stream, None) is None


@pytest.mark.parametrize("batch", SIZES)
@pytest.mark.parametrize(("workers", "in_flight"), SHAPES)
def test_order_where_late_images_are_ready_first(monkeypatch, batch, workers, in_flight):
    import cmt_edge.deploy.predictor as module

    original = module.preprocess

    def uneven(image, *rest):
        time.sleep(0.004 * (image[0, 0, 0] % 3 == 0))
        return original(image, *rest)

    monkeypatch.setattr(module, "preprocess", uneven)
    answers = levels(
        tiny(batch, session=Busy(0.002)).stream(map(grey, range(40)), workers=workers, in_flight=in_flight)
    )
    assert answers == sorted(answers)
    assert len(answers) == 40


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("throughput", [False, True])
@pytest.mark.parametrize("in_flight", [None, 3])
def test_runtimes_stream_what_they_predict(fp32_bundle, name, throughput, in_flight):
    blobs = generate(7, 72, seed=3) * 3
    with Predictor.load(fp32_bundle, backend=name, throughput=throughput) as p:
        want = np.stack([p(b).logits for b in blobs])
        np.testing.assert_array_equal(np.stack([q.logits for q in p.predict(blobs)]), want)
        got = np.stack([q.logits for q in p.stream(blobs, in_flight=in_flight)])
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_dynamic_batch_of_runtimes(onnx_bundle, name):
    blobs = generate(11, 72, seed=4)
    with Predictor.load(onnx_bundle, backend=name, throughput=True) as p:
        want = np.stack([p(b).logits for b in blobs])
        for in_flight in (1, 3):
            got = np.stack([q.logits for q in p.stream(blobs, in_flight=in_flight)])
            np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)


def test_sources_are_named(tmp_path):
    (tmp_path / "a.png").write_bytes(RED)
    images = [tmp_path / "a.png", GREEN, str(tmp_path / "a.png"), io.BytesIO(BLUE)]
    p = tiny(3)
    for answers in (p.predict(images), p.stream(images, in_flight=2), [p(i) for i in images]):
        assert [a.source for a in answers] == [str(images[0]), None, images[2], None]
        images[3].seek(0)


def test_answers_are_the_callers_own():
    p = tiny(3)
    stream = p.stream(map(grey, range(30)), in_flight=2)
    kept = next(stream)
    copy = kept.logits.copy()
    list(stream)
    np.testing.assert_array_equal(kept.logits, copy)


def test_predictor_may_be_used_while_it_reads_the_images():
    """By the iterable itself and between the answers; each use has its own buffers."""
    p = tiny(3)
    want = levels(map(p, map(grey, range(20))))
    for workers in (0, 2):
        answers = []
        for answer in p.stream((grey(i) for i in range(20) if p(grey(200)).label), workers=workers):
            answers.append(answer)
            p(BLUE)
            p.predict([RED, GREEN])
        assert levels(answers) == want


# --- a bad image among good ones ------------------------------------------------------------------


@pytest.mark.parametrize("batch", SIZES)
@pytest.mark.parametrize(("workers", "in_flight"), SHAPES)
def test_attempt_goes_on_past_bad_images(tmp_path, batch, workers, in_flight):
    images: list = [grey(8 * i) for i in range(20)]
    want: list = levels(tiny(batch).predict(images))
    for bad, source in ((0, b"no image"), (7, tmp_path / "absent.png"), (8, None), (19, io.BytesIO())):
        images[bad], want[bad] = source, ImageError
    answers = list(tiny(batch).attempt(images, workers=workers, in_flight=in_flight))
    got = [ImageError if isinstance(a, ImageError) else float(a.logits[0]) for a in answers]
    assert got == want
    assert "absent.png" in str(answers[7])


def test_attempt_raises_what_is_not_about_one_image():
    def camera():
        yield RED
        raise ConnectionError("camera unplugged")

    answers = tiny().attempt(camera())
    assert next(answers).label == "red"
    with pytest.raises(ConnectionError):
        next(answers)


# --- in flight ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", SIZES)
@pytest.mark.parametrize("in_flight", [1, 2, 4])
def test_so_many_are_in_flight(batch, in_flight):
    session = Busy(awaited=in_flight)
    list(tiny(batch, session=session).stream([RED] * 8 * (in_flight + 1), in_flight=in_flight))
    assert session.most == in_flight


@pytest.mark.parametrize("parallelism", [1, 3])
def test_the_runtime_says_how_many(parallelism):
    session = Busy(awaited=parallelism)
    session.parallelism = parallelism
    list(tiny(session=session).stream([RED] * 12))
    assert session.most == parallelism
    session.most = 0
    tiny(session=session).predict([RED] * 5)
    assert session.most == 1


def test_several_in_flight_save_time():
    def seconds(in_flight: int) -> float:
        start = time.perf_counter()
        list(tiny(session=FakeSession(3, 0.03)).stream([RED] * 24, in_flight=in_flight))
        return time.perf_counter() - start

    assert seconds(4) < 0.6 * seconds(1)


@pytest.mark.parametrize("in_flight", [0, -1])
def test_none_in_flight_is_refused(in_flight):
    with pytest.raises(InputError, match="in flight"):
        next(tiny().stream([RED], in_flight=in_flight))


def test_runtime_computes_while_the_caller_is_busy():
    session = Busy(0.001)
    stream = tiny(session=session).stream([RED] * 9, in_flight=2)
    next(stream)
    deadline = time.monotonic() + 10
    while session.calls < 6 and time.monotonic() < deadline:
        time.sleep(0.005)
    assert session.calls == 6  # 2 in flight and 4 decoded ahead, one of which was answered
    assert len(list(stream)) == 8


# --- bounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", SIZES)
@pytest.mark.parametrize(("workers", "in_flight"), SHAPES)
def test_images_held_are_bounded(batch, workers, in_flight):
    taken = delivered = most = 0

    def endless():
        nonlocal taken, most
        while True:
            taken += 1
            most = max(most, taken - delivered)
            yield RED

    stream = tiny(batch).stream(endless(), workers=workers, in_flight=in_flight)
    for _ in itertools.islice(stream, 50):
        delivered += 1
        time.sleep(0.0005)
    stream.close()
    assert most <= bound(batch, workers, in_flight)


def test_images_are_let_go_once_decoded():
    """The pixels of a decoded picture are many times its preprocessed row."""

    class Picture(io.BytesIO):
        pass

    alive: weakref.WeakSet = weakref.WeakSet()

    def pictures():
        for _ in range(40):
            picture = Picture(RED)
            alive.add(picture)
            yield picture

    stream = tiny(session=FakeSession(3, 0.01)).stream(pictures(), workers=1, in_flight=4)
    next(stream)
    time.sleep(0.1)
    assert len(alive) <= 2
    assert len(list(stream)) == 39


def test_bound_inputs_are_used_again():
    class Counting(FakeSession):
        made = 0

        def bind(self, shape):
            self.made += 1
            return super().bind(shape)

    session = Counting(3)
    p = tiny(session=session)
    for _ in range(20):
        p(RED)
        p.predict([RED, BLUE])
    assert session.made == 1
    list(p.stream([RED] * 100, workers=2, in_flight=2))
    assert session.made <= bound(1, 2, 2) + 1


# --- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", SIZES)
@pytest.mark.parametrize(("workers", "in_flight"), SHAPES)
def test_everything_before_the_error_of_the_iterable(batch, workers, in_flight):
    def camera():
        yield from map(grey, range(10))
        raise ConnectionError("camera unplugged")

    answers = []
    with pytest.raises(ConnectionError, match="unplugged"):
        answers.extend(tiny(batch).stream(camera(), workers=workers, in_flight=in_flight))
    assert levels(answers) == levels(tiny(batch).predict(map(grey, range(10))))


@pytest.mark.parametrize(("workers", "in_flight"), SHAPES)
def test_failing_inference_raises_at_its_turn(workers, in_flight):
    class Failing(FakeSession):
        def run(self, batch):
            if abs(batch.mean() * 255 - 5) < 0.1:
                raise RuntimeError("the device went away")
            return super().run(batch)

    spec = Preprocess(16, None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    stream = Predictor(Failing(3), spec, LABELS).stream(
        map(grey, range(30)), workers=workers, in_flight=in_flight
    )
    assert len(list(itertools.islice(stream, 5))) == 5
    with pytest.raises(RuntimeError, match="went away"):
        next(stream)
    assert not list_helper_threads()


def test_the_first_of_two_bad_images_is_named(tmp_path):
    for batch, in_flight in itertools.product(SIZES, (1, 3)):
        images = [RED, tmp_path / "one.png", BLUE, tmp_path / "two.png"]
        with pytest.raises(ImageError, match=r"one\.png"):
            list(tiny(batch).stream(images, in_flight=in_flight))


def test_what_is_no_iterable_is_a_type_error():
    with pytest.raises(TypeError):
        next(tiny().stream(7))
    assert not list_helper_threads()


def test_interrupt_from_the_iterable_comes_at_once():
    def interrupted():
        yield from [RED] * 3
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(tiny().stream(interrupted(), in_flight=2))
    assert not list_helper_threads()


@pytest.mark.parametrize("batch", SIZES)
@pytest.mark.parametrize("in_flight", [1, 3])
def test_early_close_cancels_what_has_not_begun(batch, in_flight):
    session = Busy(0.05)
    stream = tiny(batch, session=session).stream(itertools.repeat(RED), workers=3, in_flight=in_flight)
    next(stream)
    assert list_helper_threads()
    before = session.calls
    stream.close()
    assert not list_helper_threads()
    assert session.now == 0
    assert session.calls <= before + in_flight
    assert next(stream, None) is None


def test_leaving_the_loop_frees_the_threads():
    p = tiny(session=Busy())
    for _ in p.stream(itertools.repeat(RED), in_flight=2):
        break
    assert not list_helper_threads()
    with pytest.raises(ZeroDivisionError):
        sum(1 / 0 for _ in p.stream(itertools.repeat(RED), in_flight=2))
    gc.collect()
    assert not list_helper_threads()


def test_stream_that_is_collected_in_its_own_thread():
    """Garbage is collected wherever memory is allocated: there, waiting for oneself would never end."""
    p = tiny()
    started, dropped, done = threading.Event(), threading.Event(), threading.Event()

    class Dropping(io.BytesIO):
        def read(self, *args):
            if not started.is_set():
                started.set()
                dropped.wait(10)
                holder.clear()  # the last reference, in a decode thread
                done.set()
            return super().read(*args)

    holder = [
        p.stream(
            itertools.chain([RED], [Dropping(RED)], itertools.repeat(RED)),
            workers=1,
            in_flight=1,
            copy=False,
        )
    ]
    next(holder[0])
    assert started.wait(10)
    dropped.set()
    assert done.wait(10)
    deadline = time.monotonic() + 10
    while list_helper_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not list_helper_threads()


def test_closing_the_predictor_waits_for_what_runs():
    session = Busy(0.1)
    p = tiny(session=session)
    stream = p.stream([RED] * 20, in_flight=3)
    next(stream)
    p.close()
    assert session.closed_while_busy is False
    with pytest.raises(InputError, match="closed"):
        list(stream)
    p.close()


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_closing_a_real_predictor_in_the_middle(fp32_bundle, name):
    p = Predictor.load(fp32_bundle, backend=name, throughput=True)
    stream = p.stream(itertools.repeat(RED), in_flight=3)
    next(stream)
    p.close()
    with pytest.raises(InputError, match="closed"):
        list(stream)


def test_many_streams_of_one_predictor():
    p = tiny(3, session=FakeSession(3, 0.001))
    want = levels(p.predict(map(grey, range(25))))
    with ThreadPoolExecutor(4) as pool:
        runs = pool.map(
            lambda w: levels(p.stream(map(grey, range(25)), workers=w, in_flight=2)), [0, 1, 2, 3]
        )
        assert all(run == want for run in runs)


# --- cmt-predict ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [31, 32])
def test_many_images_are_predicted_in_throughput_mode(monkeypatch, capsys, tmp_path, count):
    from cmt_edge.deploy.cli import predict

    bundle = make_bundle(tmp_path / "b")
    (tmp_path / "images").mkdir()
    for i in range(count):
        (tmp_path / f"images/{i:03}.png").write_bytes(RED)
    asked = []
    load = Predictor.load
    monkeypatch.setattr(
        predict.Predictor, "load", lambda path, **kw: asked.append(kw["throughput"]) or load(path, **kw)
    )
    assert predict.main([str(bundle.path), str(tmp_path / "images")]) == 0
    assert asked == [count >= 32]
    assert capsys.readouterr().out.count(".png  red ") == count
