"""Quantization of the real cmt_nano graph: the rules it keeps, its answers, the cache; and the linter."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import metadata

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from torch import nn

from cmt_edge.calib import DEFAULT, CalibrationSet, Recipe, lint, quantize
from cmt_edge.calib.generated import generate
from cmt_edge.calib.recipe import FLOAT_OPS
from cmt_edge.calib.restore import list_int8_nodes
from cmt_edge.deploy.cache import CacheWarning
from cmt_edge.deploy.errors import CmtEdgeError, ImageError
from cmt_edge.deploy.preprocessing import preprocess
from cmt_edge.export import ExportConfig
from cmt_edge.export.config import OPSET
from cmt_edge.export.to_onnx import export_onnx, simplify
from helpers.calibration import IMAGES, SPEC
from helpers.graphs import compute_logits

MODULE = sys.modules[quantize.__module__]  # the package gives this name to its function


def edited(graph: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    return copy


def constants_of(graph: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {i.name: numpy_helper.to_array(i) for i in graph.graph.initializer}


def nodes(graph: onnx.ModelProto, *kinds: str) -> list[onnx.NodeProto]:
    return [n for n in graph.graph.node if n.op_type in kinds]


def test_result_keeps_every_rule(quantized):
    assert lint(quantized.model) == []
    assert not quantized.cached
    assert quantized.recipe == DEFAULT.key()
    onnx.checker.check_model(quantized.model, full_check=True)


def test_scales_and_zero_points(quantized):
    constants = constants_of(quantized.model)
    pairs = nodes(quantized.model, "QuantizeLinear", "DequantizeLinear")
    assert pairs
    for node in pairs:
        zero, scale = constants[node.input[2]], constants[node.input[1]]
        assert zero.dtype == np.int8
        assert not zero.any()
        if node.input[0] in constants and constants[node.input[0]].ndim > 1:
            assert scale.size in constants[node.input[0]].shape  # one scale a channel
            assert scale.size > 1
        else:
            assert scale.size == 1


def is_depthwise(node) -> bool:
    return any(a.name == "group" and a.i > 1 for a in node.attribute)


def test_what_is_int8_and_what_stays_float(graph, quantized):
    producer = {o: n for n in quantized.model.graph.node for o in n.output}

    def dequantized_values(name: str) -> bool:
        node = producer.get(name)
        while node is not None and node.op_type in ("Reshape", "Transpose"):
            node = producer.get(node.input[0])
        return node is not None and node.op_type == "DequantizeLinear"

    def reads_int8(node) -> list[bool]:
        return [dequantized_values(name) for name in node.input]

    dense = [n for n in nodes(quantized.model, "Conv") if not is_depthwise(n)]
    depthwise = [n for n in nodes(quantized.model, "Conv") if is_depthwise(n)]
    assert len(depthwise) == sum(is_depthwise(n) for n in graph.graph.node) > 0
    products = nodes(quantized.model, "MatMul", "Gemm")
    weighted = [
        n
        for n, f in zip(products, nodes(graph, "MatMul", "Gemm"), strict=True)
        if set(f.input) & set(constants_of(graph))
    ]
    first, *dense = dense
    assert not any(reads_int8(first))  # the conv of the image
    assert [n.name for n in [*dense, *weighted] if reads_int8(n)[:2] != [True, True]] == []
    assert not any(any(reads_int8(n)) for n in products if n not in weighted)  # the attention's own
    assert not any(any(reads_int8(n)[2:]) for n in [*dense, *depthwise])  # biases
    inner = {n.name for n in depthwise if "ffn.depthwise" in n.input[2]}
    assert len(inner) == 10
    assert {n.name for n in depthwise if reads_int8(n)[:2] == [True, True]} == inner
    assert not any(any(reads_int8(n)) for n in depthwise if n.name not in inner)
    assert not any(any(reads_int8(n)) for n in nodes(quantized.model, *FLOAT_OPS))
    for kind in ("LayerNormalization", "Softmax", "Gelu"):
        assert len(nodes(quantized.model, kind)) == len(nodes(graph, kind)) > 0


def test_answers_stay_close_to_the_float_graph(graph, quantized):
    batch = np.stack([preprocess(b, SPEC) for b in generate(24, 64, seed=99)])
    a, b = compute_logits(graph, batch, "float"), compute_logits(quantized.model, batch, "int8")
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.98
    assert not np.array_equal(a, b)
    assert (a.argmax(1) == b.argmax(1)).mean() > 0.8


def test_the_same_request_is_answered_from_the_cache(graph, data, cache, quantized, monkeypatch):
    def must_not_run(*_):
        raise AssertionError("calibrated again")

    monkeypatch.setattr(MODULE, "calibrate", must_not_run)
    again = quantize(
        edited(graph), CalibrationSet.choose("generated", IMAGES, SPEC), SPEC, Recipe(), cache=cache
    )
    assert again.cached
    for ours, first in ((again.model, quantized.model), (again.source, quantized.source)):
        assert ours.SerializeToString(deterministic=True) == first.SerializeToString(deterministic=True)


def test_another_package_may_bring_the_modules(graph, cache, quantized, monkeypatch):
    """``onnxruntime-gpu`` and Pillow-SIMD have other names, which the key must not need."""
    real = metadata.version

    def find(name):
        if name in ("onnxruntime", "pillow"):
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", find)
    data = CalibrationSet.choose("generated", IMAGES, SPEC)
    assert quantize(edited(graph), data, SPEC, Recipe(), cache=cache).cached


def copied(quantized):
    return replace(quantized, model=edited(quantized.model), cached=False)


class Recalibrated(Exception):
    """Raised where NNCF would start."""


def changed(graph, what):
    """Arguments of a request that differs in one respect."""
    other = edited(graph)
    if what == "graph":
        other.graph.initializer[0].CopyFrom(
            numpy_helper.from_array(
                numpy_helper.to_array(other.graph.initializer[0]) * 2, other.graph.initializer[0].name
            )
        )
    images = CalibrationSet.choose("generated", IMAGES, SPEC, seed=int(what == "images"))
    spec = ExportConfig("cmt_nano", exif="ignore").preprocess if what == "preprocessing" else SPEC
    return other, images, spec, Recipe(bias_correction=what != "recipe")


@pytest.mark.parametrize("what", ["graph", "images", "preprocessing", "recipe", "nothing"])
def test_any_other_request_is_calibrated(graph, cache, quantized, monkeypatch, what):
    def stop(*_):
        raise Recalibrated

    monkeypatch.setattr(MODULE, "calibrate", stop)
    if what == "nothing":
        assert quantize(*changed(graph, what), cache=cache).cached
        return
    with pytest.raises(Recalibrated):
        quantize(*changed(graph, what), cache=cache)


@pytest.mark.parametrize("damage", ["garbage", "empty", "float graph"])
def test_a_damaged_cache_entry_is_made_again(graph, data, quantized, tmp_path, monkeypatch, damage):
    calls = []
    monkeypatch.setattr(MODULE, "calibrate", lambda *_: calls.append(1) or copied(quantized))
    quantize(graph, data, SPEC, cache=tmp_path)
    entry = next(tmp_path.glob("*.onnx"))
    entry.write_bytes(
        {"garbage": b"\xff" * 100, "empty": b"", "float graph": graph.SerializeToString()}[damage]
    )
    assert not quantize(graph, data, SPEC, cache=tmp_path).cached
    assert len(calls) == 2
    assert quantize(graph, data, SPEC, cache=tmp_path).cached


def test_only_the_newest_entries_are_kept(graph, data, quantized, tmp_path, monkeypatch):
    monkeypatch.setattr(MODULE, "calibrate", lambda *_: copied(quantized))
    monkeypatch.setattr(MODULE, "CACHED_FILES", 2)
    for alpha in (0.1, 0.2, 0.3):
        quantize(graph, data, SPEC, Recipe(smooth_quant=alpha), cache=tmp_path)
    assert len(list(tmp_path.glob("*.onnx"))) == 2
    assert quantize(graph, data, SPEC, Recipe(smooth_quant=0.3), cache=tmp_path).cached


def test_an_unusable_cache_folder_costs_only_the_keeping(graph, data, quantized, tmp_path, monkeypatch):
    monkeypatch.setattr(MODULE, "calibrate", lambda *_: copied(quantized))
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "calibrated"
    with pytest.warns(CacheWarning, match=f"the cache {folder} cannot be used"):
        assert not quantize(graph, data, SPEC, cache=folder).cached


def test_progress_counts_and_nothing_is_printed_or_kept_or_changed(graph, data, capfd):
    """Without a cache; the float graph stays as it is."""
    before, seen = graph.SerializeToString(deterministic=True), []
    first = quantize(graph, data, SPEC, progress=lambda done, total: seen.append((done, total)))
    assert graph.SerializeToString(deterministic=True) == before
    assert not first.cached
    assert capfd.readouterr().out == ""
    assert (IMAGES, IMAGES) in seen


def test_a_damaged_image_is_named(graph, tmp_path):
    for i, blob in enumerate(generate(3, 64)):
        (tmp_path / f"{i}.png").write_bytes(blob if i != 1 else blob[:200])
    with pytest.raises(ImageError, match=r"1\.png"):
        quantize(graph, CalibrationSet.choose(tmp_path, None, SPEC), SPEC)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [Recipe(attention=True), Recipe(smooth_quant=0.5), Recipe(bias_correction=False, equalize=False)],
)
def test_other_recipes_keep_the_rules_too(graph, data, quantized, recipe):
    result = quantize(graph, data, SPEC, recipe)
    assert lint(result.model) == []
    assert result.recipe != quantized.recipe
    assert result.model.SerializeToString() != quantized.model.SerializeToString()
    if recipe.attention:
        assert len(nodes(result.model, "QuantizeLinear")) > len(nodes(quantized.model, "QuantizeLinear"))


# --- the linter -----------------------------------------------------------------------------------


class WithCoordinates(nn.Module):
    """Puts a map that no image changes beside the image's own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.mix = nn.Conv2d(3, 16, 3, stride=4), nn.Conv2d(18, 32, 1)
        self.last, self.fc = nn.Conv2d(32, 32, 1), nn.Linear(32, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        line = torch.linspace(-1, 1, x.shape[2])
        grid = torch.stack(torch.meshgrid(line, line, indexing="ij")).expand(len(x), -1, -1, -1)
        x = self.mix(torch.cat([x, grid], 1)).relu()
        return self.fc(self.last(x).relu().mean((2, 3)))


def test_a_layer_that_nncf_gives_one_scale_stays_float(data):
    graph = simplify(export_onnx(WithCoordinates().eval(), 64, OPSET))
    quantized = quantize(graph, data, SPEC)
    assert lint(quantized.model) == []
    mix = next(n for n in graph.graph.node if "mix.weight" in n.input)
    last = next(n for n in graph.graph.node if "last.weight" in n.input)
    names = list_int8_nodes(quantized.model)
    assert (mix.name in names, last.name in names) == (False, True)
    batch = np.stack([preprocess(blob, SPEC) for blob in data.blobs[:4]])
    plain, ours = (compute_logits(model, batch, "test") for model in (graph, quantized.model))
    assert np.abs(ours - plain).max() < 0.2 * plain.std()


def initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(i for i in model.graph.initializer if i.name == name)


def replaced(model: onnx.ModelProto, name: str, array: np.ndarray) -> None:
    initializer(model, name).CopyFrom(numpy_helper.from_array(array, name))


def first_activation(model: onnx.ModelProto) -> onnx.NodeProto:
    return nodes(model, "QuantizeLinear")[0]


def weight_dq(model: onnx.ModelProto) -> onnx.NodeProto:
    constants = constants_of(model)
    return next(
        n
        for n in nodes(model, "DequantizeLinear")
        if n.input[0] in constants and constants[n.input[0]].ndim == 4
    )


def dequantized(model: onnx.ModelProto, node: onnx.NodeProto, position: int) -> None:
    """Make ``node`` read an int8 constant at ``position``."""
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.ones(8, np.int8), "x_int8"),
            numpy_helper.from_array(np.float32(0.1), "x_scale"),
            numpy_helper.from_array(np.int8(0), "x_zero"),
        ]
    )
    model.graph.node.append(
        helper.make_node("DequantizeLinear", ["x_int8", "x_scale", "x_zero"], ["x_float"], name="x")
    )
    node.input[position] = "x_float"


