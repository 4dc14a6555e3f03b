"""Int8 weights for processors without VNNI: no sum of two products leaves 16 bits, and no other changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

ov = pytest.importorskip("openvino")

from openvino import opset13 as ops  # noqa: E402

from cmt_edge.deploy.backends import openvino as backend  # noqa: E402
from cmt_edge.deploy.backends import openvino_graph, overflow  # noqa: E402
from cmt_edge.deploy.backends.openvino_constants import compute_constant, is_dequantized  # noqa: E402
from cmt_edge.deploy.backends.openvino_core import open_core  # noqa: E402
from cmt_edge.deploy.backends.openvino_pairs import find_factors, limit_pairs  # noqa: E402
from cmt_edge.deploy.measure.benchmark import benchmark  # noqa: E402
from cmt_edge.deploy.measure.parity import verify  # noqa: E402
from cmt_edge.deploy.measure.timing import Protocol  # noqa: E402

LARGEST_UNSIGNED = 255
INT16 = np.iinfo(np.int16)


def dequantize(values, scales: np.ndarray, zero: int = 0):
    """Int8 weights, or an int8 input, as OpenVINO reads a ``DequantizeLinear`` of them."""
    source = ops.constant(values) if isinstance(values, np.ndarray) else values
    shifted = ops.subtract(ops.convert(source, "f32"), ops.constant(np.float32(zero)))
    return ops.multiply(shifted, ops.constant(scales.astype(np.float32)))


def make_layer(kind: str, weights: np.ndarray, zero: int = 0, reads_int8: bool = True) -> ov.Model:
    """One layer with int8 weights whose scales differ by output channel, of int8 values or of floats."""
    axis = {"conv": 0, "depthwise": 0, "linear": 1, "turned": 0}[kind]
    shape = [1] * weights.ndim
    shape[axis] = -1
    scales = np.linspace(0.01, 0.02, weights.shape[axis]).reshape(shape)
    dequantized = dequantize(weights, scales, zero)
    sizes = {
        "conv": [1, *weights.shape[1:2], 5, 5],
        "depthwise": [1, weights.shape[0], 5, 5],
        "linear": [3, weights.shape[0]],
        "turned": [3, *weights.shape[1:2]],
    }[kind]
    source = ops.parameter(sizes, np.int8 if reads_int8 else np.float32)
    values = dequantize(source, np.float32(0.1)) if reads_int8 else source
    if kind == "conv":
        layer = ops.convolution(values, dequantized, [1, 1], [0, 0], [0, 0], [1, 1])
    elif kind == "depthwise":
        layer = ops.group_convolution(values, dequantized, [1, 1], [0, 0], [0, 0], [1, 1])
    else:
        layer = ops.matmul(values, dequantized, False, kind == "turned")
    return ov.Model([layer], [source])


def read_weights(model: ov.Model) -> tuple[np.ndarray, np.ndarray]:
    """The integers of the only layer, and its weights as floats."""
    layer = model.get_results()[0].input_value(0).get_node()
    weights = layer.input_value(1)
    node = weights.get_node()
    while node.get_type_name() != "Constant":
        node = node.input_value(0).get_node()
    return np.array(node.data), compute_constant(weights)


def draw(*shape: int) -> np.ndarray:
    """Weights of which many neighbours exceed the limit."""
    return np.random.default_rng(0).integers(-127, 128, shape).astype(np.int8)


@pytest.mark.parametrize(
    ("kind", "shape", "axes"),
    [
        ("conv", (8, 6, 3, 3), (0, 1)),
        ("conv", (8, 7, 1, 1), (0, 1)),
        ("linear", (10, 8), (1, 0)),
        ("turned", (8, 10), (0, 1)),
    ],
)
def test_no_sum_leaves_16_bits(kind, shape, axes):
    model = make_layer(kind, draw(*shape))
    _, before = read_weights(model)
    assert limit_pairs(model) == 1
    integers, after = read_weights(model)
    columns = np.moveaxis(integers, axes, (0, 1)).astype(int)
    count = columns.shape[1] // 2 * 2
    sums = LARGEST_UNSIGNED * (columns[:, :count:2] + columns[:, 1:count:2])
    assert INT16.min <= sums.min()
    assert sums.max() <= INT16.max
    assert integers.dtype == np.int8
    assert np.abs(after - before).max() <= 0.02  # the step of a channel that was doubled, halved by rounding
    assert limit_pairs(model) == 0
    assert is_dequantized(model.get_results()[0].input_value(0).get_node().input_value(1))


@pytest.mark.parametrize(("kind", "shape"), [("conv", (8, 6, 1, 1)), ("linear", (6, 8))])
def test_weights_whose_sums_fit_stay_as_they_are(kind, shape):
    weights = np.clip(draw(*shape), -64, 64)
    model = make_layer(kind, weights)
    assert limit_pairs(model) == 0
    np.testing.assert_array_equal(read_weights(model)[0], weights)


@pytest.mark.parametrize(("kind", "shape"), [("conv", (8, 6, 1, 1)), ("linear", (6, 8))])
def test_layers_that_read_floats_stay_as_they_are(kind, shape):
    model = make_layer(kind, draw(*shape), reads_int8=False)
    assert limit_pairs(model) == 0
    np.testing.assert_array_equal(read_weights(model)[0], draw(*shape))


def test_only_channels_that_exceed_it_get_another_scale():
    weights = np.array([[127, 1, -127, -1], [127, 2, 0, 0], [-64, -65, 0, 0], [127, -127, 3, 0]], np.int8)
    factors = find_factors(weights, 0, 1)
    np.testing.assert_allclose(factors, np.array([[1], [129 / 127], [129 / 127], [1]]))


def test_depthwise_convs_stay_as_they_are():
    weights = np.full((4, 1, 1, 3, 3), 127, np.int8)
    assert limit_pairs(make_layer("depthwise", weights)) == 0


def test_products_of_two_activations_stay():
    sides = [ops.parameter([4, 4], np.int8) for _ in range(2)]
    product = ops.matmul(*(dequantize(side, np.float32(0.1)) for side in sides), False, False)
    assert limit_pairs(ov.Model([product], sides)) == 0


def test_shifts_of_weights_with_three_dimensions_are_taken_back_in_each_product():
    weights = np.stack([np.full((4, 3), 120, np.int8), np.full((4, 3), -100, np.int8)])
    source = ops.parameter([2, 2, 4], np.float32)
    ends = [ops.constant(np.float32(end)) for end in (-12.8, 12.7)]
    integers = ops.fake_quantize(
        ops.add(source, ops.constant(np.float32(-5))),
        *ends,
        *(ops.constant(np.float32(end)) for end in (-128, 127)),
        256,
    )
    values = dequantize(ops.convert(integers, "i8"), np.float32(0.1))
    product = ops.matmul(values, dequantize(weights, np.full((1, 1, 3), 0.01)), False, False)
    model = ov.Model([product], [source])
    openvino_graph.limit_shifted(model)
    found = open_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(
        [np.zeros((2, 2, 4), np.float32)]
    )[0]
    expected = np.full((2, 2, 4), -5.0) @ (0.01 * weights)
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_weights_with_a_zero_point_stay_as_they_are():
    assert limit_pairs(make_layer("conv", draw(4, 4, 1, 1), zero=3)) == 0


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, False),
        ({"OV_CPU_MAX_ISA": "AVX2"}, True),
        ({"OV_CPU_MAX_ISA": "avx512_core", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, True),
        ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, True),
        ({"DNNL_MAX_CPU_ISA": "AVX2"}, True),
        ({"ONEDNN_MAX_CPU_ISA": "no such set"}, False),
        ({"OV_CPU_MAX_ISA": "AVX2_VNNI"}, False),
        ({"OV_CPU_MAX_ISA": "AVX512_CORE_BF16"}, False),
    ],
)
def test_a_limit_of_openvino_counts_as_the_processor_would(monkeypatch, values, expected):
    for name in overflow.LIMITS:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(overflow, "can_overflow", lambda: False)
    monkeypatch.setattr(overflow, "read_flags", lambda: frozenset({"avx512_vnni", "avx_vnni"}))
    monkeypatch.setattr(overflow.platform, "machine", lambda: "x86_64")
    assert overflow.saturates_in_openvino() is expected


@pytest.mark.parametrize(("device", "limits"), [("CPU", True), ("GPU", False)])
def test_a_graph_is_changed_for_such_a_processor_alone(monkeypatch, int8_bundle, device, limits):
    changed = []
    monkeypatch.setattr(openvino_graph, "saturates_in_openvino", lambda: True)
    monkeypatch.setattr(openvino_graph, "limit_pairs", changed.append)
    openvino_graph.read(int8_bundle.file("model.onnx"), device=device)
    assert bool(changed) is limits


@pytest.mark.parametrize("fits", [True, False])
def test_verification_and_measurement_say_what_was_rounded(monkeypatch, int8_bundle, fits):
    calibration = replace(int8_bundle.manifest.calibration, fits_16_bits=fits or None)
    bundle = replace(int8_bundle, manifest=replace(int8_bundle.manifest, calibration=calibration))
    for module in (backend, openvino_graph):
        monkeypatch.setattr(module, "saturates_in_openvino", lambda: True)
        monkeypatch.setattr(module, "multiplies_matrices_slowly", lambda: False)
    expected = () if fits else (overflow.SATURATION_NOTE,)
    result = verify(bundle, threads=1)
    assert result.passed
    assert result.notes == expected
    protocol = Protocol(3, 0.01, warmup_iters=1, warmup_seconds=0.01)
    (row,) = benchmark([bundle], threads=1, protocol=protocol, with_throughput=False).results
    assert [note for note in row.warnings if note == overflow.SATURATION_NOTE] == list(expected)


def test_nothing_is_rounded_in_an_exported_bundle(int8_bundle):
    assert int8_bundle.manifest.fits_16_bits
    assert limit_pairs(ov.Core().read_model(int8_bundle.file("model.onnx"))) == 0
