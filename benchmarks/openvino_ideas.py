"""Ideas for OpenVINO's CPU plugin that change the graph and not the result: are they faster?

    python benchmarks/openvino_ideas.py attention BUNDLE [--threads 2]
    python benchmarks/openvino_ideas.py gelu [--threads 2]
    python benchmarks/openvino_ideas.py linears BUNDLE --beside FP32_BUNDLE [--threads 2]

``attention`` writes the attention of each head as OpenVINO's ScaledDotProductAttention and compares it with
the bundle's own graph: results, and the ratio of the times. ``gelu`` replaces the GELU between two int8
convs, which OpenVINO attaches to the first, by a table of 256 values that is read with the int8 number; the
convs are those of an IRFFN of CMT-XS. ``linears`` lets the linears of an int8 bundle read floats, with
weights that OpenVINO converts in each call, or that are float32 from the start
(:mod:`cmt_edge.deploy.backends.openvino_linears`), beside the float32 bundle of the same weights; under
``OV_CPU_MAX_ISA=AVX2 ONEDNN_MAX_CPU_ISA=AVX2``, for instance. What is compared runs in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from cmt_edge.deploy import Bundle
from cmt_edge.deploy.backends.openvino_graph import make_unsigned, read
from cmt_edge.deploy.backends.openvino_layers import find_start, iterate_int8
from cmt_edge.deploy.backends.openvino_linears import read_floats

ROUNDS = 60
"""How often each graph has its turn, unless told otherwise."""
RUNS = 5
"""Inferences in a turn."""
SHAPES = ((52, 48), (104, 24), (208, 12))
"""Channels and edge of the maps of the first three stages of CMT-XS."""
EXPANSION = 4
"""How many times wider the IRFFN is inside, rounded up."""
COPIES = 2
"""How often each graph of ``linears`` is compiled, because compilations of one graph differ."""
UNROUNDED = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
"""OpenVINO's setting with which a linear that reads floats computes in float."""
PAIRS = 4
"""How many times two convs follow each other in the graphs of ``gelu``."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("idea", choices=["attention", "gelu", "linears"])
    parser.add_argument("bundle", nargs="?", type=Path)
    parser.add_argument("--beside", type=Path, metavar="FP32_BUNDLE")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"turns of each graph ({ROUNDS})")
    args = parser.parse_args()
    if args.idea == "gelu":
        try_gelu(args.threads, args.rounds)
    elif args.bundle is None:
        parser.error(f"{args.idea} needs a bundle")
    elif args.idea == "linears" and args.beside is None:
        parser.error("linears needs --beside")
    elif args.idea == "linears":
        try_linears(args.bundle, args.beside, args.threads, args.rounds)
    else:
        try_attention(args.bundle, args.threads, args.rounds)


def try_attention(path: Path, threads: int, rounds: int) -> None:
    """Compare a bundle's graph with the same graph whose heads are one operation each."""
    graph = Bundle.open(path).path / "model.onnx"
    own, folded = read(graph), read(graph)
    count = fold_attention(folded)
    requests = {"own": compile_graph(make_unsigned(own), threads)}
    requests["folded"] = compile_graph(make_unsigned(folded), threads)
    image = draw_values([int(size) for size in own.inputs[0].shape])
    answers = [np.array(request.infer(image)[0]) for request in requests.values()]
    difference = float(np.abs(answers[0] - answers[1]).max())
    milliseconds = time_in_turns(requests, image, rounds)
    ratios = [a / b for a, b in zip(milliseconds["own"], milliseconds["folded"], strict=True)]
    print(f"{count} attentions folded, logits differ by {difference:.1e} at most")
    print(f"own / folded: {statistics.median(ratios):.3f} (above 1: folding is faster)")


def fold_attention(model: ov.Model) -> int:
    """Replace product, bias, softmax and product by ScaledDotProductAttention where they follow each other;
    how many were replaced."""
    count = 0
    for softmax in list(model.get_ordered_ops()):
        if softmax.get_type_name() != "Softmax":
            continue
        add = softmax.input_value(0).get_node()
        mix = next(iter(softmax.output(0).get_target_inputs())).get_node()
        scores = add.input_value(0).get_node()
        if [n.get_type_name() for n in (scores, add, mix)] != ["MatMul", "Add", "MatMul"]:
            continue
        whole = ops.scaled_dot_product_attention(
            scores.input_value(0),
            take_keys(scores),
            mix.input_value(1),
            add.input_value(1),
            ops.constant(np.float32(1.0)),
            causal=False,
        )
        for target in list(mix.output(0).get_target_inputs()):
            target.replace_source_output(whole.output(0))
        count += 1
    model.validate_nodes_and_infer_types()
    return count


def take_keys(scores: ov.Node) -> ov.Output:
    """The keys as rows, which the operation wants."""
    keys = scores.input_value(1)
    if scores.get_attributes()["transpose_b"]:
        return keys
    axes = list(range(len(keys.get_partial_shape())))
    axes[-2:] = reversed(axes[-2:])
    return ops.transpose(keys, ops.constant(np.array(axes, np.int64))).output(0)


