"""A new family is one file and one registry line: listed, built, loaded, rewritten, exported and verified
without another change."""

from __future__ import annotations

import pytest
import torch

from cmt_edge.cmt import (
    count_macs,
    count_params,
    create_model,
    find_model,
    fuse,
    list_models,
    load_weights,
    registry,
)
from cmt_edge.cmt.weights import randomize
from cmt_edge.deploy.errors import UnknownNameError
from cmt_edge.deploy.measure.parity import verify
from cmt_edge.export import ExportConfig, run

NAME, MODULE = "example_tiny", "helpers.example_family"

pytestmark = pytest.mark.usefixtures("one_thread", "example_family", "brief_measurements")


@pytest.fixture
def example_family(monkeypatch):
    """The one line, ``FAMILIES = (..., "example_family")``, for the time of a test."""
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, MODULE))


def randomized(seed: int = 0) -> torch.nn.Module:
    model = create_model(NAME)
    randomize(model, seed)
    return model


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_it_is_listed_last_and_its_row_tells_the_truth():
    assert list_models()[-1] == NAME
    model = create_model(NAME)
    assert (model.spec.params, model.spec.macs) == (count_params(model), count_macs(model))


def test_published_weights_load_under_their_own_names(tmp_path):
    trained = randomized()
    torch.save(
        {k.replace("stages.", "layers."): v for k, v in trained.state_dict().items()},
        tmp_path / "published.pth",
    )
    model = create_model(NAME, seed=1)
    load_weights(model, tmp_path / "published.pth")
    with torch.inference_mode():
        assert torch.equal(model(images(1)), trained(images(1)))


def test_each_rewrite_is_exact_alone_and_all_together():
    model, x = randomized().double(), images(2).double()
    names = [rewrite.name for rewrite in find_model(NAME).rewrites]
    with torch.inference_mode():
        expected, maps = model(x), model.features(x)
        for without in ([], *([n for n in names if n != name] for name in names)):
            fused = fuse(model, without=without)
            assert (fused(x) - expected).abs().max() < 1e-10
            assert max((a - b).abs().max() for a, b in zip(fused.features(x), maps, strict=True)) < 1e-10
    assert [tuple(m.shape) for m in maps] == [(2, 32, 16, 16), (2, 64, 4, 4)]


@pytest.mark.parametrize(("form", "precision"), [("openvino", "fp32"), ("openvino", "int8"), ("trt", "fp16")])
def test_it_is_exported_and_verified(tmp_path, form, precision):
    data = {"data": "generated", "calib_size": 8} if precision == "int8" else {}
    made = run(
        ExportConfig(
            NAME,
            weights="random",
            format=form,
            precision=precision,
            build=form != "trt",
            output=str(tmp_path),
            **data,
        )
    )
    assert made.manifest.verification.golden.passed
    assert verify(made, backend="onnxruntime").passed


def test_nothing_of_it_stays_behind(monkeypatch):
    monkeypatch.undo()
    assert NAME not in list_models()
    with pytest.raises(UnknownNameError):
        create_model(NAME)


def test_a_name_is_taken_only_once(monkeypatch):
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, MODULE))
    with pytest.raises(ValueError, match="two models have the name 'example_tiny'"):
        list_models()
