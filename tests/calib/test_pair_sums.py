"""Int8 weights for x86 without VNNI: no sum of two products leaves 16 bits, in no runtime's order."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from cmt_edge.calib.graph import open_view, write_model
from cmt_edge.calib.integer_layers import measure_conv_ranges, place_for_integers
from cmt_edge.calib.pair_sums import limit_sums, list_partners
from cmt_edge.calib.places import find_places
from cmt_edge.calib.rounding import round_columns
from cmt_edge.calib.statistics import Batches, LocalStatistics
from helpers.calibration import SPEC
from helpers.graphs import compute_logits

LIMIT = 128
SIZE = 6
STEP = 16  # of what a layer gives
KINDS = ("conv 1", "conv 3", "conv 3 in 2 groups", "linear", "gemm", "turned gemm")


def make_layer(kind: str, inputs: int, *, one_scale: bool = False) -> onnx.ModelProto:
    """``x -> Q -> DQ -> layer -> (Q -> DQ) -> y`` with 8 outputs and weights of which many sums exceed the
    limit."""
    rng = np.random.default_rng(0)
    signs = rng.choice([-1, 1], (8, 1))  # of one output all alike, so that sums are large
    size = int(kind.split()[1]) if "conv" in kind else 0
    groups = 8 if "depthwise" in kind else 2 if "groups" in kind else 1
    values = signs * rng.integers(60, 128, (8, inputs * max(1, size**2)))
    stored = values.reshape(8, inputs, size, size) if size else values
    stored = stored if size or kind == "turned gemm" else values.T
    scales = np.float32(1 / 64) if one_scale else np.full(8, 1 / 64, np.float32)
    constants = {
        "s": np.float32(1 / 8),
        "z": np.int8(0),
        "w": stored.astype(np.int8),
        "ws": scales,
        "wz": np.zeros(scales.shape, np.int8),
        "rs": np.float32(STEP),
    }
    axis = 0 if size or kind == "turned gemm" else 1
    settings = {} if one_scale else {"axis": axis}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], **settings),
    ]
    operator = "Conv" if size else "MatMul" if kind == "linear" else "Gemm"
    options = {"group": groups} if size else {"transB": 1} if kind == "turned gemm" else {}
    nodes.append(helper.make_node(operator, ["d", "wd"], ["c"], "layer", **options))
    nodes += [
        helper.make_node("QuantizeLinear", ["c", "rs", "z"], ["rq"]),
        helper.make_node("DequantizeLinear", ["rq", "rs", "z"], ["y"]),
    ]
    shape = [1, groups * inputs, SIZE, SIZE] if size else [5, inputs]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    found = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * len(shape))
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    graph = helper.make_graph(nodes, "layer", [given], [found], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def limit(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    with open_view(model) as view:
        changed = limit_sums(view.graph)
        return write_model(view), changed


def read_weights(model: onnx.ModelProto, kind: str) -> np.ndarray:
    """The integers of the layer, ``(outputs, products in the order of ONNX Runtime's sum)``."""
    (dequantizer,) = (node for node in model.graph.node if node.output[0] == "wd")
    values = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}[dequantizer.input[0]]
    if "conv" in kind:
        return values.transpose(0, 2, 3, 1).reshape(8, -1)
    return values if kind == "turned gemm" else values.T


def find_largest_sum(products: np.ndarray) -> int:
    count = products.shape[1] // 2 * 2
    pairs = products[:, :count].astype(np.int64).reshape(len(products), -1, 2)
    return int(np.abs(pairs.sum(axis=2)).max(initial=0))


