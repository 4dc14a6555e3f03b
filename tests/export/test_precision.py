"""Typed graphs: what becomes float16, what stays float32 and why, and that the result computes the same."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from cmt_edge.deploy.errors import StepError
from cmt_edge.deploy.tensorrt.parser_rules import find_parser_problems
from cmt_edge.export.to_onnx import run_graph
from cmt_edge.export.typed import FP16_MAX, LIMIT, MAX_SCORE, observe, round_graph, type_graph

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


def graph(nodes, constants=(), width: int = 4, output: str = "logits", out_width: int | None = None):
    """``input (batch, width) -> logits`` with named nodes; ``nodes`` are ``(op, inputs, output,
    attributes)``."""
    made = [
        helper.make_node(op, ins, [out], f"node_{out}", **attributes) for op, ins, out, attributes in nodes
    ]
    initializers = [
        numpy_helper.from_array(np.asarray(value), name) for name, value in dict(constants).items()
    ]
    source = helper.make_tensor_value_info("input", FLOAT, ["batch", width])
    target = helper.make_tensor_value_info(output, FLOAT, ["batch", out_width or width])
    model = helper.make_model(
        helper.make_graph(made, "g", [source], [target], initializers),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=9,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def f32(*values) -> np.ndarray:
    return np.array(values, np.float32)


def run(model, batch) -> np.ndarray:
    return run_graph(model, "test")(batch)[0]


def convert(model, batch):
    return type_graph(model, "fp16", observe(model, [batch]))


def islands(result) -> dict[str, str]:
    return {i.node: i.reason for i in result.islands}


BATCH = np.array([[1.0, 2.0, 3.0, 4.0], [-1.0, 0.5, 2.0, -8.0]], np.float32)
SIMPLE = [
    ("Mul", ["input", "two"], "a", {}),
    ("Add", ["a", "input"], "b", {}),
    ("Identity", ["b"], "logits", {}),
]


def test_observed_ranges_are_the_largest_magnitudes():
    model = graph(SIMPLE, {"two": f32(-2.0)})
    seen = observe(model, [BATCH[:1], BATCH[1:]])
    assert seen == {"input": 8.0, "a": 16.0, "b": 8.0, "logits": 8.0}


def test_everything_becomes_float16_between_float32_ends():
    model = graph(SIMPLE, {"two": f32(2.0)})
    before = model.SerializeToString()
    result = convert(model, BATCH)
    assert result.operations == {"fp16": 2}
    assert not result.islands
    assert {
        v.type.tensor_type.elem_type for v in (*result.model.graph.input, *result.model.graph.output)
    } == {FLOAT}
    assert {i.data_type for i in result.model.graph.initializer} == {HALF}
    np.testing.assert_allclose(run(result.model, BATCH), run(model, BATCH), rtol=1e-3)
    assert model.SerializeToString() == before, "the original is not touched"


def test_fp32_is_a_copy():
    model = graph(SIMPLE, {"two": f32(2.0)})
    result = type_graph(model, "fp32", {})
    assert result.model.SerializeToString() == model.SerializeToString()
    assert result.model is not model
    assert result.operations == {"fp32": 2}


CASES = {
    "a value that overflows": (
        [("Mul", ["input", "k"], "big", {}), ("Mul", ["big", "k2"], "logits", {})],
        {"k": f32(1e4), "k2": f32(1e-4)},
        4,
        {"node_big": "values leave float16", "node_logits": "values leave float16"},
    ),
    "a constant that overflows": (
        [("Div", ["input", "k"], "logits", {})],
        {"k": f32(1e6)},
        4,
        {"node_logits": "a constant leaves float16"},
    ),
    "an epsilon that becomes 0": (
        [("Add", ["input", "eps"], "a", {}), ("Identity", ["a"], "logits", {})],
        {"eps": f32(1e-12)},
        4,
        {"node_a": "a constant leaves float16"},
    ),
    "squares inside a norm": (
        [("Mul", ["input", "k"], "a", {}), ("LayerNormalization", ["a", "w"], "logits", {"axis": -1})],
        {"k": f32(50.0), "w": np.ones(4, np.float32)},
        4,
        {"node_logits": "squares of its input leave float16"},
    ),
    "a long sum": (
        [("Mul", ["input", "k"], "a", {}), ("ReduceMean", ["a", "axes"], "logits", {"keepdims": 1})],
        {"k": f32(2000.0), "axes": np.array([1], np.int64)},
        1,
        {"node_logits": "its sum leaves float16"},
    ),
    "large logits": (
        [("MatMul", ["input", "w"], "logits", {})],
        {"w": np.eye(4, dtype=np.float32) * 9},
        4,
        {"node_logits": "logits too large for float16's steps"},
    ),
    "large logits with a bias": (
        [("MatMul", ["input", "w"], "product", {}), ("Add", ["product", "bias"], "logits", {})],
        {"w": np.eye(4, dtype=np.float32) * 9, "bias": np.ones(4, np.float32)},
        4,
        {
            "node_product": "logits too large for float16's steps",
            "node_logits": "logits too large for float16's steps",
        },
    ),
    "squares of a norm over channels": (
        [
            ("Mul", ["input", "k"], "a", {}),
            ("ReduceL2", ["a", "axes"], "b", {"keepdims": 1}),
            ("Mul", ["b", "small"], "logits", {}),
        ],
        {"k": f32(20.0), "axes": np.array([1], np.int64), "small": f32(1e-3)},
        1,
        {"node_b": "its sum leaves float16"},
    ),
    "small vectors": (
        [("Mul", ["input", "k"], "logits", {})],
        {"k": f32(1e-9, 2e-9, 1e-9, 0)},
        4,
        {"node_logits": "a constant leaves float16"},
    ),
    "sharp scores": (
        [
            ("MatMul", ["input", "w"], "product", {}),
            ("Add", ["product", "bias"], "scores", {}),
            ("Softmax", ["scores"], "p", {"axis": -1}),
            ("MatMul", ["p", "w2"], "logits", {}),
        ],
        {
            "w": np.eye(4, dtype=np.float32) * 9,
            "bias": np.ones(4, np.float32),
            "w2": np.eye(4, dtype=np.float32),
        },
        4,
        {
            "node_product": "makes the scores of a float32 Softmax",
            "node_scores": "makes the scores of a float32 Softmax",
            "node_p": "scores too large for float16's steps",
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_float32_islands(case):
    nodes, constants, width, expected = CASES[case]
    model = graph(nodes, constants, out_width=width)
    result = convert(model, BATCH)
    assert islands(result) == expected
    assert find_parser_problems(result.model) == []
    ours = run(round_graph(result.model), BATCH)
    assert np.isfinite(ours).all()
    np.testing.assert_allclose(ours, run(model, BATCH), rtol=4e-3, atol=4e-3)


def test_the_observation_that_decided_is_recorded():
    nodes, constants, *_ = CASES["large logits"]
    (island,) = convert(graph(nodes, constants), BATCH).islands
    assert (island.op, island.observed) == ("MatMul", 72.0)


@pytest.mark.parametrize(("scale", "count"), [(0.999, 0), (1.001, 1)])
def test_the_margin_for_unseen_images(scale, count):
    """Values up to a quarter of float16's range stay float16."""
    model = graph(
        [("Identity", ["input"], "x", {}), ("Relu", ["x"], "y", {}), ("Mul", ["y", "small"], "logits", {})],
        {"small": f32(1e-4)},
    )
    batch = np.full((1, 4), LIMIT * scale, np.float32)
    assert sum(i.op == "Relu" for i in convert(model, batch).islands) == count
    assert LIMIT * 4 == FP16_MAX


