"""The view of an ONNX graph: reading and writing keeps every byte, and a change changes nothing else."""

from __future__ import annotations

import hashlib

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cmt_edge.calib import graph as view_of
from cmt_edge.calib.graph import (
    add_constant,
    copy_node,
    count_readers,
    detach_readers,
    find_source,
    make_node,
    open_view,
    read_array,
    read_model,
    read_types,
    remove_unread,
    set_constant,
    unfold_constants,
    write_model,
)
from cmt_edge.calib.qdq_pairs import move_pairs_to_layers, sign_quantizers
from cmt_edge.calib.restore import restore
from cmt_edge.calib.running import measure_extremes, open_graph
from cmt_edge.export.typed import round_graph, type_graph
from helpers.graphs import rewrite_copy

FLOAT = TensorProto.FLOAT


def stored(model: onnx.ModelProto) -> bytes:
    return model.SerializeToString(deterministic=True)


def awkward() -> onnx.ModelProto:
    """Has everything that the writer of onnx_ir changes in a graph that it only read."""
    nodes = [
        helper.make_node("Constant", [], ["k"], "k", value=numpy_helper.from_array(np.float32(2), "other")),
        helper.make_node("Mul", ["input", "k"], ["m"], "mul", domain="", doc_string="why"),
        helper.make_node("Clip", ["m", "", "top"], ["c"], "clip"),
        helper.make_node("LayerNormalization", ["c", "w"], ["n", "", ""], "norm", axis=-1),
        helper.make_node("Add", ["n", "w"], ["logits"]),
    ]
    for node in nodes[:2]:
        node.doc_string = ""
    nodes[0].metadata_props.add(key="z", value="1")
    nodes[0].metadata_props.add(key="a", value="2")
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [info("input", FLOAT, ["batch", 4])],
        [info("logits", FLOAT, ["batch", 4])],
        [numpy_helper.from_array(np.float32(3), "top"), helper.make_tensor("w", FLOAT, [4], [1, 2, 3, 4])],
        value_info=[info(name, FLOAT, ["batch", 4]) for name in "ncm"],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    model.producer_version = model.doc_string = model.graph.doc_string = ""
    return model


def test_reading_and_writing_keeps_every_byte():
    model = awkward()
    before = stored(model)
    assert stored(write_model(read_model(model))) == before
    assert stored(write_model(read_types(model))) == before
    assert stored(model) == before


def test_reading_and_writing_keeps_every_byte_of_real_graphs(graph, quantized):
    half = type_graph(quantized.model, "int8", {})
    for model in (graph, quantized.model, quantized.source, half.model):
        assert stored(write_model(read_model(model))) == stored(model)


def test_changes_never_reach_the_graph_that_was_read():
    model = awkward()
    before = stored(model)
    view = read_model(model)
    set_constant(view.graph.initializers["top"], np.float32(5))
    unfold_constants(view.graph)
    multiplication = view.graph.node("mul")
    multiplication.op_type = "Div"
    multiplication.replace_input_with(1, view.graph.initializers["top"])
    detach_readers(multiplication.outputs[0], "renamed").name = "m"
    assert stored(model) == before


def test_a_change_changes_nothing_else():
    model, view = awkward(), None
    view = read_model(model)
    clip = view.graph.node("clip")
    scale = add_constant(view.graph, "scale", np.full(4, 2, np.float32))
    product = make_node("Mul", [clip.inputs[0], scale], "scaled", "scaling")
    view.graph.insert_before(clip, product)
    clip.replace_input_with(0, product.outputs[0])
    result = write_model(view)
    onnx.checker.check_model(result, full_check=True)
    assert [node.name for node in result.graph.node] == ["k", "mul", "scaling", "clip", "norm", ""]
    assert list(result.graph.node[3].input) == ["scaled", "", "top"]
    assert list(result.graph.node[4].output) == ["n", "", ""]
    assert [tensor.name for tensor in result.graph.initializer] == ["top", "w", "scale"]
    del result.graph.node[2], result.graph.initializer[2]
    result.graph.node[2].input[0] = "m"
    assert stored(result) == stored(model)


