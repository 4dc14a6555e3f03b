"""Every model of the registry against the official code: logits before and after the rewrites, keys,
parameters and MACs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cmt_edge.cmt import count_macs, count_params, create_model, find_model, fuse, list_models
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

KEYS = {
    "convit_tiny": [
        ("patch_embed.proj.weight", "embed.weight"),
        ("pos_embed", "position_embedding"),
        ("cls_token", "class_token"),
        ("blocks.9.attn.gating_param", "blocks.9.attn.position.gate"),
        ("blocks.0.attn.pos_proj.bias", "blocks.0.attn.position.proj.bias"),
        ("blocks.0.attn.proj.bias", "blocks.0.attn.proj.bias"),
        ("blocks.11.mlp.fc2.weight", "blocks.11.mlp.fc2.weight"),
        ("head.bias", "head.bias"),
    ],
    "cvt_13": [
        ("stage0.patch_embed.proj.bias", "stages.0.embed.bias"),
        ("stage1.patch_embed.norm.weight", "stages.1.norm.weight"),
        ("stage2.cls_token", "stages.2.class_token"),
        ("stage2.blocks.11.attn.conv_proj_k.conv.weight", "stages.2.blocks.11.attn.k.conv.weight"),
        ("stage2.blocks.1.attn.conv_proj_q.bn.running_var", "stages.2.blocks.1.attn.q.norm.running_var"),
        ("stage0.blocks.0.attn.proj_v.bias", "stages.0.blocks.0.attn.v.linear.bias"),
        ("stage0.blocks.0.attn.proj.bias", "stages.0.blocks.0.attn.proj.bias"),
        ("stage1.blocks.1.norm2.weight", "stages.1.blocks.1.norm2.weight"),
        ("norm.bias", "norm.bias"),
        ("head.weight", "head.weight"),
    ],
    "mvitv2_t": [
        ("patch_embed.proj.weight", "embed.weight"),
        ("pos_embed", "position_embedding"),
        ("cls_token", "class_token"),
        ("blocks.1.proj.bias", "blocks.1.shortcut.bias"),
        ("blocks.1.attn.proj.bias", "blocks.1.attn.proj.bias"),
        ("blocks.12.attn.pool_q.weight", "blocks.12.attn.pool_q.conv.weight"),
        ("blocks.12.attn.norm_v.bias", "blocks.12.attn.pool_v.norm.bias"),
        ("blocks.0.attn.rel_pos_h", "blocks.0.attn.relative.rows"),
        ("blocks.0.attn.rel_pos_w", "blocks.0.attn.relative.columns"),
        ("blocks.0.norm2.weight", "blocks.0.norm2.weight"),
        ("blocks.11.mlp.fc2.weight", "blocks.11.mlp.fc2.weight"),
        ("head.projection.bias", "head.bias"),
        ("norm.bias", "norm.bias"),
    ],
}
"""Keys of official state dicts and ours, by model; each of its kinds once."""

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


@pytest.mark.parametrize(
    ("name", "theirs", "our_key"),
    [(name, *pair) for name, pairs in KEYS.items() for pair in pairs],
)
def test_a_published_key_becomes_ours_and_ours_stays(name, theirs, our_key):
    rename = find_model(name).rename
    assert rename(theirs) == our_key
    assert rename(our_key) == our_key


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
    assert count_macs(model) == figures["macs"]


def test_every_model_is_compared_or_has_no_official_code():
    compared = {variant.model for variant in VARIANTS}
    assert compared | set(WITHOUT_OFFICIAL_CODE) == set(list_models())
    assert not compared & set(WITHOUT_OFFICIAL_CODE)


def test_the_variants_are_those_of_the_shared_data():
    sizes = {name: figures["input_size"] for name, figures in official_figures().items()}
    assert {v.name: v.size for v in VARIANTS} == sizes
    recorded = {path.stem for path in shared("golden").glob("*.npz")}
    assert {v.name for v in WITH_LOGITS} == recorded
