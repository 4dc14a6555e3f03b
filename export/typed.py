"""Typed graphs: precision written into the ONNX file, for runtimes that take it from nowhere else (TensorRT).

``fp32`` leaves a graph as it is. ``fp16`` and ``int8`` turn every float32 tensor into float16, except

* the graph's input and output, which stay float32 for every precision;
* *float32 islands*: operations whose observed values do not fit float16. With ``S`` = :data:`SAFETY`:

  ======================  ===============================================================================
  any operation           a value is beyond ``65504 / S``, or a constant overflows or becomes 0
  LayerNormalization      ``max|x|**2`` is beyond ``65504 / S``: a runtime that squares in float16 would
                          overflow
  Softmax                 scores are beyond :data:`MAX_SCORE`, where float16 rounds an exponent by more than
                          0.8 %; the island reaches back to the product that makes the scores
  sums (pooling, Reduce)  ``count * max|x|`` is beyond ``65504 / S``
  the classifier          logits are beyond :data:`MAX_SCORE`, where neighbours could swap places; the island
                          reaches back to their product
  ======================  ===============================================================================

Quantize and dequantize operations keep int8 between them; their scales take the type of the float side, so
that no conversion is needed. Scales are rounded to float16, and int8 weights are quantized again with the
rounded scale.

Converters from packages are not used: they clamp or skip what does not fit without telling, know no
ranges, and do not take Q/DQ graphs.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from cmt_edge.calib.graph import (
    DEQUANTIZE,
    ELEMENTWISE,
    MOVES,
    QUANTIZE,
    add_constant,
    detach_readers,
    find_producer,
    find_readers,
    find_source,
    get_input,
    get_node_name,
    is_constant,
    list_inputs,
    make_node,
    name_value,
    open_view,
    read_array,
    read_constant,
    set_constant,
    unfold_constants,
    write_model,
)
from cmt_edge.calib.recipe import INT8_OPS
from cmt_edge.calib.running import measure_extremes
from cmt_edge.deploy.bundle.sections import Island

from .to_onnx import check_graph, guarded

FLOAT = ir.DataType.FLOAT
"""The type of tensors before the conversion, and of float32 islands after it."""

HALF = ir.DataType.FLOAT16
"""The type of tensors after the conversion."""

FP16_MAX = 65504.0
"""The largest finite float16."""

SMALLEST_HALF = np.float16(2**-24)
"""The smallest positive float16."""

SAFETY = 4.0
"""Unseen images may exceed the observed range by this factor."""

LIMIT = FP16_MAX / SAFETY
"""The largest observed value that may become float16."""

MAX_SCORE = 32.0
"""The largest observed score of a Softmax, or logit of a classifier, that may become float16."""

LARGE_LOGITS = "logits too large for float16's steps"
"""Why a classifier stays float32."""

SUMS = {
    "GlobalAveragePool": 1,
    "AveragePool": 1,
    "ReduceMean": 1,
    "ReduceSum": 1,
    "ReduceSumSquare": 2,
    "ReduceL2": 2,
}
"""Operations that add up many values, and the power to which they raise each value."""

ALWAYS_FLOAT = {"Resize": (1, 2)}
"""Operation -> positions of inputs that ONNX defines as float32, whatever type the data has."""

NOT_COUNTED = (
    *MOVES,
    QUANTIZE,
    DEQUANTIZE,
    "Cast",
    "Constant",
    "Identity",
)
"""Operations that compute nothing: :attr:`Typed.operations` leaves them out."""

STEP = "write the precision into the graph"
"""The name of this step in error messages."""


@dataclass(frozen=True)
class Typed:
    """The result of :func:`type_graph`.

    Attributes:
        model: the typed graph.
        operations: precision -> number of operations that compute in it (moves and conversions are not
            counted).
        islands: the operations that stayed float32 in a float16 graph.
        largest: the largest absolute value observed in any tensor.
    """

    model: onnx.ModelProto
    operations: dict[str, int]
    islands: tuple[Island, ...] = ()
    largest: float = 0.0


def observe(graph: onnx.ModelProto, batches: Iterable[np.ndarray]) -> dict[str, float]:
    """The largest absolute value of every float tensor of ``graph`` over ``batches``.

    Args:
        graph: an ONNX graph with one input.
        batches: float32 ``(N, 3, S, S)`` each.

    Raises:
        StepError: ONNX Runtime cannot run the graph.
    """
    with open_view(graph, types=True) as view:
        made = [value for node in view.graph for value in node.outputs]
        values = (*view.graph.inputs, *made)
        names = [name_value(value) for value in values if value.dtype == FLOAT]
    guard = functools.partial(guarded, "observe activations")
    extremes = measure_extremes(graph, [], names, batches, guard)
    return {name: _find_largest(ends) for name, ends in extremes.items()}


def _find_largest(ends: tuple[np.ndarray, np.ndarray]) -> float:
    """The largest absolute value between the lowest and highest values of the channels."""
    return float(np.abs(ends).max(initial=0.0))


def type_graph(
    graph: onnx.ModelProto,
    precision: str,
    observed: Mapping[str, float],
) -> Typed:
    """A copy of ``graph``, float32 or Q/DQ, typed for ``precision``.

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
        return Typed(copy, _count_operations(copy), largest=largest)
    with guarded(STEP), open_view(graph, types=True) as view:
        unfold_constants(view.graph)
        islands = _Islands(view.graph, observed).found
        _Conversion(view.graph, islands).run()
        model = write_model(view)
        found = tuple(islands.values())
    del model.graph.value_info[:]
    check_graph(STEP, model)
    return Typed(model, _count_operations(model), found, largest)


