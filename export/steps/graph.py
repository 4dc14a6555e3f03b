"""The graph: from the rewritten model over tracing and simplifying to the graph of one precision."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import onnx
from torch import nn

from cmt_edge.calib import CalibrationSet, Quantized, Recipe, quantize
from cmt_edge.calib.integer_layers import Ranges, measure_conv_ranges, place_for_integers
from cmt_edge.calib.quantize import keep_float
from cmt_edge.calib.statistics import Batches, LocalStatistics, Statistics
from cmt_edge.cmt import choose_head, fuse
from cmt_edge.deploy import Preprocess
from cmt_edge.deploy.backends.torch import TorchSession
from cmt_edge.deploy.files import find_cache_folder

from ..config import OPSET, ExportConfig
from ..kept_traces import trace_once
from ..to_onnx import (
    FUSE_ATOL,
    GRAPH_ATOL,
    compute_outputs,
    export_onnx,
    require_parity,
    simplify,
)
from ..typed import observe
from .images import OBSERVED_IMAGES, ProgressCallback
from .reference import Reference

Differences = dict[str, float]
"""Step -> the largest difference of its outputs from the reference's."""

DYNAMIC_SIZES = (1, 3, 8)
"""Batch sizes that a graph with a dynamic batch is checked with."""


def fuse_model(
    reference: Reference,
    head: str,
    target: str,
) -> tuple[nn.Module, Differences]:
    """The reference with the exact rewrites of its family for ``target``."""
    fused = choose_head(fuse(reference.classifier, target=target), head)
    outputs = TorchSession(fused).run(reference.batch)
    allowed = max(FUSE_ATOL, reference.resolution)
    difference = require_parity("fuse", outputs, reference.outputs, allowed)
    return fused, {"fuse": difference}


def trace_model(
    fused: nn.Module,
    reference: Reference,
    config: ExportConfig,
) -> tuple[onnx.ModelProto, Differences]:
    """The float32 graph of ``fused`` with a dynamic batch; an equal one of an earlier run is used again, and
    compared again, unless the cache is left out.

    Raises:
        StepError: torch.onnx refuses the model.
    """
    step = "export to ONNX"
    differences: Differences = {}

    def compare(graph: onnx.ModelProto) -> None:
        differences["onnx"] = _compare_graph(step, graph, reference)

    def trace() -> onnx.ModelProto:
        return export_onnx(fused, config.img_size, OPSET, config.outputs, compare)

    if not config.keeps_trace:
        return trace(), differences
    which = [config.model_name, config.head, *config.outputs, config.rewriting_target, reference.kind]
    sizes = [config.classes, config.img_size, OPSET]
    return trace_once(fused, [*which, *sizes], trace, compare), differences


def simplify_graph(graph: onnx.ModelProto) -> onnx.ModelProto:
    """``graph`` after onnxsim, not yet compared: :func:`compare_simplified` does without it."""
    return simplify(graph)


def compare_simplified(graph: onnx.ModelProto, reference: Reference) -> Differences:
    """The difference of what :func:`simplify_graph` made."""
    return {"simplify": _compare_graph("simplify", graph, reference)}


def _compare_graph(step: str, graph: onnx.ModelProto, reference: Reference) -> float:
    """The largest difference of ``graph`` from the reference on the golden images.

    Raises:
        ParityError: it is beyond what is allowed.
    """
    ours = compute_outputs(graph, reference.batch, step)
    allowed = max(GRAPH_ATOL, reference.resolution)
    return require_parity(step, ours, reference.outputs, allowed)


def compare_batch_sizes(graph: onnx.ModelProto, reference: Reference) -> Differences:
    """Differences of ``graph`` with batches of :data:`DYNAMIC_SIZES`."""
    allowed = max(GRAPH_ATOL, reference.resolution)
    differences: Differences = {}
    for count in DYNAMIC_SIZES:
        step = f"dynamic batch of {count}"
        index = np.arange(count) % len(reference.batch)
        ours = compute_outputs(graph, reference.batch[index], step)
        expected = [output[index] for output in reference.outputs]
        differences[step] = require_parity(step, ours, expected, allowed)
    return differences


def calibrate_graph(
    graph: onnx.ModelProto,
    data: CalibrationSet,
    spec: Preprocess,
    recipe: Recipe,
    cached: bool,
    progress: ProgressCallback,
    statistics: Statistics | None = None,
) -> Quantized:
    """``graph`` in int8, calibrated on ``data`` by ``recipe`` with nothing kept float; an equal one of an
    earlier run is used again where ``cached``. ``statistics`` measures on the images, by default this process
    does.

    Raises:
        GateError: the graph breaks a rule for int8.
    """
    cache = find_cache_folder() / "calibrated" if cached else None
    plain = replace(recipe, keep_float=())
    return quantize(graph, data, spec, plain, cache=cache, progress=progress, statistics=statistics)


def measure_ranges(
    quantized: Quantized,
    data: CalibrationSet,
    spec: Preprocess,
    statistics: Statistics | None = None,
) -> Ranges:
    """The ranges of the convs' results, for ONNX Runtime; ``statistics`` measures on the images, this process
    by default.

    Raises:
        StepError: ONNX Runtime cannot run the graph.
    """
    used = statistics or LocalStatistics(Batches(data, spec, None))
    return measure_conv_ranges(quantized.model, used)


def choose_graph(
    graph: onnx.ModelProto,
    quantized: Quantized | None,
    precision: str,
    kept_float: tuple[str, ...],
    ranges: Ranges | None = None,
) -> onnx.ModelProto:
    """The graph of one precision: ``graph``, or for int8 the calibrated one with groups taken back to float.

    Args:
        ranges: of the convs, where ONNX Runtime reads the graph: see :mod:`cmt_edge.calib.integer_layers`.

    Raises:
        InputError: a name in ``kept_float`` is no group of the graph, or nothing would be left in int8.
    """
    if precision != "int8":
        return graph
    assert quantized is not None, "int8 was asked for, so the graph was calibrated"
    chosen = keep_float(quantized, kept_float) if kept_float else quantized.model
    return chosen if ranges is None else place_for_integers(chosen, ranges)


def observe_ranges(
    graph: onnx.ModelProto,
    data: CalibrationSet,
    reference: Reference,
    spec: Preprocess,
) -> dict[str, float]:
    """Largest absolute value of every tensor on the golden images and the first :data:`OBSERVED_IMAGES` of
    ``data``."""
    golden = np.split(reference.batch, len(reference.batch))
    images = itertools.islice(data.batches(spec), OBSERVED_IMAGES)
    return observe(graph, itertools.chain(golden, images))
