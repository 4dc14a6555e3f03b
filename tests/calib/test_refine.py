"""Scales, weights and biases by the errors of the layers: these become smaller, always by equal constants."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_info, threadpool_limits

from cmt_edge.calib import DEFAULT, lint, quantize
from cmt_edge.calib.factors import round_weights
from cmt_edge.calib.graph import open_view
from cmt_edge.calib.places import find_places
from cmt_edge.calib.refine import MOST_IMAGES, ROWS_AN_IMAGE, refine
from cmt_edge.calib.restore import list_int8_nodes, restore
from cmt_edge.calib.rounding import round_columns
from cmt_edge.calib.running import measure_extremes, open_graph
from cmt_edge.calib.sampling import pick, sample_rows, spread
from cmt_edge.calib.shifts import find_unshifted, is_shift
from cmt_edge.calib.statistics import LocalStatistics, Request, guard_calibration
from cmt_edge.deploy.errors import StepError
from helpers.calibration import SPEC

MODULE = sys.modules[quantize.__module__]  # the package gives this name to its function


def moments(rows):
    return (rows.T @ rows)[None]


@pytest.mark.parametrize(("count", "part"), [(9, 0.8), (70, 0.2), (130, 0.2)])
def test_rounding_lowers_the_error_of_the_output(count, part):
    ratios = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        rows = rng.standard_normal((400, 3)) @ rng.standard_normal((3, count))  # they go together
        rows += 0.1 * rng.standard_normal(rows.shape)
        weights = rng.uniform(-127, 127, (5, count))
        ours = round_columns(weights[None], moments(rows))[0]
        assert np.abs(ours).max() <= 127
        assert (ours == np.rint(ours)).all()
        errors = [np.square(rows @ (rounded - weights).T).mean() for rounded in (ours, np.rint(weights))]
        ratios.append(errors[0] / errors[1])
    assert np.median(ratios) < part


def test_a_column_makes_up_for_those_before_it():
    weights = np.array([[[0.4, 0.4, 0.4, 0.4]]])
    always_equal = np.ones((1, 4, 4))
    rounded = round_columns(weights, always_equal)[0, 0]
    assert rounded.sum() == 2  # of 1.6; to the nearest all would be 0


def test_rounding_bears_inputs_that_are_always_zero():
    weights = np.random.default_rng(0).uniform(-127, 127, (1, 4, 10))
    np.testing.assert_array_equal(round_columns(weights, np.zeros((1, 10, 10))), np.rint(weights))


def test_inputs_that_do_not_go_together_are_rounded_to_the_nearest():
    weights = np.random.default_rng(0).uniform(-127, 127, (1, 4, 10))
    np.testing.assert_array_equal(round_columns(weights, np.eye(10)[None]), np.rint(weights))


@pytest.fixture(scope="module")
def plain(graph, data):
    """Extremes as ranges, weights to the nearest, biases as they are."""
    recipe = replace(DEFAULT, range_estimator="minmax", rounding=False, bias_correction=False)
    return quantize(graph, data, SPEC, recipe)


def batches(data):
    return list(data.batches(SPEC))


def measure_errors(model: onnx.ModelProto, source: onnx.ModelProto, images) -> dict[str, np.ndarray]:
    """Layer -> the squared error of its outputs over rows, relative to them, and their mean error."""
    from cmt_edge.calib.factors import Grid
    from cmt_edge.calib.graph import read_constant

    result = {}
    with open_view(source) as original, open_view(model) as view:
        before = {
            p.layer.name: p.bias and read_constant(p.bias) for p in find_places(view.graph, original.graph)
        }
        floats = original.graph.initializers
        places = find_places(view.graph, original.graph)
        wanted = MOST_IMAGES * ROWS_AN_IMAGE  # what a small model reads
        rows = sample_rows(source, [p.layer for p in places], images, guard_calibration, wanted)
        for place in places:
            values = rows[place.layer.name]
            scale = float(read_constant(place.quantizer.inputs[1]))
            before_pair = place.quantizer.inputs[0].producer()
            move = float(read_constant(before_pair.inputs[1])) if is_shift(before_pair) else 0.0
            rounded = Grid(scale, round(move / scale)).round(values) + move
            integers = read_constant(place.dequantizer.inputs[0])
            steps = read_constant(place.dequantizer.inputs[1]).reshape(-1, 1)
            matrix = integers.T if place.transposed else integers.reshape(len(integers), -1)
            pairs = (values, place.weights), (rounded, matrix * steps)
            expected, given_ = (
                np.einsum("rck,ck->rc", v, w) if place.layer.depthwise else v @ w.T for v, w in pairs
            )
            moved = 0.0
            if place.bias is not None:
                moved = (before[place.layer.name] - read_constant(floats[place.bias.name])).reshape(-1)
            error = given_ + moved - expected
            power = np.square(expected).mean()
            result[place.layer.name] = np.array(
                [np.square(error).mean() / power, np.square(error.mean(0)).mean() / power]
            )
    return result


def test_every_layer_comes_closer_on_the_calibration_images(data, plain):
    images = batches(data)
    refined = refine(plain.model, plain.source, LocalStatistics(images))
    assert lint(refined) == []
    ours, before = (measure_errors(model, plain.source, images) for model in (refined, plain.model))
    assert ours.keys() == before.keys()
    assert len(ours) > 40
    assert np.mean([ours[n][0] < before[n][0] for n in ours]) > 0.9
    assert sum(e[0] for e in ours.values()) < 0.8 * sum(e[0] for e in before.values())
    assert sum(e[1] for e in ours.values()) < 1e-3 * sum(e[1] for e in before.values())  # the mean


@pytest.fixture(scope="module")
def reach(data, plain):
    """The lowest and the highest value of what int8 layers read."""
    with open_view(plain.source) as original, open_view(plain.model) as view:
        tensors = sorted({place.layer.tensor for place in find_places(view.graph, original.graph)})
    extremes = measure_extremes(plain.source, [], tensors, batches(data))
    return {name: (float(low.min()), float(high.max())) for name, (low, high) in extremes.items()}


def find_shifted(model: onnx.ModelProto, source: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Layer whose input is shifted -> the padding of the layer."""
    with open_view(source) as original, open_view(model) as view:
        places = find_places(view.graph, original.graph)
        return {
            place.layer.name: place.layer.pads
            for place in places
            if find_unshifted(place.quantizer) is not place.quantizer.inputs[0]
        }


