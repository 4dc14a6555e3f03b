"""Every model of the registry against the official code: logits before and after the rewrites, keys,
parameters and MACs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cmt_edge.cmt import count_params, create_model, fuse, list_models, macs
from helpers.golden import (
    VARIANTS,
    WITHOUT_OFFICIAL_CODE,
    golden,
    official_array,
    official_figures,
    official_model,
    ours,
)
from helpers.models import GIANT_MACS
from helpers.shared import shared

SLOW_MACS = 3e9
"""Models above this take seconds a forward pass of two images in float64."""
RULES = {"fanin": "logits_f64", "flat": "logits_flat_f64"}
"""How the weights were made, and the name of the float64 logits in the golden file."""

WITH_LOGITS = [v for v in VARIANTS if v.logits]

pytestmark = pytest.mark.usefixtures("one_thread")


def cost(variant, giant: float):
    """The mark of a test that takes as long as a forward pass of ``variant``."""
    if variant.macs > giant:
        return [pytest.mark.giant]
    return [pytest.mark.slow] if variant.macs > SLOW_MACS else []


def logits_cases():
    """Every variant under both rules; the second rule of the slow ones is tested on demand."""
    for variant in WITH_LOGITS:
        for rule, giant in (("fanin", GIANT_MACS), ("flat", SLOW_MACS)):
            marks = cost(variant, giant)
            yield pytest.param(variant, rule, marks=marks, id=f"{variant.name}-{rule}")


def each(variants, giant: float = float("inf")):
    return [pytest.param(v, marks=cost(v, giant), id=v.name) for v in variants]


@pytest.mark.parametrize(("variant", "rule"), [*logits_cases()])
def test_logits_equal_the_official_code(variant, rule):
    """The reference in float32 and float64, and the rewritten model in float32."""
    exact, rounded = official_array(variant.name, RULES[rule]), golden().logits(variant.name, rule)
    model = official_model(variant, rule)
    x = torch.from_numpy(golden().golden_input(variant.size))
    with torch.inference_mode():
        reference = model(x).numpy()
        rewritten = fuse(model)(x).numpy()
        double = model.double()(x.double()).numpy()
    assert reference.dtype == rewritten.dtype == np.float32
    np.testing.assert_allclose(reference, rounded, rtol=0, atol=2e-5)
    np.testing.assert_allclose(rewritten, rounded, rtol=0, atol=2e-5)
    np.testing.assert_allclose(double, exact, rtol=0, atol=1e-9)


@pytest.mark.parametrize("variant", each(WITH_LOGITS))
def test_every_published_key_has_one_place_of_equal_shape(variant):
    shared(f"golden/{variant.name}.json")
    entries = golden().entries(variant.name)
    model = create_model(variant.model, img_size=variant.size)
    renamed = {model.spec.rename(e["key"]) for e in entries}
    assert len(renamed) == len(entries)
    state = {e["key"]: torch.empty(e["shape"], device="meta") for e in entries}
    assert {k: tuple(v.shape) for k, v in ours(model.spec, state).items()} == {
        k: tuple(v.shape) for k, v in model.state_dict().items()
    }


@pytest.mark.parametrize("variant", each(VARIANTS, GIANT_MACS))
def test_parameters_and_macs_are_the_official_ones(variant):
    figures = official_figures()[variant.name]
    model = create_model(variant.model, img_size=variant.size)
    assert count_params(model) == figures["num_params"]
    assert macs(model) == figures["macs"]


def test_every_model_is_compared_or_has_no_official_code():
    compared = {variant.model for variant in VARIANTS}
    assert compared | set(WITHOUT_OFFICIAL_CODE) == set(list_models())
    assert not compared & set(WITHOUT_OFFICIAL_CODE)


def test_the_variants_are_those_of_the_shared_data():
    sizes = {name: figures["input_size"] for name, figures in official_figures().items()}
    assert {v.name: v.size for v in VARIANTS} == sizes
    recorded = {path.stem for path in shared("golden").glob("*.npz")}
    assert {v.name for v in WITH_LOGITS} == recorded
