"""Int8 linears that read floats, where int8 products of matrices are slow: the weights' answers, unrounded
otherwise, and only there."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

ov = pytest.importorskip("openvino")

from cmt_edge.deploy.backends import openvino as backend  # noqa: E402
from cmt_edge.deploy.backends import openvino_graph, overflow  # noqa: E402
from cmt_edge.deploy.backends.openvino_core import open_core  # noqa: E402
from cmt_edge.deploy.backends.openvino_layers import iterate_int8  # noqa: E402
from cmt_edge.deploy.backends.openvino_linears import read_floats  # noqa: E402
from cmt_edge.deploy.measure.parity import verify  # noqa: E402
from helpers.bundles import make_bundle  # noqa: E402

h = onnx.helper
INPUTS, OUTPUTS = 24, 16


def make_pair(name: str, scale: float) -> list[onnx.NodeProto]:
    """The Q/DQ pair of an activation; its scale is ``s``."""
    return [
        h.make_node("QuantizeLinear", [name, "s", "zero"], [f"{name}_q"]),
        h.make_node("DequantizeLinear", [f"{name}_q", "s", "zero"], [f"{name}_dq"]),
    ]


def make_graph(
    *,
    shape: tuple[int, ...] = (2, 5, INPUTS),
    shift: np.ndarray | None = None,
    bias: bool = True,
    product: str = "linear",
    shared: bool = False,
) -> tuple[bytes, np.ndarray, np.ndarray]:
    """``x -> (+ shift) -> Q -> DQ -> MatMul -> (+ b) -> y``, the weights as floats, and the bias less what
    the shift adds.

    ``product`` is ``"linear"``, ``"gemm"`` (transposed weights), ``"float"`` (weights without a pair),
    ``"stored"`` (only the weights are int8) or ``"activations"``, where the other side is an input with a
    pair of its own. ``shared``: another operation
    reads the pair, too.
    """
    rng = np.random.default_rng(0)
    is_turned = product == "gemm"
    size = (OUTPUTS, INPUTS) if is_turned else (INPUTS, OUTPUTS)
    weights = rng.integers(-127, 128, size).astype(np.int8)
    scales = rng.uniform(0.004, 0.04, OUTPUTS).astype(np.float32)
    floats = weights * (scales[:, None] if is_turned else scales)
    added = rng.standard_normal(OUTPUTS).astype(np.float32)
    constants: dict[str, Any] = {"s": np.float32(0.05), "zero": np.int8(0), "b": added}
    nodes, source = [], "x"
    if shift is not None:
        constants["shift"], source = shift.astype(np.float32), "moved"
        nodes.append(h.make_node("Add", ["x", "shift"], ["moved"]))
    nodes += make_pair(source, 0.05)
    inputs, read = {"x": shape}, source if product == "stored" else f"{source}_dq"
    if product == "activations":
        inputs["w"] = (INPUTS, OUTPUTS)
        nodes += make_pair("w", 0.05)
    elif product == "float":
        constants["w_dq"] = floats
    else:
        constants |= {"w": weights, "ws": scales, "wz": np.zeros(OUTPUTS, np.int8)}
        axis = 0 if is_turned else 1
        nodes.append(h.make_node("DequantizeLinear", ["w", "ws", "wz"], ["w_dq"], axis=axis))
    if is_turned:
        nodes.append(h.make_node("Gemm", [read, "w_dq", *(["b"] if bias else [])], ["y"], transB=1))
    else:
        nodes.append(h.make_node("MatMul", [read, "w_dq"], ["p" if bias else "y"]))
        nodes += [h.make_node("Add", ["p", "b"], ["y"])] if bias else []
    ends = ["y", "z"] if shared else ["y"]
    nodes += [h.make_node("Abs", [f"{source}_dq"], ["z"])] if shared else []
    kind = onnx.TensorProto.FLOAT
    graph = h.make_graph(
        nodes,
        "g",
        [h.make_tensor_value_info(name, kind, size) for name, size in inputs.items()],
        [h.make_tensor_value_info(name, kind, [None] * len(shape)) for name in ends],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString(), (floats.T if is_turned else floats), added if bias else 0 * added


def list_kinds(model: ov.Model) -> list[str]:
    return [node.get_type_name() for node in model.get_ordered_ops()]


def answer(model: ov.Model, *inputs: np.ndarray) -> list[np.ndarray]:
    outputs = open_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(list(inputs))
    return [outputs[i] for i in range(len(outputs))]


@settings(max_examples=25, deadline=None)
@given(
    shape=st.sampled_from([(1, INPUTS), (7, INPUTS), (2, 5, INPUTS), (1, 3, 4, INPUTS)]),
    shift=st.none() | st.floats(-3, 3),
    bias=st.booleans(),
    product=st.sampled_from(["linear", "gemm"]),
)
def test_a_linear_computes_with_what_was_not_rounded(shape, shift, bias, product):
    shape = shape[-2:] if product == "gemm" and len(shape) > 2 else shape
    moved = None if shift is None else np.array(shift)
    content, weights, added = make_graph(shape=shape, shift=moved, bias=bias, product=product)
    model = ov.Core().read_model(content)
    assert read_floats(model) == 1
    assert "FakeQuantize" not in list_kinds(model)
    assert model.output(0).get_names() == {"y"}
    # beyond the range of the quantizer, too: 127 * 0.05 = 6.35
    x = np.random.default_rng(1).uniform(-9, 9, shape).astype(np.float32)
    expected = (x.astype(np.float64) + (shift or 0)) @ weights + added
    (found,) = answer(model, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_a_shift_of_more_than_one_number_is_still_added():
    content, weights, added = make_graph(shift=np.linspace(-1, 1, INPUTS))
    model = ov.Core().read_model(content)
    assert read_floats(model) == 1
    x = np.random.default_rng(1).uniform(-9, 9, (2, 5, INPUTS)).astype(np.float32)
    expected = (x + np.linspace(-1, 1, INPUTS)) @ weights + added
    np.testing.assert_allclose(answer(model, x)[0], expected, rtol=1e-4, atol=1e-3)


def test_what_else_reads_the_pair_keeps_it():
    content, weights, added = make_graph(shared=True)
    model = ov.Core().read_model(content)
    assert read_floats(model) == 1
    assert list_kinds(model).count("FakeQuantize") == 1
    x = np.random.default_rng(1).uniform(-6, 6, (2, 5, INPUTS)).astype(np.float32)
    linear, other = answer(model, x)
    np.testing.assert_allclose(linear, x @ weights + added, rtol=1e-4, atol=1e-3)
    rounded = np.abs(np.rint(x / np.float32(0.05)) * np.float32(0.05))
    assert np.abs(other - rounded).max() < 1e-5


def test_weights_of_three_dimensions_have_a_shift_of_their_own_each():
    content, weights, _ = make_graph(shape=(2, 5, INPUTS), shift=np.array(1.5), bias=False)
    model = onnx.load_from_string(content)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    twice = np.stack([numpy_helper.to_array(stored["w"]), -numpy_helper.to_array(stored["w"])])
    stored["w"].CopyFrom(numpy_helper.from_array(twice, "w"))
    (dequantizer,) = (node for node in model.graph.node if node.output[0] == "w_dq")
    dequantizer.attribute[0].i = 2
    read = ov.Core().read_model(model.SerializeToString())
    assert read_floats(read) == 1
    x = np.random.default_rng(1).uniform(-9, 9, (2, 5, INPUTS)).astype(np.float32)
    expected = (x + 1.5) @ np.stack([weights, -weights])
    np.testing.assert_allclose(answer(read, x)[0], expected, rtol=1e-4, atol=1e-3)


def change_scale(model: onnx.ModelProto) -> None:
    """The values are twice what was rounded."""
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.1), "other"))
    next(n for n in model.graph.node if n.output[0] == "x_dq").input[1] = "other"


def cut_negatives(model: onnx.ModelProto) -> None:
    """The quantizer is a ReLU, too."""
    (zero,) = (tensor for tensor in model.graph.initializer if tensor.name == "zero")
    zero.CopyFrom(numpy_helper.from_array(np.int8(-128), "zero"))


def add_to_integers(model: onnx.ModelProto) -> None:
    """The integers are read with another zero point than they were made with."""
    model.graph.initializer.append(numpy_helper.from_array(np.int8(10), "other"))
    next(n for n in model.graph.node if n.output[0] == "x_dq").input[2] = "other"


@pytest.mark.parametrize("change", [change_scale, cut_negatives, add_to_integers])
def test_pairs_that_do_more_than_round_stay(change):
    """Other tools may write such graphs."""
    model = onnx.load_from_string(make_graph()[0])
    change(model)
    read = ov.Core().read_model(model.SerializeToString())
    assert read_floats(read) == 0
    assert "FakeQuantize" in list_kinds(read)


def test_all_readers_of_the_weights_read_floats():
    content, weights, added = make_graph()
    model = onnx.load_from_string(content)
    model.graph.initializer.append(numpy_helper.from_array(np.array([2, 0], np.int64), "rows"))
    model.graph.node.append(h.make_node("Gather", ["w_dq", "rows"], ["gathered"]))
    model.graph.output.append(h.make_tensor_value_info("gathered", onnx.TensorProto.FLOAT, None))
    read = ov.Core().read_model(model.SerializeToString())
    assert read_floats(read) == 1
    x = np.random.default_rng(1).uniform(-9, 9, (2, 5, INPUTS)).astype(np.float32)
    linear, gathered = answer(read, x)
    np.testing.assert_allclose(linear, x @ weights + added, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(gathered, weights[[2, 0]], rtol=1e-6)


@pytest.mark.parametrize("product", ["float", "activations", "stored"])
def test_other_products_are_left_alone(product):
    model = ov.Core().read_model(make_graph(product=product)[0])
    before = list_kinds(model)
    assert read_floats(model) == 0
    assert list_kinds(model) == before


def test_weights_that_two_linears_share_are_made_once():
    content, weights, _ = make_graph(bias=False)
    model = onnx.load_from_string(content)
    model.graph.node.append(h.make_node("MatMul", ["x_dq", "w_dq"], ["again"]))
    model.graph.output.append(h.make_tensor_value_info("again", onnx.TensorProto.FLOAT, None))
    read = ov.Core().read_model(model.SerializeToString())
    assert read_floats(read) == 2
    large = [n for n in read.get_ordered_ops() if n.get_type_name() == "Constant" and n.data.size > OUTPUTS]
    assert [n.data.dtype for n in large] == [np.float32]
    x = np.random.default_rng(1).uniform(-9, 9, (2, 5, INPUTS)).astype(np.float32)
    for found in answer(read, x):
        np.testing.assert_allclose(found, x @ weights, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("saturates", "slow", "device", "keep", "expected"),
    [
        (True, True, "CPU", False, True),
        (True, True, "CPU", True, False),
        (True, True, "GPU", False, False),
        (True, False, "CPU", False, False),
        (False, False, "CPU", False, False),
    ],
    ids=["AVX2", "AVX2, for another machine", "a GPU beside it", "AVX-512", "VNNI"],
)
def test_a_graph_is_changed_for_such_a_processor_alone(
    monkeypatch, int8_bundle, saturates, slow, device, keep, expected
):
    monkeypatch.setattr(openvino_graph, "saturates_in_openvino", lambda: saturates)
    monkeypatch.setattr(openvino_graph, "multiplies_matrices_slowly", lambda: slow)
    model = openvino_graph.read(int8_bundle.file("model.onnx"), device=device, keep_linears=keep)
    assert (not list(iterate_int8(model, ("MatMul",)))) is expected


@pytest.mark.parametrize(("slow", "expected"), [(True, (overflow.LINEARS_NOTE,)), (False, ())])
def test_verification_says_that_linears_ran_in_float32(monkeypatch, int8_bundle, slow, expected):
    for module in (backend, openvino_graph):
        monkeypatch.setattr(module, "saturates_in_openvino", lambda: slow)
        monkeypatch.setattr(module, "multiplies_matrices_slowly", lambda: slow)
    result = verify(int8_bundle, threads=1)
    assert result.passed
    assert result.notes == expected


def test_float_bundles_are_not_spoken_of(monkeypatch, tmp_path):
    monkeypatch.setattr(backend, "multiplies_matrices_slowly", lambda: True)
    session = backend.RUNTIME.load(make_bundle(tmp_path / "tiny"), backend.LoadOptions(threads=1))
    assert list(session.notes) == []


@pytest.mark.parametrize(("product", "expected"), [("linear", "int8"), ("stored", "fp32"), ("float", "fp32")])
def test_a_profile_says_what_a_linear_multiplies(product, expected):
    """OpenVINO calls a linear int8 that has int8 weights and multiplies floats."""
    model = ov.Core().read_model(make_graph(shape=(1, 64, INPUTS), product=product)[0])
    config = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    compiled = open_core().compile_model(model, "CPU", config)
    session = backend.OpenVINOSession(compiled, lambda: model, "CPU", config)
    nodes = session.profile(np.zeros((1, 64, INPUTS), np.float32), 1).nodes
    assert [node.precision for node in nodes if node.kind == "FullyConnected"] == [expected]


RUN = """
import json, sys
from cmt_edge.deploy.backends.base import LoadOptions
from cmt_edge.deploy.backends.openvino import RUNTIME
from cmt_edge.deploy.bundle import Bundle
from cmt_edge.deploy.preprocessing import normalise

bundle = Bundle.open(sys.argv[1])
batch = normalise(bundle.golden().pixels[:1], bundle.preprocess)
nodes = RUNTIME.load(bundle, LoadOptions(threads=1)).profile(batch, 1).nodes
print(json.dumps([[node.kind, node.precision] for node in nodes]))
"""
"""Prints kind and precision of everything that runs of a bundle."""


@pytest.mark.skipif(platform.machine() not in overflow.X86, reason="limits are those of x86")
@pytest.mark.parametrize("limit", ["AVX2", None])
def test_openvino_runs_linears_in_float32_under_such_a_limit(int8_bundle, limit):
    """In a process of its own, since OpenVINO reads the limit when it starts."""
    limits = dict.fromkeys(overflow.LIMITS, limit) if limit else {}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(int8_bundle.path)],
        env={**os.environ, **limits},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    ran = json.loads(done.stdout)
    linears = {precision for kind, precision in ran if kind == "FullyConnected"}
    assert "int8" in {precision for kind, precision in ran if kind == "Convolution"}
    is_slow = limit is not None or overflow.multiplies_matrices_slowly()
    assert ("int8" in linears) is not is_slow
    assert linears
