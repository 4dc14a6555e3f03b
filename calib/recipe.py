"""Which nodes of a hybrid stay float, decided once for every runtime.

Rules are about classes of nodes, never about names of a family. They were measured on CMT (``docs/int8.md``):

* Dense convs and linears are int8: weights have a scale an output channel, activations a scale a tensor, and
  every zero point is 0. TensorRT accepts nothing else, and asymmetric activations cost CPUs extra work. What
  convs read is rescaled first so that one scale suits it (:mod:`cmt_edge.calib.equalize`).
* Depthwise convs between two dense ones, whose channels can be equalized, are int8, because nothing is
  converted between the three then. Others stay float: memory limits them, and one scale for all channels
  costs accuracy.
* Layers that nothing leads around, between stages and behind the last block, read floats where the recipe
  says so (:mod:`cmt_edge.calib.trunk`): they would round the whole stream. Their weights are int8.
* A conv of an image by small filters stays float: quantizing the image cost more than int8 saved.
* The attention's own products of two activations stay float: they cost little, and the pairs around them cost
  more than int8 saves.
* LayerNorm, Softmax (and its product with the values), GELU and elementwise operations stay float: they are
  cheap, and int8 costs most accuracy there.
* Products with a table of more than two dimensions (relative positions) stay float: they are small, and
  runtimes expect one scale there.
* Biases stay float: they are added in the accumulator's precision anyway.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection
from dataclasses import asdict, dataclass

import onnx
import onnx_ir as ir

from .graph import (
    ELEMENTWISE,
    MOVES,
    find_producer,
    get_input,
    get_node_name,
    is_constant,
    open_view,
    read_constant_dims,
)

FLOAT_OPS = (
    "LayerNormalization",
    "Softmax",
    "Gelu",
    "Sigmoid",
    "Erf",
    "ReduceMean",
    "GlobalAveragePool",
)
"""Operations that never read a dequantized activation directly."""

INT8_OPS = ("Conv", "Gemm", "MatMul")
"""Operations that compute in int8."""

BETWEEN = ("Gelu", "Relu", "Mul", "Add")
"""Operations that may stand between a depthwise conv and the dense convs around it."""

SMALL_FILTER = 32
"""A conv of the image stays float if each of its filters reads fewer values than this: int8 has little to
multiply there, and the whole image to convert."""

RULES = 13
"""The version of the rules in :meth:`Recipe.float_nodes` and of what follows it. It is increased when they
change, so that no calibrated graph of older rules is taken from the cache."""


@dataclass(frozen=True)
class Recipe:
    """Choices of :func:`cmt_edge.calib.quantize.quantize`.

    Attributes:
        equalize: rescale what convs read before calibration (:func:`cmt_edge.calib.equalize.equalize`). It
            needs images like those that the model will see: a channel that they excite may be silent on drawn
            ones, and would be cut off.
        depthwise: quantize the depthwise convs of :func:`find_inner_depthwise` too.
        attention: quantize the attention's own products of two activations, where NNCF would.
        smooth_quant: alpha of activation smoothing for matrix products, ``None`` for none; it adds a
            multiplication before each of them.
        bias_correction: correct biases for the mean error of each layer on calibration images.
        range_estimator: how activation ranges are found: ``"mean_minmax"`` (mean over images of each image's
            extremes), ``"minmax"`` (extremes over all images), or ``"error"``: the part of the latter that
            leaves the smallest error of the layers that read the values. With ``smooth_quant`` that is the
            whole, since smoothing changes the layers' weights.
        shift: move what a layer without padding reads before it is rounded, where int8 represents it better
            then (:mod:`cmt_edge.calib.shifts`); only with the ranges ``"error"``, and not with
            ``smooth_quant``.
        rounding: round weights so that the errors of those that are multiplied by the same values make up for
            each other (:mod:`cmt_edge.calib.refine`); not with ``smooth_quant``.
        fits_16_bits: round weights so that sums of two products fit 16 bits, which CPU runtimes need on x86
            processors without VNNI (:mod:`cmt_edge.calib.pair_sums`); not with ``smooth_quant``.
        float_trunk: let layers between stages and behind the last block read floats; only their weights are
            int8 (:mod:`cmt_edge.calib.trunk`).
        keep_float: groups of operations (:mod:`cmt_edge.calib.groups`) or single operations that become float
            again after calibration (:mod:`cmt_edge.calib.restore`). The others are calibrated as without it.
    """

    equalize: bool = True
    depthwise: bool = True
    attention: bool = False
    smooth_quant: float | None = None
    bias_correction: bool = True
    range_estimator: str = "error"
    shift: bool = True
    rounding: bool = True
    fits_16_bits: bool = False
    float_trunk: bool = False
    keep_float: tuple[str, ...] = ()

    def key(self) -> str:
        """Hash of all choices, for caches and the manifest."""
        return hashlib.sha256(
            json.dumps(asdict(self) | {"rules": RULES}, sort_keys=True).encode()
        ).hexdigest()

    def float_nodes(self, model: onnx.ModelProto) -> list[str]:
        """Names of the nodes of ``model`` that stay float although their operation could be int8.

        A name is repeated for each rule that applies.
        """
        with open_view(model) as view:
            return self.float_nodes_of(view.graph)

    def float_nodes_of(self, graph: ir.Graph) -> list[str]:
        """:meth:`float_nodes` of a graph that is already open."""
        inner = find_inner_depthwise(graph) if self.depthwise else set()
        return [get_node_name(node) for node in graph for _ in range(self._count_rules(node, inner))]

    def _count_rules(self, node: ir.Node, inner: Collection[ir.Node]) -> int:
        """How many rules keep ``node`` float; ``inner``: the depthwise convs that become int8."""
        rules = (
            is_depthwise_node(node) and node not in inner,
            _reads_image_by_small_filters(node),
            _reads_softmax(node),
            _reads_table(node),
            not self.attention and _multiplies_activations(node),
        )
        return sum(rules)


DEFAULT = Recipe()
"""The recipe of every export that does not choose another one."""


def _reads_image_by_small_filters(node: ir.Node) -> bool:
    """Whether it is a dense conv of the graph's input by filters of less than :data:`SMALL_FILTER` values."""
    if not is_dense(node) or not get_input(node, 0).is_graph_input():
        return False
    dims = read_constant_dims(node.inputs[1])
    return dims is not None and math.prod(dims[1:]) < SMALL_FILTER