@pytest.mark.parametrize(("score", "count"), [(MAX_SCORE - 0.1, 0), (MAX_SCORE + 0.1, 1)])
def test_softmax_by_its_scores(score, count):
    model = graph([("Softmax", ["input"], "logits", {"axis": -1})])
    result = convert(model, np.array([[score, 0, 0, 0]], np.float32))
    assert len(result.islands) == count


def test_rounding_shows_an_overflow_that_onnxruntime_hides():
    """Without its islands the graph overflows in real float16; ONNX Runtime's CPU kernels do not notice."""
    nodes, constants, *_ = CASES["a value that overflows"]
    model = graph(nodes, constants)
    blind = type_graph(model, "fp16", {}).model
    batch = BATCH[:1] * 10
    assert np.isfinite(run(blind, batch)).all()
    assert not np.isfinite(run(round_graph(blind), batch)).any()


def test_rounding_is_exactly_float16():
    model = graph([("Mul", ["input", "third"], "logits", {})], {"third": f32(1 / 3)})
    blind = type_graph(model, "fp16", {}).model
    expected = (BATCH.astype(np.float16).astype(np.float32) * np.float32(np.float16(1 / 3))).astype(
        np.float16
    )
    np.testing.assert_array_equal(run(round_graph(blind), BATCH), expected.astype(np.float32))


def test_a_constant_read_by_both_precisions_exists_twice():
    model = graph(
        [
            ("Mul", ["input", "k"], "a", {}),
            ("Mul", ["a", "big"], "b", {}),
            ("Mul", ["b", "k"], "c", {}),
            ("Mul", ["c", "small"], "logits", {}),
        ],
        {"k": f32(2.0), "big": f32(1e5), "small": f32(1e-5)},
    )
    result = convert(model, BATCH)
    assert {i.name: i.data_type for i in result.model.graph.initializer if i.name.startswith("k")} == {
        "k": FLOAT,
        "k_half": HALF,
    }
    assert find_parser_problems(result.model) == []


def test_what_is_made_from_nothing_stays_float32():
    nodes = [
        ("ConstantOfShape", ["shape"], "ones", {"value": helper.make_tensor("v", FLOAT, [1], [1.0])}),
        ("Add", ["input", "ones"], "logits", {}),
    ]
    model = graph(nodes, {"shape": np.array([4], np.int64)})
    np.testing.assert_allclose(run(convert(model, BATCH).model, BATCH), BATCH + 1)


