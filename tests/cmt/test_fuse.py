"""Exact rewrites: equal logits for every model, and each layer's algebra against direct computation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cmt_edge.cmt import create_model, find_model, fuse, list_models, load_pretrained
from cmt_edge.cmt.folding import (
    PlainNorm,
    ScaleShift,
    fold_affine_after,
    fold_affine_before,
    fold_identity,
    read_affine,
)
from cmt_edge.cmt.layers import DropPath
from cmt_edge.cmt.spec import CPU, RTX, TARGETS
from cmt_edge.cmt.weights import randomize
from cmt_edge.deploy.errors import InputError
from helpers.models import marked_models
from helpers.tensors import images

PUBLISHED_SIZE = [
    "cmt_nano",
    "cmt_ti",
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("cmt_xs", "cvt_13", "convit_tiny", "mvitv2_t")),
]


pytestmark = pytest.mark.usefixtures("one_thread")


FOR_RTX = ("cmt_nano", "convit_tiny", "mvitv2_t")
"""Models with rewrites of their own for TensorRT for RTX."""


def names_for_rtx(name: str) -> list[str]:
    return [rewrite.name for rewrite in find_model(name).choose_rewrites(RTX)]


def randomized(name: str, seed: int, **options) -> nn.Module:
    model = create_model(name, **options)
    randomize(model, seed)
    return model


def relative_difference(model: nn.Module, x: torch.Tensor, target: str = CPU) -> float:
    """Largest logit difference between ``model`` and its fused form, relative to max(1, largest logit)."""
    with torch.inference_mode():
        expected, actual = model(x), fuse(model, target=target)(x)
    assert actual.dtype == expected.dtype
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1))


@pytest.mark.parametrize("name", marked_models())
def test_logits_are_kept(name):
    model = create_model(name, img_size=64)
    for seed in range(3 if name == "cmt_nano" else 1):
        randomize(model.float(), seed)
        x = images(2, 64, seed)
        assert relative_difference(model, x) < 1e-5
        assert relative_difference(model.double(), x.double()) < 1e-10


@pytest.mark.parametrize("name", FOR_RTX)
def test_logits_are_kept_for_the_other_compiler(name):
    """The rewrites for TensorRT for RTX, together."""
    model = create_model(name, img_size=64)
    for seed in range(2):
        randomize(model.float(), seed)
        x = images(2, 64, seed)
        assert relative_difference(model, x, RTX) < 1e-5
        assert relative_difference(model.double(), x.double(), RTX) < 1e-10


@pytest.mark.parametrize(
    ("name", "rewrite"),
    [(name, rewrite) for name in FOR_RTX for rewrite in names_for_rtx(name)],
)
def test_each_rewrite_for_the_other_compiler_is_exact_on_its_own(name, rewrite):
    model = randomized(name, 0, img_size=64).double()
    x = images(2, 64, 0).double()
    with torch.inference_mode():
        expected = model(x)
        for without in ([rewrite], [other for other in names_for_rtx(name) if other != rewrite]):
            found = fuse(model, target=RTX, without=without)(x)
            assert (found - expected).abs().max() / expected.abs().max().clamp(min=1) < 1e-10


def test_attentions_for_the_other_compiler_have_no_biases_and_even_heads():
    fused = fuse(randomized("cmt_nano", 0), target=RTX)
    for stage in fused.stages:
        for block in stage.blocks:
            attn = block.attn
            if attn.heads == 1:
                assert isinstance(attn.q, nn.Identity)
                continue
            assert attn.q.bias is attn.k.bias is attn.v.bias is None
            assert attn.q.out_features % (8 * attn.heads) == 0
            assert attn.proj.in_features == attn.q.out_features


def test_heads_of_a_good_width_stay():
    fused = fuse(randomized("cmt_s", 0, img_size=64), target=RTX)
    assert fused.stages[1].blocks[0].attn.q.out_features == 128


def test_every_target_has_rewrites():
    for name in list_models():
        for target in TARGETS:
            assert find_model(name).choose_rewrites(target)
    for name in ("cvt_13", "mvitv1_b16"):  # the compiler showed no other list to be better
        assert [r.name for r in find_model(name).choose_rewrites(RTX)] == [
            r.name for r in find_model(name).rewrites
        ]


@pytest.mark.parametrize("name", PUBLISHED_SIZE)
def test_logits_are_kept_at_the_published_size(name):
    model = randomized(name, 7)
    assert relative_difference(model, images(1, model.img_size)) < 1e-5


def test_logits_are_kept_for_trained_weights():
    model = create_model("cmt_nano")
    load_pretrained(model)
    assert relative_difference(model, images(4, 64)) < 1e-5


def test_the_random_models_would_show_a_lost_rewrite():
    """A norm that were ignored moves the logits far beyond the tolerance: the tests above can fail."""
    model, x = randomized("cmt_nano", 0), images(1, 64)
    with torch.inference_mode():
        before = model(x)
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.zero_()
        assert (model(x) - before).abs().max() > 1e-3


def computing(model: nn.Module) -> int:
    return sum(not isinstance(m, nn.Identity) for m in model.modules())


FAMILY = {find_model(name).family: name for name in reversed(list_models())}
"""The smallest model of each family."""
REWRITES = [(name, rewrite.name) for name in FAMILY.values() for rewrite in find_model(name).rewrites]


@pytest.mark.parametrize(("name", "rewrite"), REWRITES)
def test_each_rewrite_is_exact_on_its_own_and_can_be_left_out(name, rewrite):
    model = randomized(name, 3, img_size=64).double()
    x, others = images(2, 64).double(), {r.name for r in model.spec.rewrites} - {rewrite}
    with torch.inference_mode():
        expected = model(x)
        alone, rest = fuse(model, without=others), fuse(model, without=[rewrite])
        assert (alone(x) - expected).abs().max() < 1e-10 * expected.abs().max().clamp(min=1)
        assert (rest(x) - expected).abs().max() < 1e-10 * expected.abs().max().clamp(min=1)


def test_an_unknown_rewrite_is_refused():
    with pytest.raises(InputError, match="no rewrite 'magic'") as error:
        fuse(create_model("cmt_nano"), without=["magic"])
    assert "scale into q" in error.value.remedy


def test_every_rewrite_says_why_it_is_exact():
    for name in FAMILY.values():
        rewrites = find_model(name).rewrites
        assert len({r.name for r in rewrites}) == len(rewrites)
        assert all("==" in r.algebra for r in rewrites)


@pytest.mark.parametrize("name", marked_models())
def test_batch_norms_dropout_and_layer_norm_affines_are_gone(name):
    model = create_model(name, img_size=64)
    fused = fuse(model)
    assert not [m for m in fused.modules() if isinstance(m, (nn.BatchNorm2d, nn.Dropout, DropPath))]
    assert computing(fused) < computing(model)
    assert not fused.training
    assert (fused.spec, fused.img_size, fused.num_classes) == (model.spec, 64, model.num_classes)


def test_the_original_is_untouched_and_shares_nothing():
    model = randomized("cmt_nano", 0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fused = fuse(model)
    with torch.no_grad():
        for p in fused.parameters():
            p.fill_(9)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(p.requires_grad for p in model.parameters())


def test_training_mode_is_refused():
    with pytest.raises(InputError, match="training mode") as error:
        fuse(create_model("cmt_nano").train())
    assert "eval()" in error.value.remedy


@pytest.mark.parametrize(
    "model", [nn.Linear(2, 2), nn.Sequential(nn.Conv2d(3, 3, 1))], ids=["linear", "sequential"]
)
def test_a_foreign_module_is_refused(model):
    with pytest.raises(InputError, match="no registered rewrite"):
        fuse(model.eval())


def test_a_fused_model_is_refused_not_crashed_on():
    with pytest.raises(InputError):
        fuse(fuse(create_model("cmt_nano")))


# --- single layers --------------------------------------------------------------------------------


def filled(layer: nn.Module, seed: int) -> nn.Module:
    """``layer`` in float64 with random parameters."""
    generator = torch.Generator().manual_seed(seed)
    layer = layer.double()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return layer


def vectors(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift of ``count`` channels."""
    generator = torch.Generator().manual_seed(seed + 1)
    scale, shift = torch.randn(2, count, generator=generator, dtype=torch.float64)
    return scale, shift


