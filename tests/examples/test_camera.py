"""The camera loop: the newest frame wins, reading never waits, and a failing camera is an error."""

from __future__ import annotations

import json
import threading
from itertools import pairwise

import numpy as np
import pytest

from cmt_edge.deploy import Predictor
from helpers.bundles import make_bundle, tiny
from helpers.images import coloured_folder

LIMIT_S = 30
"""Seconds after which a test gives up waiting."""


@pytest.fixture(scope="module")
def module(example):
    return example("camera/camera_loop.py")


def make_frames(count: int) -> list[np.ndarray]:
    return [np.full((20, 20, 3), level, np.uint8) for level in range(count)]


class Slow:
    """A Predictor that begins to answer, and goes on when the test says so."""

    def __init__(self) -> None:
        self.inner = tiny()
        self.begun, self.go = threading.Semaphore(0), threading.Semaphore(0)
        self.seen: list[int] = []

    def __call__(self, image, *, color):
        self.seen.append(int(image[0, 0, 0]))
        self.begun.release()
        assert self.go.acquire(timeout=LIMIT_S)
        return self.inner(image, color=color)


def test_frames_that_come_during_an_answer_are_skipped_but_for_the_newest(module):
    predictor, gate, given = Slow(), threading.Semaphore(1), threading.Event()

    def play():
        for number, frame in enumerate(make_frames(10)):
            if number in (1, 9):
                assert gate.acquire(timeout=LIMIT_S)
            yield frame
            if number == 8:
                given.set()

    camera = module.Camera(play())
    results = []
    gate.acquire()
    with camera:
        loop = threading.Thread(
            target=lambda: results.append(module.watch(predictor, camera, lambda *_: None))
        )
        loop.start()
        assert predictor.begun.acquire(timeout=LIMIT_S)  # frame 0 is being classified
        gate.release()
        assert given.wait(LIMIT_S)  # and 1 to 8 came meanwhile
        predictor.go.release()
        assert predictor.begun.acquire(timeout=LIMIT_S)
        gate.release()
        predictor.go.release(2)
        loop.join(LIMIT_S)
    assert predictor.seen == [0, 8, 9]
    assert results[0].answered == [0, 8, 9]
    assert results[0].summarise(camera.read)["skipped"] == 7


def test_a_failing_camera_is_an_error_after_its_last_frame(module):
    def play():
        yield from make_frames(1)
        raise OSError("the camera was unplugged")

    answered = []
    with module.Camera(play()) as camera, pytest.raises(OSError, match="unplugged"):
        module.watch(tiny(), camera, lambda frame, *_: answered.append(frame.number))
    assert answered == [0]


def test_leaving_the_loop_ends_the_camera(module):
    def play():
        while True:
            yield np.zeros((20, 20, 3), np.uint8)

    camera = module.Camera(play())
    with camera:
        assert camera.newest.take() is not None
    assert not any(thread.name == "camera" for thread in threading.enumerate())


@pytest.mark.usefixtures("served_by_fake")
def test_the_command_tells_what_the_predictor_sees(module, tmp_path, capsys):
    bundle, frames = str(make_bundle(tmp_path / "bundle").path), coloured_folder(tmp_path / "frames")
    assert module.main([str(frames), bundle, "--fps", "0", "--json"]) == 0
    *labels, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found["frames"] == 9
    assert found["answered"] + found["skipped"] == 9
    with Predictor.load(bundle) as predictor:
        newest = predictor(frames / "red" / "002.png").label
    assert labels[-1].split()[2] == newest == "red"


def test_a_recording_has_frames_that_move(module, tmp_path, capsys):
    assert module.main([str(tmp_path / "frames"), "--record"]) == 0
    frames = list(module.play_frames(tmp_path / "frames", fps=0))
    assert len(frames) == module.RECORDED
    assert {frame.shape for frame in frames} == {(module.HEIGHT, module.WIDTH, 3)}
    assert all((a != b).any() for a, b in pairwise(frames))
    assert module.main([str(tmp_path / "frames"), "--record"]) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "message"), [([], "no bundle was named"), (["bundle"], "frames")])
def test_what_is_missing_is_a_message(module, tmp_path, capsys, words, message):
    assert module.main([str(tmp_path / "frames"), *words]) == 2
    assert message in capsys.readouterr().err
