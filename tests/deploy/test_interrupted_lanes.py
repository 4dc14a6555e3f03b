"""Ctrl-C at any moment of a stream: it comes out as itself, and the Predictor stays usable."""

from __future__ import annotations

import gc
import io
import itertools
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cmt_edge.deploy.backends.fake import FakeSession
from helpers.bundles import tiny
from helpers.images import RED
from helpers.lanes import COUNT, SHAPES, SIZES, Checked, assert_tidy_and_usable, collect, grey, levels

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


class Raising(io.BytesIO):
    """A file that cannot even be read."""

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__(RED)
        self.error = error

    def read(self, *_):
        raise self.error


@pytest.mark.parametrize(("workers", "in_flight"), SHAPES)
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_while_an_image_is_decoded(workers, in_flight, error):
    p = tiny(3, session=Checked())
    for bad in range(5):
        images = [grey(i) if i != bad else Raising(error) for i in range(COUNT)]
        answers, ended_by = collect(p.stream(images, workers=workers, in_flight=in_flight))
        assert isinstance(ended_by, error)
        assert answers == list(range(len(answers)))
    with pytest.raises(error):
        p(Raising(error))
    assert_tidy_and_usable(p)


@pytest.mark.parametrize("batch", SIZES)
def test_an_interrupt_while_the_runtime_computes(batch):
    p = tiny(batch, session=Checked(5, error=KeyboardInterrupt))
    for workers, in_flight in SHAPES:
        _, ended_by = collect(p.stream(map(grey, range(COUNT)), workers=workers, in_flight=in_flight))
        assert isinstance(ended_by, KeyboardInterrupt)
        assert p.lanes.lent == 0
    with pytest.raises(KeyboardInterrupt):
        p(grey(5))
    with pytest.raises(KeyboardInterrupt):
        p.logits(p.prepare([grey(5)] * 4))
    p.session.bad.clear()
    assert_tidy_and_usable(p)


@pytest.fixture
def interrupts():
    """Deliver SIGINT to this thread after that number of seconds, as Ctrl-C does."""
    if not hasattr(signal, "setitimer"):
        pytest.skip("this system has no interval timers")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize(("workers", "in_flight"), [(0, 1), (2, 2)])
def test_ctrl_c_at_any_moment(interrupts, workers, in_flight):
    """The Predictor answers rightly afterwards, and closing it does not wait for what was interrupted."""
    rng = random.Random(0)
    for _ in range(40):
        p = tiny(3, session=Checked())
        images = map(grey, itertools.cycle(range(20)))
        stream = p.stream(images, workers=workers, in_flight=in_flight)

        def predict(p=p, stream=stream) -> None:
            interrupts(rng.uniform(1e-4, 5e-3))  # here: an interrupt that nobody expects ends the test worker
            sum(len(p(grey(3)).logits) for _ in stream)

        with pytest.raises(KeyboardInterrupt):
            predict()
        gc.collect()
        assert levels(p.predict(map(grey, range(9)))) == list(range(9))
        closer = threading.Thread(target=p.close, daemon=True)
        closer.start()
        closer.join(10)
        assert not closer.is_alive()


def test_a_thread_that_the_pool_does_not_know_keeps_its_lane(monkeypatch):
    """Ctrl-C between the start of a thread and its entry in the pool's list, which nobody waits for then."""
    start = threading.Thread.start

    def start_interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    with tiny(3, session=Checked(delay_s=0.3)) as p:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start_interrupted)
            with pytest.raises(KeyboardInterrupt):
                list(p.stream(map(grey, range(9)), workers=0, in_flight=2))
        assert levels(p.predict(map(grey, range(9)))) == list(range(9))


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_inside_a_lock_of_python_comes_out_as_itself(workers):
    """Python's Condition answers an interrupt while it waits with ``release unlocked lock``."""

    def images():
        yield grey(1)
        try:
            raise KeyboardInterrupt
        finally:
            threading.Lock().release()

    with tiny(3) as p, pytest.raises(KeyboardInterrupt):
        list(p.stream(images(), workers=workers))


def test_ctrl_c_while_closing_leaves_the_session_to_the_next_close(interrupts):
    release = threading.Event()

    class Stuck(FakeSession):
        closed = 0

        def run(self, batch):
            release.wait(10)
            return super().run(batch)

        def close(self):
            self.closed += 1

    session = Stuck(3)
    p = tiny(session=session)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(p, RED)
        time.sleep(0.05)
        interrupts(0.05)
        with pytest.raises(KeyboardInterrupt):
            p.close()
        assert session.closed == 0
        release.set()
        assert running.result().label == "red"
        p.close()
    assert session.closed == 1
