"""Pairs after calibration: every quantizer signed, because not every runtime reads uint8, and directly before
its conv."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

from cmt_edge.calib import DEFAULT, CalibrationSet, lint, quantize
from cmt_edge.calib.qdq_pairs import move_pairs_to_layers, sign_quantizers
from cmt_edge.deploy.preprocessing import Preprocess
from cmt_edge.export.to_onnx import export_onnx, run_graph, simplify
from helpers.graphs import compute_logits, rewrite_copy

SPEC = Preprocess(32, None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


class Rectified(nn.Module):
    """ReLUs before a conv and a linear, and a product with softmaxed scores."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.Conv2d(8, 8, 1)
        self.q, self.v, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.second(self.first(x).relu()).relu().flatten(2).transpose(1, 2)
        x = (self.q(x) @ x.transpose(1, 2)).softmax(-1) @ self.v(x)
        return self.head(x.relu().mean(1))


@pytest.fixture(scope="module")
def graph() -> onnx.ModelProto:
    torch.manual_seed(0)
    return simplify(export_onnx(Rectified().eval(), 32, 20))


@pytest.fixture(scope="module")
def quantized(graph) -> onnx.ModelProto:
    return quantize(graph, CalibrationSet.choose("generated", 8, SPEC, 0), SPEC).model


def test_no_quantizer_is_unsigned(quantized):
    assert lint(quantized) == []
    zeros = {n.input[2] for n in quantized.graph.node if n.op_type == "QuantizeLinear"}
    assert {i.data_type for i in quantized.graph.initializer if i.name in zeros} == {onnx.TensorProto.INT8}


def test_the_answers_stay_close(graph, quantized):
    x = np.random.default_rng(0).random((2, 3, 32, 32)).astype(np.float32)
    expected = compute_logits(graph, x, "float")
    assert np.abs(compute_logits(quantized, x, "int8") - expected).max() < 0.1 * np.abs(expected).max()


def test_what_reads_a_softmax_stays_float(graph):
    names = DEFAULT.float_nodes(graph)
    producer = {o: n for n in graph.graph.node for o in n.output}
    reading = [
        n
        for n in graph.graph.node
        if n.op_type == "MatMul"
        and any(producer.get(i) and producer[i].op_type == "Softmax" for i in n.input)
    ]
    assert reading
    assert {n.name for n in reading} <= set(names)


def test_a_signed_quantizer_covers_the_same_range():
    h = onnx.helper
    nodes = [
        h.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        h.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    constants = [
        onnx.numpy_helper.from_array(v, k) for k, v in {"s": np.float32(0.01), "z": np.uint8(0)}.items()
    ]
    ends = [h.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [3]) for n in "xy"]
    model = rewrite_copy(
        h.make_model(h.make_graph(nodes, "g", ends[:1], ends[1:], constants)), sign_quantizers
    )
    values = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    assert values["z"].dtype == np.int8
    assert values["s"] * 127 == pytest.approx(0.01 * 255)


# --- where pairs stand ----------------------------------------------------------------------------


def tokens_then_conv(*, residual: bool = False, other_reader: bool = False) -> onnx.ModelProto:
    """A pair on tokens, then a map, a conv and a class token in front of its answers: CvT's embedding of a
    stage."""
    rng, make = np.random.default_rng(0), onnx.helper.make_node
    nodes = [
        make("QuantizeLinear", ["tokens", "s", "z"], ["q"], "Q"),
        make("DequantizeLinear", ["q", "s", "z"], ["d"], "DQ"),
        make("Reshape", ["d", "shape"], ["r"], "R"),
        make("Transpose", ["r"], ["map"], "T", perm=[0, 3, 1, 2]),
        make("DequantizeLinear", ["w", "ws", "wz"], ["wd"], "W", axis=0),
        make("Conv", ["map", "wd", "b"], ["conv"], "conv", pads=[1, 1, 1, 1]),
        make("Concat", ["first", "conv"], ["y"], "C", axis=3),
    ]
    ends = [("y", [1, 12, 8, 9])]
    if residual:
        nodes.append(make("Add", ["d", "tokens"], ["sum"], "A"))
        ends.append(("sum", [1, 64, 16]))
    if other_reader:
        nodes.append(make("Relu", ["r"], ["relu"], "Relu"))
        ends.append(("relu", [1, 8, 8, 16]))
    constants = {
        "s": np.float32(0.03),
        "z": np.int8(0),
        "shape": np.array([-1, 8, 8, 16]),
        "w": rng.integers(-63, 64, (12, 16, 3, 3)).astype(np.int8),  # fit 16 bits where there is no VNNI
        "ws": rng.uniform(1e-3, 2e-3, 12).astype(np.float32),
        "wz": np.zeros(12, np.int8),
        "b": rng.standard_normal(12).astype(np.float32),
        "first": rng.standard_normal((1, 12, 8, 1)).astype(np.float32),
    }
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [value("tokens", 1, [1, 64, 16])],
        [value(n, 1, s) for n, s in ends],
        [onnx.numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)