def test_attributes_and_types_that_change_are_written():
    view = read_types(awkward())
    norm = view.graph.node("norm")
    norm.attributes.clear()
    norm.outputs[0].dtype = view_of.ir.DataType.FLOAT16
    result = write_model(view)
    assert not result.graph.node[3].attribute
    kinds = {info.name: info.type.tensor_type.elem_type for info in result.graph.value_info}
    assert kinds == {"n": TensorProto.FLOAT16, "c": FLOAT, "m": FLOAT}


def test_what_nothing_reads_goes_and_the_rest_stays():
    model = awkward()
    model.graph.node.add().CopyFrom(helper.make_node("Neg", ["alone"], ["unread"], "neg"))
    model.graph.node.insert(4, helper.make_node("Exp", ["m"], ["alone"], "exp"))
    model.graph.initializer.add().CopyFrom(numpy_helper.from_array(np.float32(1), "unread_constant"))
    view = read_model(model)
    remove_unread(view.graph)
    assert stored(write_model(view)) == stored(awkward())


def test_a_closed_view_holds_no_tensor():
    """Otherwise the weights of every graph that was looked at would wait for the garbage collector."""
    model = awkward()
    with open_view(model) as view:
        nodes, constants = list(view.graph), list(view.graph.initializers.values())
        add_constant(view.graph, "added", np.zeros(3, np.float32))
        unfold_constants(view.graph)
        remove_unread(view.graph)
        nodes += view.graph
        constants += view.graph.initializers.values()
    assert {value.name for value in constants} == {"top", "w", "added", "k"} - {"added"}
    assert not any(value.const_value is not None for value in constants)
    assert not any(node.meta or node.attributes for node in nodes)
    assert not view.meta
    with pytest.raises(ZeroDivisionError), open_view(model) as view:
        raise ZeroDivisionError
    assert not view.meta


def test_types_are_inferred_without_the_values_of_large_constants():
    nodes = [
        helper.make_node("MatMul", ["input", "w"], ["m"], "m"),
        helper.make_node("Reshape", ["m", "shape"], ["logits"], "r"),
    ]
    info = helper.make_tensor_value_info
    large = np.zeros((40, 60), np.float32)
    tensors = [numpy_helper.from_array(v, k) for k, v in {"w": large, "shape": np.array([-1, 30, 2])}.items()]
    ends = [info("input", FLOAT, ["batch", 40]), info("logits", FLOAT, None)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors),
        opset_imports=[helper.make_opsetid("", 20)],
    )
    graph = read_types(model).graph
    assert graph.node("m").outputs[0].shape[1] == 60
    assert list(graph.outputs[0].shape)[1:] == [30, 2]
    assert read_array(graph.initializers["w"]).shape == (40, 60)
    model.graph.node[0].input[0] = "shape"
    with pytest.raises(onnx.shape_inference.InferenceError):
        read_types(model)


def test_readers_are_inputs_of_nodes_and_outputs_of_the_graph():
    graph = read_model(awkward()).graph
    assert count_readers(graph.initializers["w"]) == 2
    assert count_readers(graph.outputs[0]) == 1
    assert count_readers(graph.inputs[0]) == 1


def test_constants_are_initializers_or_results_of_constant_nodes():
    model = awkward()
    model.graph.node.insert(0, helper.make_node("Constant", [], ["ints"], "i", value_ints=[1, 2]))
    model.graph.node.insert(0, helper.make_node("Constant", [], ["one"], "f", value_float=1.5))
    graph = read_model(model).graph
    values = {
        value.name: read_array(value) for node in graph for value in (*node.inputs, *node.outputs) if value
    }
    assert values.pop("ints").tolist() == [1, 2]
    assert values.pop("one") == np.float32(1.5)
    assert values.pop("one", None) is None
    assert (values.pop("k"), values.pop("top")) == (2, 3)
    assert values.pop("w").tolist() == [1, 2, 3, 4]
    assert read_array(None) is None
    assert not any(value is not None for value in values.values())