def round_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """A float32 graph that computes what a typed graph asks for: every float16 tensor is rounded to float16.

    ONNX Runtime's CPU kernels compute float16 graphs in float32 and drop the roundings between them, so an
    overflow would not show. Here it does. Sums inside one operation stay float32 here; a GPU may add in
    float16, for which :data:`SAFETY` leaves room.
    """
    with open_view(model, types=True) as view:
        _round_to_half(view.graph)
        result = write_model(view)
    del result.graph.value_info[:]
    return check_graph("round to float16", result)


def _round_to_half(graph: ir.Graph) -> None:
    """See :func:`round_graph`, in place."""
    for value in graph.initializers.values():
        if value.dtype == HALF:
            set_constant(value, read_constant(value).astype(np.float32))
    for node in list(graph):
        if node.op_type == "Cast" and _converts_floats(node):
            node.op_type = "Identity"
            node.attributes.clear()
        if node.op_type not in MOVES:
            for value in node.outputs:
                if value.dtype == HALF:
                    _round_output(graph, node, value)


def _converts_floats(cast: ir.Node) -> bool:
    """Whether a ``Cast`` converts a computed tensor between float32 and float16."""
    source = get_input(cast, 0)
    return not is_constant(source) and {
        source.dtype,
        cast.outputs[0].dtype,
    } <= {FLOAT, HALF}


