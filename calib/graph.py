"""The one view of an ONNX graph: which node makes a tensor, which nodes read it, which tensors are constants.

Graphs are stored as protobuf. :func:`open_view` shows one as objects of ``onnx_ir``, and :func:`write_model`
stores it again. In between, these objects are the only index of a graph:

* producers and readers: ``value.producer()``, ``value.uses()``, ``value.is_graph_output()``;
* constants: ``value.is_initializer()`` and ``value.const_value``, or :func:`read_array`;
* changes: ``value.replace_all_uses_with``, ``node.replace_input_with``, ``graph.insert_before``,
  ``graph.remove`` and ``graph.sort`` keep producers and readers up to date.

:mod:`cmt_edge.calib.running` runs a graph in ONNX Runtime.

The writer of ``onnx_ir`` is not used for nodes that were read, because it changes a file in which nothing was
changed: it leaves out fields that are set but empty (``doc_string``, ``producer_version``, a domain
``"ai.onnx"``), it adds an entry of ``value_info`` for every initializer, and it sorts the other entries by
node. :func:`write_model` changes only what was changed in the view, so that equal graphs keep equal bytes.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import onnx
import onnx_ir as ir
from onnx import shape_inference

QUANTIZE = "QuantizeLinear"
"""The operation that turns float values into int8 values."""

DEQUANTIZE = "DequantizeLinear"
"""The operation that turns int8 values into float values."""

MOVES = (
    "Reshape",
    "Transpose",
    "Split",
    "Slice",
    "Squeeze",
    "Unsqueeze",
    "Flatten",
)
"""Operations that only move values."""

ELEMENTWISE = ("Add", "Sub", "Mul", "Div")
"""Operations of elementwise arithmetic."""

STORED = "stored"
"""Key in the ``meta`` of a model or a node of the view: the protobuf message that it was read from."""

SMALL_TENSOR = 1024
"""The largest number of elements of a constant that may decide shapes."""


Message = TypeVar("Message", onnx.ModelProto, onnx.GraphProto)
"""A protobuf message that holds a whole graph."""


@dataclass(frozen=True)
class _StoredNode:
    """What a node of the view was read from."""

    message: onnx.NodeProto
    attributes: tuple[ir.Attr, ...]


@contextmanager
def open_view(
    model: onnx.ModelProto,
    *,
    types: bool = False,
) -> Iterator[ir.Model]:
    """A view of ``model`` for the time of a block: see :func:`read_model`, and :func:`read_types` for
    ``types``.

    When the block ends, the view lets go of all tensors. Nodes and tensors of a view refer to each other, so
    that it would keep all weights in memory until Python's next full garbage collection.
    """
    view = read_types(model) if types else read_model(model)
    nodes, constants = (
        set(view.graph),
        set(view.graph.initializers.values()),
    )
    try:
        yield view
    finally:
        view.meta.clear()
        for node in nodes.union(view.graph):
            node.meta.clear()
            node.attributes.clear()
        for value in constants.union(view.graph.initializers.values()):
            value.const_value = None


def read_model(model: onnx.ModelProto) -> ir.Model:
    """Read ``model`` as a view.

    The view shares the tensors of ``model`` and never writes into them: a new value of a constant is set with
    :func:`set_constant`. Constants must not be renamed for the same reason.
    """
    with _paused_collector():
        view = ir.from_proto(model)
    view.meta[STORED] = model
    for node, message in zip(view.graph, model.graph.node, strict=True):
        node.meta[STORED] = _StoredNode(message, tuple(node.attributes.values()))
    return view


@contextmanager
def _paused_collector() -> Iterator[None]:
    """Pause the garbage collector for the time of a block.

    A view of 800 nodes consists of 20 000 objects. Making them at once would start collections of everything
    that PyTorch and NNCF hold, which take longer (0.2 s) than the view itself (0.02 s).
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_types(model: onnx.ModelProto) -> ir.Model:
    """Read ``model`` as a view in which every tensor has the type and shape that ONNX infers.

    Raises:
        onnx.shape_inference.InferenceError: the types of the graph contradict each other.
    """
    view = read_model(model)
    inferred = shape_inference.infer_shapes(_drop_weights(model), strict_mode=True).graph
    infos = {
        info.name: info
        for info in (
            *inferred.input,
            *inferred.value_info,
            *inferred.output,
        )
    }
    made = [value for node in view.graph for value in node.outputs]
    for value in (*view.graph.inputs, *made):
        if value.name in infos:
            ir.serde.deserialize_value_info_proto(infos[value.name], value)
    return view


