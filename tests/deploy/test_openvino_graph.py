"""Signed inputs of int8 convs made unsigned for OpenVINO: the same answers, and only where the algebra
holds."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

ov = pytest.importorskip("openvino")

from openvino import opset13  # noqa: E402

from cmt_edge.deploy.backends.openvino_constants import compute_constant  # noqa: E402
from cmt_edge.deploy.backends.openvino_core import open_core  # noqa: E402
from cmt_edge.deploy.backends.openvino_graph import (  # noqa: E402
    limit_shifted,
    make_unsigned,
    read,
    take_in_shifts,
)

h = onnx.helper
SIZE = 6


def pair(name: str, scale: np.ndarray | float, axis: int | None = None):
    """A signed Q/DQ pair of the activation ``name``, or the ``DequantizeLinear`` of weights (with an
    axis)."""
    constants = {
        f"{name}_scale": np.asarray(scale, np.float32),
        f"{name}_zero": np.zeros_like(scale, np.int8),
    }
    if axis is not None:
        return constants, [h.make_node("DequantizeLinear", [name, *constants], [f"{name}_dq"], axis=axis)]
    nodes = [
        h.make_node("QuantizeLinear", [name, *constants], [f"{name}_q"], f"{name}_q"),
        h.make_node("DequantizeLinear", [f"{name}_q", *constants], [f"{name}_dq"], f"{name}_dq"),
    ]
    return constants, nodes


def graph(
    *,
    kernel: int = 1,
    stride: int = 1,
    pad: int = 0,
    groups: int = 1,
    bias: bool = True,
    shared: bool = False,
    channels: int = 4,
    scale: float = 0.02,
    batch: int | str = "batch",
    auto_pad: str = "NOTSET",
    weights: bool = True,
    largest: int = 63,
    shift: np.ndarray | None = None,
) -> bytes:
    """``x -> Q -> DQ -> Conv -> y``; ``shared``: another operation reads the pair too; ``weights``: those are
    int8, up to ``largest`` (with more than 63 OpenVINO saturates without VNNI); ``shift``: is added before
    the pair."""
    rng = np.random.default_rng(0)
    shape = (3 * groups, channels // groups, kernel, kernel)
    activation, nodes = pair("x", scale)
    scales, dequantized = pair("w", rng.uniform(0.004, 0.04, shape[0]).astype(np.float32), 0)
    constants = activation | {"w": rng.integers(-largest, largest + 1, shape).astype(np.int8)} | scales
    if not weights:
        constants, dequantized = activation | {"w_dq": rng.standard_normal(shape).astype(np.float32)}, []
    inputs = ["x_dq", "w_dq"]
    if bias:
        constants["b"] = rng.standard_normal(shape[0]).astype(np.float32)
        inputs.append("b")
    padding = {"auto_pad": auto_pad} if auto_pad != "NOTSET" else {"pads": [pad] * 4}
    if shift is not None:
        constants["shift"] = shift.astype(np.float32)
        nodes[0].input[0] = "moved"
        nodes.insert(0, h.make_node("Add", ["x", "shift"], ["moved"], "x_shift"))
    conv = h.make_node("Conv", inputs, ["y"], "conv", strides=[stride] * 2, group=groups, **padding)
    outputs = ["y", "z"] if shared else ["y"]
    nodes += [*dequantized, conv, *([h.make_node("Abs", ["x_dq"], ["z"])] if shared else [])]
    ends = [h.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [batch, None, None, None]) for n in outputs]
    source = [h.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [batch, channels, SIZE, SIZE])]
    model = h.make_model(
        h.make_graph(nodes, "g", source, ends, [numpy_helper.from_array(v, k) for k, v in constants.items()]),
        opset_imports=[h.make_opsetid("", 20)],
        ir_version=10,
    )
    onnx.checker.check_model(model)
    return model.SerializeToString()


def answers(model: ov.Model, x: np.ndarray) -> list[np.ndarray]:
    outputs = open_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([x])
    return [outputs[i] for i in range(len(outputs))]


def lows(model: ov.Model) -> list[float]:
    """The lowest value that each quantizer leaves."""
    quantizers = [o for o in model.get_ordered_ops() if o.get_type_name() == "FakeQuantize"]
    return [float(o.input_value(3).get_node().data) for o in quantizers]


def read_unsigned(content: bytes) -> ov.Model:
    return make_unsigned(ov.Core().read_model(content))


def images(channels: int = 4, batch: int = 2, scale: float = 0.02) -> np.ndarray:
    """Values beyond the range of the quantizer, too, and none where rounding could go either way."""
    rng = np.random.default_rng(1)
    shape = (batch, channels, SIZE, SIZE)
    return (scale * (rng.integers(-160, 161, shape) + rng.uniform(-0.4, 0.4, shape))).astype(np.float32)


@settings(max_examples=25, deadline=None)
@given(
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    bias=st.booleans(),
    channels=st.integers(1, 40),
    scale=st.floats(1e-3, 1.0),
)
def test_convs_without_padding_answer_the_same(kernel, stride, bias, channels, scale):
    content = graph(kernel=kernel, stride=stride, bias=bias, channels=channels, scale=scale)
    model, x = read_unsigned(content), images(channels, scale=scale)
    assert lows(model) == [0.0]
    assert model.output(0).get_names() == {"y"}
    expected = ReferenceEvaluator(content).run(None, {"x": x})
    for ours, theirs in zip(answers(model, x), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * max(1.0, np.abs(theirs).max()))


@pytest.mark.parametrize(
    "case",
    [
        {"kernel": 3, "pad": 1},
        {"kernel": 3, "auto_pad": "SAME_UPPER"},
        {"groups": 2},
        {"shared": True},
        {"weights": False},
    ],
    ids=["padded", "automatic padding", "groups", "read by others too", "float weights"],
)
def test_others_are_left_alone(case):
    content = graph(**case)
    model, x = read_unsigned(content), images()
    assert all(low < 0 for low in lows(model))
    for ours, theirs in zip(answers(model, x), ReferenceEvaluator(content).run(None, {"x": x}), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changed", [{"x_zero": -128}, {"x_zero": 10}, {"other_scale": 0.04}, {"other_zero": 10}]
)
def test_pairs_of_other_tools_keep_what_they_do(changed):
    """Zero points, and integers that are read otherwise than they were made."""
    model = onnx.load_from_string(graph())
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    (reader,) = (node for node in model.graph.node if node.output[0] == "x_dq")
    for name, value in changed.items():
        kind, place = (np.float32, 1) if name.endswith("scale") else (np.int8, 2)
        tensor = numpy_helper.from_array(np.asarray(value, kind), name)
        if name in stored:
            stored[name].CopyFrom(tensor)
        else:
            model.graph.initializer.append(tensor)
            reader.input[place] = name
    content, x = model.SerializeToString(), images()
    found = answers(read_unsigned(content), x)
    for ours, theirs in zip(found, ReferenceEvaluator(content).run(None, {"x": x}), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def list_kinds(model: ov.Model) -> list[str]:
    return [node.get_type_name() for node in model.get_ordered_ops()]


@pytest.mark.parametrize(
    "case", [{}, {"kernel": 3, "pad": 1}, {"weights": False}], ids=["plain", "padded", "float"]
)
def test_a_shift_becomes_part_of_the_rounding(case):
    content = graph(shift=np.array(-70 * 0.02), **case)
    x = images() + np.float32(70 * 0.02)
    model = make_unsigned(take_in_shifts(ov.Core().read_model(content)))
    before = list_kinds(make_unsigned(ov.Core().read_model(content)))
    assert before.count("Add") == list_kinds(model).count("Add") + 1
    expected = ReferenceEvaluator(content).run(None, {"x": x})
    for ours, theirs in zip(answers(model, x), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_biases_of_shifted_layers_follow_weights_that_are_rounded_otherwise():
    """Zeros stay exact, whatever the weights are."""
    content = graph(shift=np.array(-100 * 0.02), channels=40, largest=127)
    zeros = np.zeros((2, 40, SIZE, SIZE), np.float32)
    model = ov.Core().read_model(content)
    before = compute_weights(model)
    limit_shifted(model)
    assert np.abs(compute_weights(model) - before).max() > 0, "nothing was rounded"
    (expected,) = ReferenceEvaluator(content).run(None, {"x": zeros})
    np.testing.assert_allclose(answers(model, zeros)[0], expected, atol=1e-3)
    take_in_shifts(model)
    np.testing.assert_allclose(answers(make_unsigned(model), zeros)[0], expected, atol=1e-3)


def compute_weights(model: ov.Model) -> np.ndarray:
    (conv,) = (node for node in model.get_ordered_ops() if node.get_type_name() == "Convolution")
    return compute_constant(conv.input_value(1))


@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 1, 1, 1)])
def test_additions_of_more_than_one_number_stay(shape):
    model = take_in_shifts(ov.Core().read_model(graph(shift=np.full(shape, -0.5), bias=False)))
    assert list_kinds(model).count("Add") == 1


def test_a_graph_without_quantizers_is_left_alone():
    source = h.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 4])
    end = h.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 4])
    model = h.make_model(
        h.make_graph([h.make_node("Abs", ["x"], ["y"])], "g", [source], [end]), ir_version=10
    )
    assert [o.get_type_name() for o in read_unsigned(model.SerializeToString()).get_ordered_ops()] == [
        "Parameter",
        "Abs",
        "Result",
    ]


def test_the_conv_still_runs_as_int8_with_one_operation():
    compiled = open_core().compile_model(
        read_unsigned(graph(batch=2, channels=32)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    found = {
        str(o.get_rt_info()["layerType"].astype(str)): o.get_rt_info()
        for o in compiled.get_runtime_model().get_ops()
    }
    assert str(found["Convolution"]["runtimePrecision"].astype(str)) in ("u8", "i8")
    assert not {"Add", "Eltwise", "FullyConnected"} & set(found), "the correction belongs into the bias"


def test_a_file_is_rewritten_when_it_is_read(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(graph(shift=np.array(-0.5), bias=False))
    assert lows(read(path)) == [0.0]
    assert list_kinds(read(path)).count("Add") == 1  # the correction of the conv
    x = images()
    np.testing.assert_allclose(
        answers(read(path), x)[0], answers(ov.Core().read_model(path), x)[0], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("operation", ["Negative", "Abs"])
def test_constants_are_computed_with_any_operation(operation):
    """What is not known here is left to the runtime."""
    values = np.array([[-2.0, 3.0]], np.float32)
    constant = opset13.constant(values)
    found = compute_constant(getattr(opset13, operation.lower())(constant).output(0))
    assert np.array_equal(found, -values if operation == "Negative" else np.abs(values))
