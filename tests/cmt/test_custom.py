"""Models from outside: the whole export of a factory of the user's own, its settings, and what goes wrong."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from cmt_edge.cmt import count_macs, create_model, find_model, fuse, reference
from cmt_edge.cmt.outside import make_outside_spec
from cmt_edge.deploy import Bundle, Predictor
from cmt_edge.deploy.errors import InputError, RuntimeMissingError, UnknownNameError, WeightsError
from cmt_edge.deploy.measure.parity import verify
from cmt_edge.export import ExportConfig, run
from cmt_edge.export.cli import main
from cmt_edge.export.steps import GOLDEN_IMAGES

pytestmark = pytest.mark.usefixtures("brief_measurements")

SOURCE = '''
import torch
from torch import nn

class Small(nn.Module):
    """Convs, attention over a grid, a class for each logit."""
    default_cfg = {"input_size": (3, 32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2)}
    default_cfg["crop_pct"] = 0.9

    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=4, padding=1), nn.BatchNorm2d(16), nn.GELU())
        self.norm, self.q = nn.LayerNorm(16), nn.Linear(16, 16)
        self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, classes)

    def features(self, x):
        x = self.stem(x)
        return [x, nn.functional.avg_pool2d(x, 2)]

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

class Plain(nn.Module):
    """Its features are a module, as many models name their convs."""
    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.features(x).mean((2, 3))

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
    make_outside_spec.cache_clear()
    yield tmp_path
    make_outside_spec.cache_clear()


def test_settings_come_from_the_model(outside):
    spec = find_model("outside_models:build")
    assert (spec.img_size, spec.num_classes, spec.mean, spec.std, spec.crop_ratio) == (
        32,
        5,
        (0.5, 0.4, 0.3),
        (0.2, 0.2, 0.2),
        0.9,
    )
    model = create_model("outside_models:build", num_classes=7)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    assert count_macs(model) > 1000
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(fuse(model)(x), model(x))


@pytest.mark.parametrize(
    ("form", "precision", "data"),
    [("onnx", "fp32", None), ("openvino", "int8", "generated"), ("trt", "fp16", None)],
)
def test_the_whole_export(outside, form, precision, data):
    made = run(
        ExportConfig(
            "outside_models:build",
            format=form,
            precision=precision,
            data=data,
            calib_size=8 if data else None,
            batch=0,
            build=form != "trt",
            output="out",
        )
    )
    assert made.path.name == f"outside_models_build_{precision}_{form}_dynamic"
    opened = Bundle.open(made.path)
    assert opened.preprocess.mean == (0.5, 0.4, 0.3)
    with (
        Predictor.load(opened, backend="onnxruntime") as ours,
        Predictor.load(opened, backend="torch", trusted_model="outside_models:build") as reference,
    ):
        batch = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)
        assert (
            np.abs(ours.logits(batch) - reference.logits(batch)).max()
            < {"fp32": 1e-4, "fp16": 0.01, "int8": 0.3}[precision]
        )


def test_maps_of_a_method_features(outside):
    assert find_model("outside_models:build").strides == (4, 8)
    made = run(ExportConfig("outside_models:build", format="onnx", head="features", output="out"))
    with Predictor.load(made) as ours:
        assert [m.shape for m in ours.features(ours.prepare(made.golden().sources))] == [
            (GOLDEN_IMAGES, 16, 8, 8),
            (GOLDEN_IMAGES, 16, 4, 4),
        ]
    assert find_model("outside_models:Plain").strides == ()
    with pytest.raises(InputError, match="has no feature maps"):
        ExportConfig("outside_models:Plain", head="features").check()


def test_flags_win_over_the_models_settings(outside, capsys):
    flags = ["--mean", "0,0,0", "--std", "1,1,1", "--crop-ratio", "0", "--num-classes", "4", "-o", "out"]
    assert main(["--model", "outside_models:build", "--format", "onnx", *flags]) == 0
    made = Bundle.open("out/outside_models_build_fp32_onnx")
    assert (made.preprocess.mean, made.preprocess.std, made.preprocess.short_side) == (
        (0, 0, 0),
        (1, 1, 1),
        None,
    )
    assert len(made.labels) == 4


def test_weights_of_a_file(outside):
    model = create_model("outside_models:build", seed=1)
    with torch.no_grad():
        model.head.bias += 5
    torch.save(model.state_dict(), "trained.pt")
    made = run(ExportConfig("outside_models:build", format="onnx", weights="trained.pt", output="out"))
    with Predictor.load(
        made, backend="torch", weights="trained.pt", trusted_model="outside_models:build"
    ) as reference:
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


def test_a_factory_that_ignores_the_class_count(outside):
    create_model("outside_models:build")
    outside_models = sys.modules["outside_models"]
    outside_models.ignoring = lambda num_classes=3: outside_models.Small(3)
    with pytest.raises(InputError, match="has 3 classes, not the 9"):
        create_model("outside_models:ignoring", num_classes=9)


CROPS = [
    ({"crop_pct": 0.9}, 35),
    ({"crop_pct": 1.0}, 32),
    ({"crop_pct": 1.0, "crop_mode": "squash"}, None),
    ({}, 36),
    ({"crop_pct": 0.95, "interpolation": "bilinear"}, 33),
]


@pytest.mark.parametrize(("given", "short_side"), CROPS)
def test_crop_and_interpolation(outside, given, short_side):
    create_model("outside_models:build")
    sys.modules["outside_models"].Small.default_cfg = {"input_size": (3, 32, 32), **given}
    make_outside_spec.cache_clear()
    made = ExportConfig("outside_models:build").preprocess
    assert (made.short_side, made.interpolation) == (short_side, given.get("interpolation", "bicubic"))


UNKNOWN = [
    {"crop_mode": "border", "crop_pct": 1.0},
    {"crop_mode": "squash", "crop_pct": 0.95},
    {"interpolation": "lanczos"},
]


@pytest.mark.parametrize("given", UNKNOWN)
def test_preprocessing_that_we_do_not_have_is_refused(outside, given):
    create_model("outside_models:build")
    sys.modules["outside_models"].Small.default_cfg = {"input_size": (3, 32, 32), **given}
    make_outside_spec.cache_clear()
    with pytest.raises(InputError, match=r"crops in the mode|lanczos") as error:
        ExportConfig("outside_models:build").check()
    assert "default_cfg" in error.value.remedy


class Plain(nn.Module):
    """Convs without a bias before batch norms, ``chunk``, a pooled channels-last map: what torch.onnx writes
    in a roundabout way."""

    default_cfg: ClassVar[dict] = {"input_size": (3, 32, 32)}

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=4, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        )
        self.body = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32))
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 3)

    def forward(self, x):
        value, gate = self.body(self.stem(x)).chunk(2, 1)
        x = (value * gate.sigmoid()).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        return self.head(self.pool(x).flatten(1))


def test_an_ordinary_cnn_becomes_int8(outside):
    create_model("outside_models:build")
    sys.modules["outside_models"].Plain = Plain
    made = run(
        ExportConfig(
            "outside_models:Plain",
            weights="random",
            format="onnx",
            precision="int8",
            data="generated",
            calib_size=8,
            output="out",
        )
    )
    graph = onnx.load(made.path / "model.onnx").graph
    operations = Counter(node.op_type for node in graph.node)
    assert not {"BatchNormalization", "CastLike", "Expand", "Gather", "SplitToSequence"} & set(operations)
    producer = {output: node.op_type for node in graph.node for output in node.output}
    dense = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    int8 = [node.name for node in dense if producer.get(node.input[1]) == "DequantizeLinear"]
    assert len(dense) == 3
    assert dense[0].input[0] == graph.input[0].name
    assert int8 == [
        node.name for node in dense[1:]
    ]  # the conv of the image stays float: its filters are small
    assert verify(made, backend="onnxruntime").passed


# --- timm -----------------------------------------------------------------------------------------


class FakeTimm(ModuleType):
    """The four functions of timm that we call, with one published model of 32 pixels and 3 classes."""

    def __init__(self):
        super().__init__("timm")
        self.asked: list[dict] = []

    def is_model(self, name):
        return name.split(".")[0] == "tiny"

    def list_models(self, pattern="*"):
        return ["tiny"] if pattern in ("*", "*tin*") else []

    def get_pretrained_cfg(self, name):
        return SimpleNamespace(fixed_input_size=name.endswith("fixed"))

    def create_model(self, name, pretrained=False, num_classes=3, **options):
        self.asked.append({"name": name, "num_classes": num_classes, **options})
        if pretrained and name.endswith("offline"):
            raise OSError("no network")
        model = sys.modules["outside_models"].Small(num_classes)
        model.default_cfg = {**model.default_cfg, "classifier": "head"}
        if pretrained:
            nn.init.constant_(model.head.bias, 7.0)
        return model


@pytest.fixture
def fake_timm(outside, monkeypatch):
    create_model("outside_models:build")
    fake = FakeTimm()
    monkeypatch.setitem(sys.modules, "timm", fake)
    return fake


def test_pretrained_timm_weights_are_the_published_ones(fake_timm):
    model, loaded = reference.load_reference("timm:tiny.tag", "pretrained")
    assert model.head.bias.tolist() == [7.0] * 3
    assert loaded.source == "timm:tiny.tag"
    with pytest.raises(WeightsError, match="does not fit timm:tiny") as error:
        reference.load_reference("timm:tiny", "pretrained", num_classes=5)
    assert "--fresh-head" in error.value.remedy
    model, loaded = reference.load_reference("timm:tiny", "pretrained", num_classes=5, fresh_head=True)
    assert (len(model.head.bias), loaded.fresh) == (5, ("head.weight", "head.bias"))


def test_timm_weights_that_cannot_be_had_are_an_error(fake_timm):
    with pytest.raises(WeightsError, match="did not load the published weights") as error:
        reference.load_reference("timm:tiny.offline", "pretrained")
    assert "no network" in str(error.value)
    assert "--weights random" in error.value.remedy
    reference.load_reference("timm:tiny.offline", "random")


def test_timm_models_of_a_fixed_size_are_told_it(fake_timm):
    create_model("timm:tiny.fixed", img_size=64)
    assert fake_timm.asked[-1] == {"name": "tiny.fixed", "num_classes": 3, "img_size": 64}
    create_model("timm:tiny", img_size=64)
    assert fake_timm.asked[-1] == {"name": "tiny", "num_classes": 3}


def test_an_unknown_timm_model_tells_the_closest(fake_timm):
    with pytest.raises(UnknownNameError, match="unknown timm model 'tin'") as error:
        find_model("timm:tin")
    assert "tiny" in error.value.remedy


def test_timm_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(RuntimeMissingError, match="timm"):
        find_model("timm:resnet18")


def test_timm_whose_torchvision_is_for_another_torch(outside, monkeypatch):
    (outside / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(outside)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(RuntimeMissingError, match="timm cannot be imported") as error:
        find_model("timm:resnet18")
    assert "torchvision" in error.value.remedy


def importable_timm():
    try:
        return importlib.import_module("timm")
    except Exception as exc:  # not installed, or its torchvision is for another torch
        return pytest.skip(f"timm cannot be imported: {type(exc).__name__}: {exc}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "form", "precision"),
    [("mobilevitv2_050", "onnx", "fp32"), ("coatnet_nano_rw_224", "openvino", "int8")],
)
def test_a_timm_model_on_the_whole_road(tmp_path, name, form, precision):
    """Convs without biases, separable self-attention and group norms; attention with relative positions,
    channels-last pooling."""
    importable_timm()
    data = {"data": "generated", "calib_size": 8} if precision == "int8" else {}
    made = run(
        ExportConfig(
            f"timm:{name}",
            weights="random",
            imgsz=96,
            format=form,
            precision=precision,
            batch=0,
            output=str(tmp_path),
            **data,
        )
    )
    assert made.manifest.verification.golden.passed
    assert verify(made, backend="onnxruntime").passed


@pytest.mark.slow
def test_a_timm_model_of_a_fixed_size_and_another_class_count():
    importable_timm()
    model = create_model("timm:coatnet_nano_rw_224", img_size=160, num_classes=5)
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, 160, 160)).shape == (1, 5)