def test_constant_nodes_become_initializers_of_the_same_names():
    model = awkward()
    model.graph.node.insert(0, helper.make_node("Constant", [], ["two"], "f", value_floats=[1.5, 2.0]))
    view = read_model(model)
    unfold_constants(view.graph)
    result = write_model(view)
    values = {tensor.name: numpy_helper.to_array(tensor).tolist() for tensor in result.graph.initializer}
    assert values == {"top": 3.0, "w": [1, 2, 3, 4], "two": [1.5, 2.0], "k": 2.0}
    assert "Constant" not in {node.op_type for node in result.graph.node}
    onnx.checker.check_model(result, full_check=True)


def test_detached_readers_read_a_new_tensor_under_the_old_name():
    model = awkward()
    view = read_model(model)
    last = next(node for node in view.graph if node.op_type == "Add")
    new = detach_readers(last.outputs[0], "exact")
    view.graph.insert_after(last, view_of.ir.node("Neg", last.outputs, outputs=[new], name="neg"))
    result = write_model(view)
    onnx.checker.check_model(result, full_check=True)
    assert [list(node.output) for node in result.graph.node][-2:] == [["exact"], ["logits"]]
    batch = np.random.default_rng(0).random((2, 4)).astype(np.float32)
    np.testing.assert_array_equal(open_graph(result)(batch)[0], -open_graph(model)(batch)[0])


def test_a_copied_node_keeps_its_attributes_and_gets_new_names():
    view = read_model(awkward())
    norm = view.graph.node("norm")
    view.graph.insert_after(norm, copy_node(norm, norm.inputs, "_again"))
    written = write_model(view).graph.node[4]
    assert (written.name, written.output[0]) == ("norm_again", "n_again")
    assert [attribute.i for attribute in written.attribute] == [-1]


def test_sources_are_found_through_moves():
    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Relu", ["input"], ["r"], "relu"),
        helper.make_node("Flatten", ["r"], ["f"], "flatten"),
        helper.make_node("Transpose", ["f"], ["t"], "transpose"),
        helper.make_node("Concat", ["t", "t"], ["logits"], "concat", axis=0),
    ]
    ends = [info(name, FLOAT, None) for name in ("input", "logits")]
    graph = read_model(helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:]))).graph
    found = {node.name: find_source(node.outputs[0]) for node in graph}
    assert {name: source.name for name, source in found.items()} == {
        "relu": "relu",
        "flatten": "relu",
        "transpose": "relu",
        "concat": "concat",
    }
    assert find_source(graph.inputs[0]) is None
    assert find_source(None) is None


