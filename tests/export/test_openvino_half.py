"""OpenVINO's fp16: for GPUs and NPUs, exported and checked on a machine that need not have one."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch")
ov = pytest.importorskip("openvino")

from cmt_edge.deploy import Predictor  # noqa: E402
from cmt_edge.deploy.errors import GateError, RuntimeMissingError  # noqa: E402
from cmt_edge.export import ExportConfig, cli, run  # noqa: E402
from helpers.openvino_machine import LAPTOP, Machine  # noqa: E402


@pytest.fixture(scope="module")
def half_bundle(exported):
    """cmt_nano, OpenVINO, fp16."""
    return exported("openvino_fp16", precision="fp16")


def test_the_weights_take_half_the_size(half_bundle, fp32_bundle):
    half, single = (bundle.manifest.files["model.onnx"].size for bundle in (half_bundle, fp32_bundle))
    assert half < 0.55 * single
    operations = ov.Core().read_model(half_bundle.file("model.onnx")).get_ops()
    large = [op for op in operations if op.get_type_name() == "Constant" and op.data.size > 64]
    types = {str(op.get_output_element_type(0).get_type_name()) for op in large}
    assert "f16" in types
    assert "f32" not in types


def test_it_was_checked_here_and_not_measured(half_bundle):
    manifest = half_bundle.manifest
    assert manifest.precision == "fp16"
    assert manifest.format == "openvino"
    assert manifest.verification.golden.passed
    assert "float16 weights computed in float32" in manifest.verification.runtime.runtime
    assert manifest.typing.operations["fp16"] > 100
    assert manifest.latency is None
    assert manifest.runtime.version.startswith("openvino ")


def test_a_gpu_runs_it_in_float16(half_bundle, monkeypatch, tmp_path):
    """Through a stand-in for the plugin: the hint is f16, and the answers are right."""
    monkeypatch.setenv("CMT_EDGE_CACHE", str(tmp_path / "cache"))
    machine = Machine(LAPTOP)
    monkeypatch.setattr(ov, "Core", machine)
    golden = half_bundle.golden()
    with Predictor.load(half_bundle.path, device="GPU") as predictor:
        logits = predictor.logits(predictor.prepare(golden.sources))
    assert np.abs(logits - golden.outputs).max() < 0.12
    ((name, config),) = machine.compiled
    assert (name, config["INFERENCE_PRECISION_HINT"]) == ("GPU", "f16")


@pytest.mark.skipif(
    "FP16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"), reason="this processor has float16"
)
def test_a_processor_without_float16_refuses_it(half_bundle):
    with pytest.raises(RuntimeMissingError, match="no float16 instructions") as caught:
        Predictor.load(half_bundle.path)
    assert "--backend onnxruntime" in caught.value.remedy
    with Predictor.load(half_bundle.path, backend="onnxruntime") as predictor:
        assert predictor.predict(half_bundle.golden().sources)


def test_a_difference_is_a_failed_gate(traced, tmp_path, one_trace):
    with pytest.raises(GateError):
        run(ExportConfig("cmt_nano", precision="fp16", atol=1e-7, output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_the_plan_and_the_text_say_what_is_done(tmp_path, capsys, half_bundle):
    assert cli.main(["--model", "cmt_nano", "--half", "-o", str(tmp_path), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "measure" not in " ".join(plan["steps"]).lower()
    from cmt_edge.deploy import report

    text = report.describe_bundle(half_bundle, [])
    assert "not measured, the bundle is for a GPU or an NPU" in text
    assert f"cmt-verify {half_bundle.path} --device GPU" in text


def test_auto_never_chooses_it(tmp_path, capsys):
    arguments = ["--model", "cmt_nano", "--precision", "auto", "--data", "generated", "-o", str(tmp_path)]
    assert cli.main([*arguments, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert plan["candidates"] == ["fp32", "bf16", "int8", "int8 in part"]
