"""``cmt-build`` where something fails: the bundle stays as it was, and the error names what to do."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

import cmt_edge.deploy.bundle.bundle
import cmt_edge.deploy.bundle.manifest
import cmt_edge.deploy.cli.build
import cmt_edge.deploy.tensorrt.build
import cmt_edge.deploy.tensorrt.building
from cmt_edge.deploy import Bundle, Predictor
from cmt_edge.deploy.bundle import make_plain
from cmt_edge.deploy.children import Child
from cmt_edge.deploy.errors import BundleError, RuntimeMissingError, StepError
from cmt_edge.deploy.files import hash_file
from cmt_edge.deploy.locks import TEMPORARY
from cmt_edge.deploy.tensorrt import builder
from cmt_edge.deploy.tensorrt.engine import BuildRequest
from helpers.bundles import SIZE, snapshot
from helpers.paths import ROOT
from helpers.running import is_running
from helpers.trt import build, forget_fakes, trt_bundle

pytestmark = pytest.mark.usefixtures("quick_builds")


@pytest.fixture
def bundle(tmp_path):
    return trt_bundle(tmp_path / "tiny_fp16_trt")


FAILURES = {
    "parser_error": (4, "parser refused model.onnx", "Fancy"),
    "no_memory": (4, "out of memory", "--workspace"),
    "nothing": (4, "built no engine", "--trtexec"),
    "crash": (4, "SIGABRT", "segmentation fault in tactic"),
    "killed": (4, "out of memory", "SIGKILL"),
    "float_engine": (1, "fp16 was asked for, but only 0 %", "nothing was kept"),
    "wrong_logits": (1, "logits differ from the reference by 5", "--atol"),
    "no_context": (3, "does not fit the free memory", "--workspace"),
    "no_inspection": (4, "names its layers only", "verbosity"),
}


@pytest.mark.parametrize("mode", FAILURES)
def test_a_failure_leaves_the_bundle_as_it_was(gpu_machine, bundle, capsys, monkeypatch, mode, tmp_path):
    before = snapshot(bundle.path)
    monkeypatch.setenv("FAKE_TRT", mode)
    code, *words = FAILURES[mode]
    assert build(bundle) == code
    error = capsys.readouterr().err
    for word in words:
        assert word in error
    assert snapshot(bundle.path) == before
    assert not (bundle.path / "engines").exists()
    assert not list((tmp_path / "cache" / "build").iterdir())
    monkeypatch.delenv("FAKE_TRT")
    assert build(bundle) == 0


def test_a_failed_rebuild_keeps_the_engine(gpu_machine, bundle, monkeypatch):
    assert build(bundle) == 0
    before = snapshot(bundle.path)
    monkeypatch.setenv("FAKE_TRT", "crash")
    assert build(bundle, "--force") == 4
    assert snapshot(bundle.path) == before
    Predictor.load(bundle.path).close()


def test_a_build_that_takes_too_long_is_stopped(gpu_machine, bundle, capsys, monkeypatch):
    monkeypatch.setenv("FAKE_TRT", "slow")
    start = time.monotonic()
    assert build(bundle, "--time-limit", 3) == 4
    assert time.monotonic() - start < 15
    assert "did not end within 3 s" in capsys.readouterr().err


CUDA_FAILURES = {
    "old_driver": (3, "older than this CUDA"),
    "no_device": (3, "no device"),
    "no_memory": (4, "CUDA error 2"),
}


@pytest.mark.parametrize("mode", CUDA_FAILURES)
def test_cuda_failures_are_typed(gpu_machine, bundle, capsys, monkeypatch, mode):
    monkeypatch.setenv("FAKE_CUDA", mode)
    code, word = CUDA_FAILURES[mode]
    assert build(bundle) == code
    assert word in capsys.readouterr().err


def test_power_loss_between_engine_and_manifest(gpu_machine, bundle, monkeypatch):
    """The manifest comes last: until then the folder is the old bundle, and the next build clears what was
    left."""

    class PowerLoss(BaseException):
        pass

    def write(path, data, *mode):
        if path.name == "manifest.json":
            raise PowerLoss
        real(path, data, *mode)

    real = cmt_edge.deploy.bundle.bundle.write_atomic
    monkeypatch.setattr(cmt_edge.deploy.bundle.bundle, "write_atomic", write)
    with pytest.raises(PowerLoss):
        build(bundle)
    left = list((bundle.path / "engines").iterdir())
    assert any(p.suffix == ".plan" for p in left)
    (bundle.path / "engines" / f".engine.plan.1234abcd{TEMPORARY}").write_bytes(b"half an engine")
    assert Bundle.open(bundle.path).manifest.engine is None
    with pytest.raises(RuntimeMissingError, match="no TensorRT engine yet"):
        Predictor.load(bundle.path)
    monkeypatch.setattr(cmt_edge.deploy.bundle.bundle, "write_atomic", real)
    assert build(bundle) == 0
    assert {p.name for p in (bundle.path / "engines").iterdir()} == {
        name.split("/")[1] for name in Bundle.open(bundle.path).manifest.files if name.startswith("engines/")
    }


def builders_of(process) -> list[int]:
    """Process ids of its builders, once there are some."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        listing = subprocess.run(
            ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(process.pid)],
            capture_output=True,
            text=True,
            check=False,
        )
        if found := [
            int(line.split()[0]) for line in listing.stdout.splitlines() if "tensorrt.builder" in line
        ]:
            return found
        time.sleep(0.1)
    raise AssertionError("no builder was started")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_build_stops_its_child(gpu_machine, bundle, sent):
    before = snapshot(bundle.path)
    code = f"from cmt_edge.deploy.cli.build import main; raise SystemExit(main([{str(bundle.path)!r}]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"FAKE_TRT": "slow"}, stderr=subprocess.PIPE
    )
    children = builders_of(process)
    process.send_signal(sent)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 128 + sent
    assert b"interrupted" in error
    assert not any(is_running(child) for child in children)
    assert snapshot(bundle.path) == before


