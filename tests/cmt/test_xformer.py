"""XFormer, our reading: what it claims, its linear cost, that it trains, its rewrites, float16 and its
export.

There are no golden logits: no official code or weights exist.
"""

from __future__ import annotations

import inspect
import re

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cmt_edge.cmt import count_macs, count_params, create_model, find_model, fuse, load_weights
from cmt_edge.cmt.families import xformer
from cmt_edge.cmt.families.xformer import CrossFeatureAttention
from cmt_edge.cmt.weights import randomize
from cmt_edge.deploy.images import ImageSet
from cmt_edge.deploy.preprocessing import Preprocess, preprocess
from cmt_edge.export.to_onnx import export_onnx, simplify
from cmt_edge.export.typed import observe, round_graph, type_graph
from helpers.graphs import compute_logits
from helpers.tensors import images

NAME = "xformer_reading"
REWRITES = [rewrite.name for rewrite in find_model(NAME).rewrites]

pytestmark = pytest.mark.usefixtures("one_thread")


def attentions(model: nn.Module) -> list[CrossFeatureAttention]:
    return [m for m in model.modules() if isinstance(m, CrossFeatureAttention)]


def randomized(seed: int, size: int = 64) -> nn.Module:
    """Random weights and statistics; temperatures of 1 to 3 times a new model's, so that attention shows in
    the logits."""
    model = create_model(NAME, img_size=size)
    randomize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    for attn in attentions(model):
        attn.temperature.data.copy_((1 + 2 * torch.rand(attn.heads, generator=generator)) / 32)
    return model


# --- what it is -----------------------------------------------------------------------------------


def test_it_has_the_parameters_of_the_paper():
    model = create_model(NAME)
    assert count_params(model) == pytest.approx(5.5e6, rel=0.02)
    assert (model.spec.params, model.spec.macs) == (count_params(model), count_macs(model))
    assert (model.spec.img_size, model.spec.num_classes) == (256, 1000)


def test_it_says_what_is_ours_and_claims_no_accuracy():
    spec = find_model(NAME)
    assert (spec.top1, spec.pretrained) == (None, None)
    assert "reading" in spec.family
    for text in (spec.source, " ".join(inspect.getdoc(xformer).split())):
        assert "our reading" in text
        assert "only the abstract is public" in text
        assert "2207.07268" in text
    parts = [c for _, c in inspect.getmembers(xformer, inspect.isclass) if c.__module__ == xformer.__name__]
    assert len(parts) >= 9
    for part in parts:
        assert re.search(r"\bours?\b", inspect.getdoc(part)), part


# --- linear cost ----------------------------------------------------------------------------------