def per_channel(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Maps (B, C, H, W) by channel, anything else by the last axis."""
    if x.ndim == 4:
        scale, shift = scale[:, None, None], shift[:, None, None]
    return x * scale + shift


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-10, atol=1e-10)


convs = st.builds(
    dict,
    channels=st.integers(1, 6),
    outputs=st.integers(1, 6),
    kernel=st.sampled_from([1, 2, 3, (1, 3), (3, 2)]),
    stride=st.integers(1, 3),
    depthwise=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)


def conv_of(*, channels, outputs, kernel, stride, depthwise, bias, seed, padding=0) -> nn.Module:
    groups, outputs = (channels, channels) if depthwise else (1, outputs)
    layer = nn.Conv2d(channels, outputs, kernel, stride=stride, padding=padding, groups=groups, bias=bias)
    return filled(layer, seed)


@settings(max_examples=60, deadline=None)
@given(convs, st.integers(0, 1))
def test_affine_after_a_conv(options, padding):
    conv = conv_of(**options, padding=padding)
    scale, shift = vectors(conv.out_channels, options["seed"])
    x = torch.randn(2, conv.in_channels, 7, 7, dtype=torch.float64)
    with torch.no_grad():
        assert close(fold_affine_after(conv, scale, shift)(x), per_channel(conv(x), scale, shift))


@settings(max_examples=60, deadline=None)
@given(convs)
def test_affine_before_a_conv(options):
    conv = conv_of(**options)
    scale, shift = vectors(conv.in_channels, options["seed"])
    x = torch.randn(2, conv.in_channels, 7, 7, dtype=torch.float64)
    with torch.no_grad():
        assert close(fold_affine_before(conv, scale, shift)(x), conv(per_channel(x, scale, shift)))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.booleans(), st.integers(0, 2**31))
def test_affine_around_a_linear(inputs, outputs, bias, seed):
    linear = filled(nn.Linear(inputs, outputs, bias=bias), seed)
    before, after = vectors(inputs, seed), vectors(outputs, seed + 5)
    x = torch.randn(2, 5, inputs, dtype=torch.float64)
    with torch.no_grad():
        assert close(fold_affine_before(linear, *before)(x), linear(per_channel(x, *before)))
        assert close(fold_affine_after(linear, *after)(x), per_channel(linear(x), *after))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.sampled_from([1, 3, 5, (1, 3), (5, 3)]), st.booleans(), st.integers(0, 2**31))
def test_identity_in_a_depthwise_conv(channels, kernel, bias, seed):
    conv = filled(nn.Conv2d(channels, channels, kernel, padding="same", groups=channels, bias=bias), seed)
    conv.padding = tuple(k // 2 for k in conv.kernel_size)
    weight = conv.weight.detach().clone()
    x = torch.randn(2, channels, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        assert close(fold_identity(conv)(x), conv(x) + x)
    assert torch.equal(conv.weight, weight)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(0, 2**31), st.sampled_from([1e-5, 1e-3]))
def test_batch_norm_as_scale_and_shift(channels, seed, eps):
    norm = filled(nn.BatchNorm2d(channels, eps=eps), seed).eval()
    mean, var = vectors(channels, seed)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var.abs())
    x = torch.randn(2, channels, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        assert close(per_channel(x, *read_affine(norm)), norm(x))
        assert close(ScaleShift(norm)(x), norm(x))


def test_layer_norm_is_plain_norm_then_affine():
    norm = filled(nn.LayerNorm(6, eps=1e-6), 0)
    x = torch.randn(2, 5, 6, dtype=torch.float64) * 1e-3  # so small that eps matters
    with torch.no_grad():
        assert close(per_channel(PlainNorm(norm)(x), *read_affine(norm)), norm(x))


@pytest.mark.parametrize("padding", [1, (0, 1), (1, 0)])
def test_shift_before_a_padded_conv_is_refused(padding):
    conv, (scale, shift) = filled(nn.Conv2d(4, 5, 3, padding=padding), 0), vectors(4, 0)
    with pytest.raises(ValueError, match="zero-padded"):
        fold_affine_before(conv, scale, shift)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    with torch.no_grad():  # a scale alone is exact there
        assert close(fold_affine_before(conv, scale, shift * 0)(x), conv(per_channel(x, scale, shift * 0)))


def test_affine_before_a_grouped_conv_is_refused():
    with pytest.raises(ValueError, match="dense and depthwise"):
        fold_affine_before(nn.Conv2d(4, 4, 1, groups=2), *vectors(4, 0))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 8, 3, padding=1, groups=4),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Conv2d(4, 4, 3, padding=1, stride=2, groups=4),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4),
        nn.Conv2d(4, 4, 2, padding=1, groups=4),
    ],
    ids=["dense", "grouped", "multiplier", "unpadded", "stride", "dilation", "even"],
)
def test_identity_in_another_conv_is_refused(conv):
    with pytest.raises(ValueError, match="depthwise conv of stride 1"):
        fold_identity(conv)
