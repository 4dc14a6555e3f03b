"""Graphs that earlier exports have traced."""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import cache, wraps
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from cmt_edge.cmt import choose_head, create_model, fuse
from cmt_edge.deploy.bundle import ONNX
from cmt_edge.deploy.errors import CacheWarning
from cmt_edge.deploy.files import find_cache_folder
from cmt_edge.deploy.locks import locked
from cmt_edge.export import ExportConfig, kept_traces, run
from cmt_edge.export.kept_traces import make_key, trace_once
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


@pytest.mark.parametrize("change", [set_bias, set_stride, set_approximation, replace_activation, add_buffer])
def test_a_change_of_any_kind_makes_another_model(change):
    net = make_small()
    before = make_key(net, ())
    assert before is not None
    change(net)
    assert make_key(net, ()) not in (None, before)


class OfAUser(nn.Module):
    def forward(self, x):
        return x


def clamp(x):
    return x.clamp(max=50.0)


def hook(net, patch):
    net[1].register_forward_hook(lambda *_: None)


def hook_all(net, patch):
    handle = nn.modules.module.register_module_forward_pre_hook(lambda *_: None)
    patch.callback(handle.remove)


def override(net, patch):
    real = net[1].forward

    @wraps(real)
    def forward(x):
        return clamp(real(x))

    net[1].forward = forward


def put_own(net, patch):
    net[1] = OfAUser()


def pretend(net, patch):
    """A class that has the name and the module of PyTorch's own."""
    kind = nn.GELU
    body = {"__module__": kind.__module__, "forward": lambda _, x: clamp(x)}
    net[1].__class__ = type(kind.__name__, (kind,), body)


def change_class(net, patch):
    real = nn.GELU.forward
    nn.GELU.forward = lambda _, x: clamp(x)
    patch.callback(setattr, nn.GELU, "forward", real)


def change_function(net, patch):
    real = nn.functional.layer_norm
    nn.functional.layer_norm = clamp
    patch.callback(setattr, nn.functional, "layer_norm", real)


def add_sparse(net, patch):
    net.register_buffer("adjacent", torch.eye(3).to_sparse(), persistent=False)


def expand(net, patch):
    net.register_buffer("mask", torch.ones(1).expand(4 * 10**12), persistent=False)


OF_OTHERS = [
    hook,
    hook_all,
    override,
    put_own,
    pretend,
    change_class,
    change_function,
    add_sparse,
    expand,
]


@pytest.mark.parametrize("name", ["warnings", "typing"])
def test_decorators_of_python_are_no_code_of_others(name, monkeypatch):
    """In Python 3.13.8 a function of PyTorch is one of the module ``warnings``, by its decorator."""
    code = compile("def deprecated(*args): ...", find_spec(name).origin, "exec")
    space: dict = {}
    exec(code, space)
    monkeypatch.setattr(torch, "_check_is_size", space["deprecated"])
    assert make_key(make_small(), ()) is not None


@pytest.mark.parametrize("change", OF_OTHERS)
def test_code_of_others_and_strange_tensors_have_no_key(change):
    net = make_small()
    with ExitStack() as patch:
        change(net, patch)
        assert make_key(net, ()) is None
    assert make_key(make_small(), ()) is not None


def test_what_has_no_key_is_traced_every_time(counting):
    def add_hook(net):
        net[1].register_forward_hook(lambda *_: None)

    counting(change=add_hook)
    counting(change=add_hook)
    assert (counting.traces, list_entries()) == (2, [])


@pytest.mark.parametrize("model", ["net.py:make", "object"])
def test_models_of_a_user_are_traced_every_time(model, tmp_path, monkeypatch):
    """Nothing tells when their code changes: here a limit that no golden image reaches."""
    source = """
import torch
from torch import nn

class Net(nn.Module):
    img_size = 32

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, stride=2), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.conv(x).clamp(max=50.0).mean((2, 3)))

def make():
    torch.manual_seed(0)
    return Net().eval()
"""
    (tmp_path / "net.py").write_text(source)
    if model == "object":
        space: dict = {}
        exec(source, space)
        config = ExportConfig(space["make"](), format="onnx", output=str(tmp_path / "out"))
    else:
        config = ExportConfig(f"{tmp_path}/{model}", format="onnx", output=str(tmp_path / "out"))
    assert not config.keeps_trace
    assert not config.keeps_results
    run(config)
    assert not (tmp_path / "cache" / "traced").exists()


def test_a_module_object_of_the_registry_is_traced_every_time():
    """Its owner may have changed it."""
    assert ExportConfig("cmt_nano").keeps_trace
    assert not ExportConfig(create_model("cmt_nano")).keeps_trace


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
    first, second = (make_key(one, ()) for one in made)
    assert first == second
    assert first is not None
    assert make_key(model, ()) not in (None, first), "the rewrites are told"


def test_very_large_models_are_not_kept(monkeypatch):
    monkeypatch.setattr(kept_traces, "LARGEST", 100)
    assert make_key(make_small(), ()) is None


def test_another_version_of_the_tools_or_of_our_code_traces_anew(counting, monkeypatch):
    counting()
    with monkeypatch.context() as patch:
        patch.setattr(kept_traces.metadata, "version", lambda _: "0")
        counting()
    monkeypatch.setattr(kept_traces, "_hash_sources", lambda: "other")
    counting()
    assert counting.traces == 3


def forget(name):
    raise PackageNotFoundError(name)


def test_where_versions_or_sources_cannot_be_told_nothing_is_kept(monkeypatch, tmp_path):
    net = make_small()
    with monkeypatch.context() as patch:
        patch.setattr(kept_traces.metadata, "version", forget)
        assert make_key(net, ()) is None
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / ".#layers.py").symlink_to(tmp_path / "gone")
    with monkeypatch.context() as patch:
        patch.setattr(kept_traces, "SOURCES", (tmp_path / "broken",))
        assert make_key(net, ()) is None
    monkeypatch.setattr(kept_traces, "LOADED", 0.0)
    assert make_key(net, ()) is None, "code that was changed since it was loaded"


def test_a_kept_graph_that_answers_otherwise_is_made_again(counting, monkeypatch):
    """As if two models had one key."""
    monkeypatch.setattr(kept_traces, "make_key", lambda *_: "0" * 64)
    counting(0)
    with pytest.warns(CacheWarning, match="because it does not pass: step 'trace' changed.*made again"):
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


def test_a_process_that_holds_the_entry_keeps_nobody_waiting(counting):
    folder = find_cache_folder() / "traced"
    key = make_key(make_small(), ())
    with locked(folder / f"{key}.onnx"):
        counting()
    assert counting.traces == 1
