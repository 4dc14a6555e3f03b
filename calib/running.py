"""Running an ONNX graph in ONNX Runtime, and watching tensors inside it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import cast

import numpy as np
import onnx
from onnx import helper, numpy_helper

ONNX_RUNTIME_FATAL = 4
"""ONNX Runtime's log level at which it prints fatal errors only; other errors are raised."""

EXTREMES = ("ReduceMin", "ReduceMax")
"""The operations that :func:`measure_extremes` adds to a graph."""

LARGE_BYTES = 256 << 20
"""From this size on, in bytes, other libraries get a graph in a file and not as a string: ONNX Runtime keeps
the string as long as its session lives, and onnxsim as long as it works."""

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
    added: onnx.GraphProto | None = None,
) -> Run:
    """Open ``model`` in ONNX Runtime on the CPU.

    Args:
        model: a graph with one input.
        guard: is entered around every call of ONNX Runtime.
        outputs: names of the wanted outputs, all by default.
        threads: number of them; all cores by default.
        added: nodes, constants and outputs that the opened graph has besides, behind those of ``model``.

    Returns:
        A function from a batch, float32 ``(N, 3, S, S)``, to the outputs, ``(N, ...)`` each.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = ONNX_RUNTIME_FATAL
    options.intra_op_num_threads = threads or 0
    with guard(), lying_in_file(model, added) as path:
        session = ort.InferenceSession(
            path or b"".join(part.SerializeToString() for part in _list_parts(model, added)),
            options,
            providers=["CPUExecutionProvider"],
        )
    source = model.graph.input[0].name

    def run(batch: np.ndarray) -> list[np.ndarray]:
        with guard():
            return cast(list[np.ndarray], session.run(outputs, {source: batch}))

    return run


@contextmanager
def lying_in_file(model: onnx.ModelProto, added: onnx.GraphProto | None = None) -> Iterator[str | None]:
    """The path of a file with ``model`` and with what is ``added`` to its graph; it goes when the block ends.
    ``None`` where the graph is smaller than :data:`LARGE_BYTES`, or where the file cannot be written."""
    with ExitStack() as stack:
        yield _write(_list_parts(model, added), stack) if model.ByteSize() >= LARGE_BYTES else None


def _list_parts(model: onnx.ModelProto, added: onnx.GraphProto | None) -> list[onnx.ModelProto]:
    """Messages that are one message with the fields of all, if they are stored behind each other."""
    return [model, *([] if added is None else [onnx.ModelProto(graph=added)])]


def _write(parts: Sequence[onnx.ModelProto], stack: ExitStack) -> str | None:
    """The path of a file of these messages, which ``stack`` removes; ``None`` where there is no room."""
    try:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="cmt-edge-"))
        path = Path(folder) / "graph.onnx"
        with path.open("wb") as file:
            for part in parts:
                file.write(part.SerializeToString())
    except OSError:
        return None
    return str(path)


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
    watches, outputs = _make_watches(by_channel, whole)
    run = open_graph(model, guard, outputs, threads, watches)

    def measure(batches: Iterable[np.ndarray]) -> Extremes:
        seen = [run(batch) for batch in batches]
        stacked = [
            np.stack([answers[i].reshape(-1) for answers in seen]).astype(np.float64)
            for i in range(len(outputs))
        ]
        lows, highs = stacked[: len(names)], stacked[len(names) :]
        return dict(zip(names, zip(lows, highs, strict=True), strict=True))

    return measure


def _make_watches(
    by_channel: Sequence[str],
    whole: Sequence[str],
) -> tuple[onnx.GraphProto, list[str]]:
    """What computes the extremes of tensors as further outputs of a graph, and the names of these outputs."""
    graph = onnx.GraphProto()
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
    return graph, outputs
