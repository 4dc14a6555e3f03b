"""Values that are never negative: quantized with a sign all the same, because not every runtime reads uint8."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from calib import DEFAULT, CalibrationSet, lint, quantize
from calib.quantize import signed
from deploy.preprocess import Preprocess
from export.to_onnx import export_onnx, logits_of, simplify

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
    expected = logits_of(graph, x, "float")
    assert np.abs(logits_of(quantized, x, "int8") - expected).max() < 0.1 * np.abs(expected).max()


def test_what_reads_a_softmax_stays_float(graph):
    names = DEFAULT.float_nodes(graph)
    producer = {o: n for n in graph.graph.node for o in n.output}
    reading = [
        n
        for n in graph.graph.node
        if n.op_type == "MatMul" and any(producer.get(i) and producer[i].op_type == "Softmax" for i in n.input)
    ]
    assert reading
    assert {n.name for n in reading} <= set(names)


def test_a_signed_quantizer_covers_the_same_range():
    h = onnx.helper
    nodes = [h.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]), h.make_node("DequantizeLinear", ["q", "s", "z"], ["y"])]
    constants = [onnx.numpy_helper.from_array(v, k) for k, v in {"s": np.float32(0.01), "z": np.uint8(0)}.items()]
    ends = [h.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [3]) for n in "xy"]
    model = signed(h.make_model(h.make_graph(nodes, "g", ends[:1], ends[1:], constants)))
    values = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    assert values["z"].dtype == np.int8
    assert values["s"] * 127 == pytest.approx(0.01 * 255)
