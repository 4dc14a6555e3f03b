"""ConViT: golden logits of the official code, published keys, other resolutions, positions, its rewrites and
its export."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cmt_edge.cmt import count_macs, create_model, find_model, fuse, load_weights
from cmt_edge.cmt.families.convit import (
    Attention,
    GatedAttention,
    PositionAttention,
    PositionTable,
    RowsToOne,
    make_patch_offsets,
    resize_position_embedding,
    separate_projections,
)
from cmt_edge.cmt.folding import PlainNorm
from cmt_edge.cmt.layers import DropPath
from cmt_edge.cmt.weights import randomize
from cmt_edge.deploy.errors import InputError, WeightsError
from helpers.golden import published
from helpers.graphs import count_operations
from helpers.tensors import difference, images

NAME = "convit_tiny"
REWRITES = [rewrite.name for rewrite in find_model(NAME).rewrites]
ROWS = "row sums dropped"

pytestmark = pytest.mark.usefixtures("one_thread")


def randomized(seed: int, size: int = 64, **options) -> nn.Module:
    """Random weights; gates and positions as different from head to head as in a trained model."""
    model = create_model(NAME, img_size=size, **options)
    randomize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for position in (m for m in model.modules() if isinstance(m, PositionAttention)):
            position.gate.copy_(6 * torch.randn(position.gate.shape, generator=generator))
            position.proj.weight.copy_(torch.randn(position.proj.weight.shape, generator=generator))
    return model


# --- against the official code --------------------------------------------------------------------


def test_stacked_linears_are_taken_apart_and_ours_left_alone():
    stacked = torch.arange(18.0).reshape(9, 2)
    state = separate_projections(
        {"blocks.10.attn.qkv.weight": stacked, "blocks.0.attn.qk.weight": stacked[:6], "norm.weight": stacked}
    )
    assert list(state) == [
        *(f"blocks.10.attn.{n}.weight" for n in "qkv"),
        *(f"blocks.0.attn.{n}.weight" for n in "qk"),
        "norm.weight",
    ]
    assert torch.equal(state["blocks.10.attn.k.weight"], stacked[3:6])
    assert torch.equal(state["blocks.0.attn.k.weight"], stacked[3:6])
    mine = create_model(NAME, img_size=16).state_dict()
    assert all(separate_projections(mine)[k] is v for k, v in mine.items())


@pytest.mark.parametrize(
    "damage", [torch.zeros(100, 192), torch.zeros(()), torch.zeros(0, 192)], ids=["rows", "scalar", "empty"]
)
def test_a_damaged_stacked_linear_is_an_error_that_names_it(tmp_path, damage):
    path = tmp_path / "convit_tiny.pth"
    torch.save({**published(NAME), "blocks.3.attn.qk.weight": damage}, path)
    with pytest.raises(WeightsError, match="does not fit convit_tiny") as error:
        load_weights(create_model(NAME), path)
    assert "blocks.3.attn.q" in str(error.value)


# --- resolutions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 8, 72, 231])
def test_a_size_that_patches_do_not_tile_is_refused(size):
    with pytest.raises(InputError, match="multiple of 16"):
        create_model(NAME, img_size=size)


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (1, 3, 64, 96)])
@pytest.mark.parametrize("fused", [False, True], ids=["reference", "rewritten"])
def test_another_input_size_than_built_for_is_refused(shape, fused):
    model = randomized(0)
    with pytest.raises(ValueError, match="built for 64"):
        (fuse(model) if fused else model)(torch.zeros(shape))


def test_a_checkpoint_is_moved_to_another_resolution_when_asked(tmp_path):
    state = published(NAME)
    path = tmp_path / "convit_tiny.pth"
    torch.save(state, path)
    model = create_model(NAME, img_size=256)
    with pytest.raises(WeightsError, match="position_embedding"):
        load_weights(model, path)
    loaded = load_weights(model, path, resize=True)
    assert loaded.resized == ("position_embedding",)
    grid = state["pos_embed"].reshape(1, 14, 14, 192).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, (16, 16), mode="bicubic", align_corners=False)
    assert torch.equal(model.position_embedding, expected.permute(0, 2, 3, 1).reshape(1, 256, 192))
    with torch.inference_mode():
        assert model(images(1, 256)).isfinite().all()


def test_resizing_keeps_equal_sizes_and_smooth_functions():
    rows, columns = (t.flatten() for t in torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"))
    embedding = torch.stack((rows, columns, torch.ones(64)), -1)[None]
    assert resize_position_embedding(embedding, 64) is embedding
    large = resize_position_embedding(embedding, 256).reshape(16, 16, 3)
    inner = slice(4, 12)  # away from the borders PyTorch's bicubic nearly keeps straight lines
    place = torch.arange(16)[inner] / 2 - 0.25
    assert torch.allclose(large[inner, inner, 0], place[:, None].expand(8, 8), atol=0.05)
    assert torch.allclose(large[inner, inner, 1], place.expand(8, 8), atol=0.05)
    assert torch.allclose(large[..., 2], torch.ones(16, 16), atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 195, 192), (1, 196, 191), (196, 192), (2, 196, 192), (1, 0, 192)])
def test_an_embedding_that_is_no_square_grid_is_not_resized(tmp_path, shape):
    path = tmp_path / "convit_tiny.pth"
    torch.save({**published(NAME), "pos_embed": torch.zeros(shape)}, path)
    with pytest.raises(WeightsError, match="position_embedding"):
        load_weights(create_model(NAME, img_size=256), path, resize=True)


# --- positions ------------------------------------------------------------------------------------


def test_patch_offsets_are_dx_dy_and_the_squared_distance():
    offsets = make_patch_offsets(3)
    for query in range(9):
        for key in range(9):
            dx, dy = key % 3 - query % 3, key // 3 - query // 3
            assert offsets[query, key].tolist() == [dx, dy, dx**2 + dy**2]


def test_a_new_model_looks_at_its_neighbours_as_a_convolution_does():
    model = create_model("convit_small", img_size=80, seed=0)  # 9 heads: a 3x3 kernel
    for attn in (m for m in model.modules() if isinstance(m, GatedAttention)):
        share, weighted = attn.position()
        assert share.flatten().tolist() == pytest.approx([1 - 1 / (1 + np.exp(-1))] * 9)
        centre = weighted[:, 12].argmax(-1)  # of 5 x 5 patches
        assert sorted(centre.tolist()) == [6, 7, 8, 11, 12, 13, 16, 17, 18]
        assert centre[1] == 12 - 1  # head h looks at column h // 3, row h % 3 of the kernel
        assert torch.equal(attn.v.weight, torch.eye(432))


def test_rows_of_gated_attention_sum_to_one_without_being_divided():
    model = randomized(0)
    scores = 5 * torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    for attn in (m for m in model.modules() if isinstance(m, GatedAttention)):
        with torch.inference_mode():
            share, position = attn.position()
            sums = (share * scores.softmax(-1) + position).sum(-1)
        assert (sums - 1).abs().max() < 1e-6
    gates = torch.cat([m.gate for m in model.modules() if isinstance(m, PositionAttention)])
    assert gates.max() > 5 > -5 > gates.min()  # both kinds of attention were alone somewhere


def test_preprocessing_and_publication():
    specs = [find_model(f"convit_{size}") for size in ("tiny", "small", "base")]
    assert all((s.family, s.img_size, s.crop_ratio) == ("ConViT", 224, 0.875) for s in specs)
    urls = [s.pretrained.url for s in specs if s.pretrained]
    assert urls == [f"https://dl.fbaipublicfiles.com/convit/{s.name}.pth" for s in specs]


def test_first_blocks_see_patches_only_and_there_are_no_maps():
    model, seen = randomized(0), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    with torch.inference_mode():
        model(images(1, 64))
    assert seen == [16] * 10 + [17] * 2
    assert not hasattr(model, "features")


def test_stochastic_depth_rises_linearly_and_every_parameter_is_trained():
    model = create_model(NAME, img_size=32, seed=0, num_classes=4, drop_path=0.1).train()
    rates = [m.rate for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx(np.linspace(0, 0.1, 12), abs=1e-6)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        F.cross_entropy(model(images(4, 32)), torch.arange(4)).backward()
    assert [k for k, p in model.named_parameters() if p.grad is None] == []


# --- rewrites -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rewrite", REWRITES)
def test_each_rewrite_is_exact_alone_and_the_others_without_it(rewrite):
    model, x = randomized(2).double(), images(2, 64).double()
    with torch.inference_mode():
        expected = model(x)
        assert difference(fuse(model, without=set(REWRITES) - {rewrite})(x), expected) < 1e-10
        assert difference(fuse(model, without=[rewrite])(x), expected) < 1e-10


@pytest.mark.parametrize("size", [16, 64, 224])
def test_all_rewrites_together_are_exact(size):
    for seed in range(3):
        model, x = randomized(seed, size), images(2, size, seed)
        with torch.inference_mode():
            assert difference(fuse(model)(x), model(x)) < 1e-5
            assert difference(fuse(model.double())(x.double()), model(x.double())) < 1e-10


def test_dropping_the_row_sums_alone_stays_below_the_tolerance_in_float32():
    for seed in range(3):
        model, x = randomized(seed, 224), images(2, 224, seed)
        with torch.inference_mode():
            assert difference(fuse(model, without=set(REWRITES) - {ROWS})(x), model(x)) < 1e-5


def test_what_is_left_of_a_rewritten_model():
    model = randomized(0)
    fused = fuse(model)
    assert isinstance(fused.norm, PlainNorm)
    for block in fused.blocks:
        assert isinstance(block.norm1, PlainNorm)
        assert isinstance(block.norm2, PlainNorm)
        assert (block.attn.scale, block.attn.k.bias, block.attn.v.bias) == (1.0, None, None)
        assert block.attn.q.bias is not None
    gated = [m for m in fused.modules() if isinstance(m, GatedAttention)]
    assert len(gated) == 10
    assert all(isinstance(m.position, PositionTable) and m.position.table.shape == (4, 16, 16) for m in gated)
    assert not [m for m in fused.modules() if isinstance(m, (PositionAttention, RowsToOne))]


@pytest.mark.parametrize("size", [64, 224])
def test_positions_cost_nothing_and_the_last_block_computes_the_class_token_alone(size):
    model = randomized(0, size)
    fused = fuse(model)
    tokens, dim, heads = (size // 16) ** 2, 192, 4
    positions = 10 * 3 * heads * tokens**2
    row = (1 + 1 + 2 * 4) * dim**2 + 2 * (
        1 + tokens
    ) * dim  # q, proj and the MLP; scores and their product with the values
    assert count_macs(model) - count_macs(fused) == positions + tokens * row
    seen: list[torch.Size] = []
    fused.blocks[-1].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    with torch.inference_mode():
        fused(images(2, size))
    assert seen == [(2, 1, dim)]
    assert not model.class_only


# --- export ---------------------------------------------------------------------------------------


@pytest.mark.giant
def test_onnx_equals_pytorch_at_any_batch_and_the_rewrites_make_it_smaller():
    model = randomized(0, depth=5, local_depth=3)
    assert [type(block.attn) for block in model.blocks] == [GatedAttention] * 3 + [Attention] * 2
    reference, rewritten = count_operations(model)
    assert rewritten.total() < reference.total()
    assert not {"Div", "ReduceSum", "SequenceAt", "SplitToSequence", "If", "Loop"} & set(rewritten)
    assert rewritten["Mul"] == 3  # the shares of content attention