def unsigned_zero_point(m):
    replaced(m, first_activation(m).input[2], np.uint8(0))


def shifted_zero_point(m):
    replaced(m, first_activation(m).input[2], np.int8(3))


def zero_scale(m):
    replaced(m, first_activation(m).input[1], np.float32(0))


def negative_scale(m):
    replaced(m, first_activation(m).input[1], np.float32(-0.1))


def infinite_scale(m):
    replaced(m, weight_dq(m).input[1], np.full_like(constants_of(m)[weight_dq(m).input[1]], np.inf))


def computed_scale(m):
    first_activation(m).input[1] = "somewhere"


def no_zero_point(m):
    del first_activation(m).input[2]


def activation_by_channel(m):
    replaced(m, first_activation(m).input[1], np.full(3, 0.1, np.float32))


def quantized_bias(m):
    conv = next(n for n in nodes(m, "Conv") if not is_depthwise(n))
    dequantized(m, conv, 2)


def single_scale_weight(m):
    dq = weight_dq(m)
    replaced(m, dq.input[1], np.float32(0.1))


def softmax_reads_int8(m):
    dequantized(m, nodes(m, "Softmax")[0], 0)


def norm_reads_int8(m):
    dequantized(m, nodes(m, "LayerNormalization")[0], 0)


