"""What is measured on images, in parts: any division gives the same bytes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from cmt_edge.calib import DEFAULT
from cmt_edge.calib.by_nncf import RangeQuantizer, run_nncf
from cmt_edge.calib.sampling import Layer
from cmt_edge.calib.shard_worker import pack_measured, unpack_measured
from cmt_edge.calib.statistics import Batches, LocalStatistics, Measured, Meter, Request, merge
from helpers.calibration import SPEC

COUNT = 9
"""Images of the small graph."""


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    """A conv and a depthwise conv."""
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(shape).astype(np.float32) for shape in ((5, 3, 3, 3), (5, 1, 3, 3))]
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["a"], "first", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["a", "w1"], ["y"], "second", pads=[1, 1, 1, 1], group=5),
    ]
    graph = helper.make_graph(
        nodes,
        "two",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5, 8, 8])],
        [numpy_helper.from_array(weight, f"w{i}") for i, weight in enumerate(weights)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture(scope="module")
def batches() -> list[np.ndarray]:
    return list(np.random.default_rng(1).standard_normal((COUNT, 1, 3, 8, 8)).astype(np.float32))


@pytest.fixture(scope="module")
def request_(model) -> Request:
    pads = (1, 1, 1, 1)
    layers = (
        Layer("first", "x", (3, 3), pads=pads),
        Layer("second", "a", (3, 3), pads=pads, depthwise=True),
    )
    return Request(model, ("a",), ("x", "y"), (0, 1, 2, 4, 5, 7), layers, (1, 4, 8), wanted=60)


@pytest.fixture(scope="module")
def serial(request_, batches) -> Measured:
    return LocalStatistics(batches).measure(request_)


def flatten(found: Measured) -> dict[str, bytes]:
    extremes = {
        f"{name} {i}": side.tobytes() for name, pair in found.extremes.items() for i, side in enumerate(pair)
    }
    return extremes | {name: rows.tobytes() for name, rows in found.rows.items()}


def list_strides(found: Measured) -> dict[str, tuple[int, ...]]:
    """The order in memory, on which the last bits of sums depend."""
    return {name: rows.strides for name, rows in found.rows.items()}


@settings(max_examples=40, deadline=None)
@given(cuts=st.sets(st.integers(1, COUNT - 1)), order=st.randoms(use_true_random=False))
def test_any_division_gives_the_same_bytes(request_, batches, serial, cuts, order):
    """Parts are measured in any order, each by a graph of its own or by one that measured another part."""
    edges = [0, *sorted(cuts), COUNT]
    parts = [range(start, end) for start, end in itertools.pairwise(edges)]
    shuffled = order.sample(parts, len(parts))
    meters = [Meter(request_, threads=1), Meter(request_)]
    found = {}
    for part in shuffled:
        meter = order.choice(meters)
        measured = meter.measure(list(part), [batches[i] for i in part])
        found[part.start] = unpack_measured(pack_measured(measured))
    merged = merge([found[start] for start in sorted(found)])
    assert flatten(merged) == flatten(serial)
    assert list_strides(merged) == list_strides(serial)


def test_only_the_images_that_were_asked_for_count(request_, batches, serial):
    low, high = serial.extremes["a"]
    assert low.shape == high.shape == (6, 5)
    assert serial.extremes["x"][0].shape == (6, 1)
    np.testing.assert_array_equal(
        serial.extremes["x"][1][:, 0], [batches[i].max() for i in request_.observed]
    )
    changed = [batch * 2 if i in (3, 6) else batch for i, batch in enumerate(batches)]
    assert flatten(LocalStatistics(changed).measure(request_)) == flatten(serial)
    louder = [batch * 2 if i == 8 else batch for i, batch in enumerate(batches)]
    assert flatten(LocalStatistics(louder).measure(request_)) != flatten(serial)


def test_nothing_merges_to_nothing():
    assert merge([]) == merge([Measured(), Measured()]) == Measured()


def test_nncf_makes_the_same_of_ranges_as_of_images(graph, data):
    """The ranges that it is handed are those that it would have found."""
    images = list(Batches(data, SPEC, None))[:3]
    recipe = replace(DEFAULT, range_estimator="minmax", bias_correction=False)
    quantizer = RangeQuantizer(graph, recipe)
    request = Request(graph, whole=quantizer.tensors, observed=(0, 1, 2))
    ours = quantizer.quantize(LocalStatistics(images).measure(request).extremes)
    theirs = run_nncf(graph, images, range(3), recipe)
    assert len(quantizer.tensors) > 20
    assert [n.SerializeToString() for n in ours.graph.node] == [
        n.SerializeToString() for n in theirs.graph.node
    ]
    found, expected = (
        {t.name: numpy_helper.to_array(t) for t in m.graph.initializer} for m in (ours, theirs)
    )
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6)
