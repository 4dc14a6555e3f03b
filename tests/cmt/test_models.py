"""The models of the registry: what the registry tells of them, building them and training them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cmt_edge.cmt import (
    count_macs,
    count_params,
    create_model,
    find_model,
    find_published_labels,
    list_models,
)
from cmt_edge.cmt.layers import DropPath
from cmt_edge.deploy.errors import InputError, UnknownNameError
from helpers.models import marked_models

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", marked_models())
def test_our_own_keys_are_left_as_they_are(name):
    model = create_model(name, img_size=32)
    assert [model.spec.rename(k) for k in model.state_dict()] == list(model.state_dict())


@pytest.mark.parametrize("name", marked_models())
def test_registry_tells_the_parameters_and_macs_of_the_model(name):
    model = create_model(name)
    assert (model.spec.params, model.spec.macs) == (count_params(model), count_macs(model))


def test_macs_of_another_size_need_a_model_built_for_it():
    small, large = create_model("cmt_nano"), create_model("cmt_nano", img_size=128)
    assert (
        4 < count_macs(large) / count_macs(small) < 8
    )  # convs and linears grow with the area, attention faster
    assert next(small.parameters()).device.type == "cpu"  # counting leaves the model where it is


@pytest.mark.parametrize("name", list_models())
def test_labels_are_known_for_the_published_class_count_only(name):
    spec = find_model(name)
    labels = find_published_labels(spec, spec.num_classes)
    assert labels is not None
    assert len(dict(labels)) == spec.num_classes
    assert find_published_labels(spec, spec.num_classes + 1) is None


@pytest.mark.parametrize("name", marked_models())
def test_shapes_follow_the_arguments(name):
    model = create_model(name, img_size=64, num_classes=7)
    assert not model.training
    assert (model.img_size, model.num_classes, model.spec.name) == (64, 7, name)
    with torch.inference_mode():
        assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize(("name", "close"), [("cmt_nan", "cmt_nano"), ("cmt-xs", "cmt_xs"), ("resnet", None)])
def test_unknown_name_tells_the_closest(name, close):
    with pytest.raises(UnknownNameError, match=f"unknown model '{name}'") as error:
        create_model(name)
    assert (close or "cmt_") in error.value.remedy


@pytest.mark.parametrize("size", [65, 31, 0, -32, 100])
def test_impossible_size_is_refused_with_possible_ones(size):
    with pytest.raises(InputError, match="multiple of 32") as error:
        create_model("cmt_nano", img_size=size)
    below = max(32, size // 32 * 32)
    assert f"{below} or {below + 32}" in error.value.remedy


@pytest.mark.parametrize("classes", [0, -3])
def test_no_classes_are_refused(classes):
    with pytest.raises(InputError, match="classes"):
        create_model("cmt_nano", num_classes=classes)


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (1, 3, 64, 96)])
def test_another_input_size_than_built_for_is_refused(shape):
    with pytest.raises(ValueError, match="built for 64"):
        create_model("cmt_nano")(torch.zeros(shape))


def test_seed_is_reproducible_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    first, again, other = (create_model("cmt_nano", seed=s).state_dict() for s in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["stem.0.conv.weight"], other["stem.0.conv.weight"])


def test_without_seed_the_global_generator_decides():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        first, second = (create_model("cmt_nano").state_dict()["head.fc.weight"] for _ in range(2))
        torch.manual_seed(5)
        again = create_model("cmt_nano").state_dict()["head.fc.weight"]
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_trains_with_stochastic_depth():
    model = create_model("cmt_nano", seed=0, drop_path=0.2, head_dropout=0.0).train()
    rates = [m.rate for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx(np.linspace(0, 0.2, sum(model.config.depths)), abs=1e-6)  # linear in depth
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(10, 3, 64, 64, generator=generator), torch.arange(10)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(8):
            loss = torch.nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            if (
                not losses
            ):  # every parameter takes part; the key bias cancels in the softmax but still has a gradient
                assert all(p.grad is not None for p in model.parameters())
            optimizer.step()
            losses.append(float(loss.detach()))
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.5 * losses[0]


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean():
    drop, x = DropPath(0.25), torch.ones(4000, 2, 3)
    assert torch.equal(drop.eval()(x), x)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        y = drop.train()(x)
    per_sample = y.flatten(1)
    assert torch.equal(per_sample.amin(1), per_sample.amax(1))
    assert per_sample.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert y.mean().item() == pytest.approx(1, abs=0.05)
