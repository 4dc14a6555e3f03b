"""A manifest makes nobody download weights, or open a file outside the current folder."""

from __future__ import annotations

import os
import shutil
import socket
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest

from cmt_edge.cmt import create_model, reference
from cmt_edge.cmt.spec import Pretrained
from cmt_edge.deploy import Predictor
from cmt_edge.deploy.bundle import Bundle
from cmt_edge.deploy.cli.predict import main as cmt_predict
from cmt_edge.deploy.cli.verify import main as cmt_verify
from cmt_edge.deploy.errors import WeightsError
from helpers.bundles import copy_bundle, edit_manifest
from helpers.images import labelled

SHIPPED = "cmt_nano_cifar10.safetensors"
"""The file with the weights of cmt_nano in the package."""


@pytest.fixture
def asked(tmp_path, monkeypatch) -> list[object]:
    """The addresses that were asked for; none can be reached, and the cache is empty."""
    found: list[object] = []

    def refuse(*given: object, **_: object) -> None:
        found.append(given)
        raise OSError("there is no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("CMT_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return found


def name_weights(fp32_bundle: Bundle, place: Path, **names: str) -> Bundle:
    """The embedded model's bundle with another model or source of its weights in the manifest."""

    def edit(content) -> None:
        content["model"]["weights"]["source"] = names["source"]
        content["model"]["name"] = names.get("name", "cmt_nano")

    made = copy_bundle(fp32_bundle, place)
    edit_manifest(made, edit)
    return Bundle.open(made.path)


def list_commands(bundle: Bundle, folder: Path):
    """Every command that rebuilds the reference."""
    images = labelled(folder / "images", bundle.labels)
    picture = str(images / bundle.labels[0] / "0.png")
    path = str(bundle.path)
    return [
        (cmt_verify, [path, "--data", str(images)]),
        (cmt_verify, [path, "--backend", "torch"]),
        (cmt_predict, [path, picture, "--backend", "torch"]),
    ]


@pytest.mark.parametrize("name", ["cmt_ti", "cmt_b"])
def test_no_command_downloads_what_a_manifest_names(asked, tmp_path, fp32_bundle, capsys, name):
    bundle = name_weights(fp32_bundle, tmp_path / "bundle", source="pretrained", name=name)
    for command, arguments in list_commands(bundle, tmp_path):
        assert command(arguments) == 2, arguments
        told = capsys.readouterr().err
        assert "nothing is downloaded unasked" in told
        assert "--weights PATH" in told
        assert f"cmt-export --model {name}" in told
    assert asked == []
    assert not (tmp_path / "cache" / "weights").exists()


@pytest.mark.parametrize(
    "name", ["pipe", "folder", "elsewhere/cmt_nano.safetensors", "../cmt_nano.safetensors"]
)
def test_only_a_file_of_the_current_folder_is_opened(asked, tmp_path, fp32_bundle, capsys, name):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "elsewhere").mkdir()
    shipped = str(resources.files("cmt_edge.cmt") / "data" / SHIPPED)
    for place in (tmp_path / "elsewhere", tmp_path.parent):
        shutil.copy(shipped, place / "cmt_nano.safetensors")
    bundle = name_weights(fp32_bundle, tmp_path / "bundle", source=name)
    for command, arguments in list_commands(bundle, tmp_path):
        assert command(arguments) == 2, arguments
        assert f"made from the checkpoint '{name}'" in capsys.readouterr().err
    with Predictor.load(bundle.path, backend="torch", weights=shipped) as predictor:
        assert predictor(bundle.golden().sources[0]).label
    assert asked == []


def test_weights_in_the_package_need_no_word(asked, tmp_path, fp32_bundle):
    for command, arguments in list_commands(fp32_bundle, tmp_path):
        assert command(arguments) in (0, 1), arguments
    assert asked == []


def test_weights_in_the_cache_need_no_word(asked, tmp_path, fp32_bundle, monkeypatch):
    """The model's weights are published at an address, and were downloaded at the export."""

    def create_published(*given, **options):
        model = create_model(*given, **options)
        model.spec = replace(model.spec, pretrained=Pretrained("https://example.invalid/nano.safetensors"))
        return model

    monkeypatch.setattr(reference, "create_model", create_published)
    with pytest.raises(WeightsError, match="not in the cache"):
        Predictor.load(fp32_bundle.path, backend="torch")
    kept = tmp_path / "cache" / "weights"
    kept.mkdir(parents=True)
    shutil.copy(str(resources.files("cmt_edge.cmt") / "data" / SHIPPED), kept / "nano.safetensors")
    with Predictor.load(fp32_bundle.path, backend="torch") as predictor:
        assert predictor(fp32_bundle.golden().sources[0]).label
    assert asked == []


def test_verify_takes_the_names_that_the_export_takes(asked, fp32_bundle, capsys):
    command = [str(fp32_bundle.path), "--backend", "torch", "--weights"]
    assert cmt_verify([*command, "pretrained"]) == 0, capsys.readouterr().err
    assert cmt_verify([*command, "Random"]) == 2
    assert "not the weights that the bundle was made from" in capsys.readouterr().err
    assert asked == []