def try_linears(path: Path, beside: Path, threads: int, rounds: int) -> None:
    """Time an int8 bundle with its linears in int8, and in float with either kind of weights."""
    graph, plain = (Bundle.open(bundle).path / "model.onnx" for bundle in (path, beside))
    models = {
        "fp32 bundle": read(plain),
        "int8": read(graph, keep_linears=True),
        "linears float, weights converted": read(graph, read_floats_of_linears, keep_linears=True),
        "linears float32": read(graph, read_floats),
    }
    image = draw_values([int(size) for size in models["int8"].inputs[0].shape])
    requests = {
        f"{name}, copy {i}": compile_graph(model, threads, {"INFERENCE_PRECISION_HINT": "f32", **UNROUNDED})
        for i in range(COPIES)
        for name, model in models.items()
    }
    milliseconds = time_in_turns(requests, image, rounds)
    for name in models:
        ratios = [
            [a / b for a, b in zip(milliseconds[f"fp32 bundle, copy {i}"], taken, strict=True)]
            for i in range(COPIES)
            if (taken := milliseconds[f"{name}, copy {i}"])
        ]
        best = statistics.median(min(milliseconds[f"{name}, copy {i}"]) for i in range(COPIES))
        medians = ", ".join(f"{statistics.median(values):.2f}" for values in ratios)
        print(f"{name}: {medians} times as fast as the fp32 bundle; best turn {best:.1f} ms")


def read_floats_of_linears(model: ov.Model) -> None:
    """Let int8 linears read floats, with the int8 weights that they have."""
    for layer in list(iterate_int8(model, ("MatMul",))):
        pair = find_start(layer.input_value(0))
        if pair.get_type_name() == "FakeQuantize":
            layer.input(0).replace_source_output(pair.input_value(0))
    model.validate_nodes_and_infer_types()


def try_gelu(threads: int, rounds: int) -> None:
    """Time pairs of int8 convs with the GELU, with the table, and with nothing between them."""
    between = {"gelu": ops.gelu, "table": look_up, "nothing": lambda value, _: value}
    for channels, edge in SHAPES:
        requests = {
            name: compile_graph(make_convs(channels, edge, between=function), threads)
            for name, function in between.items()
        }
        milliseconds = time_in_turns(requests, draw_values([1, channels, edge, edge]), rounds)
        medians = {name: statistics.median(values) for name, values in milliseconds.items()}
        line = ", ".join(f"{name} {value / medians['gelu']:.2f}" for name, value in medians.items())
        print(f"{channels} channels, {edge} x {edge}: time of {line} (of that with GELU)")


def make_convs(channels: int, edge: int, between: Callable[..., ov.Node]) -> ov.Model:
    """1x1 convs that widen and narrow a map in int8 with ``between`` after the first of each two."""
    image = ops.parameter([1, channels, edge, edge], np.float32)
    value = quantize(image, -4, 4)
    for _ in range(PAIRS):
        wide = add_conv(value, channels * EXPANSION, channels)
        value = quantize(between(wide, "ERF"), -0.17, 4)
        value = quantize(add_conv(value, channels, channels * EXPANSION), -4, 4)
    return ov.Model([value], [image], "convs")


def quantize(value: ov.Node, low: float, high: float) -> ov.Node:
    """256 values from ``low`` to ``high``."""
    ends = [ops.constant(np.full((1, 1, 1, 1), end, np.float32)) for end in (low, high)]
    return ops.fake_quantize(value, *ends, *ends, 256)


def add_conv(value: ov.Node, outputs: int, inputs: int) -> ov.Node:
    """A 1x1 conv with int8 weights and a bias."""
    weights = np.random.default_rng(outputs).integers(-127, 128, (outputs, inputs, 1, 1)).astype(np.int8)
    scaled = ops.multiply(ops.convert(ops.constant(weights), "f32"), ops.constant(np.float32(0.002)))
    conv = ops.convolution(value, scaled, [1, 1], [0, 0], [0, 0], [1, 1])
    return ops.add(conv, ops.constant(draw_values([1, outputs, 1, 1])))


def look_up(value: ov.Node, _: str) -> ov.Node:
    """The value as an int8 number, and what a table of 256 values holds for it."""
    shifted = ops.add(ops.multiply(value, ops.constant(np.float32(32))), ops.constant(np.float32(128)))
    number = ops.convert(ops.round(ops.clamp(shifted, 0.0, 255.0), "half_to_even"), "u8")
    table = ops.constant(draw_values([256]))
    return ops.gather(table, ops.convert(number, "i32"), ops.constant(np.int32(0)))


def compile_graph(
    model: ov.Model, threads: int, more: Mapping[str, Any] = MappingProxyType({})
) -> ov.InferRequest:
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", **more}
    return ov.Core().compile_model(model, "CPU", settings).create_infer_request()


def draw_values(shape: list[int]) -> np.ndarray:
    """float32 values of a normal distribution, the same for the same shape."""
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def time_in_turns(
    requests: dict[str, ov.InferRequest], image: np.ndarray, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds an inference for each request in each round."""
    times: dict[str, list[float]] = {name: [] for name in requests}
    for _ in range(rounds):
        for name, request in requests.items():
            start = time.perf_counter()
            for _ in range(RUNS):
                request.infer(image)
            times[name].append(1000 * (time.perf_counter() - start) / RUNS)
    return times


if __name__ == "__main__":
    main()
