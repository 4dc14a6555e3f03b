"""Pairs and biases behind int8 layers, without which ONNX Runtime computes them in float32."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from cmt_edge.calib.integer_layers import measure_conv_ranges, place_for_integers
from cmt_edge.calib.restore import list_int8_nodes
from cmt_edge.calib.statistics import Batches, LocalStatistics
from cmt_edge.export.to_onnx import set_batch
from helpers.calibration import SPEC
from helpers.graphs import INTEGER_KERNELS, compute_logits, count_kernels


@pytest.fixture(scope="module")
def quantized(freed):
    """Calibrated for ONNX Runtime."""
    return freed


@pytest.fixture(scope="module")
def ranges(quantized, data):
    return measure_conv_ranges(quantized.model, LocalStatistics(Batches(data, SPEC, None)))


@pytest.fixture(scope="module")
def placed(quantized, ranges):
    return place_for_integers(quantized.model, ranges)


def test_onnx_runtime_computes_nearly_all_int8_layers_in_integers(quantized, placed, tmp_path):
    layers = len(list_int8_nodes(quantized.model)) - len(quantized.trunk)
    before, after = (count_kernels(graph, tmp_path) for graph in (quantized.model, placed))
    assert sum(before[kind] for kind in INTEGER_KERNELS) < 0.5 * layers  # linears without a bias
    assert sum(after[kind] for kind in INTEGER_KERNELS) >= 0.9 * layers
    assert after["QLinearConv"] > 0
    assert after["QGemm"] + after["MatMulIntegerToFloat"] > 0


def test_weights_of_layers_that_read_floats_are_converted_when_the_graph_is_opened(
    quantized, placed, tmp_path
):
    """And are int8 in the file."""
    assert len(quantized.trunk) == 5
    before, after = (len(graph.SerializeToString()) for graph in (quantized.model, placed))
    assert after < 1.1 * before
    count_kernels(placed, tmp_path)
    optimised = onnx.load(tmp_path / "optimised.onnx")
    constants = {tensor.name for tensor in optimised.graph.initializer}
    for node in optimised.graph.node:
        assert node.op_type not in ("DequantizeLinear", "Cast", "Mul") or not constants.issuperset(node.input)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_linear_that_reads_floats_gets_the_same_weights(axis):
    """ONNX Runtime rounds what a MatMul reads where its weights are dequantized along their columns."""
    model = make_half(axis)
    placed = place_for_integers(model, {})
    onnx.checker.check_model(placed, full_check=True)
    assert not any(node.op_type == "DequantizeLinear" for node in placed.graph.node)
    x = np.random.default_rng(0).standard_normal((3, 2, 4)).astype(np.float32)
    weights, scales = (numpy_helper.to_array(tensor) for tensor in model.graph.initializer[:2])
    expected = x @ (weights * (scales[:, None] if axis == 0 else scales))
    np.testing.assert_allclose(run(placed, x)[0], expected, rtol=1e-5, atol=1e-6)


def test_weights_of_a_linear_behind_joined_int8_values_stay_dequantized():
    """It reads int8, as one with a class token does, though no pair stands directly before it."""
    model = make_half(1)
    constants = {"p": np.float32(0.02), "pz": np.int8(0)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "p", "pz"], ["q"], "q"),
        *[helper.make_node("DequantizeLinear", ["q", "p", "pz"], [f"part{i}"], f"part{i}") for i in (0, 1)],
        helper.make_node("Concat", ["part0", "part1"], ["joined"], "join", axis=1),
    ]
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items())
    product = model.graph.node.pop()
    product.input[0] = "joined"
    model.graph.node.extend([*nodes, product])
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 4
    placed = place_for_integers(model, {})
    assert not any(node.op_type in ("Cast", "Mul") for node in placed.graph.node)


def make_half(axis: int) -> onnx.ModelProto:
    """A linear from 4 to 4 channels that reads floats; its int8 weights have scales along ``axis``."""
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.integers(-127, 128, (4, 4), np.int8),
        "s": rng.random(4, np.float32) / 100,
        "z": np.zeros(4, np.int8),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"], "d", axis=axis),
        helper.make_node("MatMul", ["x", "d"], ["y"], "linear"),
    ]
    graph = helper.make_graph(
        nodes,
        "half",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2, 4])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def test_a_graph_for_any_batch_size_has_the_same_kernels_and_answers(placed, tmp_path):
    kernels, answers = [], []
    x = np.random.default_rng(0).random((2, 3, 64, 64)).astype(np.float32)
    for size in (2, 0):
        model = set_batch(placed, size)
        kernels.append(count_kernels(model, tmp_path))
        answers.append(compute_logits(model, x, "test"))
    assert kernels[0] == kernels[1]
    assert kernels[1]["MatMulIntegerToFloat"] > 10
    np.testing.assert_array_equal(*answers)


def test_the_answers_stay_close(graph, quantized, placed):
    x = np.random.default_rng(0).random((4, 3, 64, 64)).astype(np.float32)
    exact, plain, ours = (compute_logits(g, x, "test") for g in (graph, quantized.model, placed))
    spread = exact.std(axis=1).mean()
    assert np.abs(ours - plain).mean() < 0.1 * spread
    assert np.abs(ours - exact).mean() < 1.5 * np.abs(plain - exact).mean() + 0.02 * spread


def test_the_given_graph_is_not_changed_and_onnx_accepts_the_result(quantized, ranges):
    before = quantized.model.SerializeToString(deterministic=True)
    onnx.checker.check_model(place_for_integers(quantized.model, ranges), full_check=True)
    assert quantized.model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("rows", [2, "rows"])
@pytest.mark.parametrize("batch", [3, "batch"])
def test_linears_of_tokens_are_computed_in_integers(batch, rows, tmp_path):
    """Their biases have as many dimensions as they: with a vector ONNX Runtime makes a Gemm in float32."""
    model = make_linears(batch=batch, rows=rows)
    placed = place_for_integers(model, {})
    onnx.checker.check_model(placed, full_check=True)
    products = [node for node in placed.graph.node if node.op_type == "MatMul"]
    assert [(node.name, [p.value for p in node.metadata_props]) for node in products] == [
        ("product0", ["m0"]),
        ("product1", ["m1"]),
    ]
    values = {i.name: numpy_helper.to_array(i) for i in placed.graph.initializer}
    assert [values[f"product{i}_bias_wide"].shape for i in (0, 1)] == [(1, 1, 3), (1, 1, 3)]
    kernels = count_kernels(placed, tmp_path)
    assert (kernels["MatMulIntegerToFloat"], kernels["MatMul"], kernels["Gemm"]) == (2, 0, 0)
    require_same_answers(model, placed)


@pytest.mark.parametrize("biases", [(0, 1), (0,), (1,), ()])
@pytest.mark.parametrize("batch", [3, "batch"])
def test_linears_that_share_a_pair_become_one_product(batch, biases, tmp_path):
    model = make_linears(pairs=1, batch=batch, biases=biases)
    placed = place_for_integers(model, {})
    onnx.checker.check_model(placed, full_check=True)
    kinds = Counter(node.op_type for node in placed.graph.node)
    assert (kinds["MatMul"], kinds["Add"], kinds["Split"]) == (1, bool(biases), 1)
    kernels = count_kernels(placed, tmp_path)
    assert (kernels["MatMulIntegerToFloat"], kernels["MatMul"], kernels["Gemm"]) == (1, 0, 0)
    require_same_answers(model, placed)


def test_linears_beside_another_reader_of_their_pair_stay_apart():
    model = make_linears(pairs=1)
    model.graph.node.append(helper.make_node("Relu", ["d0"], ["r"], "reader"))
    model.graph.output.append(helper.make_tensor_value_info("r", TensorProto.FLOAT, ["batch", 2, 4]))
    placed = place_for_integers(model, {})
    kinds = Counter(node.op_type for node in placed.graph.node)
    assert (kinds["Split"], kinds["MatMul"], kinds["Add"]) == (0, 2, 2)
    assert "product0_bias_steps" in {i.name for i in placed.graph.initializer}  # an integer, for a Gemm
    require_same_answers(model, placed)


@pytest.mark.parametrize("kind", ["rows", "no zero point"])
def test_linears_with_weights_of_another_form_stay_apart(kind):
    """Scales of the rows of a square matrix, and weights without a zero point."""
    model = make_linears(pairs=1)
    for tensor in model.graph.initializer:
        if tensor.name.startswith("w") and tensor.name[1:].isdigit():
            square = numpy_helper.to_array(tensor)[:3]
            tensor.CopyFrom(numpy_helper.from_array(square, tensor.name))
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 3
    for node in model.graph.node:
        if node.name.startswith("wd") and kind == "rows":
            node.attribute[0].i = 0
        elif node.name.startswith("wd"):
            del node.input[2:]
    if kind != "rows":
        del model.graph.initializer[[i.name for i in model.graph.initializer].index("wz")]
    placed = place_for_integers(model, {})
    assert not any(node.op_type == "Split" for node in placed.graph.node)
    x = np.random.default_rng(0).standard_normal((3, 2, 3)).astype(np.float32)
    evaluated = [ReferenceEvaluator(graph).run(None, {"x": x}) for graph in (model, placed)]
    for before, after in zip(*evaluated, strict=True):
        np.testing.assert_allclose(before, after, atol=1e-3)  # a bias may be rounded


def test_what_is_added_to_some_tokens_alone_is_no_bias():
    model = make_linears(pairs=1)
    for i in (0, 1):
        tensor = next(t for t in model.graph.initializer if t.name == f"b{i}")
        tokens = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
        tensor.CopyFrom(numpy_helper.from_array(tokens, tensor.name))
    placed = place_for_integers(model, {})
    kinds = Counter(node.op_type for node in placed.graph.node)
    assert (kinds["Split"], kinds["MatMul"], kinds["Add"]) == (1, 1, 2)
    require_same_answers(model, placed)


def require_same_answers(model: onnx.ModelProto, placed: onnx.ModelProto) -> None:
    """The answers of ``placed`` are those that ONNX's reference gives for ``model``, under the same names."""
    x = np.random.default_rng(0).standard_normal((3, 2, 4)).astype(np.float32)
    names = [value.name for value in model.graph.output]
    assert [value.name for value in placed.graph.output] == names
    expected = ReferenceEvaluator(model).run(names, {"x": x})
    for before, after in zip(expected, run(placed, x), strict=True):
        assert before.shape == after.shape
        np.testing.assert_allclose(before, after, atol=1e-5)


