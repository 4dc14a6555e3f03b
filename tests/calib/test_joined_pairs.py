"""Pairs whose values a ``Concat`` joins for a layer: they become one pair behind it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from cmt_edge.calib import CalibrationSet, lint, quantize
from cmt_edge.calib.integer_layers import place_for_integers
from cmt_edge.calib.qdq_pairs import move_pairs_to_layers
from cmt_edge.calib.restore import restore
from cmt_edge.deploy.preprocessing import Preprocess
from cmt_edge.export.to_onnx import export_onnx, simplify
from helpers.graphs import INTEGER_KERNELS, compute_logits, count_kernels, rewrite_copy

SPEC = Preprocess(64, None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
TOKENS, CHANNELS = 5, 8
"""The class token and a map of 2 by 2, in a hand-made graph."""


class Block(nn.Module):
    """Attention as in CvT's last stage: queries, keys and values are linears of a class token that is joined
    with maps from three depthwise convs, or with one map (``maps``)."""

    def __init__(self, channels: int = 32, maps: int = 3) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, channels, 7, stride=8, padding=3)
        self.token = nn.Parameter(torch.randn(1, 1, channels))
        self.norm = nn.LayerNorm(channels)
        self.maps = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels) for _ in range(maps)
        )
        self.linears = nn.ModuleList(nn.Linear(channels, channels) for _ in range(3))
        self.head = nn.Linear(channels, 7)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = self.norm(torch.cat([self.token.expand(len(x), -1, -1), x], 1))
        token, tokens = x[:, :1], x[:, 1:].transpose(1, 2).unflatten(2, (8, 8))
        joined = [torch.cat([token, conv(tokens).flatten(2).transpose(1, 2)], 1) for conv in self.maps]
        q, k, v = (linear(joined[i % len(joined)]) for i, linear in enumerate(self.linears))
        return self.head(((q @ k.transpose(1, 2)).softmax(-1) @ v)[:, 0])


@pytest.fixture(scope="module", params=[3, 1])
def maps(request) -> int:
    """How many tensors are joined for the three linears."""
    return request.param


@pytest.fixture(scope="module")
def graph(maps) -> onnx.ModelProto:
    torch.manual_seed(0)
    return simplify(export_onnx(Block(maps=maps).eval(), 64, 20))


@pytest.fixture(scope="module")
def quantized(graph):
    return quantize(graph, CalibrationSet.choose("generated", 16, SPEC, 0), SPEC)


def list_joined(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The linears whose values a Concat has joined, with or without a pair in between."""
    producers = {name: node for node in model.graph.node for name in node.output}

    def is_joined(name: str) -> bool:
        node = producers.get(name)
        while node is not None and node.op_type in ("QuantizeLinear", "DequantizeLinear", "Reshape"):
            node = producers.get(node.input[0])
        return node is not None and node.op_type == "Concat"

    return [
        node for node in model.graph.node if node.op_type in ("MatMul", "Gemm") and is_joined(node.input[0])
    ]


def test_there_is_one_pair_with_a_scale_of_its_own_behind_each_concat(quantized, maps):
    assert lint(quantized.model, quantized.trunk) == []
    layers = list_joined(quantized.model)
    producers = {name: node for node in quantized.model.graph.node for name in node.output}
    pairs = [producers[layer.input[0]] for layer in layers]
    assert [pair.op_type for pair in pairs] == 3 * ["DequantizeLinear"]
    assert len({pair.name for pair in pairs}) == len({pair.input[1] for pair in pairs}) == maps


def test_the_answers_stay_close(graph, quantized):
    x = np.random.default_rng(0).random((2, 3, 64, 64)).astype(np.float32)
    expected = compute_logits(graph, x, "float")
    assert np.abs(compute_logits(quantized.model, x, "int8") - expected).max() < 0.1 * np.abs(expected).max()


def test_onnx_runtime_computes_them_in_integers(quantized, maps, tmp_path):
    kernels = count_kernels(place_for_integers(quantized.model, {}), tmp_path)
    assert sum(kernels[kind] for kind in INTEGER_KERNELS) >= maps
    assert kernels["MatMul"] + kernels["FusedMatMul"] == 2  # scores, and sums of values


