"""Models from outside: the whole road for a factory of the user's own, its settings, and what goes wrong."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
import torch

from cmt import create_model, fuse, macs, model_spec
from deploy import Bundle, Predictor
from deploy.errors import InputError, RuntimeMissingError, UnknownNameError
from export import ExportConfig, run
from export.cli import main

SOURCE = '''
import torch
from torch import nn

class Small(nn.Module):
    """Convs, attention over a grid, a class for each logit."""
    default_cfg = {"input_size": (3, 32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2), "crop_pct": 0.9}

    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=4, padding=1), nn.BatchNorm2d(16), nn.GELU())
        self.norm, self.q, self.k, self.v = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, classes)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        y = self.norm(x)
        x = x + (self.q(y) @ self.k(y).transpose(1, 2) / 4).softmax(-1) @ self.v(y)
        return self.head(x.mean(1))

def build(num_classes=5):
    torch.manual_seed(0)
    return Small(num_classes)

def fixed():
    return Small(3)

def needs(argument):
    return Small(argument)

def wrong():
    return "a string"

def maps():
    return nn.Conv2d(3, 4, 3)

def broken():
    raise RuntimeError("no weights here")

not_callable = 3
'''


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A folder with ``outside_models.py``, the current one."""
    (tmp_path / "outside_models.py").write_text(SOURCE)
    (tmp_path / "cannot.py").write_text("import nothing_of_this_name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("outside_models", "cannot"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    from cmt.custom import custom_spec

    custom_spec.cache_clear()
    yield tmp_path
    custom_spec.cache_clear()


def test_settings_come_from_the_model(outside):
    spec = model_spec("outside_models:build")
    assert (spec.img_size, spec.num_classes, spec.mean, spec.std, spec.crop_ratio) == (
        32,
        5,
        (0.5, 0.4, 0.3),
        (0.2, 0.2, 0.2),
        0.9,
    )
    model = create_model("outside_models:build", num_classes=7)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    assert macs(model) > 1000
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(fuse(model)(x), model(x))


@pytest.mark.parametrize(
    ("form", "precision", "data"), [("onnx", "fp32", None), ("openvino", "int8", "generated"), ("trt", "fp16", None)]
)
def test_the_whole_road(outside, form, precision, data):
    made = run(ExportConfig("outside_models:build", format=form, precision=precision, data=data, calib_size=8 if data else None, batch=0,
                            build=form != "trt", output="out"))  # fmt: skip
    assert made.path.name == f"outside_models_build_{precision}_{form}_dynamic"
    opened = Bundle.open(made.path)
    assert opened.preprocess.mean == (0.5, 0.4, 0.3)
    with Predictor.load(opened, backend="onnxruntime") as ours, Predictor.load(opened, backend="torch") as reference:
        batch = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)
        assert np.abs(ours.logits(batch) - reference.logits(batch)).max() < {"fp32": 1e-4, "fp16": 0.01, "int8": 0.3}[precision]


def test_flags_win_over_the_models_settings(outside, capsys):
    flags = ["--mean", "0,0,0", "--std", "1,1,1", "--crop-ratio", "0", "--num-classes", "4", "-o", "out"]
    assert main(["--model", "outside_models:build", "--format", "onnx", *flags]) == 0
    made = Bundle.open("out/outside_models_build_fp32_onnx")
    assert (made.preprocess.mean, made.preprocess.std, made.preprocess.short_side) == ((0, 0, 0), (1, 1, 1), None)
    assert len(made.labels) == 4


def test_weights_of_a_file(outside):
    model = create_model("outside_models:build", seed=1)
    with torch.no_grad():
        model.head.bias += 5
    torch.save(model.state_dict(), "trained.pt")
    made = run(ExportConfig("outside_models:build", format="onnx", weights="trained.pt", output="out"))
    with Predictor.load(made, backend="torch", weights="trained.pt") as reference:
        assert reference.logits(np.zeros((1, 3, 32, 32), np.float32)).mean() > 4


BAD = [
    ("outside_models:bild", UnknownNameError, "did you mean build"),
    ("outside_models:not_callable", UnknownNameError, "factory in outside_models"),
    ("nowhere_to_be_found:build", InputError, "no module 'nowhere_to_be_found'"),
    ("cannot:build", InputError, "cannot"),
    ("outside_models:needs", InputError, "without required arguments"),
    ("outside_models:wrong", InputError, "returned a str"),
    ("outside_models:maps", InputError, "not logits (2, classes)"),
    ("outside_models:broken", InputError, "no weights here"),
]


@pytest.mark.parametrize(("name", "kind", "word"), BAD)
def test_what_cannot_be_used(outside, name, kind, word):
    with pytest.raises(kind) as error:
        run(ExportConfig(name, output="out"))
    assert word in str(error.value)
    assert error.value.exit_code == 2
    assert not (outside / "out").exists()


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"mean": "1,2"}, "three numbers"), ({"std": "0,1,1"}, "--std"), ({"crop_ratio": 1.5}, "--crop-ratio")],
)
def test_bad_preprocessing(outside, changes, word):
    with pytest.raises(InputError, match=word):
        ExportConfig("outside_models:build", **changes).check()


def test_a_factory_of_a_fixed_class_count(outside):
    with pytest.raises(InputError, match="takes no num_classes"):
        create_model("outside_models:fixed", num_classes=9)


def test_timm_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(RuntimeMissingError, match="timm"):
        model_spec("timm:resnet18")


@pytest.mark.slow
def test_a_timm_model(tmp_path):
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    made = run(ExportConfig("timm:efficientvit_m0", format="onnx", output=str(tmp_path)))
    assert made.manifest.verification["golden"]["passed"]