def test_extremes_are_those_of_the_tensors_on_each_batch():
    info = helper.make_tensor_value_info
    nodes = [helper.make_node("Neg", ["input"], ["y"], "neg")]
    graph = helper.make_graph(nodes, "g", [info("input", FLOAT, ["n", 2, 3, 3])], [info("y", FLOAT, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    before = stored(model)
    batches = [np.random.default_rng(i).normal(size=(1, 2, 3, 3)).astype(np.float32) for i in range(3)]
    found = measure_extremes(model, ["y"], ["input"], batches)
    low, high = found["y"]
    np.testing.assert_array_equal(low, [(-batch).min((0, 2, 3)) for batch in batches])
    np.testing.assert_array_equal(high, [(-batch).max((0, 2, 3)) for batch in batches])
    assert found["input"][0].tolist() == [[batch.min()] for batch in batches]
    assert stored(model) == before


def test_failures_of_onnx_runtime_pass_the_guard_and_those_of_reading_do_not():
    class Guarded(Exception):
        pass

    class Guard:
        def __enter__(self):
            pass

        def __exit__(self, kind, error, trace):
            if error is not None:
                raise Guarded from error

    model = awkward()
    run = open_graph(model, Guard)
    assert run(np.zeros((1, 4), np.float32))[0].shape == (1, 4)
    with pytest.raises(Guarded):
        run(np.zeros((1, 5, 5), np.float32))

    def unreadable():
        yield np.zeros((1, 4), np.float32)
        raise OSError("an unreadable image")

    with pytest.raises(OSError, match="unreadable"):
        measure_extremes(model, [], ["m"], unreadable(), Guard)
    model.graph.node[1].op_type = "NoSuchOperation"
    with pytest.raises(Guarded):
        open_graph(model, Guard)


def small() -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """A float graph, and its Q/DQ graph with an unsigned quantizer whose pair stands before moves."""
    rng = np.random.default_rng(0)
    info = helper.make_tensor_value_info
    ends = [info("input", FLOAT, ["batch", 4]), info("logits", FLOAT, ["batch", 4])]
    weight = rng.standard_normal((4, 4)).astype(np.float32)
    scale = np.abs(weight).max(0) / 127
    values = {
        "shape": np.array([-1, 4]),
        "w": weight,
        "b": np.arange(4, dtype=np.float32),
        "s": np.float32(0.01),
        "z": np.uint8(0),
        "wq": np.rint(weight / scale).astype(np.int8),
        "ws": scale,
        "wz": np.zeros(4, np.int8),
    }
    before = [helper.make_node("Relu", ["input"], ["r"], "relu")]
    tail = [
        helper.make_node("Reshape", ["d", "shape"], ["f"], "flatten"),
        helper.make_node("MatMul", ["f", "wd"], ["m"], "linear"),
        helper.make_node("Add", ["m", "b"], ["logits"], "bias"),
    ]
    pairs = [
        helper.make_node("QuantizeLinear", ["r", "s", "z"], ["q"], "Q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "DQ"),
        helper.make_node("DequantizeLinear", ["wq", "ws", "wz"], ["wd"], "W", axis=1),
    ]

    def model(nodes, names) -> onnx.ModelProto:
        tensors = [numpy_helper.from_array(values[name], name) for name in names]
        made = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
        return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)

    int8 = model([*before, *pairs, *tail], ["shape", "b", "s", "z", "wq", "ws", "wz"])
    original = model([*before, *tail], ["shape", "w", "b"])
    original.graph.node[1].input[0], original.graph.node[2].input[1] = "r", "w"
    return original, int8


def changed_graphs() -> dict[str, onnx.ModelProto]:
    """What each function that changes graphs makes of small ones."""
    original, int8 = small()
    observed = {"input": 1.0, "r": 1e5, "logits": 40.0}
    signed = rewrite_copy(int8, sign_quantizers)
    final = rewrite_copy(signed, move_pairs_to_layers)
    return {
        "signed": signed,
        "moved": final,
        "restored": restore(final, original, ["linear"]),
        "float16": type_graph(original, "fp16", observed).model,
        "int8 in float16": type_graph(final, "int8", {}).model,
        "rounded": round_graph(type_graph(final, "int8", {}).model),
    }


BYTES = {
    "signed": "e44dcf79da8f0d61",
    "moved": "d3b8f0dea077fdfb",
    "restored": "1a3e09edf8e3a775",
    "float16": "11d8c28f4816b5b0",
    "int8 in float16": "ea1a314764d76697",
    "rounded": "00fee148e54e4643",
}
"""The first 16 digits of the SHA-256 of each of :func:`changed_graphs`. A changed hash means that an export
has other bytes than before, so that caches and published bundles no longer agree with it."""


@pytest.mark.parametrize("name", BYTES)
def test_changed_graphs_keep_their_bytes(name):
    model = changed_graphs()[name]
    onnx.checker.check_model(model, full_check=True)
    assert hashlib.sha256(stored(model)).hexdigest()[:16] == BYTES[name]
