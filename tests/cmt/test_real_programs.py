"""Checkpoints that the programs themselves wrote. Each test is skipped where its program is not installed;
``docs/what-goes-in.md`` says with which versions they were run."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from cmt_edge.cmt import create_model, load_weights
from cmt_edge.cmt.described import describe_checkpoint
from helpers.weights import holds

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # warnings of other people's programs


class AnyName(type):
    """A class whose attributes are their own names, as those of an enumeration."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class Empty(ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        made = AnyName(name, (), {})
        setattr(self, name, made)
        return made


class Torchvision(MetaPathFinder, Loader):
    """Empty modules in place of torchvision, which timm imports for its data pipeline alone."""

    def find_spec(self, fullname, path, target=None):
        if fullname.partition(".")[0] != "torchvision":
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec):
        return Empty(spec.name)

    def exec_module(self, module):
        """There is nothing to run."""


HAS_TORCHVISION = find_spec("torchvision") is not None
"""Asked once: an empty module that was imported looks like an installed one."""


@pytest.fixture(autouse=True)
def no_need_of_torchvision(monkeypatch):
    if not HAS_TORCHVISION:
        monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Torchvision()])


def program(name: str) -> ModuleType:
    """A program that is not among our needs, or a skip."""
    try:
        return import_module(name)
    except Exception as exc:  # not installed, or what it needs is for another torch
        return pytest.skip(f"{name} cannot be imported: {type(exc).__name__}: {exc}")


def trained_by(lightning: ModuleType, folder, callbacks=()):
    """A LightningModule after one epoch, and the trainer."""

    class Lit(lightning.LightningModule):
        def __init__(self, lr: float = 0.1) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = create_model("cmt_nano", img_size=32, seed=5)
            self.criterion = nn.CrossEntropyLoss(weight=torch.ones(10))

        def training_step(self, batch, _):
            return self.criterion(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-3)

    data = torch.utils.data.TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8))
    model = Lit()
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[*callbacks],
        default_root_dir=folder,
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
    )
    trainer.fit(model, torch.utils.data.DataLoader(data, 4))
    return model, trainer


def test_lightning(tmp_path):
    lit, trainer = trained_by(program("lightning"), tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    model = create_model("cmt_nano", img_size=32)
    assert load_weights(model, tmp_path / "last.ckpt").entry == "state_dict.net"
    assert holds(model, lit.net.state_dict())


@pytest.mark.parametrize("averaged", [None, True, False])
def test_checkpoint_saver_of_timm(tmp_path, averaged):
    utils = program("timm.utils")
    model = create_model("cmt_nano", img_size=32, seed=5)
    average = utils.ModelEmaV3(model, decay=0.9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    average.update(model)
    saver = utils.CheckpointSaver(
        model,
        torch.optim.AdamW(model.parameters(), 1e-3),
        args=argparse.Namespace(model="cmt_nano", img_size=32, num_classes=10, lr=0.1),
        model_ema=average,
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    saver.save_checkpoint(1, metric=np.float64(3.0))
    other = create_model("cmt_nano", img_size=32, seed=9)
    loaded = load_weights(other, tmp_path / "last.pth.tar", ema=averaged)
    assert loaded.entry == ("state_dict" if averaged is False else "state_dict_ema")
    assert holds(other, (model if averaged is False else average.module).state_dict())
    said = describe_checkpoint(tmp_path / "last.pth.tar")
    assert (said.model, said.img_size, said.num_classes) == ("cmt_nano", 32, 10)
