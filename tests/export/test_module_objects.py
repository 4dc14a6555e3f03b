"""``ExportConfig(model=net)``: a module object in place of a name."""

from __future__ import annotations

import copy
import gc
import threading

import numpy as np
import pytest
import torch
from torch import nn

from cmt_edge import ExportConfig, Predictor, create_model, export, verify
from cmt_edge.cmt import compute_weights_fingerprint, find_model, load_weights
from cmt_edge.cmt.objects import unwrap
from cmt_edge.deploy.errors import BundleError, InputError
from cmt_edge.export.pipeline import make_plan
from helpers.exports import traced_once


class Net(nn.Module):
    """A small classifier that keeps a result of its last call, as for a plot."""

    img_size = 32

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(8, classes)
        self.last: object = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = {"map": [self.stem(x)]}
        return self.fc(self.drop(self.last["map"][0].mean((2, 3))))


def trained() -> Net:
    torch.manual_seed(0)
    net = Net().train()
    for _ in range(2):
        net(torch.randn(8, 3, 32, 32))
    return net


def test_a_module_is_exported_and_stays_as_it_is(tmp_path):
    net = trained()
    before, kept = copy.deepcopy(net.state_dict()), net.last
    settings = {"labels": ("cat", "dog", "cow"), "mean": (0.5, 0.4, 0.3), "std": [1, 1, 1]}
    made = export(ExportConfig(model=net, format="onnx", output=str(tmp_path), **settings))
    assert net.training
    assert net.last is kept
    assert before.keys() == net.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())

    entry = made.manifest.model
    assert (made.path.name, entry.name, entry.family) == ("Net_fp32_onnx", "Net", "custom")
    assert entry.weights.source == "as built"
    assert entry.weights.sha256 == compute_weights_fingerprint(net)
    assert made.labels == ["cat", "dog", "cow"]
    assert (made.preprocess.mean, made.preprocess.std) == ((0.5, 0.4, 0.3), (1, 1, 1))
    x = np.random.default_rng(0).normal(size=(1, 3, 32, 32)).astype(np.float32)
    with Predictor.load(made) as ours, torch.inference_mode():
        theirs = net.eval()(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(ours.logits(x), theirs, atol=1e-5)


def test_the_manifest_names_no_code_and_verify_wants_the_module(tmp_path):
    net = trained()
    made = export(ExportConfig(net, format="onnx", output=str(tmp_path)))
    assert __name__.rpartition(".")[2] not in (made.path / "manifest.json").read_text()
    with pytest.raises(InputError, match="made from a module object") as error:
        verify(made, backend="torch")
    assert "trusted_model" in error.value.remedy
    assert verify(made, backend="torch", trusted_model=net).passed
    with torch.no_grad():
        net.fc.bias += 1
    with pytest.raises(BundleError, match="not the weights"):
        verify(made, backend="torch", trusted_model=net)


def test_a_module_of_the_registry_keeps_its_family(tmp_path, traced):
    net = create_model("cmt_nano", num_classes=7, seed=0)
    spec = ExportConfig(net).spec
    assert (spec.name, spec.num_classes, spec.img_size) == ("cmt_nano", 7, 64)
    assert spec.rewrites == find_model("cmt_nano").rewrites
    torch.save(net.state_dict(), tmp_path / "net.pt")
    with traced_once(traced):
        made = export(ExportConfig(net, format="onnx", output=str(tmp_path)))
    assert made.manifest.labels_source == "numbered"
    assert verify(made, backend="torch", weights=str(tmp_path / "net.pt")).passed
    with pytest.raises(InputError, match="module object"):
        verify(made, backend="torch")


def test_labels_of_a_registry_module_are_not_guessed():
    """Ten classes are not CIFAR-10's because the model has ten outputs."""
    assert ExportConfig(create_model("cmt_nano")).spec.labels is None


def test_a_changed_module_of_the_registry_gets_the_rewrites_that_fit():
    net = create_model("cmt_nano", seed=0)
    net.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(192, 10))
    names = [rewrite.name for rewrite in ExportConfig(net).spec.rewrites]
    assert names == ["global pooling as mean"]


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        torch.optim.swa_utils.AveragedModel,
        lambda net: torch.compile(net, backend="eager"),
    ],
    ids=["DataParallel", "AveragedModel", "torch.compile"],
)
def test_what_pytorch_puts_around_a_module_is_taken_off(wrap):
    net = Net().eval()
    inner = unwrap(wrap(net))
    assert type(inner) is Net
    spec = find_model(wrap(net))
    assert (spec.name, spec.num_classes) == ("Net", 3)


def test_weights_and_size_can_be_named_with_a_module(tmp_path):
    net, other = Net(), trained()
    torch.save({"state_dict": other.state_dict()}, tmp_path / "best.pt")
    config = ExportConfig(net, imgsz=48, weights=str(tmp_path / "best.pt"))
    told = make_plan(config)
    assert told["sha256"] == compute_weights_fingerprint(other)
    assert told["input"] == [1, 3, 48, 48]
    copied = create_model(net)
    load_weights(copied, tmp_path / "best.pt")
    assert (
        compute_weights_fingerprint(copied)
        == compute_weights_fingerprint(other)
        != compute_weights_fingerprint(net)
    )


class Locked(Net):
    """Has an attribute that cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    ("model", "changes", "words"),
    [
        (3, {}, "is a int, not a name"),
        (Net, {}, "is a type, not a name"),
        (Locked(), {}, "Locked cannot be copied"),
        (nn.Conv2d(3, 4, 3), {}, "not logits"),
        (Net(), {"num_classes": 5}, "takes no num_classes"),
        (Net(), {"labels": ["cat"]}, "1 labels for 3 classes"),
        (Net(), {"mean": (0.5, 0.5)}, "not three numbers"),
        (Net(), {"mean": (0.5, 0.5, float("nan"))}, "not three numbers"),
    ],
)
def test_what_cannot_be_exported(model, changes, words, tmp_path):
    with pytest.raises(InputError, match=words) as error:
        export(ExportConfig(model, output=str(tmp_path / "out"), **changes))
    assert error.value.remedy
    assert not [*(tmp_path / "out").glob("*")]


def test_an_export_does_not_keep_the_module_alive():
    net = Net()
    model = create_model(net)
    del net
    gc.collect()
    with pytest.raises(InputError, match="does not exist any more"):
        model.spec.constructor(model.spec.config, img_size=32, num_classes=3)