def test_an_output_that_others_read_too():
    model = graph([("Relu", ["input"], "logits", {}), ("Neg", ["logits"], "unused", {})])
    np.testing.assert_allclose(run(convert(model, BATCH).model, BATCH), np.maximum(BATCH, 0))


def test_constant_operations_and_shapes_are_kept():
    model = graph(
        [
            ("Reshape", ["input", "shape"], "r", {}),
            ("Mul", ["r", "k"], "m", {}),
            ("Reshape", ["m", "back"], "logits", {}),
        ],
        {"shape": np.array([-1, 2, 2], np.int64), "back": np.array([-1, 4], np.int64), "k": f32(2.0)},
    )
    constant = helper.make_node("Constant", [], ["k"], "node_k", value=model.graph.initializer[2])
    del model.graph.initializer[2]
    model.graph.node.insert(0, constant)
    result = convert(model, BATCH)
    assert {i.name: i.data_type for i in result.model.graph.initializer} == {
        "shape": TensorProto.INT64,
        "back": TensorProto.INT64,
        "k_half": HALF,
    }
    np.testing.assert_allclose(run(result.model, BATCH), BATCH * 2)


# --- Q/DQ -----------------------------------------------------------------------------------------


def quantized(weight_scale=(0.01, 0.003, 1e-6), activation_scale=0.05):
    """``Q -> DQ -> MatMul(DQ(int8 weights)) -> logits`` with one scale a channel."""
    rng = np.random.default_rng(0)
    weights = rng.integers(-127, 128, (4, len(weight_scale))).astype(np.int8)
    nodes = [
        ("Mul", ["input", "half"], "x", {}),
        ("QuantizeLinear", ["x", "s", "z"], "q", {}),
        ("DequantizeLinear", ["q", "s", "z"], "dq", {}),
        ("DequantizeLinear", ["w", "ws", "wz"], "dw", {"axis": 1}),
        ("MatMul", ["dq", "dw"], "logits", {}),
    ]
    constants = {
        "half": f32(0.5),
        "s": np.float32(activation_scale),
        "z": np.int8(0),
        "w": weights,
        "ws": np.array(weight_scale, np.float32),
        "wz": np.zeros(len(weight_scale), np.int8),
    }
    return graph(nodes, constants, out_width=len(weight_scale))


def test_scales_take_the_type_of_the_float_side():
    result = convert(quantized(), BATCH)
    kinds = {i.name: i.data_type for i in result.model.graph.initializer}
    assert kinds == {
        "half_half": HALF,
        "s_half": HALF,
        "z": TensorProto.INT8,
        "w": TensorProto.INT8,
        "ws_half": HALF,
        "wz": TensorProto.INT8,
    }
    assert result.operations == {"int8": 1, "fp16": 1}
    assert find_parser_problems(result.model) == []
    assert not [
        n
        for n in result.model.graph.node
        if n.op_type == "Cast" and n.name not in ("cast_input_half", "cast_logits")
    ]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-7, 10.0), min_size=3, max_size=3), st.floats(1e-3, 1.0))
def test_scales_are_positive_and_weights_follow_them(weight_scale, activation_scale):
    """Rounding a scale to float16 changes no dequantized weight by more than half a step."""
    model = quantized(weight_scale, activation_scale)
    result = type_graph(model, "fp16", {"x": 1.0})
    before = {i.name: numpy_helper.to_array(i).astype(np.float64) for i in model.graph.initializer}
    after = {i.name: numpy_helper.to_array(i).astype(np.float64) for i in result.model.graph.initializer}
    scale = next(v for k, v in after.items() if k.startswith("ws"))
    assert (scale > 0).all()
    exact, ours = before["w"] * before["ws"], after["w"] * scale
    clipped = np.abs(exact) > 127 * scale
    assert (np.abs(exact - ours) <= 0.5 * scale * (1 + 1e-9) + clipped * np.abs(exact) * 2**-10).all()
    assert find_parser_problems(result.model) == []


def test_the_first_quantization_reads_the_input_without_a_conversion():
    nodes = [
        ("QuantizeLinear", ["input", "s", "z"], "q", {}),
        ("DequantizeLinear", ["q", "s", "z"], "dq", {}),
        ("Relu", ["dq"], "logits", {}),
    ]
    result = convert(graph(nodes, {"s": np.float32(0.1), "z": np.int8(0)}), BATCH)
    assert [n.op_type for n in result.model.graph.node] == [
        "QuantizeLinear",
        "DequantizeLinear",
        "Relu",
        "Cast",
    ]
    assert {i.name for i in result.model.graph.initializer} == {"s", "s_half", "z"}


def test_a_broken_graph_is_a_typed_error():
    model = graph(SIMPLE, {"two": f32(2.0)})
    model.graph.node[0].op_type = "Fancy"
    with pytest.raises(StepError, match="write the precision"):
        type_graph(model, "fp16", {"input": 1.0})
