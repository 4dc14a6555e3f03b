"""Running an ONNX graph in ONNX Runtime, and watching tensors inside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import numpy as np
import onnx
from onnx import helper, numpy_helper

ONNX_RUNTIME_FATAL = 4
"""ONNX Runtime's log level at which it prints fatal errors only; other errors are raised."""

EXTREMES = ("ReduceMin", "ReduceMax")
"""The operations that :func:`measure_extremes` adds to a graph."""

Guard = Callable[[], AbstractContextManager[None]]
"""Makes a context manager that turns errors of ONNX Runtime into errors of this package."""

Extremes = dict[str, tuple[np.ndarray, np.ndarray]]
"""Name of a tensor -> its smallest and its largest values on each batch, float64 ``(batches, C)`` each."""

Run = Callable[[np.ndarray], list[np.ndarray]]
"""Runs an opened graph: from a float32 batch ``(N, 3, S, S)`` to its outputs."""


def open_graph(
    model: onnx.ModelProto,
    guard: Guard = nullcontext,
    outputs: Sequence[str] | None = None,
    threads: int | None = None,
) -> Run:
    """Open ``model`` in ONNX Runtime on the CPU.

    Args:
        model: a graph with one input.
        guard: is entered around every call of ONNX Runtime.
        outputs: names of the wanted outputs, all by default.
        threads: number of them; all cores by default.

    Returns:
        A function from a batch, float32 ``(N, 3, S, S)``, to the outputs, ``(N, ...)`` each.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = ONNX_RUNTIME_FATAL
    options.intra_op_num_threads = threads or 0
    with guard():
        session = ort.InferenceSession(
            model.SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
        )
    source = model.graph.input[0].name

    def run(batch: np.ndarray) -> list[np.ndarray]:
        with guard():
            return cast(list[np.ndarray], session.run(outputs, {source: batch}))

    return run


def measure_extremes(
    model: onnx.ModelProto,
    by_channel: Sequence[str],
    whole: Sequence[str],
    batches: Iterable[np.ndarray],
    guard: Guard = nullcontext,
) -> Extremes:
    """The smallest and the largest values of float tensors on each batch.

    They are computed inside the graph, so that no activation has to be copied out.

    Args:
        model: a graph with one input, not modified.
        by_channel: tensors ``(N, C, H, W)`` of which each channel has its own extremes.
        whole: tensors that have one pair of extremes.
        batches: float32 ``(N, 3, S, S)`` each. Errors that reading them raises pass through unchanged.
        guard: is entered around every call of ONNX Runtime.

    Returns:
        For each tensor, two float64 arrays ``(batches, C)``; ``C`` is 1 for those of ``whole``.
    """
    return open_extremes(model, by_channel, whole, guard)(batches)


def open_extremes(
    model: onnx.ModelProto,
    by_channel: Sequence[str],
    whole: Sequence[str],
    guard: Guard = nullcontext,
    threads: int | None = None,
) -> Callable[[Iterable[np.ndarray]], Extremes]:
    """:func:`measure_extremes` as a function of one batch or more, which may be called repeatedly; the
    arguments are its own, and ``threads`` those of :func:`open_graph`."""
    names = [*by_channel, *whole]
    watched, outputs = _add_watches(model, by_channel, whole)
    run = open_graph(watched, guard, outputs, threads)

    def measure(batches: Iterable[np.ndarray]) -> Extremes:
        seen = [run(batch) for batch in batches]
        stacked = [
            np.stack([answers[i].reshape(-1) for answers in seen]).astype(np.float64)
            for i in range(len(outputs))
        ]
        lows, highs = stacked[: len(names)], stacked[len(names) :]
        return dict(zip(names, zip(lows, highs, strict=True), strict=True))

    return measure


def _add_watches(
    model: onnx.ModelProto,
    by_channel: Sequence[str],
    whole: Sequence[str],
) -> tuple[onnx.ModelProto, list[str]]:
    """A copy of ``model`` with the extremes of tensors as further outputs, and the names of these outputs."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    all_but_channels = np.array([0, 2, 3], np.int64)
    axes = numpy_helper.from_array(all_but_channels, "observed_axes")
    graph.initializer.append(axes)
    inputs = [
        *([name, axes.name] for name in by_channel),
        *([name] for name in whole),
    ]
    outputs = []
    for kind in EXTREMES:
        for i, read in enumerate(inputs):
            output = f"observed_{kind}_{i}"
            node = helper.make_node(kind, read, [output], output, keepdims=0)
            graph.node.append(node)
            graph.output.append(helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
            outputs.append(output)
    return result, outputs
