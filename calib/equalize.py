"""Exact rescaling of activations before quantization, so that one scale suits all channels of a tensor.

int8 activations have one scale a tensor, because TensorRT and fast CPU kernels take nothing else, but the
channels that a GELU leaves are not equally large. They are rescaled in float, exactly, before
calibration: the per-channel scale of a batch norm before the conv is changed, or a multiplication is
inserted, and the conv that reads the tensor multiplies its weights by the inverse: ``W x == (W e) (x /
e)``. :mod:`cmt_edge.calib.factors` chooses ``e``.

The idea is that of data-free quantization (Nagel et al., ICCV 2019, cross-layer equalization) and
SmoothQuant (Xiao et al., ICML 2023). A shift of each channel to its own centre was tried and left out: it was
better with many real images but worse with few or generated ones, because zero, the most frequent value, was
rounded then. One shift for all channels by a multiple of the scale leaves zero exact, but its addition took
2 to 5 % of the latency (docs/notes/int8.md).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir

from .factors import Extremes, Reader, choose_factor
from .graph import (
    add_constant,
    count_readers,
    find_producer,
    get_input,
    get_node_name,
    is_constant,
    make_node,
    name_value,
    open_view,
    read_constant,
    read_constant_dims,
    set_constant,
    write_model,
)
from .groups import MODULE, find_module
from .recipe import count_groups, is_depthwise_node
from .sampling import Layer, spread
from .statistics import Measured, Request, Statistics

SAMPLED_IMAGES = 16
"""The number of images whose rows decide how tensors are rescaled."""

Observed = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Tensor -> its lowest and highest values, ``(batches, C)`` each."""


@dataclass(frozen=True)
class Site:
    """A tensor that one conv reads, made by a per-channel multiplication and addition, or by a GELU.

    Attributes:
        conv: the conv.
        scale: the constant of the multiplication; ``None`` after a GELU.
        shift: the constant of the addition; ``None`` after a GELU.
    """

    conv: ir.Node
    scale: ir.Value | None = None
    shift: ir.Value | None = None

    @property
    def tensor(self) -> str:
        """The name of the tensor that the conv reads now."""
        return name_value(get_input(self.conv, 0))