def test_one_build_at_a_time(gpu_machine, bundle, capsys):
    with cmt_edge.deploy.tensorrt.build.exclusive(bundle.path):
        assert build(bundle) == 2
        assert build(bundle) == 2, "a refused build must not open the way for the next"
    assert "another build of this bundle is running" in capsys.readouterr().err
    assert build(bundle) == 0


def test_a_folder_that_cannot_be_written_is_found_out_first(gpu_machine, bundle, capsys, monkeypatch):
    monkeypatch.setattr(cmt_edge.deploy.tensorrt.build.os, "access", lambda *_: False)
    assert build(bundle) == 2
    assert "copy the bundle to a writable folder" in capsys.readouterr().err


def test_a_secret_that_cannot_be_kept(gpu_machine, bundle, capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CMT_EDGE_STATE", str(tmp_path / "file" / "state"))
    assert build(bundle) == 2
    assert "CMT_EDGE_STATE" in capsys.readouterr().err


def test_whatever_fails_in_the_builder_is_a_typed_error(gpu_machine, tmp_path):
    request = BuildRequest(
        format="trt",
        onnx=str(tmp_path / "gone.onnx"),
        sha256="0" * 64,
        plan=str(tmp_path / "engine.plan"),
        layers=None,
        timing_folder=str(tmp_path),
        timing_key="k",
        input="input",
        shape=("batch", 3, SIZE, SIZE),
        workspace=1 << 20,
        level=0,
        tf32=False,
        profile=(1, 1, 8),
        device=0,
        compute=(),
        aux_streams=None,
        memory=None,
    )
    with Child(cmt_edge.deploy.tensorrt.building.BUILDER) as child:
        with pytest.raises(BundleError, match="cannot be read") as error:
            child.request("build", **make_plain(request))
        assert error.value.exit_code == 2
        (tmp_path / "gone.onnx").write_bytes(b"another graph")
        with pytest.raises(BundleError, match="was changed after the bundle was opened"):
            child.request("build", **make_plain(request))
        damaged = replace(request, sha256=hash_file(tmp_path / "gone.onnx"))
        with pytest.raises(StepError, match="DecodeError") as failed:
            child.request("build", **make_plain(damaged))
        assert "--trtexec" in failed.value.remedy


def test_a_request_that_is_none_is_a_typed_error(gpu_machine):
    with Child(cmt_edge.deploy.tensorrt.building.BUILDER) as child:
        with pytest.raises(StepError, match="do not understand each other") as error:
            child.request("build", onnx="model.onnx")
        assert error.value.why.startswith("the request lacks entries: format, sha256, plan,")


def test_a_builder_ends_with_its_caller(gpu_machine, bundle, tmp_path):
    """Also where the caller had no chance to stop it: the pipe it held breaks."""
    code = f"from cmt_edge.deploy.cli.build import main; raise SystemExit(main([{str(bundle.path)!r}]))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"FAKE_TRT": "slow"})
    children = builders_of(process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(is_running(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(child) for child in children)


def test_a_crash_after_the_work_is_done_costs_nothing(gpu_machine, bundle, monkeypatch):
    monkeypatch.setenv("FAKE_TRT", "crash_at_end")
    assert build(bundle) == 0


def test_timings_that_cannot_be_kept_cost_nothing(gpu_machine, bundle, tmp_path, capsys):
    assert build(bundle) == 0
    (cache,) = (tmp_path / "cache" / "timing").iterdir()
    cache.unlink()
    (cache / "in the way").mkdir(parents=True)
    assert build(bundle, "--force") == 0
    assert "the timings could not be kept" in capsys.readouterr().out


def test_a_bundle_that_is_replaced_meanwhile(gpu_machine, bundle, capsys, monkeypatch):
    def finish(*args, **options):
        result = real(*args, **options)
        shutil.rmtree(bundle.path)
        trt_bundle(bundle.path, half=False)
        return result

    real = cmt_edge.deploy.cli.build.finish_bundle
    monkeypatch.setattr(cmt_edge.deploy.cli.build, "finish_bundle", finish)
    assert build(bundle) == 2
    assert "changed meanwhile" in capsys.readouterr().err
    assert Bundle.open(bundle.path).manifest.precision == "fp32"


def test_a_graph_that_changes_under_the_builder(gpu_machine, bundle):
    opened = Bundle.open(bundle.path)
    with open(bundle.path / "model.onnx", "ab") as file:
        file.write(b"x")
    with pytest.raises(BundleError, match="changed after the bundle was opened"):
        cmt_edge.deploy.tensorrt.build.finish_bundle(opened, cmt_edge.deploy.tensorrt.build.EngineOptions())


def test_a_tensorrt_that_cannot_be_loaded(bundle, capsys, monkeypatch, tmp_path):
    (tmp_path / "tensorrt.py").write_text(
        "raise ImportError('libnvdla_compiler.so: cannot open shared object file')"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert build(bundle) == 3
    error = capsys.readouterr().err
    assert "installed but cannot be loaded" in error
    forget_fakes()


@pytest.mark.parametrize(
    "entry",
    [
        [],
        {"file": ["x"]},
        {"file": "x", "seal": "é"},
        {"file": "x", "seal": "s", "report": "r", "text": "t"},
        "x",
    ],
)
def test_an_engine_entry_that_is_none(bundle, entry):
    content = json.loads((bundle.path / "manifest.json").read_text()) | {"engine": entry}
    content["checksum"] = cmt_edge.deploy.bundle.manifest.hash_content(content)
    (bundle.path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(BundleError, match="engine"):
        Bundle.open(bundle.path)


def test_a_damaged_secret(gpu_machine, bundle, tmp_path, capsys):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "machine.key").write_bytes(b"")
    (tmp_path / "state" / "machine.key").chmod(0o600)
    assert build(bundle) == 2
    assert "0 bytes instead of 32; delete it" in capsys.readouterr().err


@pytest.mark.parametrize("reused", [False, True])
def test_what_killed_builds_left_goes_with_the_next(gpu_machine, bundle, tmp_path, reused):
    """Also where the engine is still right, so that nothing is built."""
    if reused:
        assert build(bundle) == 0
    left = tmp_path / "cache" / "build" / f"build.killed{TEMPORARY}"
    users = tmp_path / "cache" / "build" / "build.notes.tmp"
    for folder in (left, users):
        folder.mkdir(parents=True)
    assert build(bundle) == 0
    assert not left.exists()
    assert users.exists()


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_a_graph_that_the_builder_cannot_read_is_an_input_error(monkeypatch, tmp_path, fault):
    def fail(*_):
        raise OSError(fault, os.strerror(fault))

    (tmp_path / "model.onnx").write_bytes(b"x")
    monkeypatch.setattr(builder, "read_regular", fail)
    with pytest.raises(BundleError, match="cannot be read") as error:
        builder.read_graph(tmp_path / "model.onnx")
    assert error.value.exit_code == 2
    assert os.strerror(fault) in str(error.value)
