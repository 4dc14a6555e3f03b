"""Graphs that a runtime refuses, or on which it fails: one typed error with the file's name, never a trace.

Each command runs in a process with limits on time and memory, so that a graph which takes gigabytes fails
there and not on the machine of whoever runs the tests.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from helpers.bundles import SIZE, Bundle, copy_bundle, make_bundle, tiny_golden
from helpers.limited import Limited

onnx = pytest.importorskip("onnx")
pytest.importorskip("openvino")
pytest.importorskip("onnxruntime")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="limits memory with setrlimit"),
]

FLOAT, DOUBLE = onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE
node, constant = onnx.helper.make_node, onnx.numpy_helper.from_array
AXES = constant(np.array([2, 3]), "axes")
MEAN = node("ReduceMean", ["input", "axes"], ["mean"], keepdims=0)
GOOD = node("Identity", ["mean"], ["logits"])
IDENTITY = node("ReduceMean", ["input", "axes"], ["logits"], keepdims=0)


def shape(name: str, *sizes: int) -> onnx.TensorProto:
    return constant(np.array(sizes, np.int64), name)


def model(
    nodes: Iterable[onnx.NodeProto],
    *constants: onnx.TensorProto,
    given: int = FLOAT,
    classes: int | str = 3,
    opset: int = 20,
    domain: str = "",
) -> bytes:
    """A graph from images of the small bundle's size to logits."""
    image = onnx.helper.make_tensor_value_info("input", given, (1, 3, SIZE, SIZE))
    logits = onnx.helper.make_tensor_value_info("logits", FLOAT, (1, classes))
    graph = onnx.helper.make_graph(list(nodes), "g", [image], [logits], [AXES, *constants])
    opsets = [onnx.helper.make_opsetid("", opset)]
    opsets += [onnx.helper.make_opsetid(domain, 1)] if domain else []
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


def undersized() -> bytes:
    """Weights that declare 64 GiB and have four bytes."""
    nodes = [node("ReduceMean", ["w"], ["m"], keepdims=0), MEAN, node("Add", ["mean", "m"], ["logits"])]
    made = onnx.load_from_string(model(nodes))
    made.graph.initializer.add(name="w", data_type=FLOAT, dims=[1 << 20, 1 << 14], raw_data=b"1234")
    return made.SerializeToString()


ONES = onnx.helper.make_tensor("one", FLOAT, [1], [1.0])
FILL = node("ConstantOfShape", ["sizes"], ["filled"], value=ONES)
TOTAL = node("ReduceSum", ["filled"], ["total"], keepdims=0)
ROWS = [
    node("NonZero", ["mean"], ["found"]),
    node("Cast", ["found"], ["rows"], to=FLOAT),
]
"""Two rows about the values that are not zero: the number of columns is known only when the graph runs."""

GRAPHS = {
    "empty": b"",
    "text": b"hello",
    "cut off": model([MEAN, GOOD])[:-9],
    "no nodes": model([]),
    "unknown operation": model([node("Nothing", ["input"], ["logits"])]),
    "unknown domain": model([node("Nothing", ["input"], ["logits"], domain="x")], domain="x"),
    "opset of the future": model([node("ReduceMean", ["input"], ["logits"], axes=[2, 3])], opset=999),
    "wrong types": model([node("And", ["input", "axes"], ["logits"])]),
    "wrong ranks": model([node("MatMul", ["input", "axes"], ["logits"])]),
    "another input type": model([MEAN, node("Cast", ["mean"], ["logits"], to=FLOAT)], given=DOUBLE),
    "more classes": model([node("Concat", ["mean", "mean"], ["logits"], axis=1), MEAN], classes=6),
    "a circle": model([node("Add", ["logits", "x"], ["x"]), node("Identity", ["x"], ["logits"])]),
    "weights that are missing": undersized(),
    "gigabytes while it is opened": model(
        [FILL, TOTAL, MEAN, node("Add", ["mean", "total"], ["logits"])], shape("sizes", 1 << 16, 1 << 16)
    ),
    "gigabytes while it runs": model(
        [
            MEAN,
            node("Reshape", ["mean", "column"], ["columns"]),
            node("Expand", ["columns", "sizes"], ["many"]),
            node("ReduceMax", ["many", "middle"], ["logits"], keepdims=0),
        ],
        shape("column", 1, 1, 3),
        shape("sizes", 1, 1 << 30, 3),
        shape("middle", 1),
    ),
    "a failure while it runs": model(
        [MEAN, *ROWS, node("Reshape", ["rows", "row"], ["logits"])], shape("row", 1, 3)
    ),
    "more classes while it runs": model(
        [MEAN, *ROWS, node("Reshape", ["rows", "row"], ["logits"])],
        shape("row", 1, -1),
        classes="n",
    ),
}
"""What is wrong with a graph -> its file."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs commands within limits."""
    with Limited(tmp_path_factory.mktemp("output")) as limited:
        yield limited


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("image") / "image.png"
    path.write_bytes(tiny_golden().sources[0])
    return path


def bundle_of(folder: Path, fmt: str, **members: bytes) -> Bundle:
    """A bundle of that format with these members; ``__`` in a name stands for a dot."""

    def edit(made: Path) -> None:
        for name, data in members.items():
            (made / name.replace("__", ".")).write_bytes(data)

    return copy_bundle(make_bundle(folder / "plain"), folder / "bundle", edit, format=fmt)


def require_refused(run, bundle: Bundle, image: Path, backend: str, file: str) -> None:
    for command in (["predict", bundle.path, image], ["verify", bundle.path]):
        outcome = run(*command, "--backend", backend)
        assert not outcome.complaint, (command[0], outcome.complaint)
        assert outcome.code == 2, (command[0], outcome.stdout)
        assert str(bundle.path) in outcome.stderr, outcome.stderr
        assert file in outcome.stderr or "shape" in outcome.stderr, outcome.stderr


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", GRAPHS)
def test_no_hostile_graph_leaves_a_trace(tmp_path, run, image, name, backend):
    require_refused(run, bundle_of(tmp_path, "onnx", model__onnx=GRAPHS[name]), image, backend, "model.onnx")


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_benchmark_of_a_graph_that_fails(tmp_path, run, backend):
    bundle = bundle_of(tmp_path, "onnx", model__onnx=GRAPHS["a failure while it runs"])
    outcome = run("bench", bundle.path, "--backend", backend)
    assert not outcome.complaint
    assert outcome.code == 2, outcome.stdout
    assert "model.onnx" in outcome.stderr


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_graph_that_is_right_runs_within_the_limits(tmp_path, run, image, backend):
    bundle = bundle_of(tmp_path, "onnx", model__onnx=model([IDENTITY]))
    outcome = run("predict", bundle.path, image, "--backend", backend)
    assert outcome.code == 0, outcome.stderr
