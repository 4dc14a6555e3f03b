"""Large graphs go to other libraries by files, and give the same answers as those in memory."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cmt_edge.calib import running
from cmt_edge.calib.running import lying_in_file, measure_extremes, open_graph
from cmt_edge.deploy.errors import StepError
from cmt_edge.export.to_onnx import check_graph, simplify

BATCH = np.random.default_rng(1).normal(size=(2, 40)).astype(np.float32)
"""What the graph reads."""


@pytest.fixture
def model() -> onnx.ModelProto:
    """Two linears, of which the first one has its weights the other way round and too many of them to be a
    shape."""
    rng = np.random.default_rng(0)
    info = helper.make_tensor_value_info
    shapes = {"first": (50, 40), "second": (50, 30)}
    weights = [
        numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name)
        for name, shape in shapes.items()
    ]
    nodes = [
        helper.make_node("Transpose", ["first"], ["turned"], "turn"),
        helper.make_node("MatMul", ["input", "turned"], ["hidden"], "one"),
        helper.make_node("MatMul", ["hidden", "second"], ["logits"], "two"),
    ]
    ends = [info("input", TensorProto.FLOAT, ["batch", 40]), info("logits", TensorProto.FLOAT, ["batch", 30])]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where files of large graphs lie: every graph is large."""
    monkeypatch.setattr(running, "LARGE_BYTES", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def compute(model: onnx.ModelProto) -> list[np.ndarray]:
    """The logits, a tensor inside, and its extremes."""
    more = onnx.GraphProto(output=[onnx.ValueInfoProto(name="hidden")])
    logits, hidden = open_graph(model, outputs=["logits", "hidden"], added=more)(BATCH)
    return [logits, hidden, *measure_extremes(model, [], ["hidden"], [BATCH])["hidden"]]


def test_large_graphs_lie_in_files_that_go(model, folder):
    before = model.SerializeToString()
    with lying_in_file(model) as path:
        assert path is not None
        assert Path(path).is_relative_to(folder)
        assert onnx.load(path) == model
    assert [*folder.iterdir()] == []
    with pytest.raises(KeyError), lying_in_file(model):
        raise KeyError
    assert [*folder.iterdir()] == []
    assert model.SerializeToString() == before


def test_they_give_the_same_answers(model, monkeypatch, folder):
    by_file = compute(model)
    assert [*folder.iterdir()] == []
    monkeypatch.setattr(running, "LARGE_BYTES", 1 << 30)
    for ours, theirs in zip(by_file, compute(model), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    hidden = BATCH @ numpy_helper.to_array(model.graph.initializer[0]).T
    np.testing.assert_allclose(by_file[1], hidden, rtol=1e-4, atol=1e-4)


def test_without_room_they_stay_in_memory(model, monkeypatch, folder):
    by_file = compute(model)
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "none"))
    with lying_in_file(model) as path:
        assert path is None
    for ours, theirs in zip(by_file, compute(model), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_large_graphs_are_simplified_alike(model, monkeypatch, folder):
    by_file = simplify(model)
    assert [node.op_type for node in by_file.graph.node] == ["MatMul", "MatMul"]
    monkeypatch.setattr(running, "LARGE_BYTES", 1 << 30)
    assert simplify(model).SerializeToString() == by_file.SerializeToString()


def test_the_check_without_weights_still_minds_them(model):
    assert check_graph("check", model) is model
    wrong = onnx.ModelProto()
    wrong.CopyFrom(model)
    wrong.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.zeros((60, 30), np.float32), "second"))
    with pytest.raises(StepError, match="check"):
        check_graph("check", wrong)
    wrong.CopyFrom(model)
    wrong.graph.initializer[1].ClearField("raw_data")
    with pytest.raises(StepError, match="check"):
        check_graph("check", wrong)
    wrong.CopyFrom(model)
    wrong.graph.initializer.append(wrong.graph.initializer[0])
    with pytest.raises(StepError, match="check"):
        check_graph("check", wrong)
