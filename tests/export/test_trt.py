"""``--format trt``: complete bundles without a GPU, finished ones on a (fake) GPU, and nothing in between."""

from __future__ import annotations

import json
import sys

import onnx
import pytest

import cmt_edge.deploy.tensorrt.build
from cmt_edge.deploy import Bundle, Predictor
from cmt_edge.deploy.bundle.sections import RanOn, RuntimeEntry
from cmt_edge.deploy.errors import GateError, InputError, RuntimeMissingError, StepError
from cmt_edge.deploy.measure.parity import verify
from cmt_edge.deploy.measure.timing import Protocol
from cmt_edge.deploy.tensorrt.parser_rules import find_parser_problems
from cmt_edge.export import ExportConfig, run
from cmt_edge.export.cli import main
from cmt_edge.export.steps import GOLDEN_IMAGES
from helpers.bundles import snapshot
from helpers.shared import shared

pytestmark = pytest.mark.usefixtures("one_trace")

PRECISIONS = ("fp32", "fp16", "int8")
DATA = {"fp32": None, "fp16": None, "int8": "generated"}


def config(output, precision="fp16", **changes) -> ExportConfig:
    settings = {
        "format": "trt",
        "precision": precision,
        "data": DATA.get(precision),
        "build": False,
        "output": str(output),
    }
    settings |= {"calib_size": 8} if precision == "int8" else {}
    return ExportConfig("cmt_nano", **(settings | changes))


@pytest.fixture(scope="module", params=PRECISIONS)
def bundle(request, tmp_path_factory) -> Bundle:
    """``cmt_nano``, unbuilt."""
    return run(config(tmp_path_factory.mktemp("trt"), request.param))


def test_a_bundle_without_an_engine_is_complete(bundle):
    opened = Bundle.open(bundle.path)
    manifest = opened.manifest
    assert manifest.format == "trt"
    assert manifest.runtime == RuntimeEntry(backend="tensorrt", version=None)
    assert manifest.latency is manifest.engine is None
    assert manifest.verification.golden.passed
    assert f"typed {manifest.precision}" in manifest.verification.steps
    assert manifest.typing.operations
    assert find_parser_problems(onnx.load(opened.file("model.onnx"))) == []


def test_its_graph_has_the_types_that_were_asked_for(bundle):
    model = onnx.load(bundle.file("model.onnx"))
    operations = bundle.manifest.typing.operations
    kinds = {i.data_type for i in model.graph.initializer}
    assert {v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)} == {
        onnx.TensorProto.FLOAT
    }
    if bundle.manifest.precision == "fp32":
        assert set(operations) == {"fp32"}
        assert onnx.TensorProto.FLOAT16 not in kinds
    else:
        assert operations["fp16"] > 100
        assert bundle.manifest.typing.observed.images > 4
        assert bundle.path.joinpath("model.onnx").stat().st_size < 4e6  # 1.7 M parameters
    assert ("int8" in operations) == (bundle.manifest.precision == "int8")


def test_it_verifies_in_onnxruntime(bundle):
    assert verify(bundle, backend="onnxruntime").passed


def test_the_report_tells_what_comes_next(tmp_path, capsys):
    assert (
        main(["--model", "cmt_nano", "--format", "engine", "--half", "--no-build", "-o", str(tmp_path)]) == 0
    )
    out = capsys.readouterr().out
    for word in (
        "in fp16 (operations)",
        "latency: not measured",
        "cmt-build cmt_nano_fp16_trt",
        "float16 holds 65504",
    ):
        assert word in out
    assert "Latency" not in (tmp_path / "cmt_nano_fp16_trt" / "report.md").read_text()
    assert "float16 emulated" in (tmp_path / "cmt_nano_fp16_trt" / "report.md").read_text()


@pytest.mark.parametrize("alias", ["engine", "tensorrt"])
def test_other_names_of_the_format(alias):
    assert ExportConfig("cmt_nano", format=alias).format == "trt"


