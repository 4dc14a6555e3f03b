"""``cmt-export --weights FILE`` where the file says what it holds, and which of its entries was taken."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from cmt_edge.deploy import Bundle
from cmt_edge.export import ExportConfig
from cmt_edge.export.cli import main
from helpers.exports import traced_once
from helpers.weights import nano, state_of

CLASSES = [f"kind {i}" for i in range(4)]
METADATA = {
    "model": "cmt_nano",
    "imgsz": "32",
    "classes": json.dumps(CLASSES),
    "mean": "0.5,0.4,0.3",
    "std": "[0.2, 0.2, 0.2]",
}


@pytest.fixture(scope="module")
def safetensors(tmp_path_factory):
    path = tmp_path_factory.mktemp("alone") / "best.safetensors"
    state = nano(img_size=32, num_classes=4).state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, path, METADATA)
    return path


def test_a_safetensors_file_alone(safetensors, tmp_path, capsys):
    with traced_once():
        assert main(["--weights", str(safetensors), "--format", "onnx", "-o", str(tmp_path), "-q"]) == 0
    made = Bundle.open(tmp_path / "cmt_nano_32_fp32_onnx")
    assert made.labels == CLASSES
    assert made.manifest.labels_source == "checkpoint"
    assert (made.preprocess.mean, made.preprocess.std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    assert made.manifest.model.weights.entry == "the top level"


def test_what_is_asked_for_goes_before_what_the_file_says(safetensors):
    config = ExportConfig.from_mapping({"weights": str(safetensors), "mean": "0,0,0", "imgsz": 64})
    assert config.preprocess.mean == (0, 0, 0)
    assert config.preprocess.std == (0.2, 0.2, 0.2)
    assert config.img_size == 64


def test_the_entry_that_was_taken_is_shown(tmp_path, capsys):
    saved = {"state_dict": state_of(2), "state_dict_ema": state_of(1), "arch": "cmt_nano"}
    torch.save(saved, tmp_path / "last.pth.tar")
    command = ["--weights", str(tmp_path / "last.pth.tar"), "--format", "onnx", "-o", str(tmp_path), "-q"]
    with traced_once():
        assert main(command) == 0
        shown = capsys.readouterr().out
        assert "weights: last.pth.tar, from state_dict_ema (averaged over training)" in shown
        made = Bundle.open(tmp_path / "cmt_nano_fp32_onnx")
        assert made.manifest.model.weights.entry == "state_dict_ema"
        page = (made.path / "report.md").read_text(encoding="utf-8")
        assert "weights: last.pth.tar, from state_dict_ema" in page

        assert main([*command, "--no-ema", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["weights"]["entry"] == "state_dict"
    assert main([*command, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["entry"] == "state_dict_ema"


def test_weights_of_no_file_have_no_entry(tmp_path, capsys):
    with traced_once():
        assert main(["--model", "cmt_nano", "--format", "onnx", "-o", str(tmp_path), "-q"]) == 0
    assert "weights: pretrained\n" in capsys.readouterr().out
    content = json.loads((tmp_path / "cmt_nano_fp32_onnx" / "manifest.json").read_text())
    assert "entry" not in content["model"]["weights"]
