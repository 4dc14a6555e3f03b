"""The steps that NVIDIA's compilers need: precision written into the graph, TensorRT's engine, and a stand-in
for an engine where there is no GPU.

Besides :mod:`cmt_edge.export.rtx`, nothing else in ``export`` imports :mod:`cmt_edge.deploy.tensorrt`, and
this module is imported only for ``--format trt`` and ``--format rtx``, and for OpenVINO's fp16, whose graph
has its precision written into it as well.
"""

from __future__ import annotations

import onnx

from cmt_edge.deploy import Bundle, Predictor
from cmt_edge.deploy.backends import LoadOptions
from cmt_edge.deploy.backends.onnxruntime import OnnxRuntimeSession
from cmt_edge.deploy.bundle import LOGITS, ONNX, Manifest
from cmt_edge.deploy.errors import (
    GateError,
    ParityError,
    RuntimeMissingError,
)
from cmt_edge.deploy.measure.tolerance import find_tolerance, measure_distance
from cmt_edge.deploy.progress import Progress
from cmt_edge.deploy.tensorrt.bindings import PRODUCTS, RTX, Product
from cmt_edge.deploy.tensorrt.build import finish_bundle, require_compiler, require_tensorrt
from cmt_edge.deploy.tensorrt.engine import EngineOptions
from cmt_edge.deploy.tensorrt.parser_rules import find_parser_problems
from cmt_edge.startup import name_program

from .config import ExportConfig
from .steps import Differences, Reference
from .to_onnx import compute_outputs
from .typed import Typed, round_graph, type_graph

SHOWN_OBJECTIONS = 5
"""Number of a parser's objections that an error names."""


def check_builder(config: ExportConfig) -> None:
    """Fail before the long work where the engine cannot be built.

    Raises:
        InputError: the workspace is out of range.
        RuntimeMissingError: the compiler is missing, or for TensorRT a GPU, and the engine is to be built
        here.
    """
    EngineOptions(config.workspace).check()
    if not config.build:
        return
    if config.format == "rtx":
        require_compiler(RTX)
        return
    try:
        require_tensorrt(config.device)
    except RuntimeMissingError as exc:
        raise RuntimeMissingError(
            exc.what,
            why=exc.why,
            remedy="--no-build writes a complete bundle without the engine;"
            f" {name_program('build')} finishes it on the device",
        ) from exc


def write_precision(
    config: ExportConfig,
    graph: onnx.ModelProto,
    observed: dict[str, float],
    reference: Reference,
) -> tuple[Typed, Differences]:
    """``graph`` with its precision written into it.

    Args:
        config: says the precision and how much it may change the outputs.
        graph: float32 or Q/DQ.
        observed: largest absolute value by tensor; empty for fp32.
        reference: whose golden images are compared.

    Raises:
        GateError: TensorRT's parser would refuse the graph.
        ParityError: the precision changes an output by more than allowed.
    """
    result = type_graph(graph, config.precision, observed)
    if config.has_engine:
        _require_readable(result.model, PRODUCTS[config.format])
    difference = _require_same(config, graph, result.model, reference)
    return result, {f"typed {config.precision}": difference}


def _require_readable(graph: onnx.ModelProto, product: Product) -> None:
    """Raise :class:`GateError` for a graph that the parser of ``product`` would refuse."""
    findings = find_parser_problems(graph, product)
    if findings:
        raise GateError(
            f"{product.title}'s parser would refuse the graph",
            why="; ".join(findings[:SHOWN_OBJECTIONS]),
            remedy="nothing was written; report the model, or export --format onnx or openvino",
        )


def _require_same(
    config: ExportConfig,
    before: onnx.ModelProto,
    after: onnx.ModelProto,
    reference: Reference,
) -> float:
    """The largest difference that writing the precision made, with every float16 tensor rounded."""
    step = "write the precision into the graph"
    ours = compute_outputs(round_graph(after), reference.batch, step)
    expected = compute_outputs(before, reference.batch, step)
    pairs = zip(ours, expected, strict=True)
    differences = [measure_distance(found, golden) for found, golden in pairs]
    kind = None if reference.kind == LOGITS else reference.kind
    for name, found, output in zip(config.outputs, differences, reference.outputs, strict=True):
        allowed = find_tolerance(output, config.precision, config.atol, kind)
        if not found <= allowed:
            raise ParityError(
                f"{config.precision} changes the {name} by {found:.3g}, allowed are {allowed:.3g}",
                remedy="nothing was written; give typical images with --data, allow more with --atol, or use"
                " --precision fp32",
            )
    return max(differences)


def add_engine(
    config: ExportConfig,
    bundle: Bundle,
    progress: Progress,
) -> tuple[Manifest, dict[str, bytes]]:
    """What ``cmt-build`` does, on a staged bundle.

    Returns:
        The manifest with the engine in it, and the files that it names.

    Raises:
        StepError: the build failed.
        GateError: the engine does not compute in what was asked, or differs from the reference.
    """
    finished = finish_bundle(
        bundle,
        EngineOptions(config.workspace),
        device=config.device,
        atol=config.atol,
        progress=progress,
    )
    return finished.manifest, finished.files


def emulate(config: ExportConfig, bundle: Bundle) -> Predictor:
    """A typed graph on the CPU with every float16 tensor rounded, for where the engine is not built."""
    graph = round_graph(onnx.load(bundle.file(ONNX)))
    session = OnnxRuntimeSession(graph.SerializeToString(), LoadOptions(threads=config.threads))
    if config.precision != "fp32":
        session.runtime += ", float16 emulated"
    return Predictor(
        session,
        config.preprocess,
        bundle.labels,
        batch=config.batch,
        head=config.head,
    )
