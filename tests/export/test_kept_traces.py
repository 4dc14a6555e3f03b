"""Graphs that earlier exports have traced."""

from __future__ import annotations

import os
from functools import cache, partial

import pytest
import torch
from torch import nn

from cmt_edge.cmt import choose_head, create_model, fuse
from cmt_edge.deploy.bundle import ONNX
from cmt_edge.deploy.errors import CacheWarning
from cmt_edge.deploy.files import find_cache_folder
from cmt_edge.export import kept_traces, run
from cmt_edge.export.kept_traces import compute_modules_digest, trace_once
from cmt_edge.export.steps import graph as graph_steps
from cmt_edge.export.to_onnx import compute_outputs, export_onnx, require_parity
from helpers.exports import nano
from helpers.measuring import brief_exports

OPSET = 20
SIZE = 8


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("CMT_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CMT_EDGE_STATE", str(tmp_path / "state"))
    with brief_exports():
        yield


def list_entries():
    return sorted((find_cache_folder() / "traced").glob("*.onnx"))


def forbid(*_):
    raise AssertionError("this model was traced already")


def test_another_precision_and_batch_size_of_the_same_weights_trace_nothing(tmp_path, monkeypatch):
    first = run(nano(tmp_path / "a"))
    monkeypatch.setattr(graph_steps, "export_onnx", forbid)
    again = run(nano(tmp_path / "b"))
    assert again.file(ONNX).read_bytes() == first.file(ONNX).read_bytes()
    assert again.manifest.verification.steps == first.manifest.verification.steps
    int8 = nano(tmp_path / "c", batch=0, precision="int8", data="generated", calib_size=4)
    assert run(int8).manifest.precision == "int8"
    assert len(list_entries()) == 1
    with pytest.raises(AssertionError, match="traced already"):
        run(nano(tmp_path / "d", cache=False))


def make_small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    ).eval()


IMAGES = torch.linspace(-2, 2, 2 * 3 * SIZE**2).reshape(2, 3, SIZE, SIZE)


@cache
def trace_small(seed: int):
    return export_onnx(make_small(seed), SIZE, OPSET, ["logits"])


class Counting:
    """Traces, compares, and counts how often it did either."""

    def __init__(self) -> None:
        self.traces = self.checks = 0

    def __call__(self, seed: int = 0, change=lambda net: None, **settings):
        model = make_small(seed)
        change(model)
        with torch.no_grad():
            expected = [model(IMAGES).numpy()]

        def check(graph):
            self.checks += 1
            require_parity("trace", compute_outputs(graph, IMAGES.numpy(), "trace"), expected)

        def trace():
            self.traces += 1
            graph = trace_small(seed)
            check(graph)
            return graph

        return trace_once(model, tuple(settings.items()), trace, check)


@pytest.fixture
def counting():
    return Counting()


def test_an_equal_model_is_traced_once_and_compared_every_time(counting):
    first, second = counting(), counting()
    assert (counting.traces, counting.checks) == (1, 2)
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)


def set_bias(net):
    with torch.no_grad():
        net[-1].bias[0] += 1e-6


def set_stride(net):
    net[0].stride = (2, 2)


def set_approximation(net):
    net[1].approximate = "tanh"


def replace_activation(net):
    net[1] = nn.SiLU()


def add_buffer(net):
    net.register_buffer("mean", torch.zeros(1), persistent=False)


def share(net):
    net.append(net[-1])


CHANGES = [set_bias, set_stride, set_approximation, replace_activation, add_buffer, share]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_any_kind_makes_another_model(change):
    net = make_small()
    before = compute_modules_digest(net)
    assert before is not None
    change(net)
    assert compute_modules_digest(net) not in (None, before)


def test_which_of_two_modules_is_used_twice_is_told():
    a, b = nn.ReLU(), nn.ReLU6()
    assert compute_modules_digest(nn.Sequential(a, b, a)) != compute_modules_digest(nn.Sequential(a, b, b))


class OfAUser(nn.Module):
    def forward(self, x):
        return x


def hook(net):
    net[1].register_forward_hook(lambda *_: None)


def override(net):
    net[1].forward = partial(torch.add, 1)


def put_own(net):
    net[1] = OfAUser()


def attach(net):
    net[1].helper = object()


def weight_norm(net):
    nn.utils.parametrizations.weight_norm(net[0])


@pytest.mark.parametrize("change", [hook, override, put_own, attach, weight_norm])
def test_code_that_cannot_be_told_is_traced_every_time(change, counting):
    net = make_small()
    change(net)
    assert compute_modules_digest(net) is None
    if change not in (override, put_own):  # which answer otherwise
        counting(change=change)
        counting(change=change)
        assert (counting.traces, list_entries()) == (2, [])


def test_settings_belong_to_the_key(counting):
    counting(outputs="logits")
    counting(outputs="map")
    assert (counting.traces, len(list_entries())) == (2, 2)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("cmt_nano", "logits"),
        ("cmt_nano", "features"),
        ("cvt_13", "logits"),
        ("convit_tiny", "logits"),
        ("mvitv2_t", "features"),
        ("xformer_reading", "logits"),
    ],
)
def test_models_of_every_family_are_told(name, head):
    model = create_model(name, seed=0)
    made = [choose_head(fuse(model), head) for _ in range(2)]
    first, second = map(compute_modules_digest, made)
    assert first == second
    assert first is not None
    assert compute_modules_digest(model) not in (None, first), "the rewrites are told"


def test_very_large_models_are_not_kept(monkeypatch):
    monkeypatch.setattr(kept_traces, "LARGEST", 100)
    assert compute_modules_digest(make_small()) is None


def test_another_version_of_the_tools_or_of_our_code_traces_anew(counting, monkeypatch):
    counting()
    with monkeypatch.context() as patch:
        patch.setattr(kept_traces.metadata, "version", lambda _: "0")
        counting()
    monkeypatch.setattr(kept_traces, "_hash_sources", lambda: "other")
    counting()
    assert counting.traces == 3


def test_a_kept_graph_that_answers_otherwise_is_made_again(counting, monkeypatch):
    """As if two models had one key."""
    monkeypatch.setattr(kept_traces, "compute_modules_digest", lambda _: "one for all")
    counting(0)
    with pytest.warns(CacheWarning, match="traced graph in the cache was not used.*made again"):
        counting(1)
    assert counting.traces == 2
    counting(1)
    assert counting.traces == 2


@pytest.mark.parametrize("fault", ["byte", "half", "seal", "other secret"])
def test_what_this_machine_did_not_write_is_made_again(fault, counting, monkeypatch, tmp_path):
    counting()
    (entry,) = list_entries()
    content = entry.read_bytes()
    if fault == "byte":
        entry.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif fault == "half":
        entry.write_bytes(content[: len(content) // 2])
    elif fault == "seal":
        entry.with_suffix(".seal").write_text("0" * 64)
    else:
        monkeypatch.setenv("CMT_EDGE_STATE", str(tmp_path / "another"))
    with pytest.warns(CacheWarning, match="not as this machine wrote it; it was made again"):
        counting()
    counting()
    assert counting.traces == 2


def test_the_weights_are_for_nobody_else(counting):
    counting()
    (entry,) = list_entries()
    if os.name == "posix":
        assert entry.stat().st_mode & 0o077 == 0
