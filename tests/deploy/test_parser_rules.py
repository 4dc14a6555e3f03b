"""The rules of TensorRT's parser: each is found when it is broken, and the graphs of every export keep
them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from cmt_edge.deploy.tensorrt.bindings import RTX
from cmt_edge.deploy.tensorrt.parser_rules import PLUGINS, SUPPORTED, find_parser_problems
from helpers.parser_graphs import BROKEN, BROKEN_FOR_RTX, drop_out, f32, model, scatter


@pytest.mark.parametrize("finding", BROKEN)
def test_each_broken_rule_is_found(finding):
    assert any(finding in f for f in find_parser_problems(BROKEN[finding])), find_parser_problems(
        BROKEN[finding]
    )


@pytest.mark.parametrize("finding", BROKEN_FOR_RTX)
def test_what_only_tensorrt_for_rtx_refuses(finding):
    assert find_parser_problems(BROKEN_FOR_RTX[finding]) == []
    (found,) = find_parser_problems(BROKEN_FOR_RTX[finding], RTX)
    assert finding in found


def test_every_operation_that_needs_a_plugin_is_tried():
    assert {f"({name})" for name in PLUGINS} <= {*BROKEN_FOR_RTX}


@pytest.mark.parametrize("graph", [scatter("none"), drop_out([], {"training": np.bool_(False)})])
def test_harmless_values_have_no_findings(graph):
    assert find_parser_problems(graph, RTX) == []


def test_weights_outside_the_file(tmp_path):
    made = model([("Add", ["input", "w"], "logits", {})], {"w": np.ones((1, 4), np.float32)})
    onnx.save(made, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0)
    assert any(
        "outside the file" in f
        for f in find_parser_problems(onnx.load(tmp_path / "m.onnx", load_external_data=False))
    )


def test_a_good_graph_has_no_findings():
    nodes = [
        ("QuantizeLinear", ["input", "s", "z"], "q", {}),
        ("DequantizeLinear", ["q", "s", "z"], "x", {}),
        ("DequantizeLinear", ["w", "ws", "wz"], "dw", {"axis": 1}),
        ("MatMul", ["x", "dw"], "logits", {}),
    ]
    constants = {
        "s": np.float32(0.1),
        "z": np.int8(0),
        "w": np.ones((4, 4), np.int8),
        "ws": f32(1, 2, 3, 4),
        "wz": np.zeros(4, np.int8),
    }
    assert find_parser_problems(model(nodes, constants)) == []


def test_an_output_that_is_left_out_is_no_output():
    pool = ("MaxPool", ["input"], ["logits", ""], {"kernel_shape": [2, 2]})
    assert find_parser_problems(model([pool], shape=(1, 2, 8, 8))) == []


def test_names_of_operations_are_onnx_names():
    known = {s.name for s in onnx.defs.get_all_schemas_with_history()}
    assert len(SUPPORTED & known) > 130
    assert {"Conv", "Gelu", "LayerNormalization", "Softmax", "QuantizeLinear"} <= SUPPORTED
    assert not {"QLinearConv", "DynamicQuantizeLinear", "MatMulInteger", "Attention"} & SUPPORTED
