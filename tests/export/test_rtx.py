"""``--format rtx``: real engines without a GPU where the package is installed, and typed errors where not."""

from __future__ import annotations

import json
from dataclasses import replace

import onnx
import pytest

from cmt_edge.cmt import list_models
from cmt_edge.deploy import Bundle
from cmt_edge.deploy.bundle import COMPILED, PORTABLE_ENGINE
from cmt_edge.deploy.bundle.sections import CompiledEntry, EstimateEntry
from cmt_edge.deploy.errors import InputError
from cmt_edge.deploy.measure.parity import verify
from cmt_edge.export import ExportConfig, run
from cmt_edge.export.blocks import name_block
from cmt_edge.export.cli import main
from cmt_edge.export.rtx import explain_slower_int8
from helpers.rtx_parser import needs_rtx

pytestmark = pytest.mark.usefixtures("one_trace")

PRECISIONS = ("fp32", "fp16", "int8")


def config(output, precision="fp16", model="cmt_nano", **changes) -> ExportConfig:
    settings = {"format": "rtx", "precision": precision, "output": str(output)}
    settings |= {"data": "generated", "calib_size": 8} if precision == "int8" else {}
    return ExportConfig(model, **(settings | changes))


@pytest.fixture(scope="module", params=PRECISIONS)
def bundle(request, tmp_path_factory) -> Bundle:
    return run(config(tmp_path_factory.mktemp("rtx"), request.param))


@needs_rtx
def test_a_bundle_holds_the_engine_and_the_compilers_verdict(bundle):
    opened = Bundle.open(bundle.path)
    compiled = opened.manifest.compiled
    assert opened.manifest.engine is opened.manifest.latency is None
    assert compiled.engine == PORTABLE_ENGINE
    assert compiled.engine_bytes == opened.file(PORTABLE_ENGINE).stat().st_size
    assert compiled.sync_nodes == 0
    softmaxes = [n for n in onnx.load(opened.file("model.onnx")).graph.node if n.op_type == "Softmax"]
    assert compiled.attentions == len(softmaxes)
    assert compiled.activation_bytes == sum(block.activation_bytes for block in compiled.blocks)
    assert {"stem.0", "stages.2.blocks.1", "head"} <= {block.name for block in compiled.blocks}
    low = {"fp32": "fp32", "fp16": "fp16", "int8": "int8"}[opened.manifest.precision]
    assert any(types.startswith(low) for types in compiled.types)


@needs_rtx
def test_the_list_of_kernels_is_that_of_the_summary(bundle):
    kernels = json.loads(bundle.file(COMPILED).read_text())["kernels"]
    compiled = bundle.manifest.compiled
    assert sum(k["reads"] + k["writes"] for k in kernels) == compiled.activation_bytes
    assert len(kernels) == compiled.kernel_count + compiled.sync_nodes
    names = {node.name for node in onnx.load(bundle.file("model.onnx")).graph.node}
    assert {node for kernel in kernels for node in kernel["nodes"]} <= names


@needs_rtx
def test_the_graph_is_verified_as_for_tensorrt(bundle):
    assert bundle.manifest.verification.golden.passed
    assert f"typed {bundle.manifest.precision}" in bundle.manifest.verification.steps
    assert verify(bundle, backend="onnxruntime").passed


@needs_rtx
def test_the_report_tells_what_the_compiler_made(tmp_path, capsys):
    flags = ["--compute-capability", "86,8.9", "-o", str(tmp_path)]
    assert main(["--model", "cmt_nano", "--format", "tensorrt_rtx", "--half", *flags]) == 0
    out = capsys.readouterr().out
    assert "for compute capability 8.6, 8.9" in out
    assert "cmt-build cmt_nano_fp16_rtx" in out
    page = (tmp_path / "cmt_nano_fp16_rtx" / "report.md").read_text()
    assert "## What the compiler made of it" in page
    assert "stages.3.blocks.0" in page
    assert json.loads((tmp_path / "cmt_nano_fp16_rtx" / "report.json").read_text())["compiled"]["kernels"]


@needs_rtx
def test_a_dynamic_batch_and_feature_maps(tmp_path):
    made = run(config(tmp_path, batch=0, head="features"))
    assert made.manifest.compiled.kernel_count > 50


@needs_rtx
@pytest.mark.giant
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", list_models())
def test_every_model_is_parsed_and_built(name, precision, tmp_path):
    made = run(config(tmp_path, precision, name, weights="random", atol=1e9))
    assert made.manifest.compiled.kernel_count > 50