@dataclass(frozen=True)
class Equalized:
    """The result of :func:`equalize`.

    Attributes:
        model: a copy with the same outputs up to rounding, which is easier to quantize. It is the given graph
            itself if nothing in it can be rescaled.
        telling: numbers of the batches on which some observed tensor of ``model`` reaches its largest
            magnitude over all batches, in ascending order. Symmetric ranges over these batches are the
            ranges over all of them. Empty if nothing was observed.
        reach: observed tensor of ``model`` -> its lowest and its highest value over all batches.
    """

    model: onnx.ModelProto
    telling: tuple[int, ...] = ()
    reach: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def equalize(
    model: onnx.ModelProto,
    statistics: Statistics,
    read: Collection[str] = (),
    *,
    rescales: bool = True,
) -> Equalized:
    """Rescale what the convs of a float graph read, and observe it.

    Args:
        model: float32 ONNX graph with input ``(batch, 3, S, S)``, not modified.
        statistics: measures on the calibration images.
        read: tensors that are observed besides those that are rescaled.
        rescales: whether anything is rescaled; otherwise the graph stays as it is.

    Raises:
        StepError: ONNX Runtime cannot run the graph.
    """
    with open_view(model) as view:
        sites = find_sites(view.graph) if rescales else []
        tensors = [site.tensor for site in sites]
        others = sorted(set(read) - set(tensors))
        if not sites and not others:
            return Equalized(model)
        layers = [Layer(get_node_name(site.conv), site.tensor, (1, 1)) for site in sites]
        count = len(statistics)
        sampled = spread(count, min(SAMPLED_IMAGES, max(count // 2, 1))) if sites else []
        found = statistics.measure(
            Request(model, tuple(tensors), tuple(others), tuple(range(count)), tuple(layers), tuple(sampled))
        )
        extremes: Observed = found.extremes
        if sites:
            extremes = _rescale_all(view.graph, sites, found, sampled)
            model = write_model(view)
            del model.graph.value_info[:]
    reach = {name: (float(low.min()), float(high.max())) for name, (low, high) in extremes.items()}
    return Equalized(model, _choose_telling(extremes), reach)


def _rescale_all(
    graph: ir.Graph,
    sites: list[Site],
    found: Measured,
    sampled: Collection[int],
) -> Observed:
    """Rescale all ``sites`` of ``graph``; the extremes of what it reads then.

    Args:
        graph: is modified.
        sites: of the graph.
        found: on all images, and the rows of those ``sampled``. Its rows are removed once they are used.
        sampled: numbers of images.
    """
    result = dict(found.extremes)
    for site in sites:
        low, high = result.pop(site.tensor)
        factor = _choose_factor(site, _split(low, high, sampled), found.rows.pop(get_node_name(site.conv)))
        _rescale(graph, site, factor)
        result[site.tensor] = low / factor, high / factor
    return result


def _choose_telling(extremes: Observed) -> tuple[int, ...]:
    """The batches of :attr:`Equalized.telling`, from the extremes of each tensor, ``(batches, C)``."""
    largest = [np.maximum(-low.min(1), high.max(1)) for low, high in extremes.values()]
    loudest = {int(values.argmax()) for values in largest}
    return tuple(sorted(loudest))


def find_sites(graph: ir.Graph) -> list[Site]:
    """The tensors that can be rescaled, in the order of the convs that read them."""
    sites = (_find_site(node) for node in graph if node.op_type == "Conv")
    return [site for site in sites if site is not None]


def _find_site(conv: ir.Node) -> Site | None:
    """What ``conv`` reads, if it can be rescaled."""
    data, weight = get_input(conv, 0), get_input(conv, 1)
    channels = _count_channels(conv)
    node = data.producer()
    if channels is None or node is None or count_readers(data) != 1 or count_readers(weight) != 1:
        return None
    if node.op_type == "Gelu":
        return None if is_depthwise_node(conv) else Site(conv)
    return _find_affine_site(conv, node, channels) if node.op_type == "Add" else None


def _find_affine_site(
    conv: ir.Node,
    addition: ir.Node,
    channels: int,
) -> Site | None:
    """The tensor after a multiplication and ``addition`` of one constant a channel, which nothing else
    reads."""
    product = next(
        (node for node in map(find_producer, addition.inputs) if node is not None),
        None,
    )
    if product is None or product.op_type != "Mul" or count_readers(product.outputs[0]) != 1:
        return None
    scale, shift = _find_first_constant(product), _find_first_constant(addition)
    if scale is None or shift is None:
        return None
    exclusive = all(
        count_readers(value) == 1 and math.prod(read_constant_dims(value) or ()) == channels
        for value in (scale, shift)
    )
    return Site(conv, scale, shift) if exclusive else None


def _find_first_constant(node: ir.Node) -> ir.Value | None:
    return next((value for value in node.inputs if is_constant(value)), None)


def _count_channels(conv: ir.Node) -> int | None:
    """The number of channels that ``conv`` reads.

    ``None`` if its weight is not a constant, or if it is neither dense nor depthwise.
    """
    dims = read_constant_dims(conv.inputs[1])
    if dims is None or len(dims) != 4:
        return None
    if not is_depthwise_node(conv):
        return dims[1]
    groups = count_groups(conv)
    return groups if dims[:2] == (groups, 1) else None


def _split(
    low: np.ndarray,
    high: np.ndarray,
    sampled: Collection[int],
) -> tuple[Extremes, Extremes]:
    """Extremes of each channel over all batches, and over those not ``sampled``, if there are any."""
    rest = sorted(set(range(len(low))) - set(sampled)) or list(sampled)
    return (
        Extremes(low.min(0), high.max(0)),
        Extremes(low[rest].min(0), high[rest].max(0)),
    )


def _choose_factor(
    site: Site,
    extremes: tuple[Extremes, Extremes],
    values: np.ndarray,
) -> np.ndarray:
    """By how much each channel is divided, ``(C,)``, from the extremes of the channels (see :func:`_split`)
    and values ``(rows, C)``."""
    weights = read_constant(get_input(site.conv, 1))
    reader = Reader(
        weights.reshape(*weights.shape[:2], -1),
        is_depthwise_node(site.conv),
        not any(site.conv.attributes.get_ints("pads", ())),
    )
    return choose_factor(*extremes, values, reader)


def _rescale(graph: ir.Graph, site: Site, factor: np.ndarray) -> None:
    """Divide one tensor by ``factor`` ``(C,)`` and multiply its conv, in float64, rounded once."""
    weight = get_input(site.conv, 1)
    along = (-1, 1, 1, 1) if is_depthwise_node(site.conv) else (1, -1, 1, 1)
    _set_constant(weight, read_constant(weight) * factor.reshape(along))
    if site.scale is None or site.shift is None:
        _insert_scale(graph, site.conv, 1 / factor)
        return
    for value in (site.scale, site.shift):
        by_channel = factor.reshape(1, -1, 1, 1)
        _set_constant(value, read_constant(value) / by_channel)


def _insert_scale(
    graph: ir.Graph,
    conv: ir.Node,
    scale: np.ndarray,
) -> None:
    """Insert a multiplication by ``scale`` ``(C,)`` between a tensor and the conv that reads it."""
    name = f"{get_node_name(conv)}_input"
    factor = add_constant(
        graph,
        f"{name}_scale",
        scale.reshape(1, -1, 1, 1).astype(np.float32),
    )
    product = make_node(
        "Mul",
        [conv.inputs[0], factor],
        f"{name}_scaled",
        f"{name}_scaled",
    )
    product.metadata_props[MODULE] = find_module(conv)
    graph.insert_before(conv, product)
    conv.replace_input_with(0, product.outputs[0])


def _set_constant(value: ir.Value, array: np.ndarray) -> None:
    """Give a constant new values of its own shape, as float32."""
    set_constant(
        value,
        array.reshape(read_constant_dims(value) or ()).astype(np.float32),
    )
