"""Bundles for TensorRT for RTX on a fake GPU: which engine is opened, and what ``cmt-build`` makes."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace

import numpy as np
import pytest

import cmt_edge.deploy.cli.build
import cmt_edge.deploy.tensorrt.build
from cmt_edge.deploy import Bundle, Predictor
from cmt_edge.deploy.bundle import PORTABLE_ENGINE, Manifest
from cmt_edge.deploy.errors import BundleError, InputError, RuntimeMissingError, StepError
from cmt_edge.deploy.measure.device_report import DeviceReport
from cmt_edge.deploy.measure.timing import Protocol
from cmt_edge.deploy.tensorrt.kernels import read_kernels
from helpers.bundles import SIZE
from helpers.trt import build_portable, forget_fakes, make_compiled, make_plan, make_rtx_bundle, trt_bundle


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(cmt_edge.deploy.cli.build, "read_protocol", lambda *_: Protocol(5, 0.0, 1, 0.0))
    monkeypatch.setattr(cmt_edge.deploy.tensorrt.build, "POWER_SECONDS", 0.05)


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    """With an engine from another machine."""
    return make_rtx_bundle(tmp_path / "tiny_fp16_rtx")


def build(bundle, *flags) -> int:
    forget_fakes()
    return cmt_edge.deploy.cli.build.main([str(bundle.path), *flags])


def read_header(plan: bytes) -> dict:
    return json.loads(plan.removeprefix(b"FAKEPLAN").split(b"\n", 1)[0])


# --- an engine that travelled ---------------------------------------------------------------------


def test_an_engine_of_another_machine_is_not_opened(gpu_machine, bundle):
    with pytest.raises(RuntimeMissingError, match="another machine") as error:
        Predictor.load(bundle.path)
    assert "cmt-build" in error.value.remedy
    assert "--key" in error.value.remedy
    assert not gpu_machine.exists(), "nothing was deserialised"


def test_the_caller_may_trust_it(gpu_machine, bundle):
    with Predictor.load(bundle.path, trusted_engine=True) as predictor:
        assert predictor(np.zeros((SIZE, SIZE, 3), np.uint8)).label in bundle.labels


def test_a_signature_is_trust(gpu_machine, bundle):
    checked = replace(Bundle.open(bundle.path), signature_checked=True)
    with Predictor.load(checked) as predictor:
        assert predictor.session.runtime == "tensorrt_rtx 1.7.1.116"


def test_a_key_on_opening_is_what_counts_as_a_check(bundle):
    assert not Bundle.open(bundle.path).signature_checked


def test_a_changed_engine_is_not_opened(gpu_machine, bundle):
    opened = Bundle.open(bundle.path)
    (bundle.path / PORTABLE_ENGINE).write_bytes(make_plan() + b" ")
    with pytest.raises(BundleError, match="changed"):
        Predictor.load(opened, trusted_engine=True)
    assert not gpu_machine.exists()


def test_a_file_that_no_signature_covers_is_not_opened(gpu_machine, tmp_path):
    name = "engines/engine-0123456789ab.plan"
    made = trt_bundle(tmp_path / "b", format="rtx", members={name: make_plan()}, compiled=make_compiled(name))
    with pytest.raises(BundleError, match=f"always {PORTABLE_ENGINE}"):
        Predictor.load(replace(made, signature_checked=True))
    assert not gpu_machine.exists()


def test_without_any_engine_the_remedy_is_to_build(gpu_machine, tmp_path):
    made = trt_bundle(tmp_path / "b", format="rtx")
    with pytest.raises(RuntimeMissingError, match="no TensorRT engine yet"):
        Predictor.load(made.path)


def test_a_bundle_of_the_other_product(gpu_machine, tmp_path):
    made = trt_bundle(tmp_path / "b")
    with pytest.raises(InputError, match="for trt, not for TensorRT for RTX"):
        Predictor.load(made.path, backend="tensorrt_rtx")


def test_the_graph_runs_in_onnxruntime(bundle):
    with Predictor.load(bundle.path, backend="onnxruntime") as predictor:
        assert predictor.labels


def test_the_section_survives_the_file(bundle):
    opened = Bundle.open(bundle.path)
    assert opened.manifest.compiled == make_compiled()
    assert Manifest.from_bytes(opened.manifest.to_bytes(), "here").compiled == make_compiled()


# --- cmt-build ------------------------------------------------------------------------------------


def test_the_device_builds_its_own_and_trusts_that(gpu_machine, bundle, capsys):
    assert build(bundle) == 0, capsys.readouterr().err
    opened = Bundle.open(bundle.path)
    entry = opened.manifest.engine
    assert entry.key.tensorrt == "1.7.1.116"
    header = read_header((bundle.path / entry.file).read_bytes())
    assert header["compute"] == "CURRENT"
    assert header["aux_streams"] == 0
    found = DeviceReport.from_bytes((bundle.path / entry.report).read_bytes(), "report")
    assert found.compiled.product == "tensorrt_rtx"
    assert found.compiled.kernels
    assert "compiled by TensorRT for RTX" in capsys.readouterr().out
    with Predictor.load(bundle.path) as predictor:
        assert predictor.session.runtime.startswith("tensorrt_rtx")
    assert build(bundle) == 0
    assert "reused" in capsys.readouterr().out


def test_a_gpu_that_is_not_served(gpu_machine, bundle, monkeypatch, capsys):
    """As TensorRT for RTX 1.7.1 on an H200."""
    monkeypatch.setenv("FAKE_TRT", "unserved")
    before = bundle.manifest.engine
    assert build(bundle) == 3
    said = capsys.readouterr().err
    assert "does not serve this GPU" in said
    assert "compute capability 9.0" in said
    assert "--format trt" in said
    assert Bundle.open(bundle.path).manifest.engine == before
    with pytest.raises(RuntimeMissingError, match="does not serve this GPU"):
        Predictor.load(bundle.path, trusted_engine=True)


def test_its_tool_is_named(bundle, capsys):
    assert build(bundle, "--trtexec") == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[0] == "tensorrt_rtx"
    assert {"--useGpu", "--maxAuxStreams=0", "--noTF32"} <= {*words}
    assert not [word for word in words if word.startswith(("--memPool", "--builder", "--timing"))]


def test_its_tool_gets_the_same_options(bundle, capsys):
    asked = ("--workspace", "1.5", "--level", "5", "--tf32", "--device", "1")
    assert build(bundle, "--trtexec", *asked) == 0
    words = shlex.split(capsys.readouterr().out)
    assert {"--memPoolSize=workspace:1536M", "--builderOptimizationLevel=5", "--device=1"} <= {*words}
    assert "--noTF32" not in words


# --- without a GPU --------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", [(), ("SM86", "SM120")])
def test_a_portable_engine(gpu_machine, bundle, compute):
    made = build_portable(bundle, compute=compute)
    assert read_header(made.plan)["compute"] == " ".join(compute)
    assert made.version == "1.7.1.116"
    assert made.warnings == ("a weight was rounded",)
    assert read_kernels(made.layers)[0].nodes == ("cast_in",)


def test_a_dynamic_batch_gets_a_profile(gpu_machine, tmp_path):
    made = trt_bundle(tmp_path / "b", format="rtx", batch="batch")
    plan = build_portable(made).plan
    assert [shape[0] for shape in read_header(plan)["profile"]["input"]] == [1, 1, 8]


@pytest.mark.parametrize(
    ("mode", "what", "remedy"),
    [
        ("parser_error", "TensorRT for RTX's parser refused", "report"),
        ("nothing", "TensorRT for RTX built no engine", "report"),
        ("no_memory", "out of memory", "smaller --batch"),
        ("killed", "out of memory", "smaller --batch"),
        ("crash", "TensorRT for RTX crashed", "tensorrt-rtx-cu12"),
    ],
)
def test_failures_are_typed(gpu_machine, bundle, monkeypatch, mode, what, remedy):
    monkeypatch.setenv("FAKE_TRT", mode)
    with pytest.raises(StepError, match=what) as error:
        build_portable(bundle)
    assert remedy in error.value.remedy


def test_a_build_has_a_time_limit(gpu_machine, bundle, monkeypatch):
    monkeypatch.setenv("FAKE_TRT", "slow")
    with pytest.raises(StepError, match=r"within 0\.5 s"):
        build_portable(bundle, time_limit=0.5)


def test_a_build_has_a_memory_limit(gpu_machine, bundle, monkeypatch):
    monkeypatch.setattr("cmt_edge.deploy.tensorrt.building.read_available_memory", lambda root: 1 << 28)
    monkeypatch.setenv("FAKE_TRT", "hungry")
    with pytest.raises(StepError, match="out of memory"):
        build_portable(bundle)


def test_an_unknown_compute_capability(gpu_machine, bundle):
    with pytest.raises(StepError, match="does not know SM999"):
        build_portable(bundle, compute=("SM999",))


def test_a_log_without_kernels(gpu_machine, bundle, monkeypatch):
    monkeypatch.setenv("FAKE_TRT", "no_layers")
    made = build_portable(bundle)
    with pytest.raises(StepError, match="cannot be understood"):
        read_kernels(made.layers)