def test_images_for_the_ranges_of_fp16(tmp_path):
    """``--data`` with fp16 observes, it does not quantize."""
    made = run(config(tmp_path, data="generated", calib_size=8))
    assert set(made.manifest.typing.operations) == {"fp16"}
    assert made.manifest.typing.observed.images == 8 + GOLDEN_IMAGES
    assert made.manifest.calibration is None
    assert not {n.op_type for n in onnx.load(made.file("model.onnx")).graph.node} & {
        "QuantizeLinear",
        "DequantizeLinear",
    }


@pytest.mark.parametrize("atol", [1e-6, 50.0])
def test_atol_reaches_the_typed_graph(tmp_path, atol):
    if atol < 1:
        with pytest.raises(GateError, match="fp16 changes the logits") as error:
            run(config(tmp_path, atol=atol))
        assert "--atol" in error.value.remedy
    else:
        run(config(tmp_path, atol=atol))


@pytest.mark.giant
@pytest.mark.parametrize("name", ["cmt_ti"])
def test_a_larger_model_is_typed_without_findings(name, tmp_path):
    """Random weights have large values somewhere, so the islands are exercised too."""
    made = run(
        ExportConfig(
            name, format="trt", precision="fp16", weights="random", build=False, output=str(tmp_path)
        )
    )
    assert made.manifest.typing.operations["fp16"] > 100
    assert made.manifest.verification.golden.passed


BAD = [
    ({"precision": "bf16", "data": None}, "has no bf16"),
    ({"format": "openvino"}, "only --format trt or rtx builds engines"),
    ({"format": "onnx"}, "has no fp16"),
    ({"format": "openvino", "precision": "fp32"}, "only --format trt or rtx builds engines"),
    ({"format": "onnx", "precision": "fp32", "build": True, "workspace": 1.0}, "--workspace"),
    ({"format": "onnx", "precision": "fp32", "build": True, "device": "0"}, "--device"),
    ({"workspace": -1.0}, "--workspace -1.0 is too small"),
    ({"precision": "fp32", "data": "generated"}, "fp16 ranges"),
    ({"precision": "int8", "data": None, "calib_size": None}, "needs calibration images"),
    ({"format": "tensort"}, "did you mean"),
]


@pytest.mark.parametrize(("changes", "word"), BAD)
def test_what_does_not_go_together(tmp_path, changes, word):
    with pytest.raises(InputError) as error:
        run(config(tmp_path, **changes))
    assert word in str(error.value)
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_it_says_what_is_missing_and_offers_no_build(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cmt_edge.deploy.backends.util.find_spec", lambda name: None)
    monkeypatch.setattr("cmt_edge.deploy.tensorrt.cuda.LIBRARIES", ())
    monkeypatch.setattr("cmt_edge.deploy.tensorrt.cuda.ctypes.util.find_library", lambda name: None)
    monkeypatch.setitem(sys.modules, "cuda", None)
    assert main(["--model", "cmt_nano", "--format", "trt", "--half", "-o", str(tmp_path)]) == 3
    error = capsys.readouterr().err
    for word in ("tensorrt is not installed", "no NVIDIA GPU", "--no-build", "cmt-build"):
        assert word in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [("--no-build",), ()])
def test_a_dry_run_names_the_steps(gpu_machine, tmp_path, capsys, flags):
    assert (
        main(
            [
                "--model",
                "cmt_nano",
                "--format",
                "trt",
                "--half",
                "--dry-run",
                "--json",
                "-o",
                str(tmp_path),
                *flags,
            ]
        )
        == 0
    )
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert ("build the engine" in steps) == (not flags)
    assert "write the precision into the graph" in steps
    assert not list(tmp_path.iterdir())


