"""How many attentions a graph has, so that a report can say how many of them the compiler fused."""

from __future__ import annotations

from collections import defaultdict

import onnx

SOFTMAX = "Softmax"
"""The operation that makes the weights of an attention. Models have it for other things, too: for
probabilities, or to choose between branches."""
PRODUCT = "MatMul"
"""The operation that multiplies the weights of an attention with its values."""
PASSED = frozenset(
    """
    Add Cast Concat DequantizeLinear Div Dropout Expand Identity Mul QuantizeLinear Reshape Slice Split
    Squeeze Sub Transpose Unsqueeze Where
    """.split()  # noqa: SIM905 (names, one a line otherwise)
)
"""Operations that may lie between the two: gates, masks, conversions and moves."""


def count_attentions(graph: onnx.ModelProto) -> int:
    """The number of softmaxes whose result is multiplied, as a matrix, with something that is no weight."""
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    fixed = {tensor.name for tensor in graph.graph.initializer}
    for node in graph.graph.node:
        for name in node.input:
            readers[name].append(node)
        if all(name in fixed for name in node.input if name):
            fixed.update(node.output)
    softmaxes = [node for node in graph.graph.node if node.op_type == SOFTMAX]
    return sum(_weighs_values(node, readers, fixed) for node in softmaxes)


def _weighs_values(
    softmax: onnx.NodeProto,
    readers: dict[str, list[onnx.NodeProto]],
    fixed: set[str],
) -> bool:
    """Whether a softmax makes the weights of an attention."""
    ahead, seen = list(softmax.output), set()
    while ahead:
        name = ahead.pop()
        for node in readers[name]:
            if node.op_type == PRODUCT and not fixed & set(node.input):
                return True
            if node.op_type in PASSED and node.output[0] not in seen:
                seen.add(node.output[0])
                ahead += node.output
    return False
