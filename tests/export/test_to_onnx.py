"""Tracing: with a fixed batch where that can be freed afterwards, with a symbolic one elsewhere; the graph is
the same to its users."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import onnx
import pytest
import torch
from onnxsim import onnx_simplifier
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from cmt_edge.cmt import create_model, fuse
from cmt_edge.cmt.weights import randomize
from cmt_edge.deploy.errors import InputError, ParityError
from cmt_edge.deploy.signals import Stopped, get_received
from cmt_edge.export import to_onnx
from cmt_edge.export.config import OPSET
from cmt_edge.export.to_onnx import BATCH_DIM, TRACED_BATCH, compute_outputs, export_onnx, simplify


class Tokens(nn.Module):
    """A class token that is expanded to the batch, and reshapes."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.fc = nn.Parameter(torch.randn(1, 1, 3)), nn.Linear(3, 4)

    def forward(self, x):
        tokens = torch.cat(
            (self.token.expand(x.shape[0], -1, -1), x.reshape(x.shape[0], 3, -1).transpose(1, 2)), 1
        )
        return self.fc(tokens.mean(1))


class BatchInAValue(nn.Module):
    """Uses the batch size as a number, which no shape shows."""

    def forward(self, x):
        return x.mean((2, 3)) * x.shape[0]


class MergedBatch(nn.Module):
    """Reshapes into a multiple of the batch size."""

    def forward(self, x):
        return x.reshape(x.shape[0] * 3, -1).mean(1).reshape(-1, 3)


def images(count: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(count).normal(size=(count, 3, size, size)).astype(np.float32)


@pytest.mark.parametrize("module", [Tokens, BatchInAValue, MergedBatch])
@pytest.mark.parametrize("count", [1, 2, 5, TRACED_BATCH])
def test_any_batch_size(module, count):
    torch.manual_seed(0)
    model = module().eval()
    graph = simplify(export_onnx(model, 8, OPSET))
    with torch.inference_mode():
        expected = model(torch.from_numpy(images(count))).numpy()
    np.testing.assert_allclose(compute_outputs(graph, images(count), "test")[0], expected, atol=1e-5)
    assert [
        v.type.tensor_type.shape.dim[0].dim_param for v in (graph.graph.input[0], graph.graph.output[0])
    ] == [BATCH_DIM, BATCH_DIM]


def test_a_refused_graph_is_traced_in_another_way_and_then_refused_for_good():
    seen = []

    def refuse(graph):
        seen.append(graph)
        raise ParityError("not the same")

    with pytest.raises(ParityError, match="not the same"):
        export_onnx(Tokens().eval(), 8, OPSET, check=refuse)
    assert len(seen) == 2
    seen.clear()
    graph = export_onnx(Tokens().eval(), 8, OPSET, check=seen.append)
    assert seen == [graph]


def test_what_cannot_be_freed_is_traced_with_a_symbolic_batch(monkeypatch):
    traced = []
    real = to_onnx.trace
    monkeypatch.setattr(to_onnx, "trace", lambda *a: traced.append(a[-1]) or real(*a))
    export_onnx(BatchInAValue().eval(), 8, OPSET)
    assert traced == [TRACED_BATCH, None]
    traced.clear()
    export_onnx(Tokens().eval(), 8, OPSET)
    assert traced == [TRACED_BATCH]


def make_graph_to_fold() -> onnx.ModelProto:
    """``x + a @ b``, of which onnxsim computes the product."""
    matrix = np.eye(2, dtype=np.float32)
    nodes = [
        onnx.helper.make_node("MatMul", ["a", "b"], ["c"]),
        onnx.helper.make_node("Add", ["x", "c"], ["y"]),
    ]
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 2]) for name in "xy"]
    constants = [onnx.numpy_helper.from_array(matrix, name) for name in "ab"]
    graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    opset = onnx.helper.make_opsetid("", OPSET)
    return onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_onnxsim_swallows_ends_the_step(monkeypatch, number):
    """It takes the exception for a constant that it cannot fold."""

    def interrupt(*_: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)

    assert [node.op_type for node in simplify(make_graph_to_fold()).graph.node] == ["Add"]
    monkeypatch.setattr(onnx_simplifier.PyModelExecutor, "Run", interrupt)
    with pytest.raises(Stopped):
        simplify(make_graph_to_fold())
    assert get_received() == number


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cmt_nano", pytest.param("cvt_13", marks=pytest.mark.giant)])
def test_both_ways_give_the_same_graph(name):
    reference = create_model(name, img_size=64)
    randomize(reference)
    model = fuse(reference)
    ours = simplify(export_onnx(model, 64, OPSET)).graph
    symbolic = simplify(to_onnx.trace(model, 64, OPSET, ("logits",), None)).graph
    assert {n.op_type for n in ours.node} <= {n.op_type for n in symbolic.node}
    assert len(ours.node) <= len(symbolic.node)


class LengthInPython(nn.Module):
    """Takes the batch size with ``len``, which fixes it while a symbolic batch is traced, beside an operation
    that makes torch.onnx fold constants."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = weight_norm(nn.Conv2d(5, 4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.linspace(-1, 1, x.shape[2])
        grid = torch.stack(torch.meshgrid(rows, rows, indexing="ij"))
        value, gate = self.mix(torch.cat([x, grid.expand(len(x), -1, -1, -1)], 1)).chunk(2, 1)
        return (value * gate.sigmoid()).mean((2, 3))


@pytest.mark.parametrize("batch", [1, 3, 13])
def test_a_batch_size_taken_with_len_stays_open(batch):
    model = LengthInPython().eval()
    graph = export_onnx(model, 16, OPSET)
    images = torch.linspace(-1, 1, batch * 3 * 256).reshape(batch, 3, 16, 16)
    answers = compute_outputs(graph, images.numpy(), "test")[0]
    with torch.no_grad():
        np.testing.assert_allclose(answers, model(images).numpy(), atol=1e-5)


class FixedBatch(nn.Module):
    """Its code chooses by the number of images."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = torch.arange(len(x) * 4, dtype=torch.float32).reshape(len(x), 4) / len(x)
        return x.mean((1, 2, 3))[:, None] + weights


class LoopOverImages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = []
        for image in x:
            rows.append(self.fc(image.mean((1, 2))))
        return torch.stack(rows)


@pytest.mark.parametrize(("model", "code"), [(FixedBatch, "len(x)"), (LoopOverImages, "for image in x")])
def test_a_batch_size_that_is_fixed_is_refused_with_the_line(model, code):
    with pytest.raises(InputError, match="fixes the batch size") as error:
        export_onnx(model().eval(), 16, OPSET)
    assert code in error.value.where
    assert "in forward" in error.value.where