def _round_output(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Let the readers of ``value`` read it rounded to float16, as float32."""
    name = name_value(value)
    after = detach_readers(value, f"{name}_exact")
    half = make_node(
        "Cast",
        [value],
        f"{name}_rounded",
        "",
        {"to": int(HALF)},
    )
    single = ir.node(
        "Cast",
        half.outputs,
        {"to": int(FLOAT)},
        outputs=[after],
        name="",
    )
    graph.insert_after(node, [half, single])


def _count_operations(model: onnx.ModelProto) -> dict[str, int]:
    """The number of computing operations by the precision that they read."""
    with open_view(model, types=True) as view:
        precisions = [_find_precision(node) for node in view.graph if node.op_type not in NOT_COUNTED]
    return dict(Counter(precision for precision in precisions if precision is not None))


def _find_precision(node: ir.Node) -> str | None:
    """The precision in which ``node`` computes; ``None`` for an operation on integers."""
    kinds = {value.dtype for value in node.outputs}
    if node.op_type in INT8_OPS and _reads_int8(node):
        return "int8"
    if HALF in kinds:
        return "fp16"
    return "fp32" if FLOAT in kinds else None


def _reads_int8(node: ir.Node) -> bool:
    """Whether both operands are dequantized."""
    sources = [find_source(value) for value in node.inputs[:2]]
    return all(source is not None and source.op_type == DEQUANTIZE for source in sources)


class _Islands:
    """Decides which operations of a float32 graph stay float32."""

    def __init__(self, graph: ir.Graph, observed: Mapping[str, float]) -> None:
        self._observed = observed
        self.found: dict[ir.Node, Island] = {}
        for node in graph:
            if node.op_type not in (QUANTIZE, DEQUANTIZE):
                self._decide(node)

    def _decide(self, node: ir.Node) -> None:
        found = self._find_reason(node)
        if found is None:
            return
        reason, value = found
        self._add(node, reason, value)
        if node.op_type == "Softmax":
            self._reach_back(node, "makes the scores of a float32 Softmax", value)
        elif reason == LARGE_LOGITS and node.op_type in (
            *MOVES,
            *ELEMENTWISE,
        ):
            self._reach_back(node, reason, value)

    def _add(self, node: ir.Node, reason: str, observed: float) -> None:
        self.found.setdefault(
            node,
            Island(get_node_name(node), node.op_type, reason, observed),
        )

    def _reach_back(self, node: ir.Node, reason: str, observed: float) -> None:
        """Keep what computes the input of ``node`` in float32, up to the product that makes its large values:
        it would not help to leave out only their last rounding."""
        before = find_producer(node.inputs[0])
        while before is not None:
            self._add(before, reason, observed)
            if before.op_type not in (*MOVES, *ELEMENTWISE):
                return
            before = next(
                (made for made in map(find_producer, before.inputs) if made is not None),
                None,
            )

    def _find_reason(self, node: ir.Node) -> tuple[str, float] | None:
        """Why ``node`` cannot be float16, with the observed value; ``None`` if it can."""
        for value in (*node.inputs, *node.outputs):
            if (largest := self._find_largest(value)) > LIMIT:
                return "values leave float16", largest
        fixed = ALWAYS_FLOAT.get(node.op_type, ())
        for position, value in enumerate(node.inputs):
            bad = _find_unrepresentable(read_array(value)) if position not in fixed else None
            if bad is not None:
                return "a constant leaves float16", bad
        return self._look_inside(node)

    def _look_inside(self, node: ir.Node) -> tuple[str, float] | None:
        """What would go wrong inside an operation whose inputs and outputs fit."""
        largest = max(map(self._find_largest, node.inputs), default=0.0)
        if node.op_type == "LayerNormalization" and largest**2 > LIMIT:
            return "squares of its input leave float16", largest
        if node.op_type == "Softmax" and largest > MAX_SCORE:
            return "scores too large for float16's steps", largest
        power = SUMS.get(node.op_type)
        if power is not None and largest**power * _count_summed(node) > LIMIT:
            return "its sum leaves float16", largest
        answers = [value for value in node.outputs if value.is_graph_output()]
        logits = max(map(self._find_largest, answers), default=0.0)
        if logits > MAX_SCORE and any(value.dtype == FLOAT for value in node.outputs):
            return LARGE_LOGITS, logits
        return None

    def _find_largest(self, value: ir.Value | None) -> float:
        """The largest observed absolute value of a tensor; 0 where nothing was observed."""
        return self._observed.get(name_value(value), 0.0)


def _count_summed(node: ir.Node) -> int:
    """How many values an element of the output sums; the batch and other open dimensions count as 1."""
    before = _count_elements(node.inputs[0])
    after = _count_elements(node.outputs[0])
    return max(1, before // max(1, after))


def _count_elements(value: ir.Value | None) -> int:
    dims = value.shape if value is not None and value.shape is not None else ()
    return math.prod(dim for dim in dims if isinstance(dim, int) and dim > 0)


def _find_unrepresentable(constant: np.ndarray | None) -> float | None:
    """A constant's largest value, if float16 cannot hold it: it is too large, or everything would become
    0."""
    if constant is None or constant.dtype != np.float32 or not constant.size:
        return None
    largest = np.abs(constant).max()
    if largest > FP16_MAX or (largest and not largest.astype(np.float16)):
        return float(largest)
    return None


class _Conversion:
    """Turns a float32 graph, in place, into a float16 graph with ``islands`` of float32."""

    def __init__(self, graph: ir.Graph, islands: Collection[ir.Node]) -> None:
        self._graph, self._islands = graph, islands
        # computed tensor that was float32 -> its type now
        self._types = {value: FLOAT for value in graph.inputs if value.dtype == FLOAT}
        # (tensor, type) -> the tensor converted to this type
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        # constants of the new graph by name, in the order in which nodes read them
        self._constants: dict[str, ir.Value] = {}

    def run(self) -> None:
        _round_scales(self._graph)
        for node in list(self._graph):
            self._convert(node)
        self._graph.initializers.clear()
        for value in self._constants.values():
            self._graph.register_initializer(value)

    def _convert(self, node: ir.Node) -> None:
        kind = self._find_kind(node)
        fixed = ALWAYS_FLOAT.get(node.op_type, ())
        for position, value in enumerate(node.inputs):
            if value is not None:
                wanted = FLOAT if position in fixed else kind
                node.replace_input_with(position, self._read(node, value, wanted))
        if node.op_type == "Cast" and node.attributes.get_int("to") == FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", int(kind))
        for value in node.outputs:
            if value.dtype == FLOAT:
                self._types[value] = kind
                if value.is_graph_output() and kind == HALF:
                    self._cast_output(node, value)

    def _cast_output(self, node: ir.Node, value: ir.Value) -> None:
        """Keep an output of the graph float32, under its name."""
        name = name_value(value)
        output = detach_readers(value, f"{name}_half")
        cast = ir.node(
            "Cast",
            [value],
            {"to": int(FLOAT)},
            outputs=[output],
            name=f"cast_{name}",
        )
        self._graph.insert_after(node, cast)
        self._types[output] = FLOAT
        self._casts[output, HALF] = value

    def _find_kind(self, node: ir.Node) -> ir.DataType:
        """The type of the float side of an operation."""
        if node.op_type == QUANTIZE:  # keeps the type of its input: a conversion before it would cost time
            return self._types[get_input(node, 0)]
        if node.op_type == DEQUANTIZE:
            readers = find_readers(node.outputs[0])
            return FLOAT if readers and all(reader in self._islands for reader in readers) else HALF
        reads_floats = any(value in self._types or _is_float_constant(value) for value in list_inputs(node))
        made_from_nothing = node.op_type != "Cast" and not reads_floats
        return FLOAT if node in self._islands or made_from_nothing else HALF

    def _read(self, node: ir.Node, value: ir.Value, kind: ir.DataType) -> ir.Value:
        """What ``node`` reads instead of ``value`` in type ``kind``; other types than float32 stay."""
        if value.is_initializer():
            return self._make_constant(value, kind)
        have = self._types.get(value)
        if have is None or have == kind:
            return value
        if (value, kind) not in self._casts:
            name = f"{name_value(value)}_{'half' if kind == HALF else 'float'}"
            cast = make_node(
                "Cast",
                [value],
                name,
                f"cast_{name}",
                {"to": int(kind)},
            )
            self._graph.insert_before(node, cast)
            self._casts[value, kind] = cast.outputs[0]
        return self._casts[value, kind]

    def _make_constant(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        """A constant in type ``kind``; other types than float32 stay."""
        name = name_value(value)
        if value.dtype != FLOAT or kind == FLOAT:
            return self._constants.setdefault(name, value)
        half = f"{name}_half"
        if half not in self._constants:
            array = read_constant(value).astype(np.float16)
            self._constants[half] = add_constant(self._graph, half, array)
        return self._constants[half]


def _is_float_constant(value: ir.Value) -> bool:
    return is_constant(value) and value.dtype == FLOAT


def _round_scales(graph: ir.Graph) -> None:
    """Round scales to values that float16 holds, and quantize weights again with them."""
    scaled = [node for node in graph if node.op_type in (QUANTIZE, DEQUANTIZE)]
    exact = {get_input(node, 1): read_constant(node.inputs[1]) for node in scaled}
    halves = {value: scale.astype(np.float16) for value, scale in exact.items()}
    held = {value: np.maximum(half, SMALLEST_HALF) for value, half in halves.items()}
    weights = {get_input(node, 0): node for node in scaled if is_constant(node.inputs[0])}
    for value, node in weights.items():
        array, key = read_constant(value), get_input(node, 1)
        ratio = exact[key].astype(np.float64) / held[key]
        axis = node.attributes.get_int("axis", 1)
        again = np.rint(array * _shape_along(ratio, axis, array.ndim))
        clipped = np.clip(again, -128, 127)
        set_constant(value, clipped.astype(np.int8))
    for value, scale in held.items():
        set_constant(value, np.asarray(scale, np.float32))


def _shape_along(values: np.ndarray, axis: int, ndim: int) -> np.ndarray:
    """``values``, a scalar or one a channel, shaped to broadcast along ``axis`` of ``ndim`` dimensions."""
    if values.ndim == 0 or values.size == 1:
        return values.reshape(())
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)