def run(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    """What ONNX Runtime gives for ``x``."""
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


def make_linears(
    pairs: int = 2,
    rows: int | str = 2,
    batch: int | str = "batch",
    biases: Collection[int] = (0, 1),
) -> onnx.ModelProto:
    """Two int8 linears from 4 to 3 channels, which read one pair, or a pair each.

    Two pairs have scales that differ, because ONNX Runtime would merge equal ones. ``biases`` says which
    linears have one.
    """
    rng = np.random.default_rng(0)
    constants = {"z": np.int8(0), "wz": np.zeros(3, np.int8)}
    nodes = []
    for i in range(pairs):
        constants[f"s{i}"] = np.float32(0.02 + 0.01 * i)
        nodes += [
            helper.make_node("QuantizeLinear", ["x", f"s{i}", "z"], [f"q{i}"], f"q{i}"),
            helper.make_node("DequantizeLinear", [f"q{i}", f"s{i}", "z"], [f"d{i}"], f"d{i}"),
        ]
    for i in range(2):
        constants |= {
            f"w{i}": rng.integers(-64, 64, (4, 3)).astype(np.int8),
            f"ws{i}": np.array([0.01, 0.02, 0.03], np.float32),
            f"b{i}": (np.arange(3) * 0.02 * np.array([0.01, 0.02, 0.03])).astype(np.float32),
        }
        nodes += [
            helper.make_node("DequantizeLinear", [f"w{i}", f"ws{i}", "wz"], [f"wd{i}"], f"wd{i}", axis=1),
            helper.make_node(
                "MatMul", [f"d{i % pairs}", f"wd{i}"], [f"m{i}" if i in biases else f"y{i}"], f"product{i}"
            ),
        ]
        nodes[-1].metadata_props.add(key="module", value=f"m{i}")
        if i in biases:
            summands = [f"b{i}", f"m{i}"][:: 1 if i else -1]
            nodes.append(helper.make_node("Add", summands, [f"y{i}"], f"addition{i}"))
        else:
            del constants[f"b{i}"]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, rows, 4])
    found = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [batch, rows, 3]) for i in range(2)]
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    graph = helper.make_graph(nodes, "g", [given], found, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_every_int8_conv_has_a_range_and_a_conv_without_one_stays(quantized, ranges):
    convs = {n for n in list_int8_nodes(quantized.model) if "conv" in n.lower()} - set(quantized.trunk)
    assert convs <= set(ranges)
    assert min(ranges.values()) > 0
    left_out = next(iter(ranges))
    some = place_for_integers(quantized.model, {k: v for k, v in ranges.items() if k != left_out})
    assert not any(node.name.startswith(f"{left_out}_result") for node in some.graph.node)
    assert any("_result_quantized" in node.name for node in some.graph.node)


def make_graph(
    bias: np.ndarray, tail: Callable[[list[onnx.NodeProto]], None] | None = None
) -> onnx.ModelProto:
    """``DQ -> MatMul -> Add`` with 2 channels; the step of the products is 0.5 * 0.25."""
    constants = {
        "s": np.float32(0.5),
        "z": np.int8(0),
        "w": np.array([[1, 2], [3, 4]], np.int8),
        "ws": np.full(2, 0.25, np.float32),
        "wz": np.zeros(2, np.int8),
        "b": bias,
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "d"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], "wd", axis=1),
        helper.make_node("MatMul", ["d", "wd"], ["m"], "product"),
        helper.make_node("Add", ["m", "b"], ["y"], "addition"),
    ]
    if tail:
        tail(nodes)
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])
    found = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    graph = helper.make_graph(nodes, "g", [given], [found], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def test_a_bias_becomes_the_nearest_integer_of_the_products_step():
    placed = place_for_integers(make_graph(np.array([1.0, -0.19], np.float32)), {})
    values = {i.name: numpy_helper.to_array(i) for i in placed.graph.initializer}
    assert values["product_bias_steps"].tolist() == [8, -2]
    assert values["product_bias_steps"].dtype == np.int32
    assert values["product_bias_scale"].tolist() == [0.125, 0.125]
    assert "b" not in values
    x = np.array([[1.0, 2.0]], np.float32)
    session = ort.InferenceSession(placed.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = x @ np.array([[0.25, 0.5], [0.75, 1.0]], np.float32) + [1.0, -0.25]
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, atol=1e-6)


@pytest.mark.parametrize("bias", [np.array([1e9, 0], np.float32), np.ones((1, 2), np.float32)])
def test_a_bias_that_int32_cannot_hold_or_that_is_no_vector_stays_float(bias):
    placed = place_for_integers(make_graph(bias), {})
    assert [node.op_type for node in placed.graph.node].count("DequantizeLinear") == 2
    assert "b" in {i.name for i in placed.graph.initializer}


def make_conv(reads: str) -> onnx.ModelProto:
    """A 1x1 conv in int8 whose result a quantizer or a ReLU reads."""
    constants = {
        "s": np.float32(0.5),
        "z": np.int8(0),
        "w": np.ones((1, 1, 1, 1), np.int8),
        "ws": np.ones(1, np.float32),
        "wz": np.zeros(1, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "d"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], "wd", axis=0),
        helper.make_node("Conv", ["d", "wd"], ["c"], "conv"),
    ]
    if reads == "QuantizeLinear":
        nodes += [
            helper.make_node("QuantizeLinear", ["c", "s", "z"], ["q2"], "q2"),
            helper.make_node("DequantizeLinear", ["q2", "s", "z"], ["y"], "d2"),
        ]
    else:
        nodes.append(helper.make_node(reads, ["c"], ["y"], "reader"))
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 1, 2, 2]) for n in "xy"]
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.mark.parametrize(("reads", "quantizers"), [("Relu", 2), ("QuantizeLinear", 2)])
def test_a_result_is_rounded_once(reads, quantizers):
    placed = place_for_integers(make_conv(reads), {"conv": 127.0})
    assert [node.op_type for node in placed.graph.node].count("QuantizeLinear") == quantizers


def test_a_conv_of_zeros_alone_stays_as_it_is():
    placed = place_for_integers(make_conv("Relu"), {"conv": 0.0})
    assert [node.op_type for node in placed.graph.node].count("QuantizeLinear") == 1
