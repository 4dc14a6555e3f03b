"""Every family through the whole pipeline, by the same commands: exported, quantized, typed, verified.

A shallow model of each architecture in every run, at a small size; every model with ``-m giant``, at their
published size (``test_rtx.py`` types and compiles all of them, too).
"""

from __future__ import annotations

import pytest

from cmt_edge.cmt import find_model, list_models
from cmt_edge.deploy import Bundle
from cmt_edge.deploy.measure.parity import verify
from cmt_edge.export import ExportConfig, run
from helpers.exports import traced_once
from helpers.models import SHALLOW, make_shallow

EVERY = [pytest.param(n, marks=pytest.mark.giant) for n in list_models()]
PATHS = [("openvino", "fp32"), ("openvino", "int8")]


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
@pytest.mark.parametrize("name", SHALLOW)
def test_each_family(name, tmp_path):
    """The longest path: float32 graph, int8, float16, linted, verified in ONNX Runtime."""
    made = export(make_shallow(name), "trt", "int8", tmp_path, 64)
    assert made.manifest.verification.golden.passed
    assert made.manifest.typing.operations["int8"] > 12
    lost = [place for place in made.manifest.blocks if place.tensor is None]
    assert all(place.missing for place in lost), "what cannot be compared has a reason"
    assert len(made.manifest.blocks) >= 2 * len(lost) > 0
    assert verify(made, backend="onnxruntime").passed


@pytest.mark.parametrize("name", EVERY)
def test_every_model_at_its_published_size(name, tmp_path, capsys):
    with traced_once(tmp_path / "traced"):
        for form, precision in PATHS:
            made = export(name, form, precision, tmp_path, find_model(name).img_size)
            again = [
                verify(Bundle.open(made.path), backend=backend) for backend in ("openvino", "onnxruntime")
            ]
            assert all(v.passed for v in again)
            with capsys.disabled():
                print(
                    f"\n{made.path.name}:",
                    ", ".join(
                        f"{v.runtime.runtime} {v.golden.diff:.2g} of {v.golden.atol:.2g}" for v in again
                    ),
                )