def answer(model: onnx.ModelProto, x: np.ndarray, level: ort.GraphOptimizationLevel) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("one_scale", [False, True])
@pytest.mark.parametrize("inputs", [6, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_no_sum_leaves_16_bits_and_integers_are_exact(kind, inputs, one_scale):
    model = make_layer(kind, inputs, one_scale=one_scale)
    assert find_largest_sum(read_weights(model, kind)) > LIMIT
    limited, changed = limit(model)
    assert changed == 1
    products = read_weights(limited, kind)
    assert find_largest_sum(products) <= LIMIT
    assert find_largest_sum(products.reshape(-1, inputs)) <= LIMIT  # OpenVINO's pairs stay within a place
    onnx.checker.check_model(limited, full_check=True)
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    x = np.where(np.random.default_rng(1).random(shape) < 0.8, 127 / 8, -1).astype(np.float32)
    levels = ort.GraphOptimizationLevel
    exact = answer(limited, x, levels.ORT_DISABLE_ALL)  # in float32
    np.testing.assert_allclose(
        answer(limited, x, levels.ORT_ENABLE_ALL), exact, atol=16
    )  # a step of rounding
    np.testing.assert_allclose(exact, answer(model, x, levels.ORT_DISABLE_ALL), rtol=0.05, atol=STEP)


def test_weights_that_fit_stay_as_they_are():
    limited, _ = limit(make_layer("conv 3", 7))
    again, changed = limit(limited)
    assert changed == 0
    assert again.SerializeToString(deterministic=True) == limited.SerializeToString(deterministic=True)


@pytest.mark.parametrize("one_scale", [False, True])
@pytest.mark.parametrize("kind", ["conv 3 depthwise", "conv 5 depthwise", "conv 2 depthwise"])
def test_depthwise_convs_need_no_limit(kind, one_scale):
    model = make_layer(kind, 1, one_scale=one_scale)
    assert find_largest_sum(read_weights(model, kind)) > LIMIT
    assert limit(model)[1] == 0
    x = np.full([d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim], 127 / 8, np.float32)
    levels = ort.GraphOptimizationLevel
    fast, exact = (answer(model, x, level) for level in (levels.ORT_ENABLE_ALL, levels.ORT_DISABLE_ALL))
    np.testing.assert_allclose(fast, exact, atol=16)  # a step of rounding


@pytest.mark.parametrize(("taps", "inputs"), [(9, 6), (9, 7), (1, 5), (4, 3)])
def test_columns_are_rounded_within_the_limit(taps, inputs):
    rng = np.random.default_rng(0)
    weights = rng.choice([-1, 1], (20, 1)) * rng.uniform(20, 75, (20, taps * inputs))
    rows = rng.standard_normal((300, 4)) @ rng.standard_normal((4, taps * inputs))
    order = np.arange(taps * inputs).reshape(inputs, taps).T.reshape(-1)
    partners = list_partners(taps, inputs)
    moments = (rows.T @ rows)[None]
    free = round_columns(weights[None], moments)[0]
    ours = round_columns(weights[None], moments, partners)[0]
    assert find_largest_sum(free[:, order]) > LIMIT
    assert find_largest_sum(ours[:, order]) <= LIMIT
    assert find_largest_sum(ours[:, order].reshape(-1, inputs)) <= LIMIT
    cut = round_columns(weights[None], np.eye(len(order))[None], partners)[0]
    errors = [np.square(rows @ (rounded - weights).T).mean() for rounded in (ours, cut)]
    assert errors[0] < 0.5 * errors[1]  # the columns behind make up for it


def test_the_calibrated_graph_keeps_the_limit(quantized, fitting):
    largest = []
    for made in (quantized, fitting):
        with open_view(made.source) as original, open_view(made.model) as view:
            places = [p for p in find_places(view.graph, original.graph) if not p.layer.depthwise]
        assert len(places) > 20
        with open_view(made.model) as view:
            largest.append(limit_sums(view.graph))
    assert largest[0] > 20
    assert largest[1] == 0  # nothing is rounded twice


def test_the_limit_costs_little_in_calibration_and_more_behind_it(graph, data, quantized, fitting):
    images = np.concatenate(list(data.batches(SPEC)))
    truth = compute_logits(graph, images, "test")

    def deviate(model: onnx.ModelProto) -> float:
        ranges = measure_conv_ranges(model, LocalStatistics(Batches(data, SPEC, None)))
        logits = compute_logits(place_for_integers(model, ranges), images, "test")
        return float(np.abs(logits - truth).mean() / truth.std(axis=1).mean())

    behind, within = deviate(limit(quantized.model)[0]), deviate(fitting.model)
    print(f"deviations: limited behind calibration {behind:.4f}, within {within:.4f}")
    assert within < behind
