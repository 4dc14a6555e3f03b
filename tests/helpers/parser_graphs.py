"""Graphs that break one rule of TensorRT's parser each, for our rules and for the real parser."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


def model(nodes, constants=(), *, opset: int = 20, ends=(FLOAT, FLOAT), shape=("batch", 4), opsets=()):
    initializers = [numpy_helper.from_array(np.asarray(v), k) for k, v in dict(constants).items()]
    made = [
        helper.make_node(op, ins, outs if isinstance(outs, list) else [outs], f"n{i}", **attributes)
        for i, (op, ins, outs, attributes) in enumerate(nodes)
    ]
    source, target = (
        helper.make_tensor_value_info("input", ends[0], shape),
        helper.make_tensor_value_info("logits", ends[1], None),
    )
    graph = helper.make_graph(made, "g", [source], [target], initializers)
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(*o) for o in opsets)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9)


def f32(*values):
    return np.array(values, np.float32)


ZERO, SCALE = np.int8(0), np.float32(0.1)


def q_dq(zero=ZERO, scale=SCALE, attributes=(), missing=False):
    """A quantized activation."""
    inputs = ["input", "s"] if missing else ["input", "s", "z"]
    again = ["q", "s"] if missing else ["q", "s", "z"]
    nodes = [
        ("QuantizeLinear", inputs, "q", dict(attributes)),
        ("DequantizeLinear", again, "logits", dict(attributes)),
    ]
    return model(nodes, {"s": scale, "z": zero})


BROKEN = {
    "opset 21 is above 20": model([("Relu", ["input"], "logits", {})], opset=21),
    "domain 'com.microsoft'": model([("Relu", ["input"], "logits", {})], opsets=[("com.microsoft", 1)]),
    "no such operation": model([("BitShift", ["input", "input"], "logits", {"direction": "LEFT"})]),
    "input: inputs and outputs must be float32": model(
        [("Cast", ["input"], "logits", {"to": FLOAT})], ends=(HALF, FLOAT)
    ),
    "logits: inputs and outputs must be float32": model(
        [("Cast", ["input"], "logits", {"to": HALF})], ends=(FLOAT, HALF)
    ),
    "tensors of type DOUBLE": model(
        [("Cast", ["input"], "d", {"to": TensorProto.DOUBLE}), ("Cast", ["d"], "logits", {"to": FLOAT})]
    ),
    "uint8 instead of int8": q_dq(zero=np.uint8(0)),
    "zero point is not 0": q_dq(zero=np.int8(3)),
    "scale is not positive": q_dq(scale=np.float32(0)),
    "scale and zero point must be constants": q_dq(missing=True),
    "activation with one scale a channel": q_dq(
        zero=np.zeros(4, np.int8), scale=f32(1, 2, 3, 4), attributes={"axis": 1}
    ),
    "no axis, and versions differ": q_dq(zero=np.zeros(4, np.int8), scale=f32(1, 2, 3, 4)),
    "alpha and beta other than 1": model(
        [("Gemm", ["input", "w"], "logits", {"alpha": 0.5})], {"w": np.eye(4, dtype=np.float32)}
    ),
    "axes must be constant": model(
        [("Cast", ["input"], "i", {"to": TensorProto.INT64}), ("ReduceMean", ["input", "i"], "logits", {})]
    ),
    "inputs from the 2. on must be constant": model(
        [("Cast", ["input"], "i", {"to": TensorProto.INT64}), ("Unsqueeze", ["input", "i"], "logits", {})]
    ),
    "only the first output": model(
        [("LayerNormalization", ["input", "w"], ["logits", "mean"], {})], {"w": f32(1, 1, 1, 1)}
    ),
    "reads float32 and float16 at once": model(
        [("Cast", ["input"], "h", {"to": HALF}), ("Add", ["input", "h"], "logits", {})]
    ),
}
