"""Every family down the whole road, by the same commands: exported, quantized, typed, verified.

One model of each architecture in every run, at a small size; all the others with ``-m giant``, at their published size.
"""

from __future__ import annotations

import pytest

from cmt import list_models, model_spec
from deploy import Predictor
from deploy.parity import verify
from export import ExportConfig, run

SMALL = ("cvt_13", "convit_tiny", "mvitv2_t", "xformer_reading")
REST = [pytest.param(n, marks=pytest.mark.giant) for n in list_models() if not n.startswith("cmt_")]
ROADS = [("trt", "int8")]
"""The longest road: float32 graph, int8, float16, linted, verified in ONNX Runtime."""
GIANT_ROADS = [("onnx", "fp32"), ("openvino", "fp32"), ("openvino", "int8"), ("trt", "fp16")]


def export(name, form, precision, folder, size):
    data = {"data": "generated", "calib_size": 8} if precision == "int8" else {}
    return run(
        ExportConfig(
            name,
            format=form,
            precision=precision,
            weights="random",
            imgsz=size,
            build=form != "trt",
            batch=0,
            output=str(folder),
            **data,
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize(("form", "precision"), ROADS)
@pytest.mark.parametrize("name", SMALL)
def test_each_family(name, form, precision, tmp_path):
    made = export(name, form, precision, tmp_path, 64)
    assert made.manifest.verification["golden"]["passed"]
    if form == "trt":
        assert made.manifest.typing["operations"]["int8"] > 20
        assert verify(made, backend="onnxruntime").passed


@pytest.mark.parametrize(("form", "precision"), GIANT_ROADS)
@pytest.mark.parametrize("name", REST)
def test_every_model_at_its_published_size(name, form, precision, tmp_path):
    made = export(name, form, precision, tmp_path, model_spec(name).img_size)
    with Predictor.load(made, backend="onnxruntime") as predictor:
        assert predictor(made.golden().sources[0]).label
