"""The graph of the trained cmt_nano, float and quantized, for the tests of calibration.

The fixtures are made once a session, so that a test must not change them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from cmt_edge.calib import DEFAULT, CalibrationSet, quantize
from cmt_edge.cmt import create_model, fuse, load_pretrained
from cmt_edge.export.config import OPSET
from cmt_edge.export.to_onnx import export_onnx, simplify
from helpers.calibration import IMAGES, SPEC
from helpers.made_once import make_once


@pytest.fixture(scope="session")
def graph(run_folder) -> onnx.ModelProto:
    """The simplified float graph of the trained cmt_nano."""

    def make(path: Path) -> None:
        model = create_model("cmt_nano")
        load_pretrained(model)
        onnx.save(simplify(export_onnx(fuse(model), 64, OPSET)), path)

    return onnx.load(make_once(run_folder / "calibrated_float.onnx", make))


@pytest.fixture(scope="session")
def data() -> CalibrationSet:
    return CalibrationSet.choose("generated", IMAGES, SPEC)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("calibrated") / "made" / "on demand"


@pytest.fixture(scope="session")
def quantized(graph, data, cache):
    return quantize(graph, data, SPEC, cache=cache)


@pytest.fixture(scope="session")
def freed(graph, data, cache):
    """As the export calibrates for OpenVINO and ONNX Runtime."""
    return quantize(graph, data, SPEC, replace(DEFAULT, fits_16_bits=True, float_trunk=True), cache=cache)


@pytest.fixture(scope="session")
def fitting(graph, data, cache):
    """The same, with all layers reading int8 that can."""
    return quantize(graph, data, SPEC, replace(DEFAULT, fits_16_bits=True), cache=cache)
