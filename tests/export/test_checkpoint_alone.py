"""``cmt-export --weights FILE`` where the file says what it holds, and which of its entries was taken."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from cmt_edge.deploy import Bundle
from cmt_edge.deploy.errors import InputError
from cmt_edge.export import ExportConfig
from cmt_edge.export.cli import main
from cmt_edge.export.pipeline import make_plan
from helpers.weights import nano, state_of

pytestmark = pytest.mark.usefixtures("one_trace")

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
    assert main(["--model", "cmt_nano", "--format", "onnx", "-o", str(tmp_path), "-q"]) == 0
    assert "weights: pretrained\n" in capsys.readouterr().out
    content = json.loads((tmp_path / "cmt_nano_fp32_onnx" / "manifest.json").read_text())
    assert "entry" not in content["model"]["weights"]


# --- images ---------------------------------------------------------------------------------------


def plan_of(folder, content, **settings) -> dict:
    torch.save({"model": state_of(1), **content}, folder / "own.pt")
    given = {"weights": str(folder / "own.pt"), "format": "onnx", "output": str(folder / "out")}
    return make_plan(ExportConfig.from_mapping(given | settings))


def test_a_plan_shows_the_mean_and_std_of_the_checkpoint(tmp_path):
    plan = plan_of(tmp_path, {"settings": {"model": "cmt_nano", "mean": 0.5}, "std": torch.tensor([0.25])})
    assert (plan["mean"], plan["std"]) == ([0.5] * 3, [0.25] * 3)
    assert plan["interpolation"] == "bicubic"
    assert "not used" not in " ".join(plan["notes"])


def test_a_mean_that_is_not_understood_is_refused_unless_both_are_given(tmp_path):
    content = {"settings": {"model": "cmt_nano", "mean": [0.5, 0.4, 0.3]}}
    for given in ({}, {"mean": "0,0,0"}):
        with pytest.raises(InputError, match="mean and standard deviation in the checkpoint") as error:
            plan_of(tmp_path, content, **given)
        assert "gives mean without std" in error.value.why
        assert "--mean R,G,B --std R,G,B" in error.value.remedy
    assert plan_of(tmp_path, content, mean="0,0,0", std="1,1,1")["mean"] == [0, 0, 0]


def test_settings_of_images_that_are_not_taken_are_noted(tmp_path):
    images = {"interpolation": "nearest", "crop_pct": 0.5, "channel_order": "bgr", "to_rgb": False}
    plan = plan_of(tmp_path, {"settings": {"model": "cmt_nano", **images}})
    notes = " ".join(plan["notes"])
    for text in (
        "interpolation = 'nearest' in own.pt is not used",
        "crop_pct = 0.5 in own.pt is not used: --crop-ratio",
        "channel_order = 'bgr' in own.pt is not used",
        "to_rgb = False in own.pt is not used",
    ):
        assert text in notes
    same = {"interpolation": "bicubic", "crop_pct": None, "channel_order": "rgb", "to_rgb": True}
    assert "not used" not in " ".join(plan_of(tmp_path, {"settings": {"model": "cmt_nano", **same}})["notes"])


def test_a_mean_of_a_checkpoint_that_names_no_model_is_noted(tmp_path):
    plan = plan_of(tmp_path, {"settings": {"mean": 0.5, "std": 0.25}}, model="cmt_nano")
    assert "the mean (0.5, 0.5, 0.5)" in " ".join(plan["notes"])
    assert "--mean and --std give them" in " ".join(plan["notes"])


# --- labels ---------------------------------------------------------------------------------------

TEN = [f"kind {i}" for i in range(10)]


def labels_of_plan(folder, content, **settings) -> str:
    torch.save({"model": state_of(1), **content}, folder / "own.pt")
    given = {"weights": str(folder / "own.pt"), "format": "onnx", "output": str(folder / "out")}
    return make_plan(ExportConfig.from_mapping(given | settings))["labels"]


@pytest.mark.parametrize(
    ("content", "labels"),
    [
        ({"settings": {"model": "cmt_nano", "classes": TEN}}, "10 (checkpoint)"),
        ({"idx_to_class": {i + 1: name for i, name in enumerate(TEN)}}, "10 (checkpoint)"),
        ({}, "10 (numbered)"),
    ],
)
def test_labels_are_those_of_the_checkpoint_or_none(tmp_path, content, labels):
    assert labels_of_plan(tmp_path, content, model="cmt_nano") == labels


def test_names_that_cannot_be_used_are_refused_and_a_file_replaces_them(tmp_path):
    content = {"class_names": TEN[:9]}
    with pytest.raises(InputError, match="names of the classes in the checkpoint cannot be used") as error:
        labels_of_plan(tmp_path, content, model="cmt_nano")
    assert "class_names has 9 names for 10 classes" in error.value.why
    assert "--labels FILE" in error.value.remedy
    (tmp_path / "names.txt").write_text("\n".join(TEN))
    given = labels_of_plan(tmp_path, content, model="cmt_nano", labels=str(tmp_path / "names.txt"))
    assert given == "10 (file)"


def test_a_checkpoint_without_names_is_noted_with_what_was_left_out(tmp_path):
    state = {f"model.{key}": value for key, value in state_of(1).items()} | {"ce.weight": torch.ones(10)}
    torch.save({"state_dict": state}, tmp_path / "own.ckpt")
    command = ["--weights", str(tmp_path / "own.ckpt"), "--format", "onnx", "-o", str(tmp_path)]
    assert main([*command, "-q"]) == 0
    made = Bundle.open(tmp_path / "cmt_nano_fp32_onnx")
    assert made.labels[0] == "class_0"
    notes = " ".join(made.manifest.verification.notes)
    assert "own.ckpt does not name its classes, so that their labels are numbered" in notes
    assert "left out: ce.weight (all of its weights are in model)" in notes.replace("state_dict.", "")


# --- the model ------------------------------------------------------------------------------------


def test_a_model_is_told_by_the_shapes_of_its_weights(tmp_path, capsys):
    torch.save({"model": state_of(1), "classes": TEN}, tmp_path / "own.pt")
    command = ["--weights", str(tmp_path / "own.pt"), "--format", "onnx", "-o", str(tmp_path), "--dry-run"]
    assert main(command) == 0
    assert "model: cmt_nano, told by the shapes of the weights" in capsys.readouterr().err


def test_a_model_is_not_guessed_between_two(tmp_path, capsys):
    from cmt_edge.cmt import create_model

    torch.save(create_model("cvt_13").state_dict(), tmp_path / "own.pt")
    with pytest.raises(InputError, match="no model was named") as error:
        ExportConfig.from_mapping({"weights": str(tmp_path / "own.pt")})
    assert "of cvt_13 and of cvt_13_384" in error.value.why
    assert error.value.remedy == "--model cvt_13 or --model cvt_13_384"
