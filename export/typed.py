"""Typed graphs: precision written into the ONNX file, for runtimes that take it from nowhere else (TensorRT).

``fp32`` leaves a graph as it is. ``fp16`` and ``int8`` turn every float32 tensor into float16, except

* the graph's input and output, which stay float32 for every precision;
* *float32 islands*: operations whose observed values do not fit float16. With ``S`` = :data:`SAFETY`:

  =====================
  ========================================================================================== any operation
  a value beyond ``65504 / S``, or a constant that overflows or becomes 0 LayerNormalization     ``max|x|**2``
  beyond ``65504 / S``: a runtime that squares in float16 would overflow Softmax                scores beyond
  :data:`MAX_SCORE`, where float16 rounds an exponent by more than 0.8 %; the
                         island reaches back to the product that makes the scores
  sums (pooling, Reduce) ``count * max|x|`` beyond ``65504 / S``
  the classifier         logits beyond :data:`MAX_SCORE`, where neighbours could swap places; reaches back to
  their product =====================
  ==========================================================================================

Quantize and dequantize operations keep int8 between them; their scales take the type of the float side, so
that no conversion is needed. Scales are rounded to float16 and int8 weights are quantized again with the
rounded scale.

Why not a converter from a package: they clamp or skip what does not fit without a word, know no ranges, and
do not take Q/DQ graphs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

from cmt_edge.calib.lint import MOVES, source_of
from cmt_edge.calib.recipe import INT8_OPS
from cmt_edge.deploy.bundle.sections import Island

from .to_onnx import checked, guarded, run_graph

FP16_MAX = 65504.0
SAFETY = 4.0
"""Unseen images may exceed the observed range by this factor."""
LIMIT = FP16_MAX / SAFETY
LOGITS = "logits too large for float16's steps"
MAX_SCORE = 32.0
FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
SUMS = {
    "GlobalAveragePool": 1,
    "AveragePool": 1,
    "ReduceMean": 1,
    "ReduceSum": 1,
    "ReduceSumSquare": 2,
    "ReduceL2": 2,
}
"""Operations that add up many values, and the power they raise each to."""
ELEMENTWISE = ("Add", "Sub", "Mul", "Div")
ALWAYS_FLOAT = {"Resize": (1, 2)}
"""Inputs that ONNX defines as float32 whatever the data is."""


@dataclass(frozen=True)
class Typed:
    """The result of :func:`typed`.

    Attributes:
        model: the typed graph.
        operations: precision -> number of operations that compute in it (moves and conversions are not
            counted).
        islands: what stayed float32 in a float16 graph.
        largest: largest absolute value observed in any tensor.
    """

    model: onnx.ModelProto
    operations: dict[str, int]
    islands: tuple[Island, ...] = ()
    largest: float = 0.0


def observe(graph: onnx.ModelProto, batches: Iterable[np.ndarray]) -> dict[str, float]:
    """Largest absolute value of every float tensor of ``graph`` over ``batches`` of ``(N, 3, S, S)`` float32.

    The extremes are computed inside the graph, so that no activation has to be copied out.
    """
    probe = onnx.ModelProto()
    probe.CopyFrom(graph)
    names = [name for name, kind in _types(graph).items() if kind == FLOAT]
    for i, name in enumerate(names):
        for op in ("ReduceMax", "ReduceMin"):
            output = f"observed_{op}_{i}"
            probe.graph.node.append(helper.make_node(op, [name], [output], keepdims=0))
            probe.graph.output.append(helper.make_tensor_value_info(output, FLOAT, []))
    largest = np.zeros(len(names))
    first = len(graph.graph.output)
    run = run_graph(probe, "observe activations")
    for batch in batches:
        extremes = np.abs(np.array(run(batch)[first:], np.float64)).reshape(-1, 2)
        largest = np.maximum(largest, extremes.max(1))
    return dict(zip(names, largest.tolist(), strict=True))


def typed(graph: onnx.ModelProto, precision: str, observed: Mapping[str, float]) -> Typed:
    """``graph``, float32 or Q/DQ, typed for ``precision``: a copy.

    Args:
        graph: float32 input and output.
        precision: ``"fp32"``, ``"fp16"`` or ``"int8"``.
        observed: from :func:`observe` on typical images; may be empty for ``"fp32"``.

    Raises:
        StepError: the result is not a valid graph.
    """
    largest = max(observed.values(), default=0.0)
    if precision == "fp32":
        copy = onnx.ModelProto()
        copy.CopyFrom(graph)
        return Typed(copy, _count(copy), largest=largest)
    with guarded("write the precision into the graph"):
        conversion = _Conversion(graph, observed)
        model = conversion.run()
    islands = tuple(conversion.islands.values())
    return Typed(checked("write the precision into the graph", model), _count(model), islands, largest)


def rounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """A float32 graph that computes what a typed graph asks for: every float16 tensor is rounded to float16.

    ONNX Runtime's CPU kernels compute float16 graphs in float32 and drop the roundings between them, so an
    overflow would not show. Here it does. Sums inside one operation stay float32 here; a GPU may add in
    float16, for which :data:`SAFETY` leaves room.
    """
    types = _types(model)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:], result.graph.value_info[:], result.graph.initializer[:]
    for tensor in model.graph.initializer:
        half = tensor.data_type == HALF
        value = numpy_helper.to_array(tensor).astype(np.float32) if half else None
        result.graph.initializer.append(
            tensor if value is None else numpy_helper.from_array(value, tensor.name)
        )
    for node in model.graph.node:
        new = result.graph.node.add()
        new.CopyFrom(node)
        if node.op_type == "Cast" and {types.get(node.input[0]), types[node.output[0]]} <= {FLOAT, HALF}:
            new.op_type = "Identity"
            del new.attribute[:]
        if node.op_type in MOVES:
            continue
        for i, name in enumerate(node.output):
            if types.get(name) == HALF:
                new.output[i] = f"{name}_exact"
                result.graph.node.append(
                    helper.make_node("Cast", [f"{name}_exact"], [f"{name}_rounded"], to=HALF)
                )
                result.graph.node.append(helper.make_node("Cast", [f"{name}_rounded"], [name], to=FLOAT))
    return checked("round to float16", result)


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of every tensor but the initializers."""
    graph = shape_inference.infer_shapes(model, strict_mode=True).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    return {v.name: v.type.tensor_type.elem_type for v in values}


