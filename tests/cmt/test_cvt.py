"""CvT: golden logits and stage maps of the official code, published keys, any resolution, its rewrites and
its export."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from cmt_edge.cmt import count_macs, create_model, find_model, fuse, load_pretrained, load_weights
from cmt_edge.cmt.families.cvt import Attention, CvT, QuickGELU
from cmt_edge.cmt.folding import PlainNorm
from cmt_edge.cmt.layers import DropPath
from cmt_edge.cmt.rewrites import drop_key_bias, fold_affine, fold_value_bias
from cmt_edge.cmt.weights import randomize
from cmt_edge.deploy.errors import InputError, WeightsError
from helpers.golden import golden, kept_model, official_array, published
from helpers.graphs import count_operations
from helpers.tensors import difference, images

NAME = "cvt_13"
REWRITES = [rewrite.name for rewrite in find_model(NAME).rewrites]
CLASS_ONLY = "class token only in the last block"

pytestmark = pytest.mark.usefixtures("one_thread")


def randomized(seed: int, size: int = 64, **options) -> nn.Module:
    model = create_model(NAME, img_size=size, **options)
    randomize(model, seed)
    return model


# --- against the official code --------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True], ids=["reference", "rewritten"])
def test_features_are_the_maps_of_the_official_stages(fused):
    model = kept_model("cvt_13_224")
    x = torch.from_numpy(golden().golden_input(224)[:1])
    with torch.inference_mode():
        maps = (fuse(model) if fused else model).features(x)
    for i, stage_map in enumerate(maps):
        expected = official_array("cvt_13_224", f"tap/stage{i}")
        np.testing.assert_allclose(stage_map[0].flatten()[:64].numpy(), expected, rtol=0, atol=2e-5)


def test_a_published_file_loads_at_both_resolutions_and_no_other_variant_takes_it(tmp_path):
    path = tmp_path / "CvT-13-224x224-IN-1k.pth"
    torch.save(published("cvt_13_224", "fanin"), path)
    large, other = create_model("cvt_13_384", img_size=64), create_model("cvt_21", img_size=64)
    load_weights(large, path)
    assert torch.equal(large.head.bias, published("cvt_13_224", "fanin")["head.bias"])
    with pytest.raises(WeightsError, match="does not fit cvt_21"):
        load_weights(other, path)


# --- facts of the family --------------------------------------------------------------------------


def test_attention_is_scaled_by_the_whole_width():
    scales = [m.scale for m in create_model(NAME, img_size=16).modules() if isinstance(m, Attention)]
    assert scales == [64**-0.5] + [192**-0.5] * 2 + [384**-0.5] * 10


def test_quick_gelu_is_not_gelu():
    x = torch.linspace(-4, 4, 81)
    assert torch.equal(QuickGELU()(x), x * torch.sigmoid(1.702 * x))
    assert 0.01 < difference(QuickGELU()(x), nn.functional.gelu(x)) < 0.03


def test_preprocessing_and_publication():
    specs = [find_model(name) for name in ("cvt_13", "cvt_21", "cvt_13_384", "cvt_21_384", "cvt_w24")]
    assert [s.img_size for s in specs] == [224, 224, 384, 384, 384]
    assert [s.crop_ratio for s in specs] == [0.875, 0.875, None, None, None]
    assert all(s.family == "CvT" and s.rewrites == specs[0].rewrites for s in specs)
    with pytest.raises(
        WeightsError, match="no weights are published"
    ) as error:  # none with an address of its own
        load_pretrained(create_model(NAME, img_size=16))
    assert "--weights" in error.value.remedy


@pytest.mark.parametrize("size", [0, 8, 72, 231])
def test_a_size_whose_maps_have_other_strides_is_refused(size):
    with pytest.raises(InputError, match="multiple of 16"):
        create_model(NAME, img_size=size)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (48, 48), (64, 112), (100, 75)])
def test_any_resolution_works_with_the_same_weights(height, width):
    model = randomized(0)
    x = images(2, height, width=width)
    with torch.inference_mode():
        both, single = model(x), model(x[:1])
        assert difference(fuse(model)(x), both) < 1e-5
    assert both.shape == (2, 1000)
    assert single.shape == (1, 1000)  # the official code drops the batch axis here
    assert difference(both[:1], single) < 1e-5


def test_stochastic_depth_rises_in_the_last_stage_alone():
    model = create_model(NAME, img_size=16, drop_path=0.3)
    rates = [[m.rate for m in stage.modules() if isinstance(m, DropPath)] for stage in model.stages]
    assert rates[:2] == [[0.0], [0.0, 0.0]]
    assert rates[2] == pytest.approx(np.linspace(0, 0.3, 10), abs=1e-6)


def test_every_parameter_is_trained():
    model = create_model(NAME, img_size=32, seed=0, num_classes=4, drop_path=0.1).train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        nn.functional.cross_entropy(model(images(4, 32)), torch.arange(4)).backward()
    assert [k for k, p in model.named_parameters() if p.grad is None] == []


# --- features -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 80])
def test_features_have_strides_4_8_16_and_survive_the_rewrites(size):
    model, x = randomized(1).double(), images(2, size).double()
    with torch.inference_mode():
        maps, rewritten = model.features(x), fuse(model).features(x)
    assert [tuple(m.shape) for m in maps] == [
        (2, d, size // s, size // s) for d, s in ((64, 4), (192, 8), (384, 16))
    ]
    assert max(difference(a, b) for a, b in zip(maps, rewritten, strict=True)) < 1e-10


# --- rewrites -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 80])  # 80: the last map is 5 x 5, its keys' map 3 x 3
@pytest.mark.parametrize("rewrite", REWRITES)
def test_each_rewrite_is_exact_alone_and_the_others_without_it(rewrite, size):
    model, x = randomized(2).double(), images(2, size).double()
    with torch.inference_mode():
        expected = model(x)
        assert difference(fuse(model, without=set(REWRITES) - {rewrite})(x), expected) < 1e-10
        assert difference(fuse(model, without=[rewrite])(x), expected) < 1e-10


def test_all_rewrites_together_are_exact():
    for seed in range(3):
        model, x = randomized(seed), images(2, 64, seed=seed)
        with torch.inference_mode():
            assert difference(fuse(model)(x), model(x)) < 1e-5
            assert difference(fuse(model.double())(x.double()), model(x.double())) < 1e-10


def test_what_is_left_of_a_rewritten_block():
    fused = fuse(randomized(0))
    for block in (b for stage in fused.stages for b in stage.blocks):
        attn = block.attn
        assert all(
            isinstance(p.norm, nn.Identity) and p.conv.bias is not None for p in (attn.q, attn.k, attn.v)
        )
        assert (attn.scale, attn.k.linear.bias, attn.v.linear.bias) == (1.0, None, None)
        assert isinstance(block.norm1, nn.LayerNorm)  # zero-padded convs read it
        assert isinstance(block.norm2, PlainNorm)
        assert isinstance(block.mlp.act, nn.SiLU)
    assert isinstance(fused.norm, PlainNorm)


def test_folding_the_first_norm_of_a_block_is_refused():
    """Its shift would be wrong at the borders of the padded convs: the reason why no rewrite does it."""
    with pytest.raises(ValueError, match="zero-padded"):
        fold_affine("norm1", "attn.q.conv").apply(randomized(0).double())


@pytest.mark.parametrize("size", [64, 224])
def test_the_last_block_computes_the_class_token_alone(size):
    model = randomized(0, size)
    fused = fuse(model)
    tokens, keys, dim = (size // 16) ** 2, 1 + ((size // 16 + 1) // 2) ** 2, 384
    linears, depthwise = (1 + 1 + 2 * 4) * dim**2, 9 * dim  # q, proj and the MLP; the conv of q
    assert count_macs(model) - count_macs(fused) == tokens * (linears + depthwise + 2 * keys * dim)
    seen: list[torch.Size] = []
    fused.stages[-1].blocks[-1].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    with torch.inference_mode():
        fused(images(2, size))
    assert seen == [(2, 1, dim)]
    assert not model.class_only


def test_bias_rewrites_find_nothing_where_there_are_no_biases():
    model = fuse(randomized(0))
    assert drop_key_bias("k.linear").apply(model) == 0
    assert fold_value_bias("v.linear", "proj").apply(model) == 0


def test_the_key_bias_may_be_anything_but_the_value_bias_may_not():
    model, x = randomized(0).double(), images(2, 64).double()
    with torch.inference_mode():
        before = model(x)
        for attn in (m for m in model.modules() if isinstance(m, Attention)):
            attn.k.linear.bias.add_(1)
        assert difference(model(x), before) < 1e-10
        model.stages[0].blocks[0].attn.v.linear.bias.add_(1)
        assert difference(model(x), before) > 1e-3


# --- export ---------------------------------------------------------------------------------------


@pytest.mark.giant
def test_onnx_equals_pytorch_at_any_batch_and_the_rewrites_make_it_smaller():
    model = randomized(0, depths=(1, 1, 2))
    assert isinstance(model, CvT)
    reference, rewritten = count_operations(model)
    assert rewritten.total() < 0.95 * reference.total()  # whose batch norms the graph has folded too
    assert not {"BatchNormalization", "SequenceAt", "SplitToSequence", "If", "Loop"} & set(rewritten)
    assert rewritten["Conv"] == 3 + 3 * 4 - 1  # the last block's queries need no conv