def answers(model: onnx.ModelProto) -> list[np.ndarray]:
    tokens = np.random.default_rng(1).normal(0, 1.2, (1, 64, 16)).astype(np.float32)
    return run_graph(model, "test")(tokens)


@pytest.mark.parametrize("kind", [{}, {"residual": True}, {"other_reader": True}])
def test_a_pair_stands_before_its_conv_and_changes_no_value(kind):
    expected = answers(tokens_then_conv(**kind))
    model = rewrite_copy(tokens_then_conv(**kind), move_pairs_to_layers)
    onnx.checker.check_model(model, full_check=True)
    for ours, before in zip(answers(model), expected, strict=True):
        np.testing.assert_array_equal(ours, before)
    by_output = {o: n for n in model.graph.node for o in n.output}
    conv = by_output["conv"]
    moved = by_output[conv.input[0]].op_type == "DequantizeLinear"
    assert moved is not bool(kind.get("other_reader"))  # there int8 values serve two readers
    assert ("Q" in {n.name for n in model.graph.node}) is bool(kind)  # gone where nobody else reads it


@pytest.mark.parametrize(("weight", "moved"), [("quantized", True), ("float", True), ("computed", False)])
def test_a_pair_stands_before_its_linear_but_not_before_a_product_of_activations(weight, moved):
    rng, make = np.random.default_rng(0), onnx.helper.make_node
    nodes = [
        make("QuantizeLinear", ["heads", "s", "z"], ["q"], "Q"),
        make("DequantizeLinear", ["q", "s", "z"], ["d"], "DQ"),
        make("Transpose", ["d"], ["t"], "T", perm=[0, 2, 1, 3]),
        make("Reshape", ["t", "shape"], ["r"], "R"),
        make("DequantizeLinear", ["w", "ws", "wz"], ["wd"], "W", axis=1),
        make("Relu", ["other"], ["relu"], "Relu"),
        make(
            "MatMul", ["r", {"quantized": "wd", "float": "wf", "computed": "relu"}[weight]], ["y"], "linear"
        ),
    ]
    used = {i for node in nodes[:4] + nodes[6:] for i in node.input} | (
        {"w", "ws", "wz"} if weight == "quantized" else set()
    )
    nodes = [n for n in nodes if n.name not in ("W", "Relu") or n.output[0] in used]
    constants = {
        "s": np.float32(0.03),
        "z": np.int8(0),
        "shape": np.array([-1, 8, 32]),
        "w": rng.integers(-127, 128, (32, 6)).astype(np.int8),
        "ws": rng.uniform(5e-4, 1e-3, 6).astype(np.float32),
        "wz": np.zeros(6, np.int8),
        "wf": rng.standard_normal((32, 6)).astype(np.float32),
    }
    value = onnx.helper.make_tensor_value_info
    inputs = [
        value("heads", 1, [1, 2, 8, 16]),
        *([value("other", 1, [32, 6])] if weight == "computed" else []),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        inputs,
        [value("y", 1, [1, 8, 6])],
        [onnx.numpy_helper.from_array(v, k) for k, v in constants.items() if k in used],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    feeds = {
        i.name: rng.standard_normal([d.dim_value for d in i.type.tensor_type.shape.dim]).astype(np.float32)
        for i in inputs
    }
    run = lambda: ReferenceEvaluator(model).run(None, feeds)[0]  # noqa: E731
    before = run()
    model = rewrite_copy(model, move_pairs_to_layers)
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_array_equal(run(), before)
    by_output = {o: n for n in model.graph.node for o in n.output}
    assert (by_output[by_output["y"].input[0]].op_type == "DequantizeLinear") is moved


def test_a_pair_with_a_scale_for_each_channel_stays():
    model = tokens_then_conv()
    for node in model.graph.node[:2]:
        node.attribute.append(onnx.helper.make_attribute("axis", 2))
    for i in model.graph.initializer:
        if i.name in "sz":
            i.CopyFrom(onnx.numpy_helper.from_array(np.tile(onnx.numpy_helper.to_array(i), 16), i.name))
    before = model.SerializeToString(deterministic=True)
    assert rewrite_copy(model, move_pairs_to_layers).SerializeToString(deterministic=True) == before


def test_openvino_answers_as_onnxruntime_beside_a_concat():
    pytest.importorskip("openvino")
    from cmt_edge.deploy.backends.openvino_core import open_core

    model = rewrite_copy(tokens_then_conv(), move_pairs_to_layers)
    compiled = open_core().compile_model(
        open_core().read_model(model.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    tokens = np.random.default_rng(1).normal(0, 1.2, (1, 64, 16)).astype(np.float32)
    ours = compiled([tokens])[0]
    np.testing.assert_allclose(
        ours, answers(model)[0], atol=1e-2
    )  # a rounding more or less; 0.3 on average before