def test_shifted_layers_come_closer(data, plain, reach):
    images = batches(data)
    shifted = refine(plain.model, plain.source, LocalStatistics(images), reach)
    assert lint(shifted) == []
    found = find_shifted(shifted, plain.source)
    assert len(found) > 8
    assert not any(map(any, found.values())), "zeros around a map would be moved, too"
    unshifted = refine(plain.model, plain.source, LocalStatistics(images))
    assert find_shifted(unshifted, plain.source) == {}
    ours, before = (measure_errors(model, plain.source, images) for model in (shifted, unshifted))
    assert sum(ours[n][0] for n in found) < 0.7 * sum(before[n][0] for n in found)
    assert sum(ours[n][1] for n in found) < 1e-2 * sum(ours[n][0] for n in found)  # the mean
    assert all(ours[n][0] == before[n][0] for n in ours.keys() - found.keys())


def test_biases_take_shifts_back_also_where_they_are_not_corrected(data, plain, reach):
    images = batches(data)
    shifted = refine(plain.model, plain.source, LocalStatistics(images), reach, rounding=False, biases=False)
    found = find_shifted(shifted, plain.source)
    ours, before = (measure_errors(model, plain.source, images) for model in (shifted, plain.model))
    assert all(ours[n][0] < before[n][0] for n in found)


def test_layers_that_become_float_again_read_what_was_not_shifted(data, plain, reach):
    shifted = refine(plain.model, plain.source, LocalStatistics(batches(data)[:4]), reach)
    found = find_shifted(shifted, plain.source)
    restored = restore(shifted, plain.source, found)
    assert find_shifted(restored, plain.source) == {}
    kinds = [
        [(n.op_type, n.name) for n in m.graph.node]
        for m in (restored, restore(plain.model, plain.source, found))
    ]
    assert kinds[0] == kinds[1]
    everything = restore(shifted, plain.source, list_int8_nodes(shifted))
    image = batches(data)[0]
    ours, float_ = (open_graph(model)(image)[0] for model in (everything, plain.source))
    np.testing.assert_allclose(ours, float_, atol=1e-4)