# --- with a GPU, here a fake one ------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("cmt_edge.deploy.tensorrt.build.POWER_SECONDS", 0.05)
    monkeypatch.setattr(
        "cmt_edge.deploy.tensorrt.build.finish_bundle.__kwdefaults__",
        {**cmt_edge.deploy.tensorrt.build.finish_bundle.__kwdefaults__, "protocol": Protocol(5, 0.0, 1, 0.0)},
    )


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_export_builds_verifies_and_measures(gpu_machine, quick, tmp_path, precision, capsys):
    flags = ["--data", "generated", "--calib-size", "8"] if precision == "int8" else []
    assert (
        main(
            ["--model", "cmt_nano", "--format", "trt", "--precision", precision, "-o", str(tmp_path), *flags]
        )
        == 0
    )
    assert "cmt-bench" in capsys.readouterr().out
    made = Bundle.open(tmp_path / f"cmt_nano_{precision}_trt")
    assert made.manifest.engine.golden.passed
    assert made.manifest.latency.p50_ms > 0
    assert made.manifest.verification.runtime == RanOn("tensorrt 10.3.0", "Fake Orin")
    assert (
        (made.path / made.manifest.engine.text)
        .read_text()
        .startswith(f"# cmt_nano_{precision}_trt on Fake Orin")
    )
    with Predictor.load(made) as predictor:
        assert predictor(made.golden().sources[0]).label in made.labels
    assert verify(made).passed


def test_feature_maps_come_from_an_engine_too(gpu_machine, quick, tmp_path, capsys):
    assert (
        main(["--model", "cmt_nano", "--format", "trt", "--half", "--head", "features", "-o", str(tmp_path)])
        == 0
    )
    made = Bundle.open(tmp_path / "cmt_nano_features_fp16_trt")
    assert made.manifest.engine.golden.passed
    assert "features(batch)" in capsys.readouterr().out
    with Predictor.load(made) as predictor:
        maps = predictor.features(predictor.prepare(made.golden().sources))
    assert [m.shape for m in maps] == [o.shape for o in made.golden().outputs]


@pytest.mark.parametrize(
    ("mode", "kind"), [("crash", StepError), ("float_engine", GateError), ("wrong_logits", GateError)]
)
def test_a_failed_build_leaves_nothing(gpu_machine, quick, tmp_path, monkeypatch, mode, kind):
    out = tmp_path / "out"
    monkeypatch.setenv("FAKE_TRT", mode)
    with pytest.raises(kind):
        run(config(out, build=True))
    assert not out.exists()


def test_an_export_over_a_finished_bundle_replaces_it_whole(gpu_machine, quick, tmp_path):
    first = run(config(tmp_path, build=True))
    assert first.manifest.engine
    before = snapshot(first.path)
    again = run(config(tmp_path))
    assert again.manifest.engine is None
    assert set(snapshot(again.path)) < set(before)


def test_a_gpu_without_tensorrt(gpu_machine, tmp_path, monkeypatch):
    """Only TensorRT is missing, so only TensorRT is named."""
    monkeypatch.setattr("cmt_edge.deploy.backends.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeMissingError) as error:
        run(config(tmp_path, build=True))
    assert error.value.why == "tensorrt is not installed"


# --- accuracy -------------------------------------------------------------------------------------

ALLOWED_DROP = {"fp16": 0.1, "int8": 0.5}
LIMIT = {"fp16": 300, "int8": 300}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ALLOWED_DROP)
def test_accuracy_on_photographs(precision, cifar, tmp_path):
    """Some test images with every float16 tensor rounded; benchmarks/typed_accuracy.py prints
    the figures of all 5000."""
    data = f"{cifar}/train" if precision == "int8" else None
    weights = str(shared("weights/cmt_nano_cifar10.pt"))
    made = run(
        config(
            tmp_path,
            precision,
            weights=weights,
            data=data,
            calib_size=100 if data else None,
            eval_data=f"{cifar}/test",
            eval_limit=LIMIT[precision],
            max_drop=ALLOWED_DROP[precision],
            batch=0,
        )
    )
    check = made.manifest.verification.data
    assert check.images == LIMIT[precision]
    assert check.drop <= ALLOWED_DROP[precision]
