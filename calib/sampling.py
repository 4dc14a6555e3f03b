"""What layers read and give on calibration images: a sample of it, as matrices.

A conv is a product of its filters with patches of the map, so that one form serves convs and linears: rows
``(rows, K)`` of what the layer multiplies by its weights, ``(K, outputs)``. Of a depthwise conv each channel
has rows of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from .graph import get_input, get_node_name, name_value, read_constant_dims
from .recipe import count_groups, is_depthwise_node
from .running import Guard, open_graph

ROWS = 1024
"""The number of rows that all images together give for a layer, unless a caller wants more."""

DEPTHWISE_PART = 4
"""How many times fewer rows a depthwise conv gives than another layer: each channel has few weights, and rows
of its own, which take much memory."""

Rows = dict[str, np.ndarray]
"""The layer's name -> float32 ``(rows, K)``, or ``(rows, C, K)`` of a depthwise conv."""


@dataclass(frozen=True)
class Layer:
    """A conv or product with constant weights.

    Attributes:
        name: of the node.
        tensor: the name of what it reads.
        kernel: height and width of the filters; ``None`` for products.
        strides: of the conv.
        pads: rows and columns of zeros before and after the map, as ONNX orders them.
        dilations: of the conv.
        depthwise: whether each channel has filters of its own.
    """

    name: str
    tensor: str
    kernel: tuple[int, int] | None = None
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)
    depthwise: bool = False


def describe_layer(node: ir.Node, tensor: ir.Value) -> Layer | None:
    """``node`` as a layer that reads ``tensor``; ``None`` where its rows cannot be taken."""
    name = get_node_name(node)
    if node.op_type != "Conv":
        return Layer(name, name_value(tensor))
    dims = read_constant_dims(get_input(node, 1))
    attributes = node.attributes
    padding = attributes.get_string("auto_pad", "NOTSET")
    if dims is None or len(dims) != 4 or padding not in ("NOTSET", "VALID"):
        return None
    if is_depthwise_node(node) and dims[:2] != (count_groups(node), 1):
        return None
    down, right = attributes.get_ints("strides", (1, 1))
    top, left, bottom, end = attributes.get_ints("pads", (0, 0, 0, 0))
    dy, dx = attributes.get_ints("dilations", (1, 1))
    return Layer(
        name,
        name_value(tensor),
        (dims[2], dims[3]),
        (down, right),
        (top, left, bottom, end),
        (dy, dx),
        is_depthwise_node(node),
    )


def sample_rows(
    model: onnx.ModelProto,
    layers: Sequence[Layer],
    batches: Sequence[np.ndarray],
    guard: Guard = nullcontext,
    wanted: int = ROWS,
) -> Rows:
    """Rows of what each layer reads.

    Args:
        model: a graph with one input, not modified.
        layers: of this graph.
        batches: float32 ``(1, 3, S, S)`` each.
        guard: is entered around every call of ONNX Runtime.
        wanted: the largest number of rows that all images together give for a layer.

    Returns:
        The layer's name -> float32 ``(rows, K)``, or ``(rows, C, K)`` of a depthwise conv. Which rows are
        taken depends on the shapes and the number of the image alone.
    """
    take = open_rows(model, layers, len(batches), wanted, guard)
    found = [take(number, batch) for number, batch in enumerate(batches)]
    return {layer.name: np.concatenate([rows[layer.name] for rows in found]) for layer in layers}


def open_rows(
    model: onnx.ModelProto,
    layers: Sequence[Layer],
    total: int,
    wanted: int = ROWS,
    guard: Guard = nullcontext,
    threads: int | None = None,
) -> Callable[[int, np.ndarray], Rows]:
    """:func:`sample_rows` of one image at a time: a function of the image's place among ``total`` images, and
    of the image."""
    tensors = sorted({layer.tensor for layer in layers})
    run = open_graph(model, guard, tensors, threads, _make_outputs(model, tensors))

    def take(number: int, batch: np.ndarray) -> Rows:
        values = dict(zip(tensors, run(batch), strict=True))
        return {
            layer.name: _take_rows(values[layer.tensor], layer, number, limit_rows(layer, wanted, total))
            for layer in layers
        }

    return take


def limit_rows(layer: Layer, wanted: int, total: int) -> int:
    """The largest number of rows of one of ``total`` images."""
    return math.ceil((wanted // DEPTHWISE_PART if layer.depthwise else wanted) / total)


def spread(total: int, count: int) -> list[int]:
    """Numbers of ``count`` of ``total`` images, evenly spread; of all where there are fewer."""
    return sorted({i * total // count for i in range(count)}) if total > count else list(range(total))


def pick(batches: Iterable[np.ndarray], numbers: Collection[int]) -> list[np.ndarray]:
    """The batches of these numbers."""
    wanted = set(numbers)
    return [batch for i, batch in enumerate(batches) if i in wanted]


def _make_outputs(model: onnx.ModelProto, tensors: Iterable[str]) -> onnx.GraphProto:
    """What makes float tensors of ``model`` outputs of it that are none yet."""
    present = {output.name for output in model.graph.output}
    wanted = [name for name in tensors if name not in present]
    infos = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in wanted]
    return onnx.GraphProto(output=infos)


def _take_rows(value: np.ndarray, layer: Layer, number: int, limit: int) -> np.ndarray:
    """At most ``limit`` rows of what a layer reads on image ``number``."""
    rng = np.random.default_rng(number)
    if layer.kernel is None:
        rows = value.reshape(-1, value.shape[-1])
        chosen = _choose(rng, len(rows), limit)
        taken: np.ndarray = rows[chosen]
        return taken
    (top, left, bottom, right) = layer.pads
    padded = np.pad(value[0], ((0, 0), (top, bottom), (left, right)))
    height, width = (
        (size - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, dilation in zip(
            padded.shape[1:], layer.kernel, layer.strides, layer.dilations, strict=True
        )
    )
    places = _choose(rng, height * width, limit)
    y, x = places // width * layer.strides[0], places % width * layer.strides[1]
    dy, dx = (np.arange(k) * d for k, d in zip(layer.kernel, layer.dilations, strict=True))
    patches = padded[
        :, y[:, None, None] + dy[None, :, None], x[:, None, None] + dx[None, None, :]
    ]  # (C, rows, kh, kw)
    patches = patches.transpose(1, 0, 2, 3)
    shape = (len(places), len(padded), -1) if layer.depthwise else (len(places), -1)
    result: np.ndarray = patches.reshape(shape)
    return result


def _choose(rng: np.random.Generator, count: int, limit: int) -> np.ndarray:
    """Numbers of at most ``limit`` of ``count`` places, in ascending order."""
    if count <= limit:
        return np.arange(count)
    return np.sort(rng.choice(count, limit, replace=False))
