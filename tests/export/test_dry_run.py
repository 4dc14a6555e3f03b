"""The plan that --dry-run prints, and files of settings: what they find before any work, and what wins."""

from __future__ import annotations

import json
import sys
import tarfile

import pytest
import torch

from cmt_edge.cmt import create_model
from cmt_edge.deploy import Bundle
from cmt_edge.export.first_look import take_first_look
from helpers.cli import failed, succeeded
from helpers.exports import NAME, OWN, content, saved_nano
from helpers.images import labelled

pytestmark = pytest.mark.usefixtures("one_trace")


def test_dry_run_writes_nothing(capsys, tmp_path):
    argv = ("--model", "cmt_nano", "--dry-run", "-o", tmp_path / "out")
    text = succeeded(capsys, *argv)
    assert "nothing was written" in text
    assert NAME in text
    plan = json.loads(
        succeeded(capsys, *argv, "--json", "--precision", "int8", "--data", "generated", "--calib-size", 5)
    )
    assert plan["calibration"]["images"] == 5
    assert plan["replaces"] is False
    assert plan["input"] == [1, 3, 64, 64]
    assert "calibrate on 5 images" in plan["steps"]
    assert content(tmp_path) == {}


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--weights", "gone", "no such checkpoint file"),
        ("--labels", "gone", "no such labels file"),
        ("--data", "gone", "no such folder of images"),
        ("--eval-data", "gone", "no such folder of images"),
        ("--config", "gone", "no such settings file"),
        ("--precision", "int9", "did you mean int8"),
        ("--calib-size", "0", "--calib-size"),
    ],
)
def test_a_mistyped_word_is_told_before_pytorch_is_imported(
    capsys, tmp_path, monkeypatch, flag, value, message
):
    monkeypatch.setattr("cmt_edge.export.cli.import_module", lambda _: pytest.fail("it was imported"))
    monkeypatch.chdir(tmp_path)
    assert message in failed(capsys, "--model", "cmt_nano", flag, value)
    assert content(tmp_path) == {}