# --- int8 that pays, or an honest no --------------------------------------------------------------


def summary(megabytes: float, kernels: int, types: dict[str, int] | None = None) -> CompiledEntry:
    """What a compiler made of a graph whose kernels each move the same number of bytes."""
    size = int(1e6 * megabytes)
    estimate = EstimateEntry(gpu="any", total_ms=megabytes, memory_ms=megabytes, arithmetic_ms=0, launch_ms=0)
    return CompiledEntry(
        product="tensorrt_rtx",
        version="1",
        targets=(),
        seconds=None,
        engine=None,
        engine_bytes=1,
        kernels={"kgen": kernels},
        sync_nodes=0,
        fused=0,
        attention=0,
        conversions=0,
        types=types or {},
        activation_bytes=size,
        weight_bytes=0,
        blocks=(),
        estimates=(estimate,),
        details=None,
    )


def test_int8_that_moves_more_is_called_slower():
    note = explain_slower_int8(summary(162, 415, {"int8 -> fp32": 70}), summary(84.3, 318))
    assert note.startswith("int8 would be slower here, because its kernels read and write 162.0 MB")
    assert "84.3 MB" in note
    assert "415 instead of 318" in note
    assert "70 of its products read int8 and write float32" in note


def test_int8_that_moves_less_is_not():
    assert explain_slower_int8(summary(60, 300), summary(84.3, 318)) == ""


def test_all_gpus_must_agree():
    fast = summary(60, 300).estimates
    slow = summary(162, 415)
    mixed = replace(slow, estimates=(*slow.estimates, *fast))
    other = summary(84.3, 318)
    assert explain_slower_int8(mixed, replace(other, estimates=other.estimates * 2)) == ""


@needs_rtx
def test_the_export_says_that_int8_would_be_slower(bundle):
    notes = bundle.manifest.compiled.notes
    if bundle.manifest.precision == "int8":
        assert notes[0].startswith("int8 would be slower here")
        assert notes[0] in (bundle.path / "report.md").read_text()
    else:
        assert notes == ()


@needs_rtx
def test_auto_chooses_by_the_compilers_figures(tmp_path):
    made = run(config(tmp_path, "auto", data="generated", calib_size=4))
    assert made.path.name == "cmt_nano_fp16_rtx"
    assert made.manifest.compiled.notes[0].startswith("auto chose fp16 by the compiler's figures")


def test_without_the_package_it_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cmt_edge.deploy.backends.util.find_spec", lambda name: None)
    assert main(["--model", "cmt_nano", "--format", "rtx", "--half", "-o", str(tmp_path / "out")]) == 3
    error = capsys.readouterr().err
    assert "tensorrt_rtx is not installed" in error
    assert 'pip install "cmt-edge[rtx]"' in error
    assert not (tmp_path / "out").exists()


def test_without_an_engine_it_needs_no_package(tmp_path, monkeypatch):
    monkeypatch.setattr("cmt_edge.deploy.backends.util.find_spec", lambda name: None)
    made = run(config(tmp_path, build=False))
    assert made.manifest.compiled is None
    assert PORTABLE_ENGINE not in made.manifest.files


BAD = [
    ({"compute_capability": "86,77"}, "unknown compute capability '77'"),
    ({"compute_capability": "Ada"}, "unknown compute capability 'Ada'"),
    ({"device": "0"}, "builds without a GPU"),
    ({"precision": "bf16"}, "has no bf16"),
    ({"precision": "auto", "data": "generated", "time_budget": 5.0}, "auto measures nothing"),
    ({"precision": "auto", "data": "generated", "build": False}, "--no-build leaves out"),
    ({"precision": "auto"}, "auto needs calibration images"),
    ({"format": "trt", "compute_capability": "86"}, "is for --format rtx"),
    ({"format": "onnx", "precision": "fp32", "compute_capability": "86"}, "only --format trt or rtx"),
]


@pytest.mark.parametrize(("changes", "words"), BAD)
def test_what_does_not_go_together(tmp_path, changes, words):
    with pytest.raises(InputError) as error:
        run(config(tmp_path, **changes))
    assert words in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("module", "block"),
    [
        ("stages.2.blocks.5.ffn.expand", "stages.2.blocks.5"),
        ("stages.0.embed", "stages.0"),
        ("stem.0", "stem.0"),
        ("head.fc", "head"),
        ("norm", "norm"),
    ],
)
def test_blocks_are_named_by_their_modules(module, block):
    assert name_block(module) == block
