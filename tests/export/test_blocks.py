"""The tensor of a block is found by its values, in whatever layout, and never another one."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from cmt_edge.cmt import create_model
from cmt_edge.deploy.backends.torch_blocks import find_last_leaf, list_blocks, watch
from cmt_edge.deploy.bundle.sections import TOKENS
from cmt_edge.export.steps.blocks import OVERWRITTEN, UNLIKE, find_blocks

SIZE = 4
"""Height and width of the images of these tests."""


class Layer(nn.Module):
    """A 1x1 conv and a norm that scales."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, bias=False)
        self.norm = nn.BatchNorm2d(3)
        nn.init.constant_(self.norm.weight, scale)

    def forward(self, x):
        return self.norm(self.conv(x))


class Net(nn.Module):
    """A row of two layers, and a head that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Layer(2.0), Layer(3.0)])
        self.head = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(self.head(x))


def make_graph(net: Net, folds_norm: bool) -> onnx.ModelProto:
    """The first layer as tokens; the second one with its norm folded away, or in place."""
    first, second = net.layers
    scales = [layer.norm.weight.detach() / (1 + layer.norm.eps) ** 0.5 for layer in net.layers]
    weights = {
        "first": (first.conv.weight.detach() * scales[0][:, None, None, None]),
        "second": second.conv.weight.detach() * (1 if folds_norm else scales[1][:, None, None, None]),
        "unit": torch.eye(3),
    }
    axes = {"shape": np.array([-1, SIZE * SIZE, 3]), "back": np.array([-1, SIZE, SIZE, 3])}
    nodes = [
        helper.make_node("Conv", ["input", "first"], ["half"], "half"),
        helper.make_node("Add", ["half", "half"], ["whole"], "whole"),
        helper.make_node("Transpose", ["whole"], ["turned"], "turned", perm=[0, 2, 3, 1]),
        helper.make_node("Reshape", ["turned", "shape"], ["tokens"], "tokens"),
        helper.make_node("MatMul", ["tokens", "unit"], ["same"], "same"),
        helper.make_node("Reshape", ["same", "back"], ["rows"], "rows"),
        helper.make_node("Transpose", ["rows"], ["map"], "map", perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["map", "second"], ["logits"], "second"),
    ]
    weights["first"] = weights["first"] / 2
    initializers = [numpy_helper.from_array(np.asarray(v), k) for k, v in (weights | axes).items()]
    shape = ["batch", 3, SIZE, SIZE]
    kind = onnx.TensorProto.FLOAT
    ends = [helper.make_tensor_value_info(name, kind, shape) for name in ("input", "logits")]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def find(net: Net, graph: onnx.ModelProto, final: onnx.ModelProto | None = None):
    batch = np.random.default_rng(0).normal(size=(2, 3, SIZE, SIZE)).astype(np.float32)
    reference = SimpleNamespace(batch=batch, classifier=net, model=net)
    return {place.name: place for place in find_blocks(graph, final or graph, reference)}


@pytest.fixture
def net() -> Net:
    return Net().eval()


def test_a_block_gets_the_tensor_with_its_values(net):
    places = find(net, make_graph(net, folds_norm=False))
    assert list(places) == ["layers.0", "layers.1", "head"]
    assert places["layers.0"].tensor == "whole"
    assert places["layers.1"].tensor == "logits"
    assert places["head"].missing == "the model calls it 2 times"


def test_a_folded_norm_leaves_the_input_of_the_norm(net):
    place = find(net, make_graph(net, folds_norm=True))["layers.1"]
    assert (place.tensor, place.before) == ("logits", "norm")


def test_tokens_count_as_the_map(net):
    graph = make_graph(net, folds_norm=False)
    (half,) = (node for node in graph.graph.node if node.name == "whole")
    half.op_type = "Identity"  # "half" times two only in the product with the unit matrix
    (unit,) = (t for t in graph.graph.initializer if t.name == "unit")
    unit.CopyFrom(numpy_helper.from_array(2 * np.eye(3, dtype=np.float32), "unit"))
    del half.input[1]
    place = find(net, graph)["layers.0"]
    assert (place.tensor, place.layout) == ("same", TOKENS)


def test_a_block_without_such_a_tensor_has_none(net):
    graph = make_graph(net, folds_norm=False)
    (first,) = (t for t in graph.graph.initializer if t.name == "first")
    first.CopyFrom(numpy_helper.from_array(1.001 * numpy_helper.to_array(first), "first"))
    place = find(net, graph)["layers.0"]
    assert (place.tensor, place.missing) == (None, UNLIKE)


def test_a_tensor_that_another_operation_makes_in_the_end_does_not_count(net):
    graph = make_graph(net, folds_norm=False)
    final = onnx.ModelProto()
    final.CopyFrom(graph)
    (whole,) = (node for node in final.graph.node if node.name == "whole")
    whole.name = "another"
    assert find(net, graph, final)["layers.0"].missing == OVERWRITTEN


@pytest.mark.parametrize(
    ("name", "some"),
    [
        ("cmt_nano", {"stem.2", "stages.0.norm", "stages.2.blocks.3", "head"}),
        ("cvt_13", {"stages.0.embed", "stages.2.blocks.9", "norm", "head"}),
        ("convit_tiny", {"embed", "blocks.11", "norm", "head"}),
        ("mvitv2_t", {"embed", "blocks.9", "norm", "head"}),
        ("xformer_reading", {"stem", "stages.0.1", "stages.1.2.layers.1", "stages.1.2.fuse", "head"}),
    ],
)
def test_blocks_of_the_families(name, some):
    model = create_model(name)
    found = list_blocks(model)
    assert some <= set(found)
    parameters = {key.rpartition(".")[0] for key, _ in model.named_parameters()}
    bare = {key for key in parameters if not any(f"{key}.".startswith(f"{path}.") for path in found)}
    assert bare <= {"", *(f"stages.{i}" for i in range(4))}, "all but tables and class tokens is in a block"


def test_the_last_leaf():
    assert find_last_leaf(Layer(1.0)) == "norm"
    assert find_last_leaf(nn.Conv2d(3, 3, 1)) is None


def test_watching_copies_what_is_changed_in_place():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True)).eval()
    batch = np.random.default_rng(0).normal(size=(1, 3, SIZE, SIZE)).astype(np.float32)
    (answer,), seen = watch(net, batch, ["0"], ["1"])
    before = seen.find_output("0")
    assert (before < 0).any()
    assert (np.maximum(before, 0) == answer).all()
    assert (seen.find_input("1") == before).all()
    assert seen.find_output("2") == "the model does not call it"


class Repeated(nn.Module):
    """Two blocks that are one module, in a row of three: its weights are shared (ALBERT's way)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        shared = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
        self.layers = nn.ModuleList([shared, nn.Sequential(nn.Conv2d(3, 3, 1)), shared])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_block_that_stands_in_two_places_is_said_to_be_called_twice():
    net = Repeated().eval()
    blocks = list_blocks(net)
    assert {"layers.0", "layers.1"} <= set(blocks)
    _, seen = watch(net, np.zeros((1, 3, SIZE, SIZE), np.float32), ["layers.0", "layers.1", "layers.2"])
    assert seen.find_output("layers.0") == seen.find_output("layers.2") == "the model calls it 2 times"
    assert isinstance(seen.find_output("layers.1"), np.ndarray)
