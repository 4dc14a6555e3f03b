"""Streams of sources that use an image again after they gave it."""

from __future__ import annotations

import io
import tempfile
import time

import numpy as np
import pytest
from PIL import Image, ImageSequence

from cmt_edge.deploy import Predictor, Preprocess
from cmt_edge.deploy.backends.fake import FakeSession
from helpers.bundles import LABELS, levels, tiny
from helpers.images import encoded, grey

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


def array_camera():
    """As ``cv2.VideoCapture.read(buffer)``: one buffer, filled again and again."""
    buffer = np.empty((20, 20, 3), np.uint8)
    for level in range(12):
        buffer[:] = 8 * level
        yield buffer


def view_camera():
    """As a memory-mapped driver: a read-only view of memory that changes."""
    memory = np.empty((20, 20, 3), np.uint8)
    view = memory.view()
    view.flags.writeable = False
    for level in range(12):
        memory[:] = 8 * level
        yield view


def picture_camera():
    """One Pillow image, painted over."""
    image = Image.new("RGB", (20, 20))
    for level in range(12):
        image.paste((8 * level,) * 3, (0, 0, 20, 20))
        yield image


def closing_camera():
    """A Pillow image that its owner closes before the next one."""
    for level in range(12):
        with Image.open(io.BytesIO(encoded(Image.new("RGB", (20, 20), (8 * level,) * 3)))) as image:
            yield image


def animation():
    """The frames of an animation, which Pillow gives as one object."""
    file = io.BytesIO()
    first, *others = (Image.new("RGB", (20, 20), (8 * level,) * 3) for level in range(12))
    first.save(file, "PNG", save_all=True, append_images=others)
    with Image.open(file) as opened:
        yield from ImageSequence.Iterator(opened)


def stream_camera():
    """As ``picamera``'s ``capture_continuous``: one byte stream, written again and again."""
    file = io.BytesIO()
    for level in range(12):
        file.seek(0)
        file.truncate()
        file.write(encoded(Image.new("RGB", (20, 20), (8 * level,) * 3)))
        yield file


def file_camera():
    """One temporary file."""
    with tempfile.TemporaryFile() as file:
        for level in range(12):
            file.seek(0)
            file.truncate()
            file.write(encoded(Image.new("RGB", (20, 20), (8 * level,) * 3)))
            yield file


def memory_camera():
    """Encoded bytes in shared memory."""
    memory = bytearray(4096)
    for level in range(12):
        blob = encoded(Image.new("RGB", (20, 20), (8 * level,) * 3))
        memory[: len(blob)] = blob
        yield memoryview(memory)[: len(blob)]


CAMERAS = [
    array_camera,
    view_camera,
    picture_camera,
    closing_camera,
    animation,
    stream_camera,
    file_camera,
    memory_camera,
]


@pytest.mark.parametrize(
    ("batch", "workers", "in_flight"), [(1, 2, 1), (0, 4, 3), (3, 1, 4), (2, 0, 1), (2, 0, 3)]
)
@pytest.mark.parametrize("camera", CAMERAS)
def test_a_source_that_uses_one_buffer_again(monkeypatch, camera, batch, workers, in_flight):
    import cmt_edge.deploy.predictor as module

    original = module.preprocess

    def late(*args):
        time.sleep(0.002)
        return original(*args)

    want = levels(map(tiny(batch), map(grey, range(0, 96, 8))))
    monkeypatch.setattr(module, "preprocess", late)
    stream = tiny(batch).stream(camera(), workers=workers, in_flight=in_flight)
    assert levels(stream) == pytest.approx(want)


def test_what_is_promised_not_to_change_is_not_copied(monkeypatch):
    import cmt_edge.deploy.predictor as module

    seen, original = [], module.preprocess
    monkeypatch.setattr(
        module, "preprocess", lambda image, *rest: seen.append(image) or original(image, *rest)
    )
    images = [grey(level) for level in range(6)]
    list(tiny().stream(images, copy=False))
    assert {id(image) for image in seen} == {id(image) for image in images}
    seen.clear()
    list(tiny().stream(images))
    assert not {id(image) for image in seen} & {id(image) for image in images}


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("exif", ["apply", "ignore"])
def test_a_copied_picture_is_turned_once(kind, exif, orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)).save(
        file, kind, exif=tags
    )
    spec = Preprocess(16, None, (0.0,) * 3, (1.0,) * 3, exif)
    p = Predictor(FakeSession(3), spec, LABELS)
    want = p(file.getvalue()).logits
    for answer in p.stream(Image.open(io.BytesIO(file.getvalue())) for _ in range(3)):
        np.testing.assert_array_equal(answer.logits, want)
