"""Makes chosen operations of a Q/DQ graph float again, without calibrating again.

A restored operation reads what it read in the float graph: weights and biases as they were before
quantization (a bias that was corrected for rounded weights is the original one again), and activations
from before their Q/DQ pair. A pair that no int8 operation reads any more is removed.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx
import onnx_ir as ir

from cmt_edge.deploy.errors import InputError, StepError

from .graph import (
    DEQUANTIZE,
    MOVES,
    QUANTIZE,
    copy_node,
    find_producer,
    find_readers,
    find_source,
    get_input,
    get_node_name,
    get_tensor,
    is_constant,
    name_value,
    open_view,
    remove_unread,
    replace_inputs,
    write_model,
)
from .recipe import INT8_OPS
from .shifts import find_unshifted, is_shift

FLOAT_SUFFIX = "_float"
"""Is added to the names of constants and moves that exist in a float and in an int8 form."""


def list_int8_nodes(quantized: onnx.ModelProto) -> list[str]:
    """Names of the operations of a Q/DQ graph that compute in int8, in the graph's order."""
    with open_view(quantized) as view:
        return [get_node_name(node) for node in view.graph if _computes_in_int8(node)]


def _computes_in_int8(node: ir.Node) -> bool:
    sources = (find_source(value) for value in node.inputs)
    return node.op_type in INT8_OPS and any(
        source is not None and source.op_type == DEQUANTIZE for source in sources
    )


def restore(
    quantized: onnx.ModelProto,
    original: onnx.ModelProto,
    nodes: Collection[str],
) -> onnx.ModelProto:
    """A copy of ``quantized`` in which ``nodes`` are float; all other operations keep their Q/DQ pairs and
    values.

    Args:
        quantized: made by :func:`cmt_edge.calib.quantize` from ``original``, without smoothing.
        original: the float graph.
        nodes: names of operations of both graphs; those that are float already stay float.

    Raises:
        InputError: ``original`` has no operation of a given name.
        StepError: ``quantized`` has other operations than ``original`` (after smoothing, for example), so
            that nothing can be restored.
    """
    with open_view(original) as source, open_view(quantized) as view:
        unknown = sorted(set(nodes) - {get_node_name(node) for node in source.graph})
        if unknown:
            raise InputError(
                f"the graph has no operation {unknown[0]!r}",
                remedy="name operations of the float graph",
            )
        chosen = [node for node in view.graph if node.name in nodes and _computes_in_int8(node)]
        if chosen:
            _Restoration(view.graph, source.graph, chosen).run()
        return write_model(view)