def test_images_that_are_made_and_those_in_an_archive_need_no_folder(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w"):
        pass
    for data in ("generated", "synthetic", f"{tmp_path}/a.tar/train", str(tmp_path)):
        take_first_look({"model": "cmt_nano", "precision": "int8", "data": data})
    take_first_look({"model": "cmt_nano", "ray": "local", "eval_data": "https://example.org/shards"})


@pytest.mark.parametrize("flag", ["--weights", "--labels", "--eval-data", "--data", "--config"])
def test_dry_run_finds_missing_files(capsys, tmp_path, flag):
    more = ["--int8"] if flag == "--data" else []
    assert "gone" in failed(
        capsys, "--model", "cmt_nano", "--dry-run", "-o", tmp_path, flag, tmp_path / "gone", *more
    )
    assert content(tmp_path) == {}


def test_a_checkpoint_that_says_what_it_is_needs_no_other_flag(capsys, tmp_path):
    path = saved_nano(tmp_path / "best.pt", ["ant", "bee"])
    content = torch.load(path, weights_only=True)
    torch.save(content | {"settings": {"model": "cmt_nano", "imgsz": 64}}, path)
    argv = ("--weights", path, "--dry-run", "--json", "-o", tmp_path / "out")
    plan = json.loads(succeeded(capsys, *argv))
    assert (plan["classes"], plan["labels"], plan["input"]) == (2, "2 (checkpoint)", [1, 3, 64, 64])
    assert json.loads(succeeded(capsys, *argv, "--model", "cmt_nano"))["classes"] == 2
    assert "2 classes" in failed(capsys, *argv, "--num-classes", 3)
    assert "best.pt" in failed(capsys, *argv, "--model", "cmt_ti")
    silent = tmp_path / "silent.pt"
    torch.save({"model": {"w": torch.zeros(2)}}, silent)
    assert "silent.pt does not say which model" in failed(capsys, "--weights", silent, "--dry-run")


@pytest.mark.parametrize("key", ["dry-run", "dry_run"])
def test_dry_run_in_a_settings_file(capsys, tmp_path, key):
    settings = tmp_path / "settings.toml"
    settings.write_text(f'model = "cmt_nano"\nweights = "random"\n{key} = true\n')
    text = succeeded(capsys, "--config", settings, "-o", tmp_path / "out")
    assert "nothing was written" in text
    assert not (tmp_path / "out").exists()
    settings.write_text('model = "cmt_nano"\ndry-run = 1\n')
    assert "dry-run = 1 should be bool" in failed(capsys, "--config", settings)


@pytest.mark.skipif(sys.platform != "linux", reason="places of Linux")
@pytest.mark.parametrize("place", ["/proc/x", "/dev/null", "/dev/null/x"])
def test_dry_run_refuses_a_place_that_cannot_be_written(capsys, place):
    flags = ("--model", "cmt_nano", "--weights", "random", "-o", place)
    real = failed(capsys, *flags)
    assert f"{place}: cannot write here" in real
    assert f"{place}: cannot write here" in failed(capsys, *flags, "--dry-run")


def test_dry_run_opens_the_weights(capsys, tmp_path):
    good = saved_nano(tmp_path / "good.pth")
    argv = ("--model", "cmt_nano", "--dry-run", "-o", tmp_path / "out", "--weights")
    plan = json.loads(succeeded(capsys, *argv, good, "--json"))
    assert len(plan["sha256"]) == 64
    other = saved_nano(tmp_path / "other.pth", seed=1)
    assert json.loads(succeeded(capsys, *argv, other, "--json"))["sha256"] != plan["sha256"]
    (tmp_path / "bad.pth").write_bytes(b"not a checkpoint")
    assert "bad.pth" in failed(capsys, *argv, tmp_path / "bad.pth")
    torch.save(create_model("cmt_ti").state_dict(), tmp_path / "ti.pth")
    assert "ti.pth" in failed(capsys, *argv, tmp_path / "ti.pth")
    assert not (tmp_path / "out").exists()


def test_dry_run_counts_the_classes(capsys, tmp_path):
    path = saved_nano(tmp_path / "three.pth", ["ant", "bee", "cat"])
    labels = tmp_path / "labels.txt"
    argv = ("--model", "cmt_nano", "--dry-run", "-o", tmp_path / "out", "--weights", path)
    assert "--num-classes 3" in failed(capsys, *argv)
    plan = json.loads(succeeded(capsys, *argv, "--num-classes", 3, "--json"))
    assert (plan["classes"], plan["labels"]) == (3, "3 (checkpoint)")
    labels.write_text("a\nb")
    assert "2 labels" in failed(capsys, *argv, "--num-classes", 3, "--labels", labels)


def test_dry_run_matches_the_folders(capsys, tmp_path):
    path = saved_nano(tmp_path / "three.pth", ["ant", "bee", "cat"])
    argv = ("--model", "cmt_nano", "--num-classes", 3, "--dry-run", "-o", tmp_path / "out", "--weights", path)
    good = labelled(tmp_path / "good", ["ant", "cat"], 2)
    plan = json.loads(succeeded(capsys, *argv, "--eval-data", good, "--json"))
    assert plan["evaluation"] == {"images": 4, "classes": 2}
    bad = labelled(tmp_path / "bad", ["ant", "dog"], 2)
    assert "folders without a label: dog" in failed(capsys, *argv, "--eval-data", bad)
    assert "class folders for 3 labels" in failed(capsys, *argv, "--eval-data", bad, "--by-order")
    labelled(tmp_path / "flat" / "x", ["ant"], 1)
    assert failed(capsys, *argv, "--eval-data", tmp_path / "flat" / "x" / "ant")


def test_dry_run_downloads_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("cmt_edge.cmt.download.fetch", lambda *_: pytest.fail("it downloads"))
    argv = ("--model", "cmt_ti", "--head", "features", "--dry-run", "-o", tmp_path / "out", "--json")
    monkeypatch.setenv("CMT_EDGE_CACHE", str(tmp_path / "cache"))
    plan = json.loads(succeeded(capsys, *argv))
    assert plan["download"].startswith("https://")
    assert "sha256" not in plan
    assert content(tmp_path) == {}


def test_dry_run_calls_the_weights_of_a_factory_as_built(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own.py").write_text(OWN)
    argv = ("--model", "own.py:small", "--imgsz", 32, "--dry-run", "--json")
    assert json.loads(succeeded(capsys, *argv))["weights"] == "as built"
    assert json.loads(succeeded(capsys, *argv, "--weights", "random"))["weights"] == "random"
    assert (
        json.loads(succeeded(capsys, "--model", "cmt_nano", "--dry-run", "--json"))["weights"] == "pretrained"
    )


def test_dry_run_tells_what_a_checkpoint_does_not_name(capsys, tmp_path):
    path = saved_nano(tmp_path / "a.pth")
    argv = ("--model", "cmt_nano", "--dry-run", "-o", tmp_path / "out", "--weights", path)
    (note,) = json.loads(succeeded(capsys, *argv, "--json"))["notes"]
    assert "does not name its classes" in note
    assert "class_9" in note
    assert f"notes        {note}" in succeeded(capsys, *argv)


def test_flags_win_over_the_configuration_file(capsys, tmp_path):
    file = tmp_path / "export.toml"
    file.write_text(
        'model = "cmt_nano"\nformat = "onnx"\nbatch = 0\nimgsz = 96\nresize-position-bias = true\n'
    )
    plan = json.loads(
        succeeded(capsys, "--config", file, "--dry-run", "--json", "--batch", 4, "-o", tmp_path / "out")
    )
    assert plan["bundle"] == str(tmp_path / "out" / "cmt_nano_96_fp32_onnx_b4")
    assert plan["input"] == [4, 3, 96, 96]


@pytest.mark.parametrize(
    ("text", "argv", "name"),
    [
        ("int8 = true\ndata = 'generated'\ncalib-size = 4", ["--calib-size", "5"], "cmt_nano_int8_openvino"),
        ("[export]\nint8 = true", ["--precision", "fp32"], "cmt_nano_fp32_openvino"),
        ("format = 'trt'\nno-build = true", ["--format", "onnx", "--batch", 2], "engines"),
    ],
)
def test_flags_win_over_every_spelling_in_the_file(capsys, tmp_path, text, argv, name):
    file = tmp_path / "export.toml"
    file.write_text(text)
    argv = ["--model", "cmt_nano", "--config", file, "--dry-run", "-o", tmp_path / "out", *argv]
    if name == "engines":  # the file's no-build is for another format than the flag's
        assert "only --format trt or rtx builds engines" in failed(capsys, *argv)
    else:
        assert name in succeeded(capsys, *argv)


def test_export_of_a_configuration_file(capsys, tmp_path):
    file = tmp_path / "export.toml"
    file.write_text(f'model = "cmt_nano"\nprecision = "int8"\nformat = "onnx"\noutput = "{tmp_path}/out"\n')
    result = json.loads(succeeded(capsys, "--config", file, "--json", "--precision", "fp32"))
    assert result["bundle"] == f"{tmp_path}/out/cmt_nano_fp32_onnx"
    assert Bundle.open(result["bundle"]).manifest.format == "onnx"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = ", "TOML"),
        ('modell = "cmt_nano"', "did you mean model"),
        ('model = "cmt_nano"\nbatch = "4"', "should be int"),
    ],
)
def test_faulty_configuration_file(capsys, tmp_path, text, message):
    file = tmp_path / "export.toml"
    file.write_text(text)
    assert message in failed(capsys, "--config", file, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()
