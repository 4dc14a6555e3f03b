"""The training example: it learns, goes on where it was interrupted, fine-tunes, and what it prints
exports."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from cmt_edge.cmt import create_model, load_weights
from cmt_edge.deploy import Predictor
from cmt_edge.deploy.preprocessing import Preprocess
from cmt_edge.export.cli import main as cmt_export
from helpers.paths import ROOT

SCRIPT = ROOT / "examples" / "train_cifar10.py"
SMALL = ("--imgsz", "32", "--batch", "8", "--threads", "1", "--lr", "2e-3")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread", "brief_measurements")]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_cifar10", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def draw(folder: Path, classes: dict[str, str], count: int, seed: int) -> Path:
    """``count`` pictures a class: a disc of its colour somewhere on grey."""
    rng = np.random.default_rng(seed)
    for name, colour in classes.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            image = Image.new("RGB", (48, 40), tuple(int(v) for v in rng.integers(90, 160, 3)))
            x, y = rng.integers(0, 24, 2)
            ImageDraw.Draw(image).ellipse((x, y, x + 20, y + 16), fill=colour)
            image.save(folder / name / f"{i}.png")
    return folder


COLOURS = {"apple": "red", "lime": "lime", "plum": "blue"}


@pytest.fixture(scope="module")
def fruit(tmp_path_factory):
    """Folders of training and test pictures."""
    root = tmp_path_factory.mktemp("fruit")
    return draw(root / "train", COLOURS, 11, seed=0), draw(root / "test", COLOURS, 4, seed=1)


def arguments(fruit, output, *more):
    return ["--data", str(fruit[0]), "--eval-data", str(fruit[1]), "--output", str(output), *SMALL, *more]


@pytest.fixture(scope="module")
def trained(script, fruit, tmp_path_factory):
    """A checkpoint after six epochs without interruption."""
    output = tmp_path_factory.mktemp("trained") / "new" / "fruit.pt"
    assert script.main(arguments(fruit, output, "--epochs", "6", "--quiet")) == 0
    return output


def weights(path: Path, *, ema: bool) -> dict[str, torch.Tensor]:
    model = create_model("cmt_nano", img_size=32, num_classes=3)
    loaded = load_weights(model, path, ema=ema)
    assert loaded.classes == ("apple", "lime", "plum")
    return model.state_dict()


def test_it_learns_and_reports(script, fruit, tmp_path, capsys):
    assert script.main(arguments(fruit, tmp_path / "f.pt", "--epochs", "6", "--limit", "8", "--json")) == 0
    out, err = capsys.readouterr()
    losses = [float(v) for v in re.findall(r"loss ([\d.]+)", err)]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.1
    assert "top-1 on 12 images" in json.loads(out)["result"]
    assert [p.name for p in tmp_path.iterdir()] == ["f.pt"]  # no temporary file stays


@pytest.mark.parametrize("stop", [1, 4])
def test_an_interrupted_run_ends_with_the_same_weights(script, fruit, trained, tmp_path, monkeypatch, stop):
    output, save = tmp_path / "fruit.pt", script.Learner.save

    def interrupted(learner, path):
        save(learner, path)
        if learner.epoch == stop:
            raise KeyboardInterrupt

    command = arguments(fruit, output, "--epochs", "6", "--quiet", "--resume")
    with monkeypatch.context() as patch:
        patch.setattr(script.Learner, "save", interrupted)
        assert script.main(command) == 130
    assert script.main(command) == 0
    for ema in (False, True):
        ours, whole = weights(output, ema=ema), weights(trained, ema=ema)
        assert all(torch.equal(ours[key], whole[key]) for key in whole)
    assert any(
        not torch.equal(a, b) for a, b in zip(weights(output, ema=False).values(), ours.values(), strict=True)
    )


def test_a_finished_run_trains_no_further(script, fruit, trained, capsys):
    before = trained.read_bytes()
    assert script.main(arguments(fruit, trained, "--epochs", "6", "--resume")) == 0
    assert trained.read_bytes() == before
    out, err = capsys.readouterr()
    assert "loss" not in err
    assert "cmt-export --model cmt_nano" in out


def test_fine_tuning_other_classes_exports_as_printed(script, fruit, tmp_path, capsys):
    command = [
        "--data",
        str(fruit[0]),
        "--eval-data",
        str(fruit[1]),
        "-o",
        str(tmp_path / "tuned.pt"),
        "--init",
        "pretrained",
    ]
    assert script.main([*command, "--epochs", "3", "--batch", "8", "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    assert "a new classifier" in err
    printed = shlex.split(next(line for line in out.splitlines() if "cmt-export" in line))
    assert printed[0] == "cmt-export"
    assert (
        cmt_export([*printed[1:], "--format", "onnx", "--threads", "1", "-o", str(tmp_path), "--json"]) == 0
    )
    top1 = re.search(r"top-1 on 12 images ([\d.]+) %", out)
    with Predictor.load(tmp_path / "cmt_nano_fp32_onnx") as predictor:
        assert predictor.labels == ["apple", "lime", "plum"]
        right = [
            p.label == Path(p.source).parent.name for p in predictor.stream(sorted(fruit[1].rglob("*.png")))
        ]
    assert float(top1[1]) == pytest.approx(
        100 * np.mean(right), abs=0.01
    )  # the same preprocessing, to the pixel


def test_fine_tuning_keeps_or_interpolates_what_fits(script, trained, capsys):
    parsed = {
        "model": "cmt_nano",
        "epochs": 1,
        "batch": 8,
        "lr": 1e-3,
        "drop_path": 0.1,
        "seed": 0,
        "limit": None,
        "device": "cpu",
    }
    options = script.argparse.Namespace(**parsed, imgsz=64, init=str(trained))
    learner = script.Learner(options, ["apple", "lime", "plum"])
    key, old = "head.fc.weight", weights(trained, ema=True)
    assert torch.equal(learner.model.state_dict()[key], old[key])
    assert capsys.readouterr().err == ""
    assert learner.model.stages[0].position_bias.shape[1] == 16**2
    assert learner.model.stages[0].blocks[1].drop_path.rate > 0
    other = script.Learner(options, ["apple", "plum", "quince"])  # as many classes, but others
    assert not torch.equal(other.model.state_dict()[key], old[key])
    assert "a new classifier: fruit.pt" in capsys.readouterr().err


@pytest.mark.parametrize("frame", [32, 37, 64])
def test_augmented_images_are_valid_pixels_of_the_right_size(script, frame):
    spec = Preprocess(32, None, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    batch = np.random.default_rng(0).integers(0, 256, (5, frame, frame, 3), dtype=np.uint8)
    first, again = (script.augment(batch, spec, np.random.default_rng(3)) for _ in range(2))
    assert first.shape == (5, 32, 32, 3)
    assert 0 <= first.min() <= first.max() <= 255
    assert np.array_equal(first, again)
    assert not np.array_equal(first[0], first[1])


FAILURES = {
    "empty": ((), "holds no images"),
    "one class": ((), "has 1 class folders"),
    "loose images": ((), "has 0 class folders"),
    "damaged": ((), "3.png"),
    "other test classes": ((), "quince"),
    "size": (("--imgsz", "50"), "use 32 or 64"),
    "model": (("--model", "cmt_nani"), "did you mean cmt_nano"),
    "checkpoint": (("--init", "none.pt"), "no such checkpoint"),
    "batch": (("--batch", "1"), "--batch 2 or more"),
    "epochs": (("--epochs", "0"), "must be positive"),
    "suffix": (("--output", "x.safetensors"), "name it .pt"),
    "there": ((), "--resume"),
    "diverged": (("--lr", "1e30"), "smaller --lr"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_failures_say_what_to_do(script, tmp_path, capsys, kind):
    train, output = tmp_path / "train", tmp_path / "f.pt"
    draw(
        train,
        {"apple": "red"} if kind == "one class" else {} if kind in ("empty", "loose images") else COLOURS,
        4,
        seed=0,
    )
    train.mkdir(exist_ok=True)
    test = draw(
        tmp_path / "test", {"quince": "yellow"} if kind == "other test classes" else COLOURS, 1, seed=1
    )
    if kind == "damaged":
        (train / "lime" / "3.png").write_bytes(b"no image")
    if kind == "there":
        output.touch()
    if kind == "loose images":
        Image.new("RGB", (40, 40)).save(train / "a.png")
    more, message = FAILURES[kind]
    assert script.main([*arguments((train, test), output, "--epochs", "2", "--batch", "4"), *more]) == (
        1 if kind == "diverged" else 2
    )
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_a_missing_gpu_is_named(script, fruit, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert script.main(arguments(fruit, tmp_path / "f.pt", "--device", "cuda")) == 3
    assert "--device cpu" in capsys.readouterr().err


def test_resuming_with_other_settings_or_files_is_refused(script, fruit, trained, tmp_path, capsys):
    assert script.main(arguments(fruit, trained, "--epochs", "7", "--resume")) == 2
    assert "epochs was 6, is 7" in capsys.readouterr().err
    foreign = tmp_path / "foreign.pt"
    torch.save(create_model("cmt_nano", img_size=32, num_classes=3).state_dict(), foreign)
    assert script.main(arguments(fruit, foreign, "--epochs", "6", "--resume")) == 2
    foreign.write_bytes(trained.read_bytes()[:1000])
    assert script.main(arguments(fruit, foreign, "--epochs", "6", "--resume")) == 2
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--lr", "--drop-path"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_that_are_none_are_refused(script, fruit, tmp_path, flag, value, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(arguments(fruit, tmp_path / "f.pt", f"{flag}={value}"))
    assert stop.value.code == 2
    assert flag in capsys.readouterr().err


def test_every_next_command_can_be_pasted(script, fruit, trained, capsys):
    assert script.main(arguments(fruit, trained, "--epochs", "6", "--resume", "--quiet")) == 0
    out = capsys.readouterr().out
    printed = [shlex.split(line) for line in out.splitlines() if line.startswith("  cmt-export")]
    assert len(printed) == 2
    assert "(" not in out.partition("next:")[2]
    for command in printed:
        assert cmt_export([*command[1:], "--dry-run"]) == 0
    assert printed[1][-4:] == ["--precision", "int8", "--data", str(fruit[0])]
