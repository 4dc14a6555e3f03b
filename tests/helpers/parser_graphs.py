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


IMAGE = (1, 2, 8, 8)


def in_a_branch(nodes):
    """A graph that runs ``nodes`` only where the sum of its input is above 0; they write ``then``."""
    made = [
        helper.make_node(op, ins, outs, f"b{i}", **given) for i, (op, ins, outs, given) in enumerate(nodes)
    ]
    bodies = {"then": made, "else": [helper.make_node("Identity", ["input"], ["else"], "b")]}
    branches = {
        f"{name}_branch": helper.make_graph(
            body, name, [], [helper.make_tensor_value_info(name, FLOAT, None)]
        )
        for name, body in bodies.items()
    }
    test = [("ReduceSum", ["input"], "sum", {"keepdims": 0}), ("Greater", ["sum", "zero"], "test", {})]
    return model([*test, ("If", ["test"], "logits", branches)], {"zero": np.float32(0)}, shape=IMAGE)


def resize(**attributes):
    """Half of the size."""
    node = ("Resize", ["input", "", "scales"], "logits", {"mode": "linear", **attributes})
    return model([node], {"scales": f32(1, 1, 0.5, 0.5)}, shape=IMAGE)


def in_half(nodes, constants=()):
    """A graph that runs ``nodes`` on float16 ``h`` and on its sum ``s``; they write ``c``."""
    before = [
        ("Cast", ["input"], "h", {"to": HALF}),
        ("ReduceSum", ["h"], "s", {"keepdims": 0}),
        ("Identity", ["s"], "t", {}),
    ]
    return model([*before, *nodes, ("Cast", ["c"], "logits", {"to": FLOAT})], constants, shape=IMAGE)


def drop_out(nodes, constants=()):
    """A dropout, whose switch is ``training``."""
    node = ("Dropout", ["input", "ratio", "training"], "logits", {})
    return model([*nodes, node], {"ratio": np.float32(0.5)} | dict(constants), shape=IMAGE)


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
    "dilations must be 1": model(
        [("MaxPool", ["input"], "logits", {"kernel_shape": [2, 2], "dilations": [1, 2]})], shape=IMAGE
    ),
    "antialias must be 0": resize(antialias=1),
    "keep_aspect_ratio_policy must be stretch": model(
        [("Resize", ["input", "", "", "sizes"], "logits", {"keep_aspect_ratio_policy": "not_larger"})],
        {"sizes": np.array([1, 2, 4, 6], np.int64)},
        shape=IMAGE,
    ),
    "coordinate_transformation_mode must be": resize(coordinate_transformation_mode="half_pixel_symmetric"),
    "reduction must be none": model(
        [("ScatterND", ["input", "i", "u"], "logits", {"reduction": "add"})],
        {"i": np.array([[0]], np.int64), "u": np.ones((1, 2, 8, 8), np.float32)},
        shape=IMAGE,
    ),
    "training_mode must be 0": model(
        [("BatchNormalization", ["input", *"abcd"], ["logits", "m", "v"], {"training_mode": 1})],
        {name: f32(1, 1) for name in "abcd"},
        shape=IMAGE,
    ),
    "multiplies matrices of whole numbers": model(
        [
            ("Cast", ["input"], "i", {"to": TensorProto.INT64}),
            ("MatMul", ["i", "i"], "j", {}),
            ("Cast", ["j"], "logits", {"to": FLOAT}),
        ],
        shape=IMAGE,
    ),
    "more than 8": model(
        [("Reshape", ["input", "r"], "logits", {})], {"r": np.array([1] * 8 + [128], np.int64)}, shape=IMAGE
    ),
    "p must be 1 or 2": model(
        [("LpPool", ["input"], "logits", {"kernel_shape": [2, 2], "p": 3})], shape=IMAGE
    ),
    "without fmod": model([("Mod", ["input", "c"], "logits", {})], {"c": np.float32(3)}, shape=IMAGE),
    "n3 (Celu): reads float16": in_half([("Celu", ["h"], "c", {})]),
    "n3 (Range): reads float16": in_half(
        [("Range", ["z", "s", "o"], "c", {})], {"z": np.float16(0), "o": np.float16(1)}
    ),
    "its inputs from the 3. on must be constant": drop_out(
        [("ReduceSum", ["input"], "s", {"keepdims": 0}), ("Greater", ["s", "ratio"], "training", {})]
    ),
    "is in training mode": drop_out([], {"training": np.bool_(True)}),
    "input 2 must be constant": model(
        [
            ("Cast", ["input"], "i", {"to": TensorProto.INT64}),
            ("ReduceMax", ["i"], "depth", {"keepdims": 0}),
            ("OneHot", ["i", "depth", "values"], "logits", {}),
        ],
        {"values": f32(0, 1)},
        shape=IMAGE,
    ),
    "b0 (MaxPool): only the first output": in_a_branch(
        [("MaxPool", ["input"], ["then", "places"], {"kernel_shape": [1, 1]})]
    ),
    "b1 (Add): reads float32 and float16 at once": in_a_branch(
        [("Cast", ["input"], ["half"], {"to": HALF}), ("Add", ["input", "half"], ["then"], {})]
    ),
}


def scatter(reduction):
    node = ("ScatterElements", ["input", "i", "u"], "logits", {"axis": 1, "reduction": reduction})
    zeros = np.zeros(IMAGE, np.int64)
    return model([node], {"i": zeros, "u": zeros.astype(np.float32)}, shape=IMAGE)


BROKEN_FOR_RTX = {
    "reduction must be none": scatter("add"),
    "(NonZero)": model(
        [("NonZero", ["input"], "n", {}), ("Cast", ["n"], "logits", {"to": FLOAT})], shape=IMAGE
    ),
    "(RoiAlign)": model(
        [("RoiAlign", ["input", "boxes", "i"], "logits", {"output_height": 2, "output_width": 2})],
        {"boxes": f32([0, 0, 4, 4]), "i": np.zeros(1, np.int64)},
        shape=IMAGE,
    ),
    "(NonMaxSuppression)": model(
        [
            ("NonMaxSuppression", ["boxes", "input", "most"], "n", {}),
            ("Cast", ["n"], "logits", {"to": FLOAT}),
        ],
        {"boxes": np.ones((1, 8, 4), np.float32), "most": np.array([3], np.int64)},
        shape=(1, 2, 8),
    ),
    "(DeformConv)": model(
        [("DeformConv", ["input", "w", "offset"], "logits", {})],
        {"w": np.ones((1, 2, 2, 2), np.float32), "offset": np.zeros((1, 8, 7, 7), np.float32)},
        shape=IMAGE,
    ),
}
"""Graphs that TensorRT reads, and TensorRT for RTX does not; the name is a part of the finding."""