def _count(model: onnx.ModelProto) -> dict[str, int]:
    """Computing operations by the precision they read."""
    types = _types(model) | {i.name: i.data_type for i in model.graph.initializer}
    producer = {o: n for n in model.graph.node for o in n.output}
    count: Counter[str] = Counter()
    for node in model.graph.node:
        kinds = {types.get(o) for o in node.output}
        if node.op_type in (*MOVES, "Cast", "QuantizeLinear", "DequantizeLinear", "Constant", "Identity"):
            continue
        sources = [source_of(name, producer) for name in node.input[:2]]
        quantized = node.op_type in INT8_OPS and all(
            s is not None and s.op_type == "DequantizeLinear" for s in sources
        )
        if quantized or kinds & {FLOAT, HALF}:
            count["int8" if quantized else "fp16" if HALF in kinds else "fp32"] += 1
    return dict(count)


@dataclass
class _Conversion:
    """One float32 graph on its way to float16."""

    graph: onnx.ModelProto
    observed: Mapping[str, float]
    islands: dict[int, Island] = field(default_factory=dict)

    def run(self) -> onnx.ModelProto:
        graph = self.graph.graph
        self.constants = _constants(self.graph)
        self.nodes = [n for n in graph.node if n.op_type != "Constant"]
        self.producer = {o: i for i, n in enumerate(self.nodes) for o in n.output}
        self.consumers: dict[str, list[int]] = {}
        for i, node in enumerate(self.nodes):
            for name in node.input:
                self.consumers.setdefault(name, []).append(i)
        inferred = shape_inference.infer_shapes(self.graph, strict_mode=True).graph
        values = (*inferred.input, *inferred.value_info, *inferred.output)
        self.shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
        self.kinds = {v.name: v.type.tensor_type.elem_type for v in values}
        self.outputs = {o.name for o in graph.output}
        for i, node in enumerate(self.nodes):
            self._decide(i, node)
        self._round_scales()
        self.new_nodes: list[onnx.NodeProto] = []
        self.new_constants: dict[str, onnx.TensorProto] = {}
        self.now: dict[str, int] = {
            i.name: FLOAT for i in graph.input if self.kinds[i.name] == FLOAT
        }  # in the new graph
        self.cast: dict[tuple[str, int], str] = {}
        for i, node in enumerate(self.nodes):
            self._convert(i, node)
        return self._assemble()

    # which operations stay float32

    def _decide(self, index: int, node: onnx.NodeProto) -> None:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            return
        if (found := self._reason(node)) is None:
            return
        self._add(index, *found)
        if node.op_type == "Softmax":
            self._reach_back(node.input[0], "makes the scores of a float32 Softmax", found[1])
        elif found[0] == LOGITS and node.op_type in (*MOVES, *ELEMENTWISE):
            self._reach_back(node.input[0], *found)

    def _add(self, index: int, reason: str, observed: float) -> None:
        node = self.nodes[index]
        self.islands.setdefault(index, Island(node.name, node.op_type, reason, observed))

    def _reach_back(self, name: str, reason: str, observed: float) -> None:
        """Keep what computes large values in float32, up to the product that makes them: not rounding them
        later would be no help."""
        index = self.producer.get(name)
        while index is not None:
            node = self.nodes[index]
            self._add(index, reason, observed)
            if node.op_type not in (*MOVES, *ELEMENTWISE):
                return
            index = next((self.producer[n] for n in node.input if n in self.producer), None)

    def _reason(self, node: onnx.NodeProto) -> tuple[str, float] | None:
        """Why ``node`` cannot be float16, with the observed value; ``None`` if it can."""
        for name in (*node.input, *node.output):
            if self.observed.get(name, 0.0) > LIMIT:
                return "values leave float16", self.observed[name]
        for position, name in enumerate(node.input):
            if position in ALWAYS_FLOAT.get(node.op_type, ()) or name not in self.constants:
                continue
            if (bad := _unrepresentable(self.constants[name])) is not None:
                return "a constant leaves float16", bad
        return self._inside(node)

    def _inside(self, node: onnx.NodeProto) -> tuple[str, float] | None:
        """What would go wrong inside an operation whose inputs and outputs fit."""
        largest = max((self.observed.get(n, 0.0) for n in node.input), default=0.0)
        logits = max((self.observed.get(o, 0.0) for o in node.output if o in self.outputs), default=0.0)
        if node.op_type == "LayerNormalization" and largest**2 > LIMIT:
            return "squares of its input leave float16", largest
        if node.op_type == "Softmax" and largest > MAX_SCORE:
            return "scores too large for float16's steps", largest
        if node.op_type in SUMS and largest ** SUMS[node.op_type] * self._summed(node) > LIMIT:
            return "its sum leaves float16", largest
        if logits > MAX_SCORE and any(self.kinds.get(o) == FLOAT for o in node.output):
            return LOGITS, logits
        return None

    def _summed(self, node: onnx.NodeProto) -> int:
        """How many values an element of the output sums."""
        before, after = (
            np.prod([d or 1 for d in self.shapes.get(n, [])]) for n in (node.input[0], node.output[0])
        )
        return max(1, int(before // max(1, after)))

    # the new graph

    def _round_scales(self) -> None:
        """Scales become values that float16 holds; weights are quantized again with them."""
        scaled = [n for n in self.nodes if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
        exact = {n.input[1]: numpy_helper.to_array(self.constants[n.input[1]]) for n in scaled}
        held = {
            name: np.maximum(scale.astype(np.float16), np.float16(2**-24)) for name, scale in exact.items()
        }
        weights = {n.input[0]: n for n in scaled if n.input[0] in self.constants}
        for name, node in weights.items():
            values = numpy_helper.to_array(self.constants[name])
            ratio = exact[node.input[1]].astype(np.float64) / held[node.input[1]]
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
            again = np.clip(np.rint(values * _along(ratio, axis, values.ndim)), -128, 127).astype(np.int8)
            self.constants[name] = numpy_helper.from_array(again, name)
        for name, scale in held.items():
            self.constants[name] = numpy_helper.from_array(np.asarray(scale, np.float32), name)

    def _convert(self, index: int, node: onnx.NodeProto) -> None:
        kind = self._kind(index, node)
        new = onnx.NodeProto()
        new.CopyFrom(node)
        fixed = ALWAYS_FLOAT.get(node.op_type, ())
        for position, name in enumerate(node.input):
            if name:
                new.input[position] = self._read(name, FLOAT if position in fixed else kind)
        for attribute in new.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == FLOAT:
                attribute.i = kind
        for position, name in enumerate(node.output):
            if self.kinds.get(name) != FLOAT:
                continue
            if name in self.outputs and kind == HALF:
                new.output[position] = f"{name}_half"
            self.now[new.output[position]] = kind
        self.new_nodes.append(new)
        for name in self.outputs.intersection(node.output):
            if f"{name}_half" in new.output:
                self.now[name], self.cast[name, HALF] = FLOAT, f"{name}_half"
                self.new_nodes.append(
                    helper.make_node("Cast", [f"{name}_half"], [name], f"cast_{name}", to=FLOAT)
                )

    def _kind(self, index: int, node: onnx.NodeProto) -> int:
        """Type of the float side of an operation."""
        if node.op_type == "QuantizeLinear":  # as it comes: a conversion before quantizing would be waste
            return self.now[node.input[0]]
        if node.op_type == "DequantizeLinear":
            readers = self.consumers.get(node.output[0], [])
            return FLOAT if readers and all(i in self.islands for i in readers) else HALF
        made_from_nothing = node.op_type != "Cast" and not any(
            n in self.now or self._is_float(n) for n in node.input
        )
        return FLOAT if index in self.islands or made_from_nothing else HALF

    def _is_float(self, name: str) -> bool:
        return name in self.constants and self.constants[name].data_type == FLOAT

    def _read(self, name: str, kind: int) -> str:
        """Name of ``name``'s values in type ``kind``; other types than float32 are left alone."""
        if name in self.constants:
            return self._constant(name, kind)
        have = self.now.get(name)
        if have is None or have == kind:
            return name
        if (name, kind) not in self.cast:
            new = f"{name}_{'half' if kind == HALF else 'float'}"
            self.new_nodes.append(helper.make_node("Cast", [name], [new], f"cast_{new}", to=kind))
            self.cast[name, kind] = new
        return self.cast[name, kind]

    def _constant(self, name: str, kind: int) -> str:
        tensor = self.constants[name]
        if tensor.data_type != FLOAT or kind == FLOAT:
            self.new_constants[name] = tensor
            return name
        half = f"{name}_half"
        if half not in self.new_constants:
            self.new_constants[half] = numpy_helper.from_array(
                numpy_helper.to_array(tensor).astype(np.float16), half
            )
        return half

    def _assemble(self) -> onnx.ModelProto:
        model = onnx.ModelProto()
        model.CopyFrom(self.graph)
        del model.graph.node[:], model.graph.initializer[:], model.graph.value_info[:]
        model.graph.node.extend(self.new_nodes)
        model.graph.initializer.extend(self.new_constants.values())
        return model


def _constants(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Initializers, and Constant operations as if they were some."""
    found = {i.name: i for i in model.graph.initializer}
    for name, value in _constant_nodes(model):
        tensor = onnx.TensorProto()
        tensor.CopyFrom(value)
        tensor.name = name
        found[name] = tensor
    return found


def _constant_nodes(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    for node in model.graph.node:
        if node.op_type == "Constant":
            attribute = node.attribute[0]
            value = helper.get_attribute_value(attribute)
            if attribute.name != "value":  # value_float, value_ints, ...
                value = numpy_helper.from_array(
                    np.array(value, np.float32 if "float" in attribute.name else np.int64)
                )
            yield node.output[0], value


def _unrepresentable(tensor: onnx.TensorProto) -> float | None:
    """A constant's largest value, if float16 cannot hold it: too large, or everything would become 0."""
    if tensor.data_type != FLOAT:
        return None
    values = np.abs(numpy_helper.to_array(tensor))
    if values.size and values.max() > FP16_MAX:
        return float(values.max())
    if values.size and values.max() and not values.astype(np.float16).max():
        return float(values.max())
    return None


def _along(values: np.ndarray, axis: int, ndim: int) -> np.ndarray:
    """``values``, a scalar or one a channel, shaped to broadcast along ``axis`` of ``ndim`` dimensions."""
    if values.ndim == 0 or values.size == 1:
        return values.reshape(())
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)