class _Restoration:
    """One run of :func:`restore` on the graph ``quantized``, in place."""

    def __init__(
        self,
        quantized: ir.Graph,
        original: ir.Graph,
        chosen: Collection[ir.Node],
    ) -> None:
        self.graph = quantized
        self.chosen = set(chosen)
        self.left = {node for node in quantized if _computes_in_int8(node)} - self.chosen
        self.original = {get_node_name(node): node for node in original}
        self.values = original.initializers
        # tensor -> the tensor with its values from before the Q/DQ pair
        self.floats: dict[ir.Value, ir.Value] = {}
        self._require_same_operations()

    def _require_same_operations(self) -> None:
        for node in self.graph:
            added = node.op_type in (QUANTIZE, DEQUANTIZE) or is_shift(node)
            if not added and node.name not in self.original:
                raise StepError(
                    "the int8 graph cannot become float again in part",
                    why=f"it has an operation {node.name} that the float graph does not have",
                    remedy="quantize without smoothing",
                )

    def run(self) -> None:
        self._bypass_unread_pairs()
        # initializer -> the nodes that read it before any of them is restored
        constants = self.graph.initializers.values()
        self.readers = {value: set(find_readers(value)) for value in constants}
        for node in list(self.graph):
            if node in self.chosen:
                self._restore_operation(node)
            elif node.op_type == "Add" and self._follows_chosen(node):
                self._restore_bias(node)
        remove_unread(self.graph)

    # pairs

    def _bypass_unread_pairs(self) -> None:
        """Let the readers of a pair read its input where no operation that stays int8 depends on the pair."""
        for pair in list(self.graph):
            if pair.op_type != DEQUANTIZE or is_constant(pair.inputs[0]):
                continue
            value = pair.outputs[0]
            readers = self._find_int8_readers(value, (*MOVES, "Concat")) or self._find_int8_readers(
                value, None
            )
            if not readers & self.left:
                before = _find_before_pair(pair)
                for node in find_readers(value):
                    replace_inputs(node, value, before)

    def _find_int8_readers(
        self,
        tensor: ir.Value,
        through: tuple[str, ...] | None,
    ) -> set[ir.Node]:
        """Operations that compute in int8 and read ``tensor``, looking through operations of these kinds
        (``None``: of all kinds)."""
        found: set[ir.Node] = set()
        seen, queue = {tensor}, [tensor]
        while queue:
            for node in find_readers(queue.pop()):
                if node in self.left or node in self.chosen:
                    found.add(node)
                elif through is None or node.op_type in through:
                    queue += [value for value in node.outputs if value not in seen]
                    seen.update(node.outputs)
        return found

    # operations

    def _restore_operation(self, node: ir.Node) -> None:
        """Let ``node`` read the float graph's constants, and activations from before their pairs."""
        inputs = self.original[get_node_name(node)].inputs
        for position, value in enumerate(node.inputs):
            before = inputs[position] if position < len(inputs) else None  # NNCF may have added a bias
            if before is None:
                node.replace_input_with(position, None)
            elif is_constant(before):
                node.replace_input_with(position, self._restore_constant(before, node))
            elif value is not None:
                node.replace_input_with(position, self._find_float(value))

    def _follows_chosen(self, node: ir.Node) -> bool:
        """Whether ``node`` adds something to the result of a chosen operation."""
        sources = (find_source(value) for value in node.inputs)
        return (
            next(
                (source for source in sources if source is not None),
                None,
            )
            in self.chosen
        )

    def _restore_bias(self, addition: ir.Node) -> None:
        """Let the addition that follows a product read the float graph's bias."""
        for position, value in enumerate(addition.inputs):
            before = self.values.get(name_value(value))
            if before is not None:
                addition.replace_input_with(position, self._restore_constant(before, addition))

    def _restore_constant(self, before: ir.Value, node: ir.Node) -> ir.Value:
        """The constant that ``node`` reads with the value that it has in the float graph.

        It gets another name where other operations read a changed value under the old one.
        """
        name = name_value(before)
        now = self.graph.initializers.get(name)
        if now is not None and _is_same(now, before):
            return now
        others = set() if now is None else self.readers.get(now, set()) - {node}
        shared = bool(others)
        if now is not None and not shared:
            now.const_value = before.const_value
            return now
        target = name + FLOAT_SUFFIX if shared else name
        if target not in self.graph.initializers:
            self._add_constant(target, before)
        return self.graph.initializers[target]

    def _add_constant(self, name: str, before: ir.Value) -> None:
        """Add a copy of a constant of the float graph under another name."""
        tensor = onnx.TensorProto()
        tensor.CopyFrom(get_tensor(before))
        tensor.name = name
        self.graph.register_initializer(ir.val(name, const_value=ir.TensorProtoTensor(tensor)))

    def _find_float(self, tensor: ir.Value) -> ir.Value:
        """The tensor with the values of ``tensor`` from before its Q/DQ pair; moves in between are copied."""
        if tensor in self.floats:
            return self.floats[tensor]
        node = tensor.producer()
        result = tensor
        if node is not None and node.op_type == DEQUANTIZE and not is_constant(node.inputs[0]):
            result = _find_before_pair(node)
        elif node is not None and node.op_type in (*MOVES, "Concat"):
            result = self._make_float_move(node, tensor)
        self.floats[tensor] = result
        return result

    def _make_float_move(self, node: ir.Node, tensor: ir.Value) -> ir.Value:
        """``tensor``, or a copy of it if what ``node`` moves has another float form."""
        count = len(node.inputs) if node.op_type == "Concat" else 1
        sources = [self._find_float(get_input(node, position)) for position in range(count)]
        if sources == list(node.inputs[:count]):
            return tensor
        copy = copy_node(
            node,
            [*sources, *node.inputs[count:]],
            FLOAT_SUFFIX,
        )
        self.graph.insert_after(node, copy)
        self.floats |= dict(zip(node.outputs, copy.outputs, strict=True))
        return self.floats[tensor]


def _find_before_pair(dequantizer: ir.Node) -> ir.Value:
    """What the quantizer of a pair reads, before a shift."""
    quantizer = find_producer(dequantizer.inputs[0])
    if quantizer is None:
        raise TypeError(f"{dequantizer.name} does not read a quantizer")
    return find_unshifted(quantizer)


def _is_same(now: ir.Value, before: ir.Value) -> bool:
    """Whether two constants are stored alike."""
    ours: bytes = get_tensor(now).SerializeToString(deterministic=True)
    theirs: bytes = get_tensor(before).SerializeToString(deterministic=True)
    return ours == theirs
