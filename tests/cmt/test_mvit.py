"""MViT and MViTv2: golden logits and maps of the official code, published keys, other resolutions, rewrites
and export."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cmt_edge.cmt import (
    count_macs,
    count_params,
    create_model,
    find_model,
    fuse,
    load_pretrained,
    load_weights,
)
from cmt_edge.cmt.families.mvit.model import (
    Attention,
    MViT,
    MViTConfig,
    Pooling,
    RelativePositions,
    SplitHeads,
    list_block_shapes,
    make_relative_index,
)
from cmt_edge.cmt.families.mvit.published import adapt, resize_position_embedding, resize_relative
from cmt_edge.cmt.families.mvit.rewrites import ConstantPositions, JointPooling, choose_rewrites
from cmt_edge.cmt.folding import PlainNorm
from cmt_edge.cmt.layers import DropPath
from cmt_edge.cmt.spec import Rewrite
from cmt_edge.cmt.weights import randomize
from cmt_edge.deploy.errors import InputError, WeightsError
from helpers.golden import golden, kept_model, official_array, published
from helpers.graphs import count_operations
from helpers.tensors import images, relative_difference

V1, V2 = "mvitv1_b16", "mvitv2_t"
NAMES = [V1, V2, "mvitv2_s", "mvitv2_b", "mvitv2_l"]
REWRITES = [(name, rewrite.name) for name in (V1, V2) for rewrite in find_model(name).rewrites]
CLASS_ONLY = "class token only in the last block"
DIMS = (24, 48, 96, 192)

pytestmark = pytest.mark.usefixtures("one_thread")


def randomized(name: str, seed: int, size: int = 64) -> nn.Module:
    """A narrow model with random weights.

    Its layer norms scale by anything, also by nearly nothing, and positions matter as much as contents.
    """
    heads = (2, 4, 8, 16) if name == "mvitv2_l" else (1, 2, 4, 8)
    model = create_model(name, img_size=size, dims=DIMS, depths=(1, 2, 3, 2), heads=heads)
    randomize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.LayerNorm, RelativePositions)):
                for parameter in module.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


# --- against the official code --------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True], ids=["reference", "rewritten"])
def test_features_are_the_outputs_of_the_official_blocks(fused):
    model = kept_model(V2)
    x = torch.from_numpy(golden().golden_input(224)[:1])
    with torch.inference_mode():
        maps = (fuse(model) if fused else model).features(x)
    for block, m in zip((0, 2, 7, 9), maps, strict=True):  # the last of each stage
        expected = official_array(V2, f"tap/blocks.{block}")  # (tokens, channels), the first values
        np.testing.assert_allclose(m[0, : len(expected), 0, 0], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_macs_are_the_published_ones(name):
    spec = find_model(name)
    with torch.device("meta"):
        model = spec.constructor(spec.config, img_size=224, num_classes=1000)
    assert (count_params(model), count_macs(model)) == (spec.params, spec.macs)


def test_stacked_linears_are_taken_apart_convs_lose_their_time_axis_and_ours_are_left_alone():
    weight, bias, conv = (
        torch.arange(24.0).reshape(12, 2),
        torch.arange(12.0),
        torch.arange(36.0).reshape(4, 1, 1, 3, 3),
    )
    state = adapt(
        {
            "blocks.0.attn.qkv.weight": weight,
            "blocks.0.attn.qkv.bias": bias,
            "blocks.0.attn.pool_k.conv.weight": conv,
        }
    )
    assert torch.equal(state["blocks.0.attn.q.weight"], weight[:4])
    assert torch.equal(state["blocks.0.attn.k.weight"], weight[4:8])
    assert torch.equal(state["blocks.0.attn.v.bias"], bias[8:])
    assert torch.equal(state["blocks.0.attn.pool_k.conv.weight"], conv[:, :, 0])
    assert len(state) == 7
    for name in (V1, V2):
        mine = create_model(name, img_size=32).state_dict()
        assert all(adapt(mine)[k] is v for k, v in mine.items())


@pytest.mark.parametrize("name", [V1, V2])
def test_a_published_checkpoint_is_loaded(tmp_path, name):
    """The container of the official training code, and 5-D convs, which published files may have."""
    state = {
        k: v.unsqueeze(2) if re.search(r"pool_.\.weight$", k) and v.ndim == 4 else v
        for k, v in published(name).items()
    }
    path = tmp_path / f"{name}.pyth"
    torch.save({"epoch": 299, "model_state": state, "optimizer_state": {}, "cfg": "MODEL: {}"}, path)
    model = create_model(name)
    assert load_weights(model, path).resized == ()
    assert torch.equal(model.blocks[0].attn.pool_k.conv.weight, state["blocks.0.attn.pool_k.weight"][:, :, 0])


@pytest.mark.parametrize(
    "damage",
    [torch.zeros(100, 96), torch.zeros(()), torch.zeros(0, 96), torch.zeros(288, 95)],
    ids=["rows", "scalar", "empty", "columns"],
)
def test_a_damaged_stacked_linear_is_an_error_that_names_it(tmp_path, damage):
    path = tmp_path / "mvitv2_t.pyth"
    torch.save({**published(V2), "blocks.0.attn.qkv.weight": damage}, path)
    with pytest.raises(WeightsError, match="does not fit mvitv2_t") as error:
        load_weights(create_model(V2), path)
    assert "blocks.0.attn.q" in str(error.value)


@pytest.mark.parametrize(("name", "other"), [(V2, "mvitv2_s"), (V2, V1), (V1, V2)])
def test_a_checkpoint_of_another_variant_is_refused(tmp_path, name, other):
    path = tmp_path / "other.safetensors.pth"
    torch.save(create_model(other, img_size=32).state_dict(), path)
    with pytest.raises(WeightsError, match=f"does not fit {name}"):
        load_weights(create_model(name, img_size=32), path, resize=True)


def test_preprocessing_and_publication():
    specs = [find_model(n) for n in NAMES]
    assert all((s.img_size, s.crop_ratio, s.num_classes) == (224, 0.875, 1000) for s in specs)
    assert [s.family for s in specs] == ["MViTv1", *["MViTv2"] * 4]
    folder = "https://dl.fbaipublicfiles.com/mvit/mvitv2_models"
    assert [s.pretrained.url for s in specs if s.pretrained] == [
        f"{folder}/MViTv2_{v}_in1k.pyth" for v in "TSBL"
    ]
    with pytest.raises(WeightsError, match="no weights are published"):
        load_pretrained(create_model(V1, img_size=32))


# --- resolutions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [V1, V2])
@pytest.mark.parametrize("size", [0, 16, 112 + 8, 231])
def test_a_size_that_the_strides_do_not_divide_is_refused(name, size):
    with pytest.raises(InputError, match="multiple of 32"):
        create_model(name, img_size=size)


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (1, 3, 64, 96)])
@pytest.mark.parametrize("fused", [False, True], ids=["reference", "rewritten"])
@pytest.mark.parametrize("name", [V1, V2])
def test_another_input_size_than_built_for_is_refused(name, fused, shape):
    model = randomized(name, 0)
    for call in ("forward", "features"):
        with pytest.raises(ValueError, match="built for 64"):
            getattr(fuse(model) if fused else model, call)(torch.zeros(shape))


@pytest.mark.parametrize(("name", "count"), [(V1, 1), (V2, 20)])
def test_a_checkpoint_is_moved_to_another_resolution_when_asked(tmp_path, name, count):
    state = published(name)
    path = tmp_path / "weights.pyth"
    torch.save({"model_state": state}, path)
    model = create_model(name, img_size=256)
    with pytest.raises(WeightsError, match=r"position_embedding|relative"):
        load_weights(model, path)
    resized = load_weights(model, path, resize=True).resized
    assert len(resized) == count
    assert all(k == "position_embedding" or ".relative." in k for k in resized)
    with torch.inference_mode():
        assert model(images(1, 256)).isfinite().all()
    if name == V1:
        grid = state["pos_embed"][:, 1:].reshape(1, 56, 56, 96).permute(0, 3, 1, 2)
        expected = F.interpolate(grid[:, :, None], (1, 64, 64), mode="trilinear", align_corners=False)[
            :, :, 0
        ]  # as officially
        expected = expected.permute(0, 2, 3, 1).reshape(1, 64 * 64, 96)
        assert torch.allclose(model.position_embedding[:, 1:], expected, atol=1e-7)
        assert torch.equal(model.position_embedding[:, :1], state["pos_embed"][:, :1])
    else:
        table = state["blocks.9.attn.rel_pos_w"]  # 7 x 7 -> 8 x 8: 13 -> 15 distances
        expected = np.stack(
            [np.interp((np.arange(15) + 0.5) * 13 / 15 - 0.5, np.arange(13), c) for c in table.T.numpy()], 1
        )
        np.testing.assert_allclose(model.blocks[9].attn.relative.columns.detach(), expected, atol=1e-6)


def test_resizing_keeps_equal_sizes_and_the_order_of_distances():
    table, embedding = torch.arange(13.0)[:, None].expand(13, 4), torch.randn(1, 17, 4)
    assert resize_relative(table, 13) is table
    assert resize_position_embedding(embedding, 17) is embedding
    larger = resize_relative(table, 27)
    assert larger.shape == (27, 4)
    assert (larger.diff(dim=0) >= 0).all()
    assert larger[13].tolist() == [6.0] * 4  # distance 0 stays in the middle
    assert torch.allclose(resize_position_embedding(torch.ones(1, 17, 4), 65), torch.ones(1, 65, 4))


@pytest.mark.parametrize(
    "shape", [(1, 3136, 96), (1, 3137, 95), (3137, 96), (2, 3137, 96), (1, 0, 96), (1, 1, 96)]
)
def test_an_embedding_that_is_no_square_grid_is_not_resized(tmp_path, shape):
    path = tmp_path / "weights.pyth"
    torch.save({**published(V1), "pos_embed": torch.zeros(shape)}, path)
    with pytest.raises(WeightsError, match="position_embedding"):
        load_weights(create_model(V1, img_size=256), path, resize=True)


@pytest.mark.parametrize("shape", [(111, 95), (111,), (0, 96), ()])
def test_a_table_of_another_kind_is_not_resized(tmp_path, shape):
    path = tmp_path / "weights.pyth"
    torch.save({**published(V2), "blocks.0.attn.rel_pos_h": torch.zeros(shape)}, path)
    with pytest.raises(WeightsError, match=r"blocks\.0\.attn\.relative\.rows"):
        load_weights(create_model(V2, img_size=256), path, resize=True)


# --- architecture ---------------------------------------------------------------------------------


def test_relative_index_counts_distances_on_the_finer_grid():
    assert make_relative_index(3, 3).tolist() == [[2, 1, 0], [3, 2, 1], [4, 3, 2]]
    for queries, keys in [(56, 14), (28, 28), (28, 14), (14, 28), (7, 14), (1, 2), (1, 1), (64, 16)]:
        index, fine = make_relative_index(queries, keys), max(queries, keys)
        assert 0 <= index.min() <= index.max() <= 2 * fine - 2
        zero = (keys - 1) * (fine // keys)
        for i in range(queries):
            for j in range(keys):
                assert index[i, j] - zero == i * (fine // queries) - j * (fine // keys)


def test_relative_positions_are_the_definition():
    """score[q, k] + q . R_rows[index of the rows] + q . R_columns[index of the columns], token by token."""
    positions = RelativePositions(5, 4, 2)
    generator = torch.Generator().manual_seed(0)
    for table in positions.parameters():
        nn.init.normal_(table, generator=generator)
    q, scores = torch.randn(2, 3, 16, 5, generator=generator), torch.randn(2, 3, 16, 4, generator=generator)
    index = make_relative_index(4, 2)
    with torch.inference_mode():
        actual = positions(q, scores)
        for query in range(16):
            for key in range(4):
                rows = positions.rows[index[query // 4, key // 2]]
                columns = positions.columns[index[query % 4, key % 2]]
                expected = scores[:, :, query, key] + q[:, :, query] @ (rows + columns)
                assert torch.allclose(actual[:, :, query, key], expected, atol=1e-5)


def test_blocks_change_widths_and_pool_where_the_variants_say():
    v1, v2, large = (list_block_shapes(find_model(n).config, 224) for n in (V1, V2, "mvitv2_l"))
    assert [i for i, s in enumerate(v1) if s.q_stride == 2] == [1, 3, 14]
    assert [i for i, s in enumerate(v2) if s.q_stride == 2] == [1, 3, 8]
    assert [i for i, s in enumerate(large) if s.q_stride == 2] == [2, 8, 44]
    assert [i for i, s in enumerate(v1) if s.out_dim != s.dim] == [0, 2, 13]
    assert [i for i, s in enumerate(v2) if s.in_dim != s.dim] == [1, 3, 8]
    assert [i for i, s in enumerate(large) if s.out_dim != s.dim] == [1, 7, 43]
    assert [(s.size, s.kv_stride) for s in v2] == [(56, 4), (56, 2), (28, 2), (28, 1), *[(14, 1)] * 5, (7, 1)]
    assert {s.head_dim for s in (*v1, *v2)} == {96}
    assert {s.head_dim for s in large} == {72}


def test_queries_are_pooled_everywhere_in_v2_and_with_the_map_in_v1():
    pooled = {
        n: [isinstance(b.attn.pool_q, Pooling) for b in create_model(n, img_size=32).blocks] for n in (V1, V2)
    }
    assert [i for i, p in enumerate(pooled[V1]) if p] == [1, 3, 14]
    assert all(pooled[V2])


@pytest.mark.parametrize("fused", [False, True], ids=["reference", "rewritten"])
@pytest.mark.parametrize(("name", "widths"), [(V1, (*DIMS[1:], DIMS[3])), (V2, DIMS)])
def test_features_are_four_maps_without_the_class_token(name, widths, fused):
    model = randomized(name, 0, 96).double()
    x = images(2, 96).double()
    with torch.inference_mode():
        maps, reference = (fuse(model) if fused else model).features(x), model.features(x)
        last = maps[-1].flatten(2).transpose(1, 2)
        assert [tuple(m.shape) for m in maps] == [(2, w, 24 >> i, 24 >> i) for i, w in enumerate(widths)]
        assert all(relative_difference(a, b) < 1e-10 for a, b in zip(maps, reference, strict=True))
        if name == V2:
            assert relative_difference(model.head(model.norm(last).mean(1)), model(x)) < 1e-10


def test_stochastic_depth_rises_linearly_and_every_parameter_is_trained():
    for name in (V1, V2):
        model = create_model(name, img_size=32, seed=0, num_classes=4, drop_path=0.1).train()
        rates = [m.rate for m in model.modules() if isinstance(m, DropPath)]
        assert rates == pytest.approx(np.linspace(0, 0.1, len(model.blocks)))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            F.cross_entropy(model(images(4, 32)), torch.arange(4)).backward()
        assert [k for k, p in model.named_parameters() if p.grad is None] == []


def test_a_new_model_starts_from_small_positions_and_unbiased_linears():
    for name in (V1, V2):
        model = create_model(name, img_size=64, seed=0)
        parameters = dict(model.named_parameters())
        positions = [
            p for k, p in parameters.items() if re.search(r"relative|position_embedding|class_token", k)
        ]
        assert len(positions) == (2 if name == V1 else 20)
        assert torch.cat([p.flatten() for p in positions]).std().item() == pytest.approx(0.02, rel=0.05)
        assert not any(
            parameters[k].any() for k in parameters if re.search(r"(\.[qkv]|proj|fc.|head)\.bias$", k)
        )


# --- rewrites -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "rewrite"), REWRITES)
def test_each_rewrite_is_exact_alone_and_the_others_without_it(name, rewrite):
    model, x = randomized(name, 2).double(), images(2, 64).double()
    others = {r.name for r in model.spec.rewrites} - {rewrite}
    with torch.inference_mode():
        expected, maps = model(x), model.features(x)
        for fused in (fuse(model, without=others), fuse(model, without=[rewrite])):
            assert relative_difference(fused(x), expected) < 1e-10
            assert all(
                relative_difference(a, b) < 1e-10 for a, b in zip(fused.features(x), maps, strict=True)
            )


@pytest.mark.parametrize("name", [V1, V2, "mvitv2_l"])
@pytest.mark.parametrize("size", [32, 96])
def test_all_rewrites_together_are_exact(name, size):
    model, x = randomized(name, 1, size), images(2, size, 1)
    with torch.inference_mode():
        expected = model.double()(x.double())
        assert relative_difference(fuse(model)(x.double()), expected) < 1e-10
        assert relative_difference(fuse(model.float())(x).double(), expected) < 1e-5


def test_the_random_models_would_show_a_lost_rewrite():
    """Ignored scales, shifts and positions move the logits far beyond the tolerance: the tests above can
    fail."""
    x = images(1, 64)
    for name in (V1, V2):
        paths = ["pool_k.norm.weight", "pool_v.norm.weight", "pool_v.norm.bias"]
        for path in [*paths, "scale", *(["relative.rows", "relative.columns"] if name == V2 else [])]:
            model = randomized(name, 0)
            with torch.inference_mode():
                before = model(x)
                for attn in (m for m in model.modules() if isinstance(m, Attention)):
                    if path == "scale":
                        attn.scale = 1.0
                    else:
                        attn.get_parameter(path).zero_()
                assert relative_difference(model(x), before) > 1e-3, path


def test_what_is_left_of_a_rewritten_v1():
    fused = fuse(randomized(V1, 0))
    assert fused.class_only
    assert isinstance(fused.norm, PlainNorm)
    for i, block in enumerate(fused.blocks):
        attn = block.attn
        assert attn.scale == 1.0
        assert all(
            isinstance(n, PlainNorm) for n in (block.norm1, block.norm2, attn.pool_k.norm, attn.pool_v.norm)
        )
        assert isinstance(attn.pool_k, JointPooling)
        assert isinstance(attn.pool_q, JointPooling if i in (1, 3, 6) else SplitHeads)
    assert [m for m in fused.modules() if isinstance(m, nn.LayerNorm)] == [
        fused.blocks[i].attn.pool_q.norm for i in (1, 3, 6)
    ]


def test_what_is_left_of_a_rewritten_v2():
    fused = fuse(randomized(V2, 0, 96))
    assert not fused.class_only
    assert isinstance(fused.norm, PlainNorm)
    for shape, block in zip(list_block_shapes(fused.config, 96), fused.blocks, strict=True):
        attn, queries, keys = block.attn, shape.size // shape.q_stride, shape.size // shape.kv_stride
        assert (attn.scale, attn.pool_k.norm.bias, attn.pool_v.norm.bias) == (1.0, None, None)
        assert attn.pool_q.norm.bias is not None
        assert all(isinstance(n, PlainNorm) for n in (block.norm1, block.norm2))
        assert isinstance(attn.relative, ConstantPositions)
        tables = dict(attn.relative.named_buffers())
        assert {k: tuple(t.shape) for k, t in tables.items()} == dict.fromkeys(
            ("row_table", "column_table"), (queries, 24, keys)
        )
        assert list(attn.relative.parameters()) == []
        assert attn.pool_v.conv.groups == attn.pool_v.conv.in_channels == shape.dim
    assert not [m for m in fused.modules() if type(m) in (Pooling, RelativePositions)]


def test_the_last_block_of_v1_computes_the_class_token_alone():
    model = randomized(V1, 0)
    fused = fuse(model)
    tokens, dim = (64 // 32) ** 2, DIMS[-1]
    row = (1 + 1 + 2 * 4) * dim**2 + 2 * (
        1 + tokens
    ) * dim  # q, proj and the MLP; scores and their product with the values
    assert count_macs(model) - count_macs(fused) == tokens * row
    assert count_macs(fuse(model, without=[CLASS_ONLY])) == count_macs(model)
    seen: list[torch.Size] = []
    fused.blocks[-1].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    with torch.inference_mode():
        fused(images(2, 64))
        fused.features(images(2, 64))
    assert seen == [(2, 1, dim), (2, 1 + tokens, dim)]
    assert not model.class_only


def test_rewrites_of_v1_that_are_not_exact_in_v2_are_refused():
    model = randomized(V2, 0).double()
    for name in ("affine of pool_k.norm into q", "affine of pool_v.norm into proj", CLASS_ONLY):
        (rewrite,) = [r for r in find_model(V1).rewrites if r.name == name]
        with pytest.raises(ValueError, match=r"queries|class token"):
            rewrite.apply(model)


def test_a_last_block_that_pools_its_queries_keeps_all_tokens():
    config = MViTConfig((96, 192, 384, 768), (1, 1, 1, 1), version=1, widen_in_attention=False)
    model = MViT(config, img_size=32, num_classes=3)
    rewrite: Rewrite = choose_rewrites(config)[-1]
    with pytest.raises(ValueError, match="must not pool"):
        rewrite.apply(model)
    assert not model.class_only


def test_variants_subscribe_to_what_is_exact_in_them():
    names = {n: [r.name for r in find_model(n).rewrites] for n in NAMES}
    assert names[V2] == names["mvitv2_s"] == names["mvitv2_b"]
    assert "affine of norm1 into attn.q, attn.k, attn.v, shortcut" in names[V2]
    assert all("affine of norm2 into mlp.fc1, shortcut" in names[n] for n in (V1, "mvitv2_l"))
    assert [n for n in NAMES if CLASS_ONLY in names[n]] == [V1]


# --- export ---------------------------------------------------------------------------------------


@pytest.mark.giant
@pytest.mark.slow
@pytest.mark.parametrize("name", [V1, V2])
def test_onnx_equals_pytorch_at_any_batch_and_the_rewrites_make_it_smaller(name):
    model = randomized(name, 0)
    reference, rewritten = count_operations(model)
    assert rewritten.total() < 0.95 * reference.total()
    assert rewritten["Reshape"] < reference["Reshape"]
    assert not {"Mul", "Einsum", "CastLike", "SequenceAt", "SplitToSequence", "If", "Loop"} & set(rewritten)
