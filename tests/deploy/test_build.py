"""``cmt-build`` on a fake GPU: everything it does, and everything that may go wrong on a device."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

import cmt_edge.deploy.cli.build
import cmt_edge.deploy.tensorrt.building
from cmt_edge.deploy import Bundle, Predictor
from cmt_edge.deploy.bundle.sections import RanOn
from cmt_edge.deploy.cli import report
from cmt_edge.deploy.errors import BundleError, OutputError, RuntimeMissingError
from cmt_edge.deploy.measure.device_report import DeviceReport
from cmt_edge.deploy.measure.parity import verify
from helpers.bundles import SIZE, edit_manifest, make_bundle
from helpers.trt import build, forget_fakes, trt_bundle

pytestmark = pytest.mark.usefixtures("quick_builds")


@pytest.fixture
def bundle(tmp_path):
    return trt_bundle(tmp_path / "tiny_fp16_trt")


def deserialized(trace) -> int:
    return len(trace.read_text().splitlines()) if trace.exists() else 0


def engine_path(bundle):
    return bundle.path / Bundle.open(bundle.path).manifest.engine.file


def test_the_whole_job(gpu_machine, bundle, capsys):
    before = set(bundle.manifest.files)
    assert build(bundle) == 0
    out = capsys.readouterr().out
    for word in (
        "built in",
        "TensorRT 10.3.0",
        "Fake Orin, 8 multiprocessors (sm 8.7)",
        "GPU, inference alone",
        "host, image file to answer",
        "cmt-predict",
    ):
        assert word in out
    built = Bundle.open(bundle.path)
    entry = built.manifest.engine
    assert before < set(built.manifest.files)
    assert entry.key.onnx == bundle.manifest.files["model.onnx"].sha256
    assert entry.golden.passed
    report = json.loads((bundle.path / entry.report).read_text())
    assert report["benchmark"]["results"][0]["on_device"]["compute"]["count"] == 5
    assert "a weight was rounded" in report["warnings"]
    data = (bundle.path / entry.report).read_bytes()
    assert DeviceReport.from_bytes(data, entry.report).to_bytes() == data
    assert "GPU, inference alone" in (bundle.path / entry.text).read_text()
    assert built.manifest.latency.p50_ms > 0
    assert verify(built).passed
    with Predictor.load(built) as predictor:
        assert predictor.info == RanOn("tensorrt 10.3.0", "Fake Orin")
        red = np.zeros((SIZE, SIZE, 3), np.uint8)
        red[..., 0] = 255
        assert predictor(red).label == "red"


def test_the_page_shows_the_device(gpu_machine, bundle, tmp_path):
    assert build(bundle) == 0
    page = tmp_path / "page.html"
    assert report.main([str(bundle.path), "-o", str(page)]) == 0
    text = page.read_text()
    for word in (
        "Fake Orin",
        "engine, on its device",
        "clock, with copies",
        "a weight was rounded",
        "driver",
    ):
        assert word in text


def test_the_network_is_strongly_typed_and_the_options_arrive(gpu_machine, bundle):
    assert build(bundle, "--workspace", 0.5, "--level", 2, "--tf32") == 0
    header = json.loads(engine_path(bundle).read_bytes()[len(b"FAKEPLAN") :].split(b"\n", 1)[0])
    assert header["typed"]
    assert header["detailed"]
    assert (header["workspace"], header["level"], header["tf32"], header["profile"]) == (
        1 << 29,
        2,
        True,
        None,
    )


def test_defaults_leave_tf32_off_and_take_part_of_the_free_memory(gpu_machine, bundle, monkeypatch):
    """Of what the system could free, where GPU and CPU share their memory."""
    monkeypatch.setattr(cmt_edge.deploy.tensorrt.building, "read_available_memory", lambda root: 5000 << 20)
    assert build(bundle) == 0
    header = json.loads(engine_path(bundle).read_bytes()[len(b"FAKEPLAN") :].split(b"\n", 1)[0])
    assert (header["workspace"], header["level"], header["tf32"]) == (int(0.4 * (5000 << 20)), 3, False)


def test_json(gpu_machine, bundle, capsys):
    assert build(bundle, "--json") == 0
    assert json.loads(capsys.readouterr().out)["key"]["sm"] == "8.7"


def test_a_dynamic_batch_gets_a_profile(gpu_machine, tmp_path):
    bundle = trt_bundle(tmp_path / "b", batch="batch")
    assert build(bundle, "--profile", "1,2,4") == 0
    with Predictor.load(bundle.path) as predictor:
        batch = np.random.default_rng(0).normal(size=(11, 3, SIZE, SIZE)).astype(np.float32)
        with Predictor.load(bundle.path, backend="onnxruntime") as other:
            np.testing.assert_allclose(predictor.logits(batch), other.logits(batch), atol=1e-6)


def test_an_engine_that_is_still_right_is_used_again(gpu_machine, bundle, capsys):
    assert build(bundle) == 0
    first = engine_path(bundle).read_bytes()
    assert build(bundle) == 0
    assert "engine: reused" in capsys.readouterr().out
    assert engine_path(bundle).read_bytes() == first
    assert build(bundle, "--force") == 0
    assert engine_path(bundle).read_bytes() != first
    assert build(bundle, "--level", 1) == 0
    assert "replaced: the options changed" in capsys.readouterr().out
    assert len(list((bundle.path / "engines").glob("*.plan"))) == 1


CHANGES = {
    "tensorrt": ("FAKE_TRT_VERSION", "11.0.0.114"),
    "driver": ("FAKE_CUDA_DRIVER", "12080"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_stale_engine_is_not_loaded_but_built_again(gpu_machine, bundle, capsys, monkeypatch, what):
    assert build(bundle) == 0
    monkeypatch.setenv(*CHANGES[what])
    forget_fakes()
    seen = deserialized(gpu_machine)
    with pytest.raises(RuntimeMissingError, match="does not fit this device") as error:
        Predictor.load(bundle.path)
    assert what in str(error.value)
    assert "cmt-build" in error.value.remedy
    assert deserialized(gpu_machine) == seen
    assert build(bundle) == 0
    assert f"replaced: {what}: built for" in capsys.readouterr().out
    Predictor.load(bundle.path).close()


def test_an_engine_of_another_machine_is_not_loaded_but_built_again(
    gpu_machine, bundle, capsys, monkeypatch, tmp_path
):
    assert build(bundle) == 0
    monkeypatch.setenv("CMT_EDGE_STATE", str(tmp_path / "elsewhere"))
    seen = deserialized(gpu_machine)
    with pytest.raises(RuntimeMissingError, match="not built on this machine"):
        Predictor.load(bundle.path)
    assert deserialized(gpu_machine) == seen
    assert build(bundle) == 0
    assert "replaced: the engine in the bundle was not built on this machine" in capsys.readouterr().out


def test_an_engine_that_is_not_what_the_manifest_says(gpu_machine, bundle):
    """A class less in the manifest than in the engine: the answer would have no label."""
    assert build(bundle) == 0

    def forget_a_class(content):
        content["labels"].pop()
        content["model"]["num_classes"] -= 1
        content["outputs"][0]["shape"][1] -= 1

    edit_manifest(bundle, forget_a_class)
    with pytest.raises(BundleError, match="the graph's outputs are not what the manifest says") as error:
        Predictor.load(bundle.path)
    assert "the graph has logits float32 (1, 3); the manifest says logits float32 (1, 2)" in error.value.why


def test_a_forged_entry_is_not_loaded(gpu_machine, bundle):
    """Whoever can write the manifest can make all hashes agree, but not the seal."""
    assert build(bundle) == 0
    opened = Bundle.open(bundle.path)
    evil = engine_path(bundle).read_bytes().replace(b'"level": 3', b'"level": 4')
    manifest = opened.manifest
    entry = replace(manifest.engine, file="engines/evil.plan")
    opened.update(replace(manifest, engine=entry), {"engines/evil.plan": evil})
    seen = deserialized(gpu_machine)
    with pytest.raises(RuntimeMissingError, match="not built on this machine"):
        Predictor.load(bundle.path)
    assert deserialized(gpu_machine) == seen


def test_a_tampered_engine_is_refused_before_it_is_deserialised(gpu_machine, bundle):
    assert build(bundle) == 0
    opened = Bundle.open(bundle.path)
    path = engine_path(bundle)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    seen = deserialized(gpu_machine)
    with pytest.raises(BundleError, match="SHA-256"):
        Predictor.load(bundle.path)
    with pytest.raises(BundleError, match="the engine was changed"):  # after the bundle was opened
        Predictor.load(opened)
    assert build(bundle) == 2
    assert deserialized(gpu_machine) == seen


def test_where_graphs_cannot_be_captured_the_report_says_so(gpu_machine, bundle, capsys, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA", "no_capture")
    assert build(bundle) == 0
    assert "no CUDA graph, each inference is enqueued" in capsys.readouterr().out


def test_an_unusable_timing_cache_is_replaced(gpu_machine, bundle, tmp_path):
    assert build(bundle) == 0
    (cache,) = (tmp_path / "cache" / "timing").iterdir()
    first = cache.read_bytes()
    assert build(bundle, "--force") == 0
    assert cache.read_bytes() == first + b"+", "the second build started from the first one's timings"
    cache.write_bytes(b"of another version")
    assert build(bundle, "--force") == 0
    assert cache.read_bytes() == first


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--workspace", "0"), "--workspace"),
        (("--workspace", "nan"), "--workspace"),
        (("--level", "6"), "give 0 to 5"),
        (("--profile", "1,2"), "three batch sizes"),
        (("--profile", "2,2,8"), "MIN 1"),
        (("--profile", "1,9,8"), "OPT <= MAX"),
        (("--profile", "a,b,c"), "three"),
        (("--profile", "1,\u00b2,8"), "not a whole number"),  # a digit by str.isdigit
        (("--profile", "1,1,99999"), "is too large"),
        (("--profile", "1,2,4"), "takes batches of 1"),
        (("--device", "\u00b2"), "number of a GPU"),
        (("--device", "9" * 5000), "number of a GPU"),
        (("--time-limit", "0"), "--time-limit"),
        (("--time-limit", "inf"), "--time-limit"),
        (("--time-limit", "nan"), "--time-limit"),
        (("--atol", "-1"), "--atol"),
        (("--device", "one"), "number of a GPU"),
    ],
)
def test_bad_flags(gpu_machine, bundle, capsys, flags, word):
    try:
        code = build(bundle, *flags)
    except SystemExit as exc:  # argparse refuses what is no finite number
        code = exc.code
    assert code == 2
    assert word in capsys.readouterr().err


def test_a_gpu_that_is_not_there(gpu_machine, bundle, capsys):
    assert build(bundle, "--device", "3") == 3
    assert "there is no GPU 3" in capsys.readouterr().err


def test_a_bundle_for_another_runtime(gpu_machine, tmp_path, capsys):
    assert build(make_bundle(tmp_path / "b")) == 2
    assert "--format trt" in capsys.readouterr().err


def test_trtexec_is_printed_without_a_gpu(tmp_path, capsys):
    bundle = trt_bundle(tmp_path / "b", batch="batch")
    assert (
        cmt_edge.deploy.cli.build.main(
            [str(bundle.path), "--trtexec", "--workspace", "2", "--profile", "1,4,16"]
        )
        == 0
    )
    line = capsys.readouterr().out
    for part in (
        "--stronglyTyped",
        "--noTF32",
        "--memPoolSize=workspace:2048M",
        f"--maxShapes=input:16x3x{SIZE}x{SIZE}",
    ):
        assert part in line


def test_without_tensorrt_the_error_names_what_is_missing(bundle, capsys):
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine may have TensorRT")
    assert cmt_edge.deploy.cli.build.main([str(bundle.path)]) == 3
    error = capsys.readouterr().err
    assert "tensorrt is not installed" in error
    assert "NVIDIA GPU" in error


def test_a_bundle_without_an_engine_runs_in_onnxruntime(bundle):
    assert verify(bundle, backend="onnxruntime").passed


def test_update_never_replaces_a_file(bundle):
    with pytest.raises(ValueError, match="would be replaced"):
        bundle.update(bundle.manifest, {"model.onnx": b"another"})


def test_nothing_is_imported_from_the_current_folder(gpu_machine, bundle, tmp_path, monkeypatch):
    (tmp_path / "stick").mkdir()
    (tmp_path / "stick" / "tensorrt.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path / "stick")
    assert build(bundle) == 0
    assert not (tmp_path / "ran").exists()


def test_a_relative_bundle_and_cache(gpu_machine, bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CMT_EDGE_CACHE", "here")
    forget_fakes()
    assert cmt_edge.deploy.cli.build.main([bundle.path.name]) == 0
    assert list((tmp_path / "here" / "timing").iterdir())


def test_another_gpu(gpu_machine, bundle, monkeypatch):
    monkeypatch.setenv("FAKE_GPUS", "2")
    assert build(bundle, "--device", "1") == 0
    assert json.loads(engine_path(bundle).read_bytes()[len(b"FAKEPLAN") :].split(b"\n", 1)[0])["device"] == 1
    with Predictor.load(bundle.path, device="1") as predictor:
        predictor(np.zeros((SIZE, SIZE, 3), np.uint8))


@pytest.mark.parametrize(("mode", "code"), [("float_engine", 1), ("no_types", 4)])
def test_a_dynamic_engine_is_not_taken_on_trust(gpu_machine, tmp_path, monkeypatch, capsys, mode, code):
    monkeypatch.setenv("FAKE_TRT", mode)
    assert build(trt_bundle(tmp_path / "b", batch="batch")) == code
    assert "fp16" in capsys.readouterr().err


def test_output_error_is_an_input_error():
    assert OutputError.exit_code == 2