def test_one_of_them_can_be_float_again(graph, quantized):
    first = list_joined(quantized.model)[0].name
    model = restore(quantized.model, quantized.source, [first])
    assert lint(model, quantized.trunk) == []
    producers = {name: node for node in model.graph.node for name in node.output}
    assert [producers[layer.input[0]].op_type for layer in list_joined(model)] == [
        "Concat",
        "DequantizeLinear",
        "DequantizeLinear",
    ]
    x = np.random.default_rng(0).random((2, 3, 64, 64)).astype(np.float32)
    expected = compute_logits(graph, x, "float")
    assert np.abs(compute_logits(model, x, "int8") - expected).max() < 0.1 * np.abs(expected).max()


# --- by hand --------------------------------------------------------------------------------------


def make_joined(
    *,
    layers: int = 2,
    scale: float = 0.03,
    zero_type: type = np.int8,
    also: str = "",
    shared: bool = False,
    step: float = 0.03,
    alone: bool = False,
    is_output: bool = False,
) -> onnx.ModelProto:
    """A class token from a slice that all layers share, joined with tokens of their own.

    Args:
        layers: number of linears, each with a Concat.
        scale: of the pairs on the tokens; that of the class token is 0.03.
        zero_type: type of their zero points.
        also: another reader: ``"slice"`` of the class token, ``"concat"`` of the first Concat.
        shared: whether another linear reads what the first one reads.
        step: the scale with which the class token is dequantized.
        alone: whether a linear reads the class token alone, as the queries of CvT's last block do.
        is_output: whether the class token is an output of the graph.
    """
    rng, make = np.random.default_rng(0), helper.make_node
    constants = {
        "s": np.float32(0.03),
        "sd": np.float32(step),
        "z": np.int8(0),
        "t": np.float32(scale),
        "tz": zero_type(0),
        "begin": np.array([0]),
        "end": np.array([1]),
        "axis": np.array([1]),
        "w": rng.integers(-63, 64, (CHANNELS, 6)).astype(np.int8),
        "ws": rng.uniform(1e-3, 2e-3, 6).astype(np.float32),
        "wz": np.zeros(6, np.int8),
    }
    nodes = [
        make("QuantizeLinear", ["x", "s", "z"], ["xq"], "XQ"),
        make("DequantizeLinear", ["xq", "sd", "z"], ["xd"], "XD"),
        make("Slice", ["xd", "begin", "end", "axis"], ["token"], "token"),
        make("Relu", ["x"], ["relu"], "relu"),
    ]
    ends = {}
    for i in range(layers):
        nodes += [
            make("QuantizeLinear", ["relu", "t", "tz"], [f"q{i}"], f"Q{i}"),
            make("DequantizeLinear", [f"q{i}", "t", "tz"], [f"d{i}"], f"D{i}"),
            make("Transpose", [f"d{i}"], [f"m{i}"], f"M{i}", perm=[0, 1, 2]),
            make("Concat", ["token", f"m{i}"], [f"c{i}"], f"C{i}", axis=1),
            make("DequantizeLinear", ["w", "ws", "wz"], [f"w{i}"], f"W{i}", axis=1),
            make("MatMul", [f"c{i}", f"w{i}"], [f"y{i}"], f"linear{i}"),
        ]
        ends[f"y{i}"] = [1, TOKENS + 1, 6]
    if shared:
        nodes.append(make("MatMul", ["c0", "w0"], ["again"], "again"))
        ends["again"] = [1, TOKENS + 1, 6]
    if also:
        nodes.append(make("Neg", [{"slice": "token", "concat": "c0"}[also]], ["other"], "other"))
        ends["other"] = [1, 1 if also == "slice" else TOKENS + 1, CHANNELS]
    if alone:
        nodes.append(make("MatMul", ["token", "w0"], ["query"], "query"))
        ends["query"] = [1, 1, 6]
    if is_output:
        ends["token"] = [1, 1, CHANNELS]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", 1, [1, TOKENS, CHANNELS])],
        [value(name, 1, shape) for name, shape in ends.items()],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def answers(model: onnx.ModelProto) -> list[np.ndarray]:
    """What ONNX's reference computes: ONNX Runtime rounds once more what a product reads from a Concat."""
    x = np.random.default_rng(1).normal(0, 1.2, (1, TOKENS, CHANNELS)).astype(np.float32)
    found: list[np.ndarray] = ReferenceEvaluator(model).run(None, {"x": x})
    return found