def _drop_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``model`` in which large initializers have a type and a shape only.

    Types and shapes depend on the values of small tensors (shapes, axes) alone, and weights would be copied
    several times on the way through the inference.
    """
    result = _copy_without(model, "graph")
    result.graph.CopyFrom(_copy_without(model.graph, "initializer"))
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) > SMALL_TENSOR:
            result.graph.initializer.add(
                name=tensor.name,
                data_type=tensor.data_type,
                dims=tensor.dims,
            )
        else:
            result.graph.initializer.add().CopyFrom(tensor)
    return result


def declare_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``model`` in which large initializers are inputs of their type and shape: a valid graph with
    the same types, and without weights."""
    result = _copy_without(model, "graph")
    result.graph.CopyFrom(_copy_without(model.graph, "initializer"))
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) > SMALL_TENSOR:
            info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            result.graph.input.append(info)
        else:
            result.graph.initializer.append(tensor)
    return result


def _copy_without(message: Message, *names: str) -> Message:
    """A copy of a message without some of its fields; a field that is set but empty stays so."""
    fields = {field.name: value for field, value in message.ListFields() if field.name not in names}
    return type(message)(**fields)


def write_model(view: ir.Model) -> onnx.ModelProto:
    """Store a view as a new message.

    The header, the declarations of inputs and outputs, and the metadata of nodes that were read are those of
    the model that was read. Entries of ``value_info`` stay in their order, without those of tensors that no
    longer exist.
    """
    stored: onnx.ModelProto = view.meta[STORED]
    result = _copy_without(stored, "graph")
    graph = result.graph
    graph.MergeFrom(_copy_without(stored.graph, "node", "initializer", "value_info"))
    graph.node.extend(_write_node(node) for node in view.graph)
    graph.initializer.extend(get_tensor(value) for value in view.graph.initializers.values())
    made = [value for node in view.graph for value in node.outputs]
    values = (*made, *view.graph.initializers.values())
    present = {name_value(value): value for value in values}
    for info in stored.graph.value_info:
        value = present.get(info.name)
        if value is not None:
            _write_info(graph.value_info.add(), info, value)
    return result


def _write_node(node: ir.Node) -> onnx.NodeProto:
    stored: _StoredNode | None = node.meta.get(STORED)
    if stored is None:
        return ir.to_proto(node)
    result = onnx.NodeProto()
    result.CopyFrom(stored.message)
    if node.name:
        result.name = node.name
    result.op_type = node.op_type
    del result.input[:], result.output[:]
    result.input.extend(name_value(value) for value in node.inputs)
    result.output.extend(name_value(value) for value in node.outputs)
    attributes = tuple(node.attributes.values())
    if attributes != stored.attributes:
        del result.attribute[:]
        result.attribute.extend(ir.to_proto(attribute) for attribute in attributes)
    return result


def _write_info(
    target: onnx.ValueInfoProto,
    stored: onnx.ValueInfoProto,
    value: ir.Value,
) -> None:
    target.CopyFrom(stored)
    if value.dtype is not None and stored.type.HasField("tensor_type"):
        target.type.tensor_type.elem_type = int(value.dtype)


def name_value(value: ir.Value | None) -> str:
    """The name of a tensor as nodes store it: empty for an optional input or output that is left out."""
    return (value.name or "") if value is not None else ""


def get_node_name(node: ir.Node) -> str:
    """The name of ``node``, which is empty if it has none."""
    return node.name or ""


def list_inputs(node: ir.Node) -> list[ir.Value]:
    """What ``node`` reads, without optional inputs that are left out."""
    return [value for value in node.inputs if value is not None]


def get_input(node: ir.Node, position: int) -> ir.Value:
    """An input of ``node`` that every valid graph has.

    Raises:
        IndexError, TypeError: the graph is not valid.
    """
    value = node.inputs[position]
    if value is None:
        raise TypeError(f"{node.name} ({node.op_type}) has no input {position}")
    return value


def find_producer(value: ir.Value | None) -> ir.Node | None:
    """The node that makes a tensor; ``None`` for constants, for inputs of the graph and for no tensor."""
    return value.producer() if value is not None else None


def is_constant(value: ir.Value | None) -> bool:
    """Whether a tensor is an initializer. Results of ``Constant`` nodes are not: see :func:`read_array`."""
    return value is not None and value.is_initializer()


def read_array(value: ir.Value | None) -> np.ndarray | None:
    """The value of an initializer or of a ``Constant`` node; ``None`` for every other tensor."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    if node is None or node.op_type != "Constant":
        return None
    attribute = next(iter(node.attributes.values()))
    if attribute.name == "value":
        return attribute.as_tensor().numpy()
    return np.array(
        attribute.value,
        np.float32 if "float" in attribute.name else np.int64,
    )


def read_constant(value: ir.Value | None) -> np.ndarray:
    """The value of a tensor that is known to be constant.

    Raises:
        ValueError: it is not.
    """
    array = read_array(value)
    if array is None:
        raise ValueError(f"the tensor {name_value(value)!r} is not constant")
    return array


def read_constant_dims(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape of an initializer; ``None`` for every other tensor."""
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    return tuple(value.const_value.shape.numpy())


