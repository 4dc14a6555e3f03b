"""Models whose outputs are no plain logits, through a whole export."""

from __future__ import annotations

import importlib
import json
import sys

import numpy as np
import pytest
import torch

from cmt_edge.cmt.outside import make_outside_spec
from cmt_edge.deploy import Predictor, report
from cmt_edge.deploy.errors import InputError
from cmt_edge.deploy.measure.parity import verify
from cmt_edge.export import ExportConfig, run
from cmt_edge.export.outputs import find_kind, require_finite
from cmt_edge.export.pipeline import check_preconditions

SOURCE = """
import torch
from torch import nn

class Net(nn.Module):
    img_size = 32

    def __init__(self, form, classes):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 16, 3, stride=4, padding=1), nn.BatchNorm2d(16)
        self.fc, self.form = nn.Linear(16, classes), form

    def forward(self, x):
        return self.form(8 * self.fc(self.norm(self.conv(x)).relu().mean((2, 3))))

class Map(nn.Module):
    img_size = 32

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 16, 3, stride=4, padding=1), nn.Conv2d(16, 1, 1)

    def forward(self, x):
        return self.head(self.conv(x).relu()).amax((2, 3))

def plain(): return Net(lambda y: y, 5)
def prob(): return Net(lambda y: (4 * y).softmax(1), 5)
def prob_half(): return Net(lambda y: y.half().softmax(1), 5)
def half(): return Net(lambda y: y.half(), 5)
def bf16(): return Net(lambda y: y.bfloat16(), 5)
def log_prob(): return Net(lambda y: y.log_softmax(1), 5)
def several(): return Net(lambda y: y.sigmoid(), 5)
def written_out(): return Net(lambda y: 1 / (1 + (-y).exp()), 5)
def one_hot(): return Net(lambda y: nn.functional.one_hot(y.argmax(1), 5).float(), 5)
def averaged(): return Net(lambda y: (y.sigmoid() + (2 * y).sigmoid()) / 2, 5)
def rectified(): return Net(lambda y: y.relu() * 1.0, 5)
def small(): return Net(lambda y: y * 0.01 + 0.1, 5)
def index_float(): return Net(lambda y: y.argmax(1, keepdim=True).float(), 5)
def index_scaled(): return Net(lambda y: y.argmax(1, keepdim=True) * 1.0, 5)
def constant(): return Net(lambda y: 0 * y, 5)
def constant_rounded(): return Net(lambda y: 1e-7 * y.tanh() + torch.linspace(-1, 1, 5), 5)
def one_nearly_sure(): return Net(lambda y: (0.1 * y.tanh() + 15.5).sigmoid(), 1)
def constant_share(): return Net(lambda y: (0 * y).softmax(1), 5)
def values(): return Net(lambda y: y.sort(1, descending=True).values, 5)
def best_three(): return Net(lambda y: y.topk(3).values * 2.0, 5)
def percent(): return Net(lambda y: 100 * y.softmax(1), 5)
def nearly(): return Net(lambda y: 1.002 * y.softmax(1), 5)
def background(): return Net(lambda y: y.softmax(1)[:, :-1], 5)
def losses(): return Net(lambda y: -y.log_softmax(1), 5)
def best_kept(): return Net(lambda y: y.max(-1, keepdim=True).values, 5)
def best_only(): return Net(lambda y: y.amax(1), 5)
def evidence(): return Net(lambda y: y.logsumexp(1, keepdim=True), 5)
def one_of_map(): return Map()
def one_softmax(): return Net(lambda y: y.softmax(1), 1)
def one_percent(): return Net(lambda y: 100 * y.sigmoid(), 1)
def one_written_out(): return Net(lambda y: 1 / (1 + (-y).exp()), 1)
def one_averaged(): return Net(lambda y: torch.stack([y.sigmoid(), (2 * y).sigmoid()]).mean(0), 1)
def one_clamped(): return Net(lambda y: y.sigmoid().clamp(1e-6, 1 - 1e-6), 1)
def one_small(): return Net(lambda y: y * 0.01 + 0.5, 1)
def nan(): return Net(lambda y: y / (y - y), 5)
def index(): return Net(lambda y: y.argmax(1), 5)
def record(): return Net(lambda y: {"logits": y, "features": y}, 5)
def one(): return Net(lambda y: y, 1)
def one_unsure(): return Net(lambda y: 0.2 * y, 1)
def one_squeezed(): return Net(lambda y: y.squeeze(1), 1)
def one_prob(): return Net(lambda y: y.sigmoid(), 1)
def one_sure(): return Net(lambda y: (y.abs() * 1000 + 100).sigmoid(), 1)
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """A module of factories, importable from the current folder."""
    (tmp_path / "output_kinds.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "output_kinds", raising=False)
    make_outside_spec.cache_clear()
    return tmp_path


def exported(name: str, folder, **settings):
    return run(ExportConfig(f"output_kinds:{name}", output=folder / "out", threads=1, **settings))


def expected(name: str, batch: np.ndarray) -> np.ndarray:
    """The probabilities that the model itself means, ``(N, classes)``."""
    values = getattr(importlib.import_module("output_kinds"), name)().eval()(torch.from_numpy(batch))
    values = values["logits"] if isinstance(values, dict) else values
    values = values.detach().float()
    if name.startswith("one"):
        positive = (
            values.reshape(-1, 1) if KINDS[name] == "probabilities" else values.reshape(-1, 1).sigmoid()
        )
        return torch.cat([1 - positive, positive], 1).numpy()
    if KINDS[name] is not None:
        return values.numpy()
    return values.softmax(1).numpy()


KINDS = {
    "plain": None,
    "prob": "probabilities",
    "prob_half": "probabilities",
    "half": None,
    "bf16": None,
    "log_prob": None,
    "several": "scores",
    "written_out": "scores",
    "averaged": "scores",
    "record": None,
    "one": None,
    "one_squeezed": None,
    "one_prob": "probabilities",
    "one_sure": "probabilities",
    "one_nearly_sure": "probabilities",
    "one_written_out": "probabilities",
    "one_averaged": "probabilities",
    "one_clamped": "probabilities",
    "rectified": None,
    "small": None,
    "one_small": None,
    "one_of_map": None,
}
"""Factory -> the kind that the manifest records; ``None`` means logits, and is left out."""


@pytest.mark.parametrize(
    ("name", "format"), [*((name, "openvino") for name in KINDS), ("one_prob", "onnx"), ("prob_half", "onnx")]
)
def test_a_prediction_shows_what_the_model_means(nets, name, format):
    bundle = exported(name, nets, format=format)
    output = json.loads((bundle.path / "manifest.json").read_text())["outputs"][0]
    assert output.get("kind") == KINDS[name]
    assert output["dtype"] == "float32"
    assert ("kind" in output) == (KINDS[name] is not None)
    assert bundle.manifest.verification.golden.atol > 0
    images = [np.full((32, 32, 3), shade, np.uint8) for shade in (0, 90, 250)]
    with Predictor.load(bundle.path, threads=1) as predictor:
        means = expected(name, predictor.prepare(images))
        found = [predictor(images[0]), *predictor.predict(images[1:])]
    np.testing.assert_allclose(np.stack([p.probabilities for p in found]), means, atol=5e-3)
    assert len(bundle.labels) == means.shape[1]
    for prediction, mean in zip(found, means, strict=True):
        assert prediction.label == prediction.top(1)[0][0] == bundle.labels[int(mean.argmax())]
    verification = verify(bundle, threads=1)
    assert verification.passed
    for text in (report.describe_verification(verification), report.describe_bundle(bundle)):
        assert ("in probability)" in text) == (KINDS[name] is not None)


REFUSED = {
    "one_hot": "a single 1 among zeros",
    "nan": "NaN or infinite",
    "index": "int64 (2,)",
    "index_float": "a whole number",
    "index_scaled": "a whole number",
    "constant": "with the same values",
    "constant_rounded": "with the same values",
    "constant_share": "with the same values",
    "values": "sorted values",
    "best_three": "sorted values",
    "percent": "sum to 100 for every image",
    "nearly": "sum to 1.002 for every image",
    "background": "a part of a softmax",
    "losses": "negated log-probabilities",
    "best_kept": "the max of 5 values",
    "best_only": "the amax of 5 values",
    "evidence": "the logsumexp of 5 values",
    "one_softmax": "softmax, which is 1",
    "one_percent": "between 0 and 100",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_logits_is_refused(nets, name):
    with pytest.raises(InputError, match=REFUSED[name].replace("(", r"\(").replace(")", r"\)")):
        exported(name, nets)
    assert not list((nets / "out").glob("*/manifest.json"))


@pytest.mark.parametrize("name", ["one", "one_prob", "prob", "several"])
def test_int8(nets, name):
    bundle = exported(name, nets, precision="int8", data="generated", calib_size=32, atol=10)
    image = np.full((32, 32, 3), 90, np.uint8)
    with Predictor.load(bundle.path, threads=1) as predictor:
        means = expected(name, predictor.prepare([image]))[0]
        np.testing.assert_allclose(predictor(image).probabilities, means, atol=0.3)


@pytest.mark.parametrize("format", ["onnx", "openvino"])
@pytest.mark.parametrize("name", ["one", "one_unsure"])
def test_one_logit_in_int8_has_a_tolerance_of_its_own(nets, name, format):
    bundle = exported(name, nets, precision="int8", data="generated", calib_size=32, format=format)
    golden = bundle.manifest.verification.golden
    assert golden.atol >= 0.375
    assert verify(bundle, threads=1).passed
    assert not verify(bundle, threads=1, atol=golden.diff / 2).passed


def test_two_labels_of_one_logit_come_from_a_file(nets):
    (nets / "labels.txt").write_text("cat\ndog\n")
    bundle = exported("one", nets, labels=str(nets / "labels.txt"))
    assert bundle.labels == ["cat", "dog"]
    assert bundle.manifest.model.num_classes == 1
    (nets / "labels.txt").write_text("dog\n")
    assert exported("one", nets, labels=str(nets / "labels.txt")).labels == ["not dog", "dog"]
    (nets / "labels.txt").write_text("cat\ndog\ncow\n")
    with pytest.raises(InputError, match="2 classes"):
        exported("one", nets, labels=str(nets / "labels.txt"))


# --- mean and std --------------------------------------------------------------------------------


IMAGENET = ("123.675,116.28,103.53", "58.395,57.12,57.375")
SCALES = [
    (*IMAGENET, False),
    ("127.5,127.5,127.5", "127.5,127.5,127.5", False),
    ("123.68,116.779,103.939", "1,1,1", False),
    ("0.5,0.5,0.5", "58,57,57", False),
    ("0.5,0.5,0.5", "0.017,0.0175,0.0174", False),
    ("0.5,0.5,0.5", "0.0078125,0.0078125,0.0078125", False),
    ("0.5,0.5,0.5", "0.05,0.05,0.05", True),
    ("0,0,0", "255,255,255", False),
    ("0.5,0.5,0.5", "0.5,0.5,0.5", True),
    ("0,0,0", "1,1,1", True),
    ("0,0,0", "0.0039215686,0.0039215686,0.0039215686", True),
    ("1,1,1", "1,1,1", True),
    ("0.485,0.456,0.406", "0.229,0.224,0.225", True),
]


@pytest.mark.parametrize(("mean", "std", "right"), SCALES)
def test_mean_and_std_of_values_from_0_to_255_are_refused(tmp_path, mean, std, right):
    config = ExportConfig("cmt_nano", output=tmp_path, mean=mean, std=std)
    if right:
        check_preconditions(config)
        return
    with pytest.raises(InputError, match="values from 0 to 1"):
        check_preconditions(config)


MIXED = [
    ("0.5,0.5,127", "58,57,57"),
    ("0.485,116.28,103.53", "0.229,0.224,0.225"),
    ("123.675,116.28,103.53", "0.229,57.12,57.375"),
    ("0.5,0.5,0.5", "0.5,127.5,127.5"),
    ("1,116,103", "58,57,57"),
]


@pytest.mark.parametrize(("mean", "std"), MIXED)
def test_no_conversion_is_proposed_for_values_of_two_scales(tmp_path, mean, std):
    config = ExportConfig("cmt_nano", output=tmp_path, mean=mean, std=std)
    with pytest.raises(InputError, match="values from 0 to 1") as error:
        check_preconditions(config)
    assert "mix two scales" in error.value.why
    assert not any(figure.isdigit() for figure in error.value.remedy.replace("from 0 to 1", ""))


@pytest.mark.parametrize("mean", ["123,0,103", "0,0,128"])
def test_a_mean_of_0_is_of_either_scale(tmp_path, mean):
    config = ExportConfig("cmt_nano", output=tmp_path, mean=mean, std="58,57,57")
    with pytest.raises(InputError) as error:
        check_preconditions(config)
    assert "--mean 0" in error.value.remedy


def test_the_remedy_names_the_converted_values(tmp_path):
    config = ExportConfig("cmt_nano", output=tmp_path, mean=IMAGENET[0], std=IMAGENET[1])
    with pytest.raises(InputError, match=r"--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225"):
        check_preconditions(config)


CONVERTED = [
    ("123.675,116.28,103.53", None, "--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225"),
    (None, "58.395,57.12,57.375", "--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225"),
    (
        "127.5,127.5,127.5",
        "0.0078125,0.0078125,0.0078125",
        "--mean 0.5,0.5,0.5 --std 0.50196,0.50196,0.50196",
    ),
    (None, "0.02,0.02,0.02", "--std 0.19608,0.19608,0.19608"),
]


@pytest.mark.parametrize(("mean", "std", "remedy"), CONVERTED)
def test_the_remedy_converts_only_what_was_given_in_grey_levels(tmp_path, mean, std, remedy):
    config = ExportConfig("cmt_nano", output=tmp_path, mean=mean, std=std)
    with pytest.raises(InputError) as caught:
        check_preconditions(config)
    assert remedy in caught.value.remedy


# --- the rule ---------------------------------------------------------------------------------------


RULE = [
    ([[0.2, 0.8], [0.5, 0.5]], "", "probabilities"),
    ([[0.2, 0.8], [0.5, 0.6]], "", "logits"),
    ([[0.2, 0.8], [0.5, 0.6]], "sigmoid", "scores"),
    ([[0.2, 0.8], [0.5, 0.5]], "sigmoid", "probabilities"),
    ([[1.0, 0.0], [0.0, 1.0]], "softmax", "probabilities"),
    ([[1.0, 0.0], [0.9, 0.1]], "", "probabilities"),
    ([[-0.2, 1.2], [0.5, 0.5]], "", "logits"),
    ([[2.0, 3.0], [0.5, 0.5]], "sigmoid", "logits"),
    ([[0.0, 0.0], [0.0, 0.0]], "", "logits"),
]


@pytest.mark.parametrize(("rows", "operation", "kind"), RULE)
def test_the_rule(rows, operation, kind):
    assert find_kind(np.array(rows, np.float32), operation) == kind


def test_an_index_among_zeros_is_no_probability():
    with pytest.raises(InputError, match="single 1"):
        find_kind(np.eye(4, dtype=np.float32), "")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_answers_that_are_not_finite(bad):
    maps = np.zeros((4, 3, 2, 2), np.float32)
    require_finite([maps])
    maps[1, 2, 0, 0] = bad
    with pytest.raises(InputError, match="1 of 4 golden images"):
        require_finite([np.zeros((4, 2), np.float32), maps])