KINDS = [
    ({}, 2),
    ({"layers": 1}, 1),
    ({"layers": 3}, 3),
    ({"alone": True}, 3),
    ({"shared": True}, 3),
    ({"shared": True, "alone": True, "layers": 1}, 3),
    ({"scale": 0.04}, 0),
    ({"step": 0.04}, 0),
    ({"zero_type": np.uint8}, 0),
    ({"also": "slice"}, 0),
    ({"also": "concat"}, 0),
    ({"is_output": True}, 0),
]
"""Kind of graph, and how many of its layers get a pair behind their Concat. One that keeps its pairs also
keeps the shared class token rounded, so that the others keep theirs."""


@pytest.mark.parametrize(("kind", "moved"), KINDS, ids=str)
def test_a_pair_stands_behind_the_concat_and_changes_no_value(kind, moved):
    model = make_joined(**kind)
    result = rewrite_copy(model, move_pairs_to_layers)
    onnx.checker.check_model(result, full_check=True)
    for ours, before in zip(answers(result), answers(model), strict=True):
        np.testing.assert_array_equal(ours, before)
    producers = {name: node for node in result.graph.node for name in node.output}
    behind = [
        n for n in result.graph.node if n.op_type == "MatMul" and producers[n.input[0]].op_type != "Concat"
    ]
    assert len(behind) == moved
    quantizers = [n for n in result.graph.node if n.op_type == "QuantizeLinear"]
    pairs = moved - kind.get("shared", False)
    assert len(quantizers) == (pairs if moved else 1 + kind.get("layers", 2))
    assert len({n.input[1] for n in quantizers}) == (pairs if moved else 2)


def test_a_value_that_a_layer_reads_as_its_bias_stays_rounded():
    rng, make, value = np.random.default_rng(0), helper.make_node, helper.make_tensor_value_info
    constants = {
        "s": np.float32(0.03),
        "z": np.int8(0),
        "begin": np.array([0]),
        "end": np.array([1]),
        "w": rng.integers(-63, 64, (CHANNELS, CHANNELS)).astype(np.int8),
        "ws": np.full(CHANNELS, 0.01, np.float32),
        "wz": np.zeros(CHANNELS, np.int8),
    }
    nodes = [
        make("QuantizeLinear", ["x", "s", "z"], ["q"], "Q"),
        make("DequantizeLinear", ["q", "s", "z"], ["d"], "D"),
        make("Slice", ["d", "begin", "end", "begin"], ["token"], "token"),
        make("Transpose", ["d"], ["map"], "map", perm=[0, 1]),
        make("DequantizeLinear", ["w", "ws", "wz"], ["wd"], "W", axis=1),
        make("Concat", ["token", "map"], ["joined"], "join", axis=0),
        make("MatMul", ["joined", "wd"], ["y"], "linear"),
        make("Gemm", ["map", "wd", "token"], ["g"], "gemm"),
    ]
    ends = [value("y", 1, [TOKENS + 1, CHANNELS]), value("g", 1, [TOKENS, CHANNELS])]
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    graph = helper.make_graph(nodes, "g", [value("x", 1, [TOKENS, CHANNELS])], ends, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    result = rewrite_copy(model, move_pairs_to_layers)
    onnx.checker.check_model(result, full_check=True)
    x = rng.normal(0, 1.2, (TOKENS, CHANNELS)).astype(np.float32)
    both = [ReferenceEvaluator(graph).run(None, {"x": x}) for graph in (model, result)]
    for before, ours in zip(*both, strict=True):
        np.testing.assert_array_equal(ours, before)


def test_a_concat_of_a_concat_keeps_its_pairs():
    model = make_joined(layers=1)
    for node in model.graph.node:
        if node.name == "linear0":
            node.input[0] = "cc"
    model.graph.node.insert(8, helper.make_node("Concat", ["c0", "c0"], ["cc"], "CC", axis=1))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value *= 2
    before = model.SerializeToString(deterministic=True)
    assert rewrite_copy(model, move_pairs_to_layers).SerializeToString(deterministic=True) == before
