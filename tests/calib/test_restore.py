"""Groups of operations by module, and taking them back to float: on the real graphs, for every group and
every operation."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cmt_edge.calib import Recipe, lint, quantize
from cmt_edge.calib.generated import generate
from cmt_edge.calib.groups import MODULE, group_by_kind, group_nodes, name_groups
from cmt_edge.calib.restore import list_int8_nodes, restore
from cmt_edge.deploy.errors import InputError, StepError
from cmt_edge.deploy.preprocessing import preprocess
from cmt_edge.export.to_onnx import set_batch
from helpers.calibration import SPEC
from helpers.graphs import compute_logits


def names(*paths: str) -> dict[str, str]:
    return name_groups(set(paths))


def test_groups_are_a_kind_of_layer_in_a_stage():
    found = names(
        "stem.0.conv",
        "stem.1.conv",
        "stages.0.embed",
        "stages.0.blocks.0.lpu",
        "stages.0.blocks.1.ffn.expand",
        "stages.0.blocks.0.ffn.project",
        "stages.1.blocks.0.attn.q",
        "stages.1.blocks.0.attn",
        "head.fc",
        "head.conv",
    )
    assert found == {
        "stem.0.conv": "stem",
        "stem.1.conv": "stem",
        "stages.0.embed": "stages.0.embed",
        "stages.0.blocks.0.lpu": "stages.0.lpu",
        "stages.0.blocks.1.ffn.expand": "stages.0.ffn",
        "stages.0.blocks.0.ffn.project": "stages.0.ffn",
        "stages.1.blocks.0.attn.q": "stages.1.attn",
        "stages.1.blocks.0.attn": "stages.1.attn",
        "head.fc": "head",
        "head.conv": "head",
    }


def test_a_long_row_of_blocks_is_cut_into_parts():
    found = names(
        *(f"blocks.{i}.{kind}.{leaf}" for i in range(12) for kind in ("attn", "mlp") for leaf in ("a", "b")),
        "head",
    )
    assert found["blocks.0.attn.a"] == found["blocks.2.attn.b"] == "blocks[0-2].attn"
    assert found["blocks.11.mlp.a"] == "blocks[9-11].mlp"
    assert found["head"] == "head"
    assert len(set(found.values())) == 9


def test_numbers_inside_a_block_are_no_blocks():
    found = names(
        "layers.0.blocks.0.mlp.0",
        "layers.0.blocks.0.mlp.3",
        "layers.0.blocks.1.attn.qkv",
        "layers.1.blocks.0.mlp.0",
    )
    assert found["layers.0.blocks.0.mlp.3"] == "layers.0.mlp"
    assert found["layers.1.blocks.0.mlp.0"] == "layers.1.mlp"


@pytest.mark.parametrize("path", ["", "conv", "0", "a.0", "0.1.2", "..", "a..0.b"])
def test_any_path_has_a_group(path):
    assert set(names(path)) == {path}


@pytest.fixture(scope="module")
def batch():
    return np.stack([preprocess(b, SPEC) for b in generate(4, 64, seed=98)])


@pytest.fixture(scope="module")
def expected(graph, batch):
    return compute_logits(graph, batch, "float")


def test_every_operation_knows_its_module_and_the_bundle_does_not(graph):
    assert all(
        node.metadata_props[0].key == MODULE
        for node in graph.graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul")
    )
    assert not any(node.metadata_props for node in set_batch(graph, 1).graph.node)


def test_groups_of_the_real_graph(graph, quantized):
    groups = group_nodes(quantized.source, list_int8_nodes(quantized.model))
    kinds = ("embed", "attn", "ffn")  # lpu is depthwise, so it is float already
    stages = [f"stages.{stage}.{kind}" for stage in range(4) for kind in kinds]
    assert list(groups) == ["stem", *stages, "head"]
    assert sum(map(len, groups.values())) == len(list_int8_nodes(quantized.model))
    classes = group_by_kind(quantized.source, list_int8_nodes(quantized.model))
    assert classes["@products"] == ()  # the attention's own are float
    assert len(classes["@depthwise"]) == 10
    assert set(classes["@linears"]) < set(list_int8_nodes(quantized.model))


def test_restoring_nothing_changes_nothing(graph, quantized):
    same = restore(quantized.model, quantized.source, [])
    assert same.SerializeToString(deterministic=True) == quantized.model.SerializeToString(deterministic=True)


def test_restoring_everything_is_the_float_graph(graph, quantized, batch, expected):
    before = quantized.model.SerializeToString(deterministic=True)
    whole = restore(quantized.model, quantized.source, list_int8_nodes(quantized.model))
    assert np.abs(compute_logits(whole, batch, "restored") - expected).max() < 1e-5
    assert {n.op_type for n in whole.graph.node} == {n.op_type for n in quantized.source.graph.node}
    assert len(whole.graph.node) == len(quantized.source.graph.node)
    assert list_int8_nodes(whole) == []
    assert quantized.model.SerializeToString(deterministic=True) == before


def check(variant, left):
    assert lint(variant) == []
    onnx.checker.check_model(variant, full_check=True)
    assert set(list_int8_nodes(variant)) == set(left)


def test_every_operation_alone_can_be_restored_or_left(graph, quantized):
    every = list_int8_nodes(quantized.model)
    for node in every[::3]:
        check(restore(quantized.model, quantized.source, [node]), [n for n in every if n != node])
        check(restore(quantized.model, quantized.source, [n for n in every if n != node]), [node])


def test_every_group_comes_closer_to_the_float_answers(graph, quantized, batch, expected):
    every = list_int8_nodes(quantized.model)
    whole = np.abs(compute_logits(quantized.model, batch, "int8") - expected).mean()
    for nodes in group_nodes(quantized.source, every).values():
        alone = restore(quantized.model, quantized.source, [n for n in every if n not in nodes])
        check(alone, nodes)
        assert 0 < np.abs(compute_logits(alone, batch, "alone") - expected).mean() < whole


def test_random_choices(graph, quantized):
    every, rng = list_int8_nodes(quantized.model), np.random.default_rng(0)
    for _ in range(8):
        chosen = [n for n in every if rng.random() < rng.random()]
        if len(chosen) < len(every):
            check(restore(quantized.model, quantized.source, chosen), set(every) - set(chosen))


def test_corrected_biases_are_the_original_ones_again(graph, quantized):
    before = {i.name: numpy_helper.to_array(i) for i in quantized.source.graph.initializer}

    def bias(model, name="stem.1.conv.bias"):
        return next(numpy_helper.to_array(i) for i in model.graph.initializer if i.name == name)

    assert not np.array_equal(bias(quantized.model), before["stem.1.conv.bias"])
    stem = group_nodes(quantized.source, list_int8_nodes(quantized.model))["stem"]
    assert np.array_equal(bias(restore(quantized.model, quantized.source, stem)), before["stem.1.conv.bias"])


def test_the_recipe_keeps_groups_float(graph, data, cache, quantized):
    recipe = Recipe(keep_float=("stem", "@linears", "stages.3.ffn"))
    result = quantize(graph, data, SPEC, recipe, cache=cache)
    assert result.cached  # the calibrated graph is that of the plain recipe
    assert result.recipe == recipe.key() != quantized.recipe
    left = set(list_int8_nodes(result.model))
    groups, classes = (
        f(quantized.source, list_int8_nodes(quantized.model)) for f in (group_nodes, group_by_kind)
    )
    assert left == set(list_int8_nodes(quantized.model)) - {
        *groups["stem"],
        *groups["stages.3.ffn"],
        *classes["@linears"],
    }


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (("stages.9.ffn",), "no group"),
        (
            (
                "@linears",
                "stem",
                *(f"stages.{s}.{k}" for s in range(4) for k in ("embed", "attn", "ffn")),
                "head",
            ),
            "nothing would be left",
        ),
    ],
)
def test_names_that_cannot_be_kept_float(graph, data, cache, quantized, keep, message):
    with pytest.raises(InputError, match=message):
        quantize(graph, data, SPEC, Recipe(keep_float=keep), cache=cache)


def test_unknown_operations_and_foreign_graphs_are_refused(graph, quantized):
    with pytest.raises(InputError, match="no operation 'nothing'"):
        restore(quantized.model, quantized.source, ["nothing"])
    smoothed = onnx.ModelProto()
    smoothed.CopyFrom(quantized.model)
    smoothed.graph.node.add().CopyFrom(
        helper.make_node("Mul", ["input", "input"], ["smoothed"], name="smooth")
    )
    with pytest.raises(StepError, match="become float again"):
        restore(smoothed, graph, list_int8_nodes(quantized.model)[:1])


# --- small graphs: shared pairs, shared constants, biases added apart -----------------------------


def pair(name: str, scale: float) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    nodes = [
        helper.make_node(op, [source, f"{name}_s", f"{name}_z"], [target], name=f"{op}_{name}")
        for op, source, target in (
            ("QuantizeLinear", name, f"{name}_q"),
            ("DequantizeLinear", f"{name}_q", f"{name}_dq"),
        )
    ]
    values = [
        numpy_helper.from_array(np.float32(scale), f"{name}_s"),
        numpy_helper.from_array(np.int8(0), f"{name}_z"),
    ]
    return nodes, values


def model_of(nodes, constants) -> onnx.ModelProto:
    io = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 4]) for name in ("input", "logits")]
    result = helper.make_model(
        helper.make_graph(nodes, "g", io[:1], io[1:], constants), opset_imports=[helper.make_opsetid("", 20)]
    )
    result.ir_version = 10
    onnx.checker.check_model(result, full_check=True)
    return result


@pytest.fixture
def twins():
    """Two products of one reshaped input with one weight; the second's bias is added apart and was
    corrected."""
    rng = np.random.default_rng(0)
    weight, bias = rng.standard_normal((4, 4)).astype(np.float32), rng.standard_normal(4).astype(np.float32)
    scale = np.abs(weight).max(0) / 127
    shape = numpy_helper.from_array(np.array([2, 4]), "shape")

    def tail(first, second):
        return [
            helper.make_node("MatMul", [first, second], ["x"], name="one"),
            helper.make_node("MatMul", [first, second], ["y"], name="two"),
            helper.make_node("Add", ["y", "bias"], ["yb"], name="add"),
            helper.make_node("Add", ["x", "yb"], ["logits"], name="sum"),
        ]

    flat = helper.make_node("Reshape", ["input", "shape"], ["flat"], name="flatten")
    values = [numpy_helper.from_array(v, n) for v, n in ((weight, "weight"), (bias, "bias"))]
    original = model_of([flat, *tail("flat", "weight")], [shape, *values])
    quantizing, scales = pair("input", 0.05)
    flat_int8 = helper.make_node("Reshape", ["input_dq", "shape"], ["flat"], name="flatten")
    weights = helper.make_node("DequantizeLinear", ["w_q", "w_s", "w_z"], ["w_dq"], name="dq_w", axis=1)
    int8 = [
        numpy_helper.from_array(np.round(weight / scale).astype(np.int8), "w_q"),
        numpy_helper.from_array(scale, "w_s"),
        numpy_helper.from_array(np.zeros(4, np.int8), "w_z"),
        numpy_helper.from_array(bias + 1, "bias"),
    ]
    return original, model_of(
        [*quantizing, flat_int8, weights, *tail("flat", "w_dq")], [shape, *scales, *int8]
    )


def test_one_of_two_readers_of_a_pair(twins):
    original, int8 = twins
    batch = np.random.default_rng(1).standard_normal((2, 4)).astype(np.float32)
    for chosen, left in (("one", "two"), ("two", "one")):
        variant = restore(int8, original, [chosen])
        check(variant, [left])
        assert len({n.name for n in variant.graph.node}) == len(variant.graph.node)
        bias = next(numpy_helper.to_array(i) for i in variant.graph.initializer if i.name == "bias")
        corrected = numpy_helper.to_array(int8.graph.initializer[-1])
        assert np.array_equal(bias, corrected) == (chosen == "one")
    whole = restore(int8, original, ["one", "two"])
    assert np.array_equal(compute_logits(whole, batch, "whole"), compute_logits(original, batch, "original"))
