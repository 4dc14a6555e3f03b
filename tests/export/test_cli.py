"""The command cmt-export: output, exit codes, messages, interruption."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cmt_edge.calib.generated import generate
from cmt_edge.cmt import create_model, list_models
from cmt_edge.deploy import Bundle
from cmt_edge.deploy import backends as backends_module
from cmt_edge.deploy.cli import bench, verify
from cmt_edge.export import pipeline
from cmt_edge.export.cli import main
from cmt_edge.export.replaced import Replaced, describe_replaced
from helpers.cli import failed, succeeded
from helpers.exports import NAME, OWN, content, saved_nano
from helpers.images import coloured, folder_of, labelled

pytestmark = pytest.mark.usefixtures("one_trace")


def test_list_models(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # lines and tables that are too long are folded
    lines = succeeded(capsys, "--list-models").splitlines()
    assert [line.split()[0] for line in lines[2:]] == list_models()
    assert any("81.8" in line and "1.55" in line and "15.2" in line for line in lines)
    described = json.loads(succeeded(capsys, "--list-models", "--json"))
    assert [m["name"] for m in described] == list_models()
    assert described[2]["img_size"] == 192


def test_the_list_says_where_to_choose(capsys):
    assert main(["--list-models"]) == 0
    assert "docs/which-model.md" in capsys.readouterr().err
    assert main(["--list-models", "--json"]) == 0
    assert not capsys.readouterr().err


def test_export_prints_what_to_do_next(capsys, tmp_path):
    out = succeeded(capsys, "--model", "cmt_nano", "-o", tmp_path)
    path = tmp_path / NAME
    Bundle.open(path)
    assert f"bundle: {path}" in out
    for command in (f"cmt-predict {path} IMAGE", f"cmt-bench {path}", f"cmt-verify {path} --data"):
        assert command in out.split("next:")[1]
    assert "fuse" in out
    assert "top-1: not measured" in out
    assert "ran as: fp32" in out


def test_export_as_json(capsys, tmp_path):
    """Some calibration images are judged, too, which a warning says."""
    images = labelled(tmp_path / "images", ["cat", "dog"], 3)
    folder_of(tmp_path / "calibration", {"any": generate(5, 64)})
    shutil.copytree(images / "dog", tmp_path / "calibration" / "dogs")
    out = succeeded(
        capsys,
        "--model",
        "cmt_nano",
        "--int8",
        "--data",
        tmp_path / "calibration",
        "--eval-data",
        images,
        "--max-drop",
        100,
        "-o",
        tmp_path / "out",
        "--json",
    )
    result = json.loads(out)
    assert Bundle.open(result["bundle"]).manifest.precision == result["precision"] == "int8"
    assert result["calibration"]["images"] == 8
    assert result["verification"]["data"]["images"] == 6
    warning = "3 of the 8 calibration images are among the 6 of --eval-data"
    assert any(note.startswith(warning) for note in result["verification"]["notes"])
    assert result["bytes"] > 1e6
    assert result["latency"]["p50_ms"] > 0


def pasted(out: str) -> list[list[str]]:
    """The commands below ``next:`` that can be pasted as they stand."""
    lines = out.split("next:\n")[1].splitlines()
    return [shlex.split(line) for line in itertools.takewhile(lambda line: line.startswith("  "), lines)]


@pytest.mark.parametrize("evaluated", [True, False])
def test_what_is_printed_next_works_as_it_stands(capsys, tmp_path, evaluated):
    """In a folder whose name a shell would take apart, after a training run: the weights are a file."""
    folder = tmp_path / "it's a $place"
    folder.mkdir()
    weights = saved_nano(folder / "best 1.pt", ["ant", "bee"])
    images = labelled(folder / "images", ["ant", "bee"], 3)
    more = ["--eval-data", images, "--eval-limit", 4, "--max-drop", 100] if evaluated else []
    argv = ["--model", "cmt_nano", "--num-classes", 2, "--weights", weights, "--format", "onnx", *more]
    out = succeeded(capsys, *argv, "-o", folder / "out")
    (images / "ant" / "new.png").write_bytes(coloured("red"))  # its answer is not recorded
    mains = {"cmt-bench": bench.main, "cmt-verify": verify.main}
    commands = pasted(out)
    assert [command[0] for command in commands] == ["cmt-bench", "cmt-verify"]
    if not evaluated:
        own = next(line for line in out.splitlines() if "LABELLED_IMAGES" in line)
        commands.append(shlex.split(own.replace("LABELLED_IMAGES", shlex.quote(str(images)))))
        commands[-1] += ["--max-drop", "100"]
    for name, *arguments in commands:
        short = ["--iters", "3", "--seconds", "0.01"] if name == "cmt-bench" else []
        assert mains[name]([*arguments, *short]) == 0, capsys.readouterr().err
    assert "reference: torch" in capsys.readouterr().out


def test_verify_tries_the_recorded_checkpoint_in_this_folder(capsys, tmp_path, monkeypatch):
    weights = saved_nano(tmp_path / "best.pt", ["ant", "bee"])
    argv = ["--model", "cmt_nano", "--num-classes", 2, "--weights", weights, "--format", "onnx"]
    succeeded(capsys, *argv, "-o", tmp_path)
    images = labelled(tmp_path / "images", ["ant", "bee"], 2)
    command = [str(tmp_path / "cmt_nano_fp32_onnx"), "--data", str(images)]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert verify.main(command) == 2
    assert "--weights PATH" in capsys.readouterr().err
    saved_nano(tmp_path / "elsewhere" / "best.pt", ["ant", "bee"], seed=5)
    assert verify.main(command) == 2
    assert "not the weights that the bundle was made from" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert verify.main(command) == 0, capsys.readouterr().err


# --- one folder, several models ------------------------------------------------------------------


def test_two_models_of_one_folder_have_a_word_about_the_replaced_one(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    source = (
        "from torch import nn\n"
        "def small():\n"
        "    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1),"
        " nn.Flatten(), nn.Linear(8, 2))\n"
        "    net.img_size = 32\n"
        "    return net\n"
    )
    (tmp_path / "sub").mkdir()
    for name in ("sub/net.py", "sub_net.py"):
        (tmp_path / name).write_text(source)
    argv = ("--format", "onnx", "--weights", "random", "-o", "out", "--model")
    assert "replaced:" not in succeeded(capsys, *argv, "sub/net.py:small")
    out = succeeded(capsys, *argv, "sub_net.py:small")
    assert "replaced: the bundle of another model, sub/net.py:small (--name NAME keeps both)" in out
    assert "replaced: a bundle of the same model" in succeeded(capsys, *argv, "sub_net.py:small")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["sub_net.py_small_fp32_onnx"]


def test_one_file_by_two_paths_is_one_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = SimpleNamespace(manifest=make_manifest("./sub/net.py:small"))
    for name in ("sub/net.py:small", str(tmp_path / "sub/../sub/net.py:small")):
        assert "of the same model" in describe_replaced(Replaced(name, "random", "1"), made)
    for name in ("net.py:small", "sub/net.py:large", "sub.net:small", "cmt_nano"):
        assert "the bundle of another model" in describe_replaced(Replaced(name, "random", "1"), made)


def make_manifest(name: str) -> SimpleNamespace:
    weights = SimpleNamespace(source="random", sha256="1")
    return SimpleNamespace(model=SimpleNamespace(name=name, weights=weights))


def test_a_warning_is_printed_once(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own.py").write_text(OWN)
    data = labelled(tmp_path / "eval", ["class_0", "class_1"], 1)
    argv = ("--model", "own.py:small", "--imgsz", 32, "--format", "onnx", "--eval-data", data)
    lines = succeeded(capsys, *argv, "--max-drop", 100).splitlines()
    warnings = [line for line in lines if line.startswith("warning:")]
    assert any("too few" in line or "REFERENCE" in line for line in warnings)
    assert len(set(warnings)) == len(warnings)


def test_what_was_not_read_is_told_without_images(capsys, tmp_path):
    path = saved_nano(tmp_path / "a.pth", [f"c{i}" for i in range(10)])
    torch.save(torch.load(path, weights_only=True) | {"rng": np.random.default_rng(0)}, path)
    argv = ("--model", "cmt_nano", "--imgsz", 64, "--format", "onnx", "-o", tmp_path, "--weights", path)
    out = succeeded(capsys, *argv)
    assert out.count("not read, because that would run its code: numpy.random") == 1


def test_two_checkpoints_of_one_model_have_two_names_or_a_word_about_the_replaced_one(capsys, tmp_path):
    first, second = (saved_nano(tmp_path / f"{name}.pth", seed=seed) for seed, name in enumerate("ab"))
    argv = ("--model", "cmt_nano", "--format", "onnx", "-o", tmp_path / "out", "--weights")
    assert "replaced:" not in succeeded(capsys, *argv, first)
    assert "replaced:" not in succeeded(capsys, *argv, second, "--name", "second")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "cmt_nano_fp32_onnx",
        "second_fp32_onnx",
    ]
    out = succeeded(capsys, *argv, second)
    assert "replaced: a bundle of the same model with other weights, a.pth (--name NAME keeps both)" in out
    result = json.loads(succeeded(capsys, *argv, first, "--json"))
    assert result["replaced"]["weights"] == "b.pth"
    manifest = tmp_path / "out" / "second_fp32_onnx" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"cmt_nano"', '"cmt_nanu"'))
    out = succeeded(capsys, *argv, second, "--name", "second")
    assert "replaced: a bundle that could not be read" in out


def test_a_home_that_cannot_be_written_is_told_of_before_the_work_and_costs_only_the_cache(
    capsys, tmp_path, monkeypatch
):
    (tmp_path / "home").write_text("not a folder")
    monkeypatch.setenv("CMT_EDGE_CACHE", str(tmp_path / "home" / ".cache"))
    told = []
    real = pipeline.prepare
    monkeypatch.setattr(pipeline, "prepare", lambda *a: told.append(capsys.readouterr().err) or real(*a))
    argv = ["--int8", "--data", "generated", "--calib-size", 8, "--max-drop", 100]
    out = succeeded(capsys, "--model", "cmt_nano", *argv, "-o", tmp_path / "out", "--format", "onnx")
    assert "bundle:" in out
    assert told[0].startswith("warning: the cache ")
    assert told[0].count("the cache ") == 1


# --- exit codes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no model was named"),
        (["--model", "cmt_nanno"], "did you mean cmt_nano"),
        (["--model", "cmt_nano", "--format", "onx"], "did you mean onnx"),
        (["--model", "cmt_nano", "--precision", "int4"], "unknown precision 'int4'"),
        (["--model", "cmt_nano", "--imgsz", "65"], "use 64 or 96"),
        (["--model", "cmt_nano", "--batch", "-1"], "--batch"),
        (["--model", "cmt_nano", "--batch", "many"], "--batch"),
        (["--model", "cmt_nano", "--unknown-flag"], "--unknown-flag"),
        (["--model", "cmt_nano", "--int8"], "--data"),
        (["--model", "cmt_nano", "--num-classes", "7"], "--num-classes 10"),
        (["--model", "cmt_nano", "--num-classes", "0"], "--num-classes"),
        (["--model", "cmt_nano", "--weights", "gone.pth"], "gone.pth"),
        (["--model", "cmt_nano", "--eval-data", "gone"], "gone"),
        (["--model", "cmt_nano", "--int8", "--data", "generated", "--calib-size", "0"], "--calib-size"),
    ],
    ids=lambda v: " ".join(v[2:]) if isinstance(v, list) else "",
)
def test_faulty_input_exits_with_2(capsys, tmp_path, argv, message):
    assert message in failed(capsys, *argv, "-o", tmp_path)
    assert content(tmp_path) == {}


def test_a_truncated_checkpoint_exits_with_2(capsys, tmp_path):
    path = tmp_path / "cut.pth"
    torch.save(create_model("cmt_nano").state_dict(), path)
    path.write_bytes(path.read_bytes()[:100_000])
    assert "cut.pth: cannot be read" in failed(
        capsys, "--model", "cmt_nano", "--weights", path, "-o", tmp_path / "out"
    )
    assert content(tmp_path / "out") == {}


def test_a_place_that_cannot_be_written_exits_with_2(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write" in failed(capsys, "--model", "cmt_nano", "-o", tmp_path / "file" / "below")


def test_a_failed_gate_exits_with_1(capsys, tmp_path):
    err = failed(capsys, "--model", "cmt_nano", "--atol", "1e-12", "-o", tmp_path, code=1)
    assert "nothing was written" in err
    assert content(tmp_path) == {}


def test_a_missing_runtime_exits_with_3(capsys, tmp_path, monkeypatch):
    real = backends_module.util.find_spec
    monkeypatch.setattr(
        backends_module.util, "find_spec", lambda n, *a: None if n == "openvino" else real(n, *a)
    )
    err = failed(capsys, "--model", "cmt_nano", "-o", tmp_path, code=3)
    assert "openvino is not installed" in err
    assert 'pip install "cmt-edge[openvino]"' in err
    assert content(tmp_path) == {}


def test_verbose_shows_the_trace_before_the_message(capsys, tmp_path):
    assert main(["--model", "cmt_nanno", "-v", "-o", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.rstrip().splitlines()[-2].startswith("error: ")


# --- interruption ---------------------------------------------------------------------------------

CODE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background may ignore it
from cmt_edge.export.cli import main
sys.exit(main(sys.argv[1:]))
"""


