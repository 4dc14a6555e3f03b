"""Images of every kind: arrays of either order of colours, tensors, and one image where several are
expected."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from cmt_edge.deploy import Predictor
from cmt_edge.deploy.errors import (
    ImageError,
    InputError,
)
from helpers.bundles import make_bundle, tiny
from helpers.images import BLUE, GREEN, RED


def bgr(blob: bytes) -> np.ndarray:
    """As ``cv2.imread`` gives it."""
    with Image.open(io.BytesIO(blob)) as image:
        return np.asarray(image.convert("RGB"))[..., ::-1]


@pytest.mark.parametrize("color", ["BGR", "Bgr", "bgr"])
def test_the_order_of_colours_in_any_case(tmp_path, color):
    bundle = make_bundle(tmp_path / "b")
    with Predictor.load(bundle) as p:
        assert p(bgr(RED), color=color).label == "red"
    with Predictor.load(bundle, color=color) as p:
        assert p(bgr(RED)).label == "red"
        assert p(bgr(RED), color="RGB").label == "blue"


class Wrapped:
    """Gives its pixels only as ``__array__``, as tensors do."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __array__(self, *args, **kwargs) -> np.ndarray:
        return self.array


class OnGpu:
    """A tensor that NumPy cannot read."""

    def __array__(self, *args, **kwargs) -> np.ndarray:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


def test_tensors_are_images(tmp_path):
    with Predictor.load(make_bundle(tmp_path / "b")) as p:
        tensors = [Wrapped(bgr(blob)[..., ::-1]) for blob in (RED, GREEN)]
        assert [p(tensor).label for tensor in tensors] == ["red", "green"]
        assert [a.label for a in p.predict(tensors)] == ["red", "green"]
        assert [a.label for a in p.predict(tensors[0])] == ["red"]
        assert [a.label for a in p.stream(tensors)] == ["red", "green"]
        np.testing.assert_array_equal(p.prepare(tensors), p.prepare([RED, GREEN]))


@pytest.mark.parametrize(
    ("image", "advice"),
    [
        (Wrapped(np.zeros((3, 64, 64), np.uint8)), "tensor.permute(1, 2, 0)"),
        (Wrapped(np.zeros((64, 64, 3), np.float32)), "255 * array"),
        (Wrapped(np.zeros((3, 64, 64), np.float32)), "tensor.permute(1, 2, 0); pixels are uint8"),
        (OnGpu(), "tensor.detach().cpu().numpy()"),
    ],
    ids=["CHW", "float", "float CHW", "GPU"],
)
def test_a_tensor_that_is_no_image_is_refused(tmp_path, image, advice):
    with Predictor.load(make_bundle(tmp_path / "b")) as p:
        for ask in (p, lambda given: p.predict([given]), lambda given: p.predict(given)):
            with pytest.raises(ImageError) as caught:
                ask(image)
            assert advice in caught.value.remedy


@pytest.mark.parametrize("where", ["load", "call"])
def test_bgr_arrays(tmp_path, where):
    bundle = make_bundle(tmp_path / "b")
    blobs, want = [RED, GREEN, BLUE], ["red", "green", "blue"]
    arrays = [bgr(blob) for blob in blobs]
    with Predictor.load(bundle, **({"color": "bgr"} if where == "load" else {})) as p:
        say = {"color": "bgr"} if where == "call" else {}
        assert [p(array, **say).label for array in arrays] == want
        assert [a.label for a in p.predict(arrays, **say)] == want
        assert [a.label for a in p.stream(arrays, **say)] == want
        assert [a.label for a in p.attempt(arrays, **say)] == want
        for several in (arrays, iter(arrays)):
            np.testing.assert_array_equal(p.prepare(several, **say), p.prepare(blobs))
        assert [a.label for a in p.stream(blobs, **say)] == want  # encoded images know their order
        assert [a.label for a in p.stream([Image.open(io.BytesIO(b)) for b in blobs], **say)] == want
        assert p(arrays[0], color="rgb").label == "blue"  # a call overrules what was said before


@pytest.mark.parametrize(
    "ask",
    [
        lambda path: Predictor.load(path, color="BRG"),
        lambda path: Predictor.load(path, color=None),
        lambda path: Predictor.load(path)(RED, color="gbr"),
        lambda path: Predictor.load(path).predict([RED], color=""),
        lambda path: next(Predictor.load(path).stream([RED], color="rgba")),
        lambda path: Predictor.load(path).prepare([RED], color="grey"),
    ],
)
def test_an_unknown_order_of_colours_is_refused(tmp_path, ask):
    with pytest.raises(InputError, match="order of colours") as caught:
        ask(make_bundle(tmp_path / "b").path)
    assert "bgr" in caught.value.remedy


SINGLE = {
    "path": lambda folder: folder / "a.png",
    "text": lambda folder: str(folder / "a.png"),
    "bytes": lambda folder: RED,
    "bytearray": lambda folder: bytearray(RED),
    "memoryview": lambda folder: memoryview(RED),
    "file": lambda folder: open(folder / "a.png", "rb"),  # noqa: SIM115
    "BytesIO": lambda folder: io.BytesIO(RED),
    "Pillow image": lambda folder: Image.open(folder / "a.png"),
    "array": lambda folder: bgr(BLUE),
    "RGBA array": lambda folder: np.asarray(Image.open(folder / "a.png").convert("RGBA")),
}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("single", SINGLE.values(), ids=SINGLE.keys())
def test_a_single_image_where_several_are_expected(tmp_path, single):
    """Nobody iterates over its letters, bytes, lines or rows."""
    (tmp_path / "a.png").write_bytes(RED)
    p = tiny()
    assert [a.label for a in p.predict(single(tmp_path))] == ["red"]
    assert [a.label for a in p.stream(single(tmp_path))] == ["red"]
    assert p.prepare(single(tmp_path)).shape[0] == 1


@pytest.mark.parametrize("shape", [(5, 20, 20), (5, 20, 20, 3), (5, 20, 20, 1), (5, 20, 20, 4)])
def test_a_stack_of_arrays_is_several_images(shape):
    assert len(tiny().predict(np.zeros(shape, np.uint8))) == 5


@pytest.mark.parametrize("shape", [(20, 20), (20, 20, 1), (20, 20, 2), (20, 20, 3), (20, 20, 4)])
def test_one_array_is_one_image(shape):
    assert len(tiny().predict(np.zeros(shape, np.uint8))) == 1
