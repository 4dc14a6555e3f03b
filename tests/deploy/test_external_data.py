"""The walk over an ONNX file's bytes finds every reference to another file, as onnx's parser does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from cmt_edge.deploy.bundle.external_data import (
    MalformedOnnx,
    has_external_data,
    refers_outside,
)

Place = Callable[[onnx.ModelProto], TensorProto]


def small_model() -> onnx.ModelProto:
    """A graph of one addition with one constant."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    constant = numpy_helper.from_array(np.ones(2, np.float32), "c")
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "c"], ["y"])], "g", [value], [result], [constant]
    )
    return helper.make_model(graph)


def attribute_of(node: onnx.NodeProto, kind: int) -> onnx.AttributeProto:
    return node.attribute.add(name="a", type=kind)


def in_nested_graph(model: onnx.ModelProto) -> TensorProto:
    branch = attribute_of(model.graph.node[0], onnx.AttributeProto.GRAPH).g
    inner = attribute_of(branch.node.add(op_type="If"), onnx.AttributeProto.GRAPHS).graphs.add()
    return inner.initializer.add()


PLACES: dict[str, Place] = {
    "initializer": lambda m: m.graph.initializer[0],
    "second initializer": lambda m: m.graph.initializer.add(),
    "attribute": lambda m: attribute_of(m.graph.node[0], onnx.AttributeProto.TENSOR).t,
    "attribute's list": lambda m: attribute_of(m.graph.node[0], onnx.AttributeProto.TENSORS).tensors.add(),
    "sparse initializer": lambda m: m.graph.sparse_initializer.add().values,
    "sparse indices": lambda m: m.graph.sparse_initializer.add().indices,
    "sparse attribute": lambda m: attribute_of(m.graph.node[0], 11).sparse_tensor.values,
    "sparse attributes": lambda m: attribute_of(m.graph.node[0], 12).sparse_tensors.add().indices,
    "nested graph": in_nested_graph,
    "function": lambda m: attribute_of(m.functions.add().node.add(), onnx.AttributeProto.TENSOR).t,
    "function's default": lambda m: m.functions.add().attribute_proto.add(name="d").t,
    "training": lambda m: m.training_info.add().initialization.initializer.add(),
    "training's algorithm": lambda m: m.training_info.add().algorithm.initializer.add(),
}
"""Where a tensor can stand in a model."""


def refer_by_path(tensor: TensorProto) -> None:
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")


def refer_by_location_alone(tensor: TensorProto) -> None:
    tensor.data_location = TensorProto.EXTERNAL


def refer_without_location(tensor: TensorProto) -> None:
    tensor.external_data.add(key="offset", value="0")


def refer_with_value_first(tensor: TensorProto) -> None:
    """The entry is encoded with its value before its key: a search for the key's bytes alone misses nothing
    here, but one for the usual beginning does."""
    tensor.data_location = TensorProto.EXTERNAL
    entry = b"\x12\x09../secret" + b"\x0a\x88\x00location"
    tensor.MergeFromString(bytes([13 << 3 | 2, len(entry)]) + entry)


REFERENCES = [
    refer_by_path,
    refer_by_location_alone,
    refer_without_location,
    refer_with_value_first,
]


def tensors_of(message: Message) -> Iterator[TensorProto]:
    """Every tensor in a message, found through onnx's own classes."""
    if isinstance(message, TensorProto):
        yield message
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for part in [value] if isinstance(value, Message) else value:
            yield from tensors_of(part)


def refers_by_onnx(content: bytes) -> bool:
    model = onnx.ModelProto.FromString(content)
    return any(t.external_data or t.data_location != TensorProto.DEFAULT for t in tensors_of(model))


@pytest.mark.parametrize("refer", REFERENCES, ids=lambda refer: refer.__name__)
@pytest.mark.parametrize("place", PLACES)
def test_every_place_of_a_tensor_is_searched(
    place: str,
    refer: Callable[[TensorProto], None],
    tmp_path: Path,
) -> None:
    model = small_model()
    tensor = PLACES[place](model)
    file = tmp_path / "m.onnx"
    file.write_bytes(model.SerializeToString())
    assert not has_external_data(file)
    refer(tensor)
    file.write_bytes(model.SerializeToString())
    assert has_external_data(file)
    assert refers_by_onnx(file.read_bytes())


def long_varint(value: int, length: int) -> bytes:
    """A number in more bytes than it needs, as a parser must accept."""
    digits = [(value >> 7 * i) & 0x7F for i in range(length)]
    return bytes(d | 0x80 for d in digits[:-1]) + bytes(digits[-1:])


@pytest.mark.parametrize("key_length", [1, 2, 5])
@pytest.mark.parametrize("length_length", [1, 3, 5])
def test_other_encodings_of_the_same_field_are_understood(key_length: int, length_length: int) -> None:
    tensor = TensorProto(name="w")
    refer_by_path(tensor)
    content = tensor.SerializeToString()
    for field in (5, 7):  # GraphProto.initializer, ModelProto.graph
        content = long_varint(field << 3 | 2, key_length) + long_varint(len(content), length_length) + content
    assert refers_by_onnx(content)
    assert refers_outside(content)


def test_a_label_that_reads_like_a_reference_is_none() -> None:
    model = small_model()
    model.metadata_props.add(key="location", value="weights.bin")
    model.graph.doc_string = "\n\x08location\x12"
    assert not refers_outside(model.SerializeToString())


@pytest.mark.parametrize(
    "content",
    [
        b"\x3a\x05\x0a",  # the graph is longer than the file
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # a length of more than ten bytes
        b"\x02\x00",  # field number 0
        b"\x80",
        b"not a model at all",
    ],
)
def test_what_is_no_model_is_refused(content: bytes) -> None:
    with pytest.raises(DecodeError):
        onnx.ModelProto.FromString(content)
    with pytest.raises(MalformedOnnx):
        refers_outside(content)


def test_groups_are_refused() -> None:
    """The parser skips them as unknown fields, but nothing that writes ONNX makes one."""
    with pytest.raises(MalformedOnnx, match="wire type 3"):
        refers_outside(b"\x3b\x3c")


def test_deep_nesting_is_refused() -> None:
    content = b""
    for _ in range(3000):
        for field in (6, 5, 1):  # AttributeProto.g, NodeProto.attribute, GraphProto.node
            content = long_varint(field << 3 | 2, 1) + long_varint(len(content), 5) + content
    with pytest.raises(MalformedOnnx, match="nest"):
        refers_outside(b"\x3a" + long_varint(len(content), 5) + content)


@settings(max_examples=300, deadline=None)
@given(
    place=st.sampled_from(sorted(PLACES)),
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=3),
    outside=st.booleans(),
)
def test_damaged_files_are_judged_as_onnx_judges_them(
    place: str,
    flips: list[tuple[int, int]],
    outside: bool,
) -> None:
    model = small_model()
    tensor = PLACES[place](model)
    if outside:
        refer_by_path(tensor)
    content = bytearray(model.SerializeToString())
    for position, value in flips:
        content[position % len(content)] = value
    try:
        expected = refers_by_onnx(bytes(content))
    except DecodeError:
        return  # whether we refuse it too does not matter: no runtime reads it
    try:
        found = refers_outside(bytes(content))
    except MalformedOnnx:
        return  # stricter than the parser (a group among unknown fields)
    assert found >= expected