def begun(folder: Path, process: subprocess.Popen, writing: bool) -> bool:
    """Wait until an export has claimed its folder, or until it is ``writing`` a hidden one there."""
    for _ in range(1200):
        if process.poll() is not None:
            return False
        if folder.is_dir() and (not writing or any(p.suffix == ".tmp" for p in folder.iterdir())):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signal_number", "writing", "delay"),
    [
        (signal.SIGTERM, False, 0.2),
        (signal.SIGTERM, False, 3),
        (signal.SIGINT, False, 1.5),
        (signal.SIGTERM, True, 0.0),
        (signal.SIGHUP, True, 0.0),
    ],
)
def test_an_interrupted_export_leaves_nothing(tmp_path, signal_number, writing, delay):
    (tmp_path / "own.py").write_text(OWN)
    model = ("own.py:small", "--imgsz", "32") if writing else ("cmt_nano",)
    command = [sys.executable, "-c", CODE, "--model", *model, "-o", "out"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ.copy(),
        cwd=tmp_path,
    )
    try:
        assert begun(tmp_path / "out", process, writing)
        time.sleep(delay)
        assert process.poll() is None
        process.send_signal(signal_number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal_number, err
    assert out == ""
    assert "interrupted" in err
    assert content(tmp_path / "out") == {}


@pytest.mark.parametrize("package", ["torch", "onnx", "nncf"])
def test_missing_packages_are_named(package):
    """A device has only the light needs; there the command says what is missing."""
    code = (
        f"import sys; sys.modules[{package!r}] = None; from cmt_edge.export.cli import main; raise"
        " SystemExit(main(sys.argv[1:]))"
    )
    arguments = [
        "--model",
        "cmt_nano",
        "--precision",
        "int8",
        "--data",
        "generated",
        "--calib-size",
        "2",
        "--no-cache",
        "--dry-run",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    expected = 0 if package == "nncf" else 3  # nncf is needed only once calibration starts
    assert done.returncode == expected, done.stderr
    assert expected == 0 or (
        package in done.stderr and "pip install" in done.stderr and "Traceback" not in done.stderr
    )
