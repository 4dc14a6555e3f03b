"""Equalization: the same answers, ranges that one scale fits, and int8 answers that come closer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from cmt_edge.calib import DEFAULT, quantize
from cmt_edge.calib.equalize import Equalized, equalize, find_sites
from cmt_edge.calib.generated import generate
from cmt_edge.calib.graph import read_model
from cmt_edge.calib.recipe import find_inner_depthwise
from cmt_edge.calib.running import measure_extremes
from cmt_edge.calib.statistics import LocalStatistics
from cmt_edge.deploy.errors import StepError
from cmt_edge.deploy.preprocessing import preprocess
from helpers.calibration import SPEC
from helpers.graphs import compute_logits

SIZE = 6


def chain(
    rng, *, channels=5, hidden=4, padding=1, affine=True, depthwise=True, project_padding=0
) -> onnx.ModelProto:
    """1x1 conv, GELU, batch norm as scale and shift, 3x3 conv, GELU, 1x1 conv; channels of very different
    sizes."""
    wide = channels if depthwise else hidden
    values = {
        "w1": rng.standard_normal((channels, 3, 1, 1)) * 10.0 ** rng.uniform(-2, 1, (channels, 1, 1, 1)),
        "b1": rng.standard_normal(channels),
        "s": rng.uniform(0.2, 3, (1, channels, 1, 1)),
        "t": rng.standard_normal((1, channels, 1, 1)),
        "w2": rng.standard_normal((wide, 1 if depthwise else channels, 3, 3)),
        "b2": rng.standard_normal(wide),
        "w3": rng.standard_normal((2, wide, 1, 1)),
        "b3": rng.standard_normal(2),
    }
    pads = [padding] * 4
    nodes = [
        helper.make_node("Conv", ["input", "w1", "b1"], ["x"], "expand"),
        helper.make_node("Gelu", ["x"], ["g"], "gelu"),
    ]
    if affine:
        nodes += [
            helper.make_node("Mul", ["g", "s"], ["m"], "scale"),
            helper.make_node("Add", ["m", "t"], ["a"], "shift"),
        ]
    nodes += [
        helper.make_node(
            "Conv",
            ["a" if affine else "g", "w2", "b2"],
            ["y"],
            "middle",
            pads=pads,
            group=channels if depthwise else 1,
        ),
        helper.make_node("Gelu", ["y"], ["h"], "gelu2"),
        helper.make_node("Conv", ["h", "w3", "b3"], ["logits"], "project", pads=[project_padding] * 4),
    ]
    io = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", c, None, None])
        for n, c in (("input", 3), ("logits", 2))
    ]
    used = {i for n in nodes for i in n.input}
    constants = [numpy_helper.from_array(v.astype(np.float32), k) for k, v in values.items() if k in used]
    model = helper.make_model(
        helper.make_graph(nodes, "g", io[:1], io[1:], constants), opset_imports=[helper.make_opsetid("", 20)]
    )
    model.ir_version = 10
    onnx.checker.check_model(model, full_check=True)
    return model


def images(rng, count):
    return [rng.standard_normal((1, 3, SIZE, SIZE)).astype(np.float32) for _ in range(count)]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    channels=st.integers(1, 9),
    padding=st.integers(0, 1),
    affine=st.booleans(),
    depthwise=st.booleans(),
    project_padding=st.integers(0, 1),
)
def test_the_answers_are_the_same(seed, channels, padding, affine, depthwise, project_padding):
    rng = np.random.default_rng(seed)
    model = chain(
        rng,
        channels=channels,
        padding=padding,
        affine=affine,
        depthwise=depthwise,
        project_padding=project_padding,
    )
    before = model.SerializeToString(deterministic=True)
    equal = equalize(model, LocalStatistics(images(rng, 3))).model
    assert model.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(equal, full_check=True)
    for batch in images(rng, 3):  # other ones
        ours, expected = compute_logits(equal, batch, "equalized"), compute_logits(model, batch, "given")
        assert np.abs(ours - expected).max() <= 2e-5 * max(1, np.abs(expected).max())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), affine=st.booleans())
def test_telling_batches_alone_have_the_same_ranges(seed, affine):
    rng = np.random.default_rng(seed)
    model, batches = (
        chain(rng, affine=affine),
        [b * np.float32(s) for b, s in zip(images(rng, 9), rng.uniform(0.1, 3, 9), strict=True)],
    )
    read = [n.input[0] for n in model.graph.node if n.op_type == "Conv"]
    equalized = equalize(model, LocalStatistics(batches), read)
    assert 0 < len(equalized.telling) <= 3
    tensors = [n.input[0] for n in equalized.model.graph.node if n.op_type == "Conv"]
    largest = []
    for chosen in (batches, [batches[i] for i in equalized.telling]):
        found = measure_extremes(equalized.model, [], tensors, chosen)
        largest.append([max(-low.min(), high.max()) for low, high in found.values()])
    np.testing.assert_allclose(largest[1], largest[0], rtol=1e-5)


def test_a_graph_that_cannot_run_is_a_typed_error():
    model = chain(np.random.default_rng(0))
    with pytest.raises(StepError, match="ONNX Runtime") as error:
        equalize(model, LocalStatistics([np.zeros((1, 4, SIZE, SIZE), np.float32)]))
    assert "export fp32" in error.value.remedy
    model.graph.node[1].op_type = "NoSuchOperation"
    with pytest.raises(StepError, match="ONNX Runtime"):
        equalize(model, LocalStatistics(images(np.random.default_rng(0), 1)))


def test_ranges_become_more_equal():
    rng = np.random.default_rng(0)
    model, batches = chain(rng), images(rng, 5)
    equal = equalize(model, LocalStatistics(batches)).model
    for read_by in ("middle", "project"):
        spread = []
        for graph_ in (model, equal):
            tensor = next(n.input[0] for n in graph_.graph.node if n.name == read_by)
            low, high = measure_extremes(graph_, [tensor], [], batches)[tensor]
            spread.append(np.maximum(-low.min(0), high.max(0)))
        assert spread[1].max() / spread[1].min() < 0.8 * spread[0].max() / spread[0].min()


@pytest.mark.parametrize("why", ["two readers", "shared weight", "is an output"])
def test_what_others_read_too_is_left_alone(why):
    rng = np.random.default_rng(1)
    model = chain(rng, affine=False, depthwise=True)
    if why == "two readers":
        model.graph.node.append(helper.make_node("Neg", ["h"], ["other"], "neg"))
    elif why == "shared weight":
        model.graph.node.append(helper.make_node("Neg", ["w3"], ["other"], "neg"))
    else:
        model.graph.output.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, None))
    assert equalize(model, LocalStatistics(images(rng, 2))) == Equalized(model)


def test_a_silent_channel_does_not_become_loud():
    rng = np.random.default_rng(2)
    model = chain(rng)
    for tensor in model.graph.initializer:
        if tensor.name in ("w1", "b1", "t"):
            value = numpy_helper.to_array(tensor).copy()
            value[(0, 0) if tensor.name == "t" else 0] = 0
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    equal = equalize(model, LocalStatistics(images(rng, 2))).model
    assert all(np.isfinite(numpy_helper.to_array(t)).all() for t in equal.graph.initializer)
    batch = images(rng, 1)[0]
    assert np.allclose(
        compute_logits(equal, batch, "equalized"), compute_logits(model, batch, "given"), rtol=1e-4, atol=1e-4
    )


def name_inner_depthwise(model: onnx.ModelProto) -> set[str | None]:
    return {node.name for node in find_inner_depthwise(read_model(model).graph)}


def test_the_places_of_a_real_graph(graph):
    read_by = {site.conv.name for site in find_sites(read_model(graph).graph)}
    inner = name_inner_depthwise(graph)
    assert len(inner) == 10  # one a block
    assert inner < read_by
    assert (
        len(read_by) == 10 + 10 + 3
    )  # and what projects, and two convs of the stem and the one that reads it


def test_depthwise_convs_elsewhere_stay_float(graph):
    chain_ = chain(np.random.default_rng(3))
    assert name_inner_depthwise(chain_) == {"middle"}
    assert (
        name_inner_depthwise(chain(np.random.default_rng(3), affine=False)) == set()
    )  # nothing to equalize with
    chain_.graph.node[0].op_type = "MaxPool"
    assert name_inner_depthwise(chain_) == set()


def test_int8_comes_closer(graph, data, quantized):
    batch = np.stack([preprocess(b, SPEC) for b in generate(24, 64, seed=99)])
    expected = compute_logits(graph, batch, "float")
    nearest = replace(DEFAULT, range_estimator="minmax", rounding=False, bias_correction=False)
    equalized, plain = (
        quantize(graph, data, SPEC, replace(nearest, equalize=equalize_)) for equalize_ in (True, False)
    )
    ours, alone, without = (
        np.abs(compute_logits(q.model, batch, "int8") - expected).mean()
        for q in (quantized, equalized, plain)
    )
    assert alone < 0.9 * without
    assert ours < alone  # by ranges, rounding and biases
    assert np.abs(compute_logits(quantized.source, batch, "source") - expected).max() < 1e-3
    assert plain.source is graph
