"""Graphs whose outputs have other shapes than the manifest says, once they run: an error, never the answer of
another image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from cmt_edge.__main__ import main
from cmt_edge.deploy import Predictor
from cmt_edge.deploy.backends.fake import FakeSession
from cmt_edge.deploy.bundle import ONNX, Bundle
from cmt_edge.deploy.errors import BundleError
from cmt_edge.deploy.lanes import Lanes
from helpers.bundles import LABELS, SIZE, SPEC, make_bundle, tiny_manifest

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

RUNTIMES = ("openvino", "onnxruntime")
WHITE = np.full((SIZE, SIZE, 3), 255, np.uint8)
BLACK = np.zeros((SIZE, SIZE, 3), np.uint8)
IMAGES = [np.full((SIZE, SIZE, 3), shade, np.uint8) for shade in (0, 80, 160, 255, 30)]
node, constant = onnx.helper.make_node, onnx.numpy_helper.from_array
MEAN = node("ReduceMean", ["input", "axes"], ["mean"], keepdims=0)
BRIGHTNESS = node("ReduceMean", ["input"], ["brightness"], keepdims=0)


def encode(nodes: list[onnx.NodeProto], batch: int | str, shape: tuple[int | str, ...]) -> bytes:
    """A graph from images to logits of ``shape``."""
    kind = onnx.TensorProto.FLOAT
    source = onnx.helper.make_tensor_value_info("input", kind, (batch, 3, SIZE, SIZE))
    target = onnx.helper.make_tensor_value_info("logits", kind, shape)
    constants = [
        constant(np.array([2, 3]), "axes"),
        constant(np.array(0.5, np.float32), "half"),
        *(constant(np.array([value]), name) for name, value in NUMBERS.items()),
        constant(np.array([2, 1]), "twice"),
    ]
    graph = onnx.helper.make_graph([MEAN, *nodes], "g", [source], [target], constants)
    opsets = [onnx.helper.make_opsetid("", 18)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


NUMBERS = {"zero": 0, "one": 1, "two": 2, "three": 3, "last": -1}


def slice_by_brightness(axis: str, bright: str, dark: str) -> list[onnx.NodeProto]:
    """The end of a slice along an axis is ``bright`` for bright images and ``dark`` for others."""
    return [
        BRIGHTNESS,
        node("Greater", ["brightness", "half"], ["is_bright"]),
        node("Where", ["is_bright", bright, dark], ["end"]),
        node("Slice", ["mean", "zero", "end", axis], ["logits"]),
    ]


def make_open(place: Path, nodes: list[onnx.NodeProto]) -> Bundle:
    """A bundle of any batch size whose graph gives rows as ``nodes`` do."""
    manifest = tiny_manifest()
    members = {ONNX: encode(nodes, "batch", ("rows", len(LABELS)))}
    return make_bundle(
        place,
        members=members,
        input=replace(manifest.input, shape=("batch", 3, SIZE, SIZE)),
        outputs=(replace(manifest.outputs[0], shape=("batch", len(LABELS))),),
    )


ROWS = {
    "twice as many": [node("Tile", ["mean", "twice"], ["logits"])],
    "one less": [node("Slice", ["mean", "zero", "last", "zero"], ["logits"])],
    "one more": [
        node("Slice", ["mean", "zero", "one", "zero"], ["first"]),
        node("Concat", ["mean", "first"], ["logits"], axis=0),
    ],
}
"""How many rows a graph of any batch size gives -> its operations."""

CALLS: dict[str, Callable[[Predictor], object]] = {
    "one image": lambda p: p(IMAGES[0]),
    "several": lambda p: p.predict(IMAGES),
    "a stream": lambda p: list(p.stream(IMAGES)),
    "an attempt": lambda p: list(p.attempt(IMAGES)),
    "logits": lambda p: p.logits(p.prepare(IMAGES)),
    "outputs": lambda p: p.outputs(p.prepare(IMAGES)),
}
"""Ways to ask."""


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("rows", ROWS)
def test_an_answer_more_or_less_than_images_is_an_error(tmp_path: Path, rows: str, runtime: str) -> None:
    bundle = make_open(tmp_path / "b", ROWS[rows])
    with Predictor.load(bundle.path, backend=runtime) as predictor:
        for ask in CALLS.values():
            with pytest.raises(BundleError, match=r"output of shape \(\d+, 3\) for a batch of \d+"):
                ask(predictor)
        assert not predictor.lanes.lent


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("rows", ["twice as many", "one less"])
def test_commands_name_the_bundle_whose_rows_are_wrong(tmp_path: Path, capsys, rows, runtime) -> None:
    bundle = make_open(tmp_path / "b", ROWS[rows])
    image = tmp_path / "i.png"
    Image.fromarray(WHITE).save(image)
    command = ["predict", str(bundle.path), "--backend", runtime]
    for count in (1, 3):
        assert main([*command, *[str(image)] * count]) == 2
        told = capsys.readouterr().err
        assert f"{bundle.path}: the model gives an output of shape" in told


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("dark_first", [False, True])
def test_no_answer_keeps_values_of_the_image_before(
    tmp_path: Path,
    dark_first: bool,
    runtime: str,
) -> None:
    """The graph gives three logits for a bright image and two for a dark one."""
    members = {ONNX: encode(slice_by_brightness("one", "three", "two"), 1, (1, "n"))}
    bundle = make_bundle(tmp_path / "b", members=members)
    images = [BLACK, WHITE, BLACK] if dark_first else [WHITE, BLACK, WHITE]
    with Predictor.load(bundle.path, backend=runtime) as predictor:
        for image in images:
            if image is WHITE:
                assert predictor(image).logits.tolist() == [1.0, 1.0, 1.0]
                continue
            with pytest.raises(BundleError, match=r"logits of shape \(2,\)"):
                predictor(image)
        with pytest.raises(BundleError, match=r"different shapes|logits of shape \(2,\)"):
            predictor.logits(predictor.prepare(images))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_no_batch_keeps_rows_of_the_batch_before(tmp_path: Path, runtime: str) -> None:
    """The graph drops the last rows of dark images: the number of rows depends on the values."""
    bundle = make_open(tmp_path / "b", slice_by_brightness("zero", "three", "two"))
    bright, dark = [WHITE] * 3, [BLACK] * 3
    with Predictor.load(bundle.path, backend=runtime) as predictor:
        good, bad = predictor.prepare(bright), predictor.prepare(dark)
        for _ in range(2):
            assert predictor.logits(good).tolist() == [[1.0, 1.0, 1.0]] * 3
            with pytest.raises(BundleError, match=r"shape \(2, 3\) for a batch of 3"):
                predictor.logits(bad)
        assert not predictor.logits(good[:0]).size


def test_a_bound_lane_counts_its_rows() -> None:
    class Doubled(FakeSession):
        def run(self, batch: np.ndarray) -> list[np.ndarray]:
            return [np.concatenate([output, output]) for output in super().run(batch)]

    lanes = Lanes(Doubled(3), 4, SPEC.size, "the bundle")
    for count in (4, 2, 0):
        with lanes.take(count) as lane:
            lane.batch[:] = 0
            with pytest.raises(BundleError, match="for a batch of 4") as found:
                lane.run(count)
        assert found.value.where == "the bundle"
        assert lanes.idle == 0, "a lane whose inference failed is lent again"