def get_tensor(value: ir.Value) -> onnx.TensorProto:
    """The message of an initializer, as it is stored; it must not be written into."""
    tensor = value.const_value
    if isinstance(tensor, ir.TensorProtoTensor):
        return tensor.raw
    if tensor is None:
        raise ValueError(f"the initializer {value.name!r} has no value")
    return ir.to_proto(tensor)


def add_constant(
    graph: ir.Graph,
    name: str,
    array: np.ndarray,
) -> ir.Value:
    """Add an initializer behind those that ``graph`` has."""
    value = ir.val(name, const_value=ir.Tensor(array, name=name))
    graph.register_initializer(value)
    return value


def set_constant(value: ir.Value, array: np.ndarray) -> None:
    """Give an initializer another value, of any shape and type, in the view only."""
    tensor = ir.Tensor(array, name=value.name)
    value.const_value = tensor
    value.dtype = tensor.dtype
    value.shape = tensor.shape


def unfold_constants(graph: ir.Graph) -> None:
    """Replace ``Constant`` nodes by initializers of the same names, in place."""
    for node in list(graph):
        if node.op_type != "Constant":
            continue
        value = node.outputs[0]
        initializer = ir.val(value.name, const_value=_rename_tensor(value))
        value.replace_all_uses_with(initializer, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        graph.register_initializer(initializer)


def _rename_tensor(value: ir.Value) -> ir.TensorProtocol:
    """The value of a ``Constant`` node, under the name of its output."""
    node = value.producer()
    attribute = node.attributes.get("value") if node is not None else None
    if attribute is None:
        return ir.Tensor(read_constant(value), name=value.name)
    tensor = ir.to_proto(attribute.as_tensor())  # a copy
    tensor.name = name_value(value)
    return ir.TensorProtoTensor(tensor)


def make_node(
    op_type: str,
    inputs: Sequence[ir.Value | None],
    output: str,
    name: str,
    attributes: dict[str, int] | None = None,
) -> ir.Node:
    """A new node with one output, which belongs to no graph yet."""
    return ir.node(
        op_type,
        inputs,
        attributes,
        outputs=[ir.val(output)],
        name=name,
    )


def copy_node(
    node: ir.Node,
    inputs: Sequence[ir.Value | None],
    suffix: str,
) -> ir.Node:
    """A copy of ``node`` that reads ``inputs``; ``suffix`` is added to its name and to those of its
    outputs."""
    copy = ir.Node(
        node.domain,
        node.op_type,
        inputs,
        tuple(node.attributes.values()),
        outputs=[ir.val(name_value(value) + suffix) for value in node.outputs],
        name=get_node_name(node) + suffix,
        metadata_props=dict(node.metadata_props),
    )
    if STORED in node.meta:
        copy.meta[STORED] = node.meta[STORED]
    return copy


def detach_readers(value: ir.Value, name: str) -> ir.Value:
    """Rename a computed tensor, and return a new tensor under its old name, which everything reads instead.

    The new tensor has the type and shape of the old one; the caller makes the node that computes it.
    """
    new = ir.val(value.name, type=value.type, shape=value.shape)
    value.name = name
    value.replace_all_uses_with(new, replace_graph_outputs=True)
    return new


def replace_inputs(
    node: ir.Node,
    before: ir.Value,
    after: ir.Value,
) -> None:
    """Let ``node`` read ``after`` wherever it reads ``before``."""
    for position, value in enumerate(node.inputs):
        if value is before:
            node.replace_input_with(position, after)


def count_readers(value: ir.Value) -> int:
    """How often a tensor is read: by inputs of nodes, and as an output of the graph."""
    return len(value.uses()) + value.is_graph_output()


def find_readers(value: ir.Value) -> list[ir.Node]:
    """Nodes that read a tensor, once for each of their inputs that does."""
    return [use.node for use in value.uses()]


def find_source(value: ir.Value | None) -> ir.Node | None:
    """The node that computed a tensor.

    It looks through operations that only move values (:data:`MOVES`), and through a ``Concat`` of which all
    inputs are dequantized.
    """
    node = find_producer(value)
    while node is not None and node.op_type in MOVES:
        node = find_producer(node.inputs[0])
    if node is None or node.op_type != "Concat":
        return node
    sources = [find_source(part) for part in node.inputs]
    if all(source is not None and source.op_type == DEQUANTIZE for source in sources):
        return sources[0]
    return node


def remove_unread(graph: ir.Graph) -> None:
    """Remove nodes and initializers that nothing reads, in place.

    ``onnx_ir``'s own pass also removes empty inputs and optional outputs of the nodes that stay.
    """
    for node in reversed(graph):
        if not any(count_readers(value) for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not count_readers(value):
            del graph.initializers[name]
