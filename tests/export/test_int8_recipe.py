"""What int8 exports choose by their format and their images; ONNX Runtime gets the pairs that it needs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cmt_edge.export import ExportConfig
from cmt_edge.export.description import describe_calibration
from cmt_edge.export.steps import graph as steps


def make_config(form: str, precision: str = "int8") -> ExportConfig:
    return ExportConfig("cmt_nano", form, precision, data=None if precision == "fp32" else "generated")


@pytest.mark.parametrize(
    ("form", "precision", "expected"),
    [
        ("onnx", "int8", True),
        ("onnx", "auto", True),
        ("onnx", "fp32", False),
        ("openvino", "int8", False),
        ("trt", "int8", False),
    ],
)
def test_only_int8_for_onnx_runtime_needs_them(form, precision, expected):
    assert make_config(form, precision).computes_by_pairs is expected


def test_the_recorded_recipe_tells_the_two_apart():
    class Data:
        @staticmethod
        def describe():
            return SimpleNamespace(source="generated", images=1, fingerprint="0" * 64, synthesis=None)

    entries = {form: describe_calibration(make_config(form), Data, False) for form in ("onnx", "openvino")}
    names = {entry.recipe for entry in entries.values()}
    assert len(names) == 2
    assert make_config("openvino").recipe.key() in names
    assert {len(name) for name in names} == {64}
    assert entries["onnx"].fits_16_bits is True
    assert entries["openvino"].fits_16_bits is True
    assert describe_calibration(make_config("trt"), Data, False).fits_16_bits is None


@pytest.mark.parametrize(
    ("form", "expected"), [("onnx", True), ("openvino", True), ("trt", False), ("rtx", False)]
)
def test_formats_for_cpus_get_weights_that_fit_16_bits(monkeypatch, form, expected):
    recipes = []
    monkeypatch.setattr(steps, "quantize", lambda *args, **_others: recipes.append(args[3]))
    recipe = make_config(form).recipe
    steps.calibrate_graph(None, None, None, recipe, cached=False, progress=lambda *_: None)
    assert [recipe.fits_16_bits for recipe in recipes] == [expected]


@pytest.mark.parametrize(
    ("form", "expected"), [("onnx", True), ("openvino", True), ("trt", False), ("rtx", False)]
)
def test_layers_that_nothing_leads_around_read_floats_on_cpus(form, expected):
    assert make_config(form).recipe.float_trunk is expected


@pytest.mark.parametrize(("data", "expected"), [("generated", False), ("synthetic", True), ("photos", True)])
def test_channels_are_rescaled_by_images_like_those_of_the_model_alone(data, expected):
    assert ExportConfig("cmt_nano", "openvino", "int8", data=data).recipe.equalize is expected


def test_the_pairs_are_placed_in_what_is_exported(monkeypatch):
    monkeypatch.setattr(steps, "place_for_integers", lambda model, ranges: (model, ranges))
    monkeypatch.setattr(steps, "keep_float", lambda _quantized, names: names)
    quantized = SimpleNamespace(model="whole")
    assert steps.choose_graph("float", quantized, "int8", (), None) == "whole"
    assert steps.choose_graph("float", quantized, "int8", (), {"conv": 1.0}) == ("whole", {"conv": 1.0})
    assert steps.choose_graph("float", quantized, "int8", ("head",), {}) == (("head",), {})
    assert steps.choose_graph("float", quantized, "fp32", (), None) == "float"