def attention_macs(dim: int, tokens: int) -> int:
    attn = CrossFeatureAttention(dim, dim // 32).to("meta")
    with FlopCounterMode(display=False) as counter:
        attn(torch.empty(1, tokens, dim, device="meta"))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("dim", [128, 256])
def test_attention_costs_in_proportion_to_tokens(dim):
    stride = {128: 8, 256: 32}[dim]
    costs = [attention_macs(dim, (size // stride) ** 2) for size in (128, 256, 512)]
    assert costs[1] == 4 * costs[0]
    assert costs[2] == 4 * costs[1]
    tokens = (128 // stride) ** 2
    assert (
        costs[0] == 4 * tokens * dim**2 + 2 * tokens * dim * 32
    )  # four linears, two products of d = 32 features


def test_the_whole_model_costs_in_proportion_to_pixels():
    small, middle, large = (count_macs(create_model(NAME), size) for size in (128, 256, 512))
    assert large - middle == 4 * (middle - small)  # all but what reads the pooled map: gates and classifier
    constant = (4 * small - middle) // 3
    assert 0 < constant < 0.01 * small
    assert count_macs(create_model(NAME, img_size=512)) == large


# --- what attention computes ----------------------------------------------------------------------


def attention(seed: int = 0, dim: int = 64, heads: int = 2) -> CrossFeatureAttention:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        attn = CrossFeatureAttention(dim, heads).double().eval()
    attn.temperature.data.copy_(torch.tensor([0.3, -0.7][:heads]))
    return attn


def test_attention_is_the_documented_formula():
    attn, x = (
        attention(),
        torch.randn(2, 50, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
    )
    with torch.inference_mode():
        q, k, v = attn.q(x) / 32, attn.k(x) / 32, attn.v(x)
        expected = torch.empty_like(v)
        for head in range(2):
            columns = slice(32 * head, 32 * head + 32)
            for b in range(2):
                a, c = (t[b, :, columns] / (t[b, :, columns].square().sum(0) + 1e-4).sqrt() for t in (k, q))
                expected[b, :, columns] = attn.temperature[head] * v[b, :, columns] @ (a.T @ c)
        torch.testing.assert_close(attn(x), attn.proj(expected), rtol=1e-12, atol=1e-12)


def test_attention_does_not_depend_on_the_order_of_tokens():
    attn, x = (
        attention(),
        torch.randn(1, 20, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
    )
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        torch.testing.assert_close(attn(x[:, order]), attn(x)[:, order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["normal", "large", "tiny", "zero", "constant", "one token differs"])
@pytest.mark.parametrize("divide_scores", [False, True])
def test_attention_is_safe_in_float16(kind, divide_scores):
    """4096 tokens (512 pixels at stride 8): sums over unscaled queries would overflow, and the epsilon must
    not vanish."""
    generator = torch.Generator().manual_seed(3)
    q, k = torch.randn(2, 1, 2, 4096, 32, generator=generator, dtype=torch.float64)
    if kind == "one token differs":
        q, k = (torch.cat((t[..., :1, :], 0 * t[..., 1:, :]), -2) for t in (q, k))
    elif kind == "constant":
        q, k = q * 0 + 3, k * 0 - 3
    else:
        factor = {"normal": 1, "large": 100, "tiny": 1e-3, "zero": 0}[kind]
        q, k = q * factor, k * factor
    q, k = q.half() / 32, k.half() / 32
    attn = attention()
    attn.divide_scores = divide_scores
    exact, half = attn.cosines(k.double().mT, q.double()), attn.cosines(k.mT, q)
    assert half.dtype == torch.float16
    assert exact.abs().max() <= 1
    assert half.isfinite().all()
    assert (half - exact).abs().max() < 4e-3
    if kind in ("normal", "large"):  # the epsilon does not show
        unit = torch.nn.functional.normalize
        cosines = unit(k.double().mT, dim=-1) @ unit(q.double(), dim=-2)
        torch.testing.assert_close(exact, cosines, rtol=0, atol=1e-4)


def test_gradients_are_finite_where_features_vanish():
    attn = attention()
    x = torch.zeros(1, 9, 64, dtype=torch.float64, requires_grad=True)
    attn(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in attn.parameters())


# --- the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 64), (32, 32), (96, 160)])
def test_features_have_strides_4_to_32_before_and_after_the_rewrites(shape):
    model = randomized(0)  # built for 64 pixels: nothing in it depends on the size
    deployed, x = fuse(model), torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    expected = [
        (2, c, shape[0] // s, shape[1] // s) for c, s in zip((32, 64, 112, 160), (4, 8, 16, 32), strict=True)
    ]
    with torch.inference_mode():
        maps, rewritten = model.features(x), deployed.features(x)
        assert [tuple(m.shape) for m in maps] == expected
        assert model(x).shape == (2, 1000)
        for a, b in zip(maps, rewritten, strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-5 * float(a.abs().max().clamp(min=1)))


def test_one_checkpoint_serves_every_size(tmp_path):
    torch.save(randomized(0).state_dict(), tmp_path / "xformer.pth")
    model = create_model(NAME, img_size=96)
    assert load_weights(model, tmp_path / "xformer.pth").resized == ()


def test_it_trains_on_photographs(cifar):
    """Twenty steps on one real image of each class: the loss falls to a tenth, every parameter takes part."""
    spec = Preprocess(64, None, find_model(NAME).mean, find_model(NAME).std)
    files = ImageSet(cifar / "test")
    first = {item.label: item for item in reversed(files)}
    x = torch.from_numpy(np.stack([preprocess(files.read(first[label]), spec) for label in files.classes]))
    y = torch.arange(len(files.classes))
    model = create_model(
        NAME, img_size=64, num_classes=len(y), seed=0, head_dropout=0.0, drop_path=0.05
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    losses = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(20):
            loss = torch.nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            if not losses:
                idle = [
                    n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0
                ]
                assert not idle
            optimizer.step()
            losses.append(float(loss.detach()))
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.1 * losses[0]


# --- rewrites and export --------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [*([name] for name in REWRITES), REWRITES], ids=[*REWRITES, "all"])
def test_rewrites_keep_the_logits(kept):
    model, x = randomized(1), images(2, 64)
    without = [name for name in REWRITES if name not in kept]
    with torch.inference_mode():
        single, expected = fuse(model, without=without)(x), model(x)
        assert (single - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1)
        expected = model.double()(x.double())
        assert (fuse(model, without=without)(x.double()) - expected).abs().max() < 1e-10


def test_the_random_models_would_show_a_lost_rewrite():
    """Attention, norms and biases move the logits far beyond the tolerance: the test above can fail."""
    x = images(2, 64)
    with torch.inference_mode():
        for kind, name in (
            (CrossFeatureAttention, "temperature"),
            (nn.BatchNorm2d, "running_mean"),
            (nn.LayerNorm, "bias"),
        ):
            model = randomized(1)
            before = model(x)
            for module in model.modules():
                if isinstance(module, kind):
                    getattr(module, name).zero_()
            assert (model(x) - before).abs().max() > 1e-3, name


def test_nothing_foldable_is_left():
    deployed = fuse(randomized(0))
    assert not [m for m in deployed.modules() if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm, nn.Dropout))]
    for attn in attentions(deployed):
        assert attn.temperature is None
        assert attn.q_scale == attn.k_scale == 1
        assert attn.divide_scores


def graph_of(model: nn.Module) -> onnx.ModelProto:
    return simplify(export_onnx(model, 64, 20))


@pytest.fixture(scope="module")
def deployed_graph() -> onnx.ModelProto:
    """The ONNX graph of ``randomized(2)`` after the rewrites."""
    return graph_of(fuse(randomized(2)))


def assert_same_logits_at_any_batch(graph: onnx.ModelProto, model: nn.Module) -> None:
    for batch in (1, 3):
        x = images(batch, 64, batch)
        with torch.inference_mode():
            expected = model(x).numpy()
        np.testing.assert_allclose(compute_logits(graph, x.numpy(), "test"), expected, rtol=0, atol=1e-4)


def test_rewritten_model_exports_with_any_batch(deployed_graph):
    operations = {node.op_type for node in deployed_graph.graph.node}
    assert not operations & {"SequenceAt", "SplitToSequence", "ReduceL2", "BatchNormalization", "Softmax"}
    assert_same_logits_at_any_batch(deployed_graph, randomized(2))


@pytest.mark.slow
def test_reference_model_exports_with_any_batch(deployed_graph):
    graph = graph_of(randomized(2))
    assert len(graph.graph.node) > len(deployed_graph.graph.node)
    assert_same_logits_at_any_batch(graph, randomized(2))


def test_float16_graph_needs_no_float32_islands(deployed_graph):
    x = images(4, 64).numpy()
    half = type_graph(deployed_graph, "fp16", observe(deployed_graph, [x]))
    assert half.islands == ()
    exact, rounded_logits = (
        compute_logits(deployed_graph, x, "test"),
        compute_logits(round_graph(half.model), x, "test"),
    )
    assert np.abs(rounded_logits - exact).max() < 0.03 * np.abs(exact).max()