def one_side_float(m):
    producer = {o: n for n in m.graph.node for o in n.output}
    matmul = next(n for n in nodes(m, "Conv") if n.input[0] in producer)
    matmul.input[0] = producer[producer[matmul.input[0]].input[0]].input[
        0
    ]  # past DequantizeLinear and QuantizeLinear


def newer_opset(m):
    m.opset_import[0].version = 22


def foreign_domain(m):
    m.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def external_weights(m):
    onnx.external_data_helper.set_external_data(m.graph.initializer[0], "weights.bin")


@pytest.mark.parametrize(
    ("edit", "finding"),
    [
        (unsigned_zero_point, "uint8 instead of int8"),
        (shifted_zero_point, "zero point is not 0"),
        (zero_scale, "scale is not positive"),
        (negative_scale, "scale is not positive"),
        (infinite_scale, "scale is not positive"),
        (computed_scale, "must be constants"),
        (no_zero_point, "must be constants"),
        (activation_by_channel, "one scale a channel"),
        (quantized_bias, "quantized bias"),
        (single_scale_weight, "single scale"),
        (softmax_reads_int8, "Softmax must stay float"),
        (norm_reads_int8, "LayerNormalization must stay float"),
        (one_side_float, "one side int8, the other float"),
        (newer_opset, "opset 22 is above 20"),
        (foreign_domain, "com.microsoft"),
        (external_weights, "outside the file"),
    ],
    ids=lambda v: v.__name__ if callable(v) else "",
)
def test_linter_finds(quantized, edit, finding):
    model = edited(quantized.model)
    edit(model)
    assert any(finding in f for f in lint(model)), lint(model)


