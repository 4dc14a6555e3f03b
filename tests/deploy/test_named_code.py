"""A bundle never makes Python import code: a model from outside the registry needs the user's own word."""

from __future__ import annotations

import sys

import pytest

from cmt_edge.deploy import Predictor
from cmt_edge.deploy.bundle import Bundle
from cmt_edge.deploy.cli.predict import main as cmt_predict
from cmt_edge.deploy.cli.verify import main as cmt_verify
from cmt_edge.deploy.errors import InputError
from helpers.bundles import copy_bundle, edit_manifest
from helpers.images import labelled

CODE = """
from pathlib import Path
Path("imported").write_text("yes")
from cmt_edge.cmt import create_model
def make():
    return create_model("cmt_nano")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a module of the name that the manifest gives."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    (tmp_path / "hostile.py").write_text(CODE)
    yield tmp_path
    sys.modules.pop("hostile", None)


@pytest.fixture
def bundle(folder, fp32_bundle) -> Bundle:
    """The embedded model's bundle, whose manifest names a module."""
    made = copy_bundle(fp32_bundle, folder / "bundle")
    edit_manifest(made, lambda content: content["model"].update(name="hostile:make"))
    return Bundle.open(made.path)


def test_no_command_imports_what_a_manifest_names(folder, bundle, capsys):
    images = labelled(folder / "images", bundle.labels)
    picture = str(images / bundle.labels[0] / "0.png")
    path = str(bundle.path)
    commands = [
        (cmt_verify, [path, "--data", str(images)]),
        (cmt_verify, [path, "--backend", "torch"]),
        (cmt_predict, [path, picture, "--backend", "torch"]),
    ]
    for command, arguments in commands:
        assert command(arguments) == 2, arguments
        assert "--reference-model hostile:make" in capsys.readouterr().err
        assert not (folder / "imported").exists()
        assert "hostile" not in sys.modules
    assert cmt_verify([path]) == 0
    assert cmt_predict([path, picture]) == 0
    assert not (folder / "imported").exists()


@pytest.mark.parametrize("name", ["hostile:make", "timm:resnet18", "os:system", "hostile.py:make"])
def test_every_name_from_outside_is_refused(folder, bundle, name):
    edit_manifest(bundle, lambda content: content["model"].update(name=name))
    with pytest.raises(InputError, match="without your word"):
        Predictor.load(bundle.path, backend="torch")
    assert not (folder / "imported").exists()


def test_the_user_may_name_the_code(folder, bundle):
    with Predictor.load(bundle.path, backend="torch", trusted_model="cmt_nano") as own:
        assert own(bundle.golden().sources[0]).label
    assert not (folder / "imported").exists()
    with pytest.raises(InputError, match="not the weights"):
        Predictor.load(bundle.path, backend="torch", trusted_model="hostile:make", weights="pretrained")
    assert (folder / "imported").exists()
