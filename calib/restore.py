"""Takes chosen operations of a Q/DQ graph back to float, without calibrating again.

A restored operation reads what it read in the float graph: weights and biases as they were before
quantization (so a bias corrected for rounded weights is the original one again), activations from before
their Q/DQ pair. A pair that no int8 operation reads any more goes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

import onnx

from cmt_edge.deploy.errors import InputError, StepError

from .lint import source_of
from .qdq_pairs import replace_nodes
from .recipe import INT8_OPS, MOVES

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
SUFFIX = "_float"


def int8_nodes(quantized: onnx.ModelProto) -> list[str]:
    """Names of the operations of a Q/DQ graph that compute in int8, in the graph's order."""
    producer = {output: node for node in quantized.graph.node for output in node.output}
    return [
        node.name
        for node in quantized.graph.node
        if node.op_type in INT8_OPS
        and any(
            (source := source_of(name, producer)) is not None and source.op_type == DEQUANTIZE
            for name in node.input
        )
    ]


def restore(quantized: onnx.ModelProto, original: onnx.ModelProto, nodes: Collection[str]) -> onnx.ModelProto:
    """A copy of ``quantized`` in which ``nodes`` are float; all other operations keep their Q/DQ pairs and
    values.

    Args:
        quantized: made by :func:`cmt_edge.calib.quantize` from ``original``, without smoothing.
        original: the float graph.
        nodes: names of operations of both; those that are float already stay so.

    Raises:
        InputError: a name that ``original`` has not.
        StepError: ``quantized`` has other operations than ``original`` (it was smoothed, say), so there is no
            way back.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(quantized)
    unknown = sorted(set(nodes) - {n.name for n in original.graph.node})
    if unknown:
        raise InputError(
            f"the graph has no operation {unknown[0]!r}", remedy="name operations of the float graph"
        )
    chosen = set(nodes) & set(int8_nodes(quantized))
    if chosen:
        _Restoration(copy, original, chosen).run()
    return copy


class _Restoration:
    """One run of :func:`restore` on the graph ``model``, in place."""

    def __init__(self, model: onnx.ModelProto, original: onnx.ModelProto, chosen: set[str]) -> None:
        self.graph, self.chosen = model.graph, chosen
        self.original = {node.name: node for node in original.graph.node}
        self.values = {i.name: i for i in original.graph.initializer}
        self.left = set(int8_nodes(model)) - chosen
        others = [
            n.name
            for n in self.graph.node
            if n.op_type not in (QUANTIZE, DEQUANTIZE) and n.name not in self.original
        ]
        if others:
            raise StepError(
                "the int8 graph cannot be taken back to float in part",
                why=f"it has an operation {others[0]} that the float graph has not",
                remedy="quantize without smoothing",
            )
        self._index()

    def _index(self) -> None:
        self.producer = {output: node for node in self.graph.node for output in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.graph.node:
            for name in node.input:
                self.readers[name].append(node)
        self.constants = {i.name: i for i in self.graph.initializer}

    def run(self) -> None:
        self._bypass_unread_pairs()
        self._index()
        self.clones: list[onnx.NodeProto] = []
        self.floats: dict[str, str] = {}
        for node in self.graph.node:
            if node.name in self.chosen:
                for i, name in enumerate(node.input):
                    node.input[i] = (
                        self._constant(self._before(node, i), node)
                        if self._is_value(node, i)
                        else self._float(name)
                    )
            elif node.op_type == "Add" and self._follows_chosen(node):  # a product's bias
                for i, name in enumerate(node.input):
                    node.input[i] = self._constant(name, node)
        copies = {
            clone.name.removesuffix(SUFFIX): clone for clone in self.clones
        }  # each right after what it was copied from
        replace_nodes(
            self.graph,
            [n for node in self.graph.node for n in (node, copies.get(node.name)) if n is not None],
        )

    def _before(self, node: onnx.NodeProto, position: int) -> str:
        inputs = self.original[node.name].input
        return inputs[position] if position < len(inputs) else ""  # NNCF may add a bias where there was none

    def _is_value(self, node: onnx.NodeProto, position: int) -> bool:
        before = self._before(node, position)
        return before in self.values or before == ""

    def _constant(self, name: str, node: onnx.NodeProto) -> str:
        """Name of an initializer with the original value; another name where int8 operations read a changed
        one."""
        if name not in self.values:
            return name
        now = self.constants.get(name)
        if now is not None and now.SerializeToString(deterministic=True) == self._value(name):
            return name
        shared = now is not None and any(r.name != node.name for r in self.readers[name])
        target = name + SUFFIX if shared else name
        if now is not None and not shared:
            now.CopyFrom(self.values[name])
        elif target not in self.constants:
            fresh = self.graph.initializer.add()
            fresh.CopyFrom(self.values[name])
            fresh.name = target
            self.constants[target] = fresh
        return target

    def _value(self, name: str) -> bytes:
        return self.values[name].SerializeToString(deterministic=True)

    def _follows_chosen(self, node: onnx.NodeProto) -> bool:
        source = next((s for name in node.input if (s := source_of(name, self.producer)) is not None), None)
        return source is not None and source.name in self.chosen

    def _bypass_unread_pairs(self) -> None:
        """Let the readers of a pair read its input where no operation that stays int8 depends on the pair."""
        for pair in [
            n for n in self.graph.node if n.op_type == DEQUANTIZE and n.input[0] not in self.constants
        ]:
            readers = self._int8_readers(pair.output[0], (*MOVES, "Concat")) or self._int8_readers(
                pair.output[0], None
            )
            if not readers & self.left:
                before = self.producer[pair.input[0]].input[0]
                for node in self.readers[pair.output[0]]:
                    for i, name in enumerate(node.input):
                        if name == pair.output[0]:
                            node.input[i] = before
                            self.readers[before].append(node)

    def _int8_readers(self, tensor: str, through: tuple[str, ...] | None) -> set[str]:
        """Operations that compute in int8 and read ``tensor``, looking through operations of these kinds
        (``None``: of all)."""
        found: set[str] = set()
        seen, queue = {tensor}, [tensor]
        while queue:
            for node in self.readers[queue.pop()]:
                if node.name in self.left or node.name in self.chosen:
                    found.add(node.name)
                elif through is None or node.op_type in through:
                    queue += [o for o in node.output if o not in seen]
                    seen.update(node.output)
        return found

    def _float(self, tensor: str) -> str:
        """The tensor with the values of ``tensor`` from before its Q/DQ pair; operations in between are
        copied."""
        if tensor in self.floats:
            return self.floats[tensor]
        node = self.producer.get(tensor)
        result = tensor
        if node is not None and node.op_type == DEQUANTIZE and node.input[0] not in self.constants:
            result = self.producer[node.input[0]].input[0]
        elif node is not None and node.op_type in (*MOVES, "Concat"):
            count = len(node.input) if node.op_type == "Concat" else 1
            sources = [self._float(name) for name in node.input[:count]]
            if sources != list(node.input[:count]):
                result = self._clone(node, sources, tensor)
        self.floats[tensor] = result
        return result

    def _clone(self, node: onnx.NodeProto, sources: list[str], tensor: str) -> str:
        clone = onnx.NodeProto()
        clone.CopyFrom(node)
        clone.name += SUFFIX
        for i, source in enumerate(sources):
            clone.input[i] = source
        for i, output in enumerate(clone.output):
            clone.output[i] = output + SUFFIX
            self.floats[output] = output + SUFFIX
        self.clones.append(clone)
        return tensor + SUFFIX