def test_only_constants_change_and_equal_images_give_equal_bytes(data, plain):
    images = LocalStatistics(batches(data)[:4])
    one, two = (refine(plain.model, plain.source, images) for _ in range(2))
    assert one.SerializeToString(deterministic=True) == two.SerializeToString(deterministic=True)
    assert [(n.op_type, n.name) for n in one.graph.node] == [
        (n.op_type, n.name) for n in plain.model.graph.node
    ]
    other = refine(plain.model, plain.source, LocalStatistics(batches(data)[4:8]))
    assert other.SerializeToString(deterministic=True) != one.SerializeToString(deterministic=True)


class Recorded(LocalStatistics):
    """Keeps what was asked for."""

    def __init__(self, images):
        super().__init__(images)
        self.requests: list[Request] = []

    def measure(self, request):
        self.requests.append(request)
        return super().measure(request)


def test_layers_with_small_maps_read_further_images(data, plain, monkeypatch):
    monkeypatch.setattr("cmt_edge.calib.refine.MOST_IMAGES", 4)
    images = Recorded(batches(data)[:7])
    refine(plain.model, plain.source, images)
    first, further = images.requests
    assert first.sampled == (0, 1, 3, 5)
    assert further.sampled == (2, 4, 6)
    named = {layer.name for layer in further.layers}
    assert named < {layer.name for layer in first.layers}
    head, stem = first.layers[-1], first.layers[0]
    assert head.name in named
    assert stem.name not in named


@pytest.mark.parametrize(("room", "expected"), [(0, {0}), (1 << 20, {1, 2}), (1 << 30, {3})])
def test_further_images_are_as_many_as_the_memory_allows(data, plain, monkeypatch, room, expected):
    monkeypatch.setattr("cmt_edge.calib.refine.MOST_IMAGES", 4)
    monkeypatch.setattr("cmt_edge.calib.refine.ROW_BYTES", room)
    images = Recorded(batches(data)[:7])
    refine(plain.model, plain.source, images)
    assert sum(len(request.sampled) for request in images.requests[1:]) in expected


@pytest.mark.parametrize("given_threads", [1, 2])
def test_matrices_are_multiplied_on_one_thread(graph, data, monkeypatch, given_threads):
    seen = []

    def count_threads(*_, **__):
        seen.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        raise AssertionError("counted")

    monkeypatch.setattr(MODULE, "refine", count_threads)
    images = data.__class__.of_blobs("two", data.blobs[:2])
    with threadpool_limits(given_threads, "blas"), pytest.raises(AssertionError, match="counted"):
        quantize(graph, images, SPEC)
    assert seen
    assert set(seen) == {1}


def test_smoothed_graphs_are_left_to_nncf(graph, data, monkeypatch):
    def must_not_run(*_, **__):
        raise AssertionError("refined")

    monkeypatch.setattr(MODULE, "refine", must_not_run)
    images = data.__class__.of_blobs("two", data.blobs[:2])
    with pytest.raises(AssertionError, match="refined"):
        quantize(graph, images, SPEC)
    quantize(graph, images, SPEC, replace(DEFAULT, smooth_quant=0.5))


def test_a_graph_that_cannot_run_is_a_typed_error(plain):
    with pytest.raises(StepError, match="ONNX Runtime"):
        refine(plain.model, plain.source, LocalStatistics([np.zeros((1, 4, 64, 64), np.float32)]))


@given(total=st.integers(1, 400), count=st.integers(1, 64))
def test_images_are_spread(total, count):
    chosen = spread(total, count)
    assert len(chosen) == min(total, count)
    assert set(chosen) <= set(range(total))
    assert [int(b) for b in pick(iter(range(total)), chosen)] == chosen


def test_weights_to_the_nearest_are_those_of_round_weights(plain):
    with open_view(plain.source) as original, open_view(plain.model) as view:
        from cmt_edge.calib.graph import read_constant

        for place in find_places(view.graph, original.graph):
            integers = read_constant(place.dequantizer.inputs[0])
            steps = read_constant(place.dequantizer.inputs[1]).reshape(-1, 1)
            matrix = integers.T if place.transposed else integers.reshape(len(integers), -1)
            ours = round_weights(place.weights.astype(np.float64))
            assert np.abs(matrix * steps - ours).max() <= 1.01 * steps.max()