def _reads_softmax(node: ir.Node) -> bool:
    """Whether it is a product with the scores of an attention."""
    return node.op_type == "MatMul" and any(_comes_from(value, "Softmax") for value in node.inputs)


def _reads_table(node: ir.Node) -> bool:
    """Whether it is a product with a constant of more than two dimensions."""
    if node.op_type != "MatMul":
        return False
    known = [dims for dims in map(read_constant_dims, node.inputs) if dims is not None]
    return any(len(dims) > 2 for dims in known)


def _multiplies_activations(node: ir.Node) -> bool:
    return node.op_type == "MatMul" and not any(is_constant(value) for value in node.inputs)


def _comes_from(value: ir.Value | None, op_type: str) -> bool:
    """Whether a tensor is made from the output of such an operation by moves and elementwise arithmetic
    alone."""
    node = find_producer(value)
    if node is None or node.op_type == op_type:
        return node is not None
    if node.op_type not in (*MOVES, *ELEMENTWISE):
        return False
    return any(_comes_from(part, op_type) for part in node.inputs)


def find_inner_depthwise(graph: ir.Graph) -> set[ir.Node]:
    """Depthwise convs that read a dense conv and are read by one alone, with activations and a scale and
    shift between."""
    return {
        node
        for node in graph
        if is_depthwise_node(node)
        and _is_scaled_and_shifted(get_input(node, 0))
        and _is_dense_before(get_input(node, 0))
        and _is_dense_after(node.outputs[0])
    }


def _is_scaled_and_shifted(value: ir.Value) -> bool:
    """Whether a tensor is made by a multiplication and an addition of constants."""
    shift = value.producer()
    if shift is None:
        return False
    scale = next(
        (node for node in map(find_producer, shift.inputs) if node is not None),
        None,
    )
    return _reads_constant(shift, "Add") and scale is not None and _reads_constant(scale, "Mul")


def _reads_constant(node: ir.Node, op_type: str) -> bool:
    """Whether ``node`` is such an operation with a constant."""
    return node.op_type == op_type and any(is_constant(value) for value in node.inputs)


def _is_dense_before(value: ir.Value) -> bool:
    """Whether a tensor comes from a dense conv that nothing else reads."""
    node = value.producer()
    if node is None or len(value.uses()) != 1:
        return False
    if is_dense(node):
        return True
    computed = [part for part in node.inputs if part is not None and not part.is_initializer()]
    return node.op_type in BETWEEN and len(computed) == 1 and _is_dense_before(computed[0])


def _is_dense_after(value: ir.Value) -> bool:
    """Whether a tensor goes to a dense conv and to nothing else."""
    if len(value.uses()) != 1:
        return False
    (use,) = value.uses()
    if is_dense(use.node):
        return True
    return use.node.op_type in BETWEEN and _is_dense_after(use.node.outputs[0])


def is_dense(node: ir.Node) -> bool:
    """Whether ``node`` is a conv whose filters read all channels."""
    return node.op_type == "Conv" and not is_depthwise_node(node)


def is_depthwise_node(node: ir.Node) -> bool:
    """Whether ``node`` is a grouped conv (in these families every grouped conv is depthwise)."""
    return node.op_type == "Conv" and count_groups(node) > 1


def count_groups(conv: ir.Node) -> int:
    """The number of groups into which a conv divides its channels."""
    return conv.attributes.get_int("group", 1)