def test_linter_finds_a_graph_without_int8(graph):
    assert lint(graph) == ["the graph has no quantized operation"]


def test_a_graph_that_breaks_the_rules_is_never_returned(graph, data, quantized, tmp_path, monkeypatch):
    broken = edited(quantized.model)
    shifted_zero_point(broken)
    monkeypatch.setattr(MODULE, "calibrate", lambda *_: replace(quantized, model=broken))
    with pytest.raises(CmtEdgeError, match="breaks the rules") as error:
        quantize(graph, data, SPEC, cache=tmp_path)
    assert error.value.exit_code == 1
    assert not list(tmp_path.glob("*.onnx"))


# --- which images are read ------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.data())
def test_telling_images_are_filled_up(count, draw):
    telling = draw.draw(st.sets(st.integers(0, count - 1), max_size=100))
    chosen = MODULE.fill_up(telling, count)
    assert chosen == sorted(set(chosen))
    assert telling <= set(chosen) <= set(range(count))
    assert len(chosen) == max(len(telling), min(MODULE.ENOUGH, count))


@pytest.mark.parametrize("equalizes", [True, False])
def test_ranges_are_those_of_all_images(graph, monkeypatch, equalizes):
    many = CalibrationSet.choose("generated", 40, SPEC)
    equalize, recipe = MODULE.equalize, replace(DEFAULT, equalize=equalizes, range_estimator="minmax")
    telling = []
    monkeypatch.setattr(MODULE, "equalize", lambda *a, **k: telling.append(equalize(*a, **k)) or telling[-1])
    results = [quantize(graph, many, SPEC, recipe).model]
    monkeypatch.setattr(MODULE, "equalize", lambda *a, **k: replace(equalize(*a, **k), telling=()))
    results.append(quantize(graph, many, SPEC, recipe).model)
    assert len(telling[0].telling) < 35
    ours, every = map(constants_of, results)
    scales = {n.input[1] for n in nodes(results[0], "QuantizeLinear")}
    assert len(scales) > 20
    for name in scales:
        np.testing.assert_allclose(ours[name], every[name], rtol=1e-5)
