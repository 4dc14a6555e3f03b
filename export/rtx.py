"""The steps of ``--format rtx``: TensorRT for RTX compiles the graph here, without a GPU, and its verdict
goes into the bundle."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx

from cmt_edge.deploy import Bundle
from cmt_edge.deploy.bundle import COMPILED, ONNX, PORTABLE_ENGINE, Manifest, make_plain
from cmt_edge.deploy.bundle.sections import BATCH, FLOAT32, CompiledDetails, CompiledEntry, TensorEntry
from cmt_edge.deploy.progress import Progress
from cmt_edge.deploy.tensorrt.bindings import RTX
from cmt_edge.deploy.tensorrt.building import PortableOptions, PortablePlan, build_portable_plan
from cmt_edge.deploy.tensorrt.compiled import EngineFacts, describe_kernels, summarise_kernels
from cmt_edge.deploy.tensorrt.kernels import read_kernels

from .blocks import name_blocks
from .config import ExportConfig
from .to_onnx import INPUT, set_batch
from .typed import observe, type_graph

ATTENTION = "Softmax"
"""The operation of which every attention of the models has one."""
WIDENED = "int8 -> fp32"
"""What a convolution in int8 reads and writes."""
MEGABYTE = 1e6
"""Bytes in a megabyte."""
GRAPH = "model.onnx"
"""Name of a graph that is compiled apart from a bundle."""


def add_portable_engine(
    config: ExportConfig,
    bundle: Bundle,
    graph: onnx.ModelProto,
    progress: Progress,
    notes: tuple[str, ...] = (),
) -> tuple[Manifest, dict[str, bytes]]:
    """Compile the graph of a staged bundle ahead of time.

    Args:
        config: names the compute capabilities.
        bundle: staged, of format ``"rtx"``.
        graph: what ``model.onnx`` was written from; its nodes still carry the names of their modules.
        progress: draws the steps.
        notes: go into the summary.

    Returns:
        The manifest with the compiler's summary, and the files that it names: engine and list of kernels.

    Raises:
        StepError: the build failed; says what the compiler said.
    """
    options = PortableOptions(_name_targets(config.compute), config.workspace)
    with progress.step("build the engine"):
        plan = build_portable_plan(
            bundle.file(ONNX),
            bundle.manifest.files[ONNX].sha256,
            bundle.manifest.input,
            options,
            progress=progress,
        )
    kernels = read_kernels(plan.layers)
    facts = describe_plan(plan, graph, config.compute)
    summary = summarise_kernels(kernels, facts, COMPILED)
    compiled = replace(summary, engine=PORTABLE_ENGINE, notes=notes)
    details = CompiledDetails(kernels=describe_kernels(kernels, facts.blocks))
    return replace(bundle.manifest, compiled=compiled), {
        PORTABLE_ENGINE: plan.plan,
        COMPILED: _encode_details(details),
    }


def _name_targets(compute: Sequence[str]) -> tuple[str, ...]:
    """NVIDIA's names of compute capabilities, ``"SM86"``."""
    return tuple(f"SM{name}" for name in compute)


def _encode_details(details: CompiledDetails) -> bytes:
    """The content of :data:`COMPILED`."""
    content = json.dumps(make_plain(details), ensure_ascii=False) + "\n"
    return content.encode()


def compile_graph(
    graph: onnx.ModelProto,
    batch: int,
    progress: Progress,
    *,
    compute: tuple[str, ...] = (),
    aux_streams: int | None = RTX.aux_streams,
) -> CompiledEntry:
    """What the compiler makes of a typed graph, whose engine is not kept.

    Args:
        graph: with the names of modules at its nodes.
        batch: its batch size, 0 for a dynamic one.
        progress: draws the steps.
        compute: compute capabilities without the point; none for a portable engine.
        aux_streams: the largest number of streams besides the caller's, ``None`` for the compiler's choice.

    Raises:
        StepError: the build failed.
    """
    content = set_batch(graph, batch).SerializeToString(deterministic=True)
    size = graph.graph.input[0].type.tensor_type.shape.dim[2].dim_value
    source = TensorEntry(
        name=INPUT,
        shape=(batch or BATCH, 3, size, size),
        dtype=FLOAT32,
    )
    with tempfile.TemporaryDirectory(prefix="cmt-edge-") as folder:
        path = Path(folder) / GRAPH
        path.write_bytes(content)
        plan = build_portable_plan(
            path,
            hashlib.sha256(content).hexdigest(),
            source,
            PortableOptions(_name_targets(compute), aux_streams=aux_streams),
            progress=progress,
        )
    return summarise_kernels(read_kernels(plan.layers), describe_plan(plan, graph, compute))


def compile_candidates(
    config: ExportConfig,
    graphs: Mapping[str, onnx.ModelProto],
    batch: np.ndarray,
    progress: Progress,
) -> dict[str, CompiledEntry]:
    """What the compiler makes of each precision.

    Args:
        config: names the batch size and the compute capabilities.
        graphs: precision -> float32 or Q/DQ graph.
        batch: images that the ranges are observed on, float32 ``(K, 3, S, S)``.
        progress: draws the steps.
    """
    found = {}
    for precision, graph in graphs.items():
        observed = observe(graph, np.split(batch, len(batch)))
        typed = type_graph(graph, precision, observed).model
        found[precision] = compile_graph(
            typed,
            config.batch,
            progress,
            compute=config.compute,
        )
    return found


def explain_slower_int8(int8: CompiledEntry, fp16: CompiledEntry) -> str:
    """Why int8 would be slower than fp16, with the figures; ``""`` where an estimate says that it is faster.

    Every GPU of the estimates must agree, whose ratios of memory and arithmetic differ by far.
    """
    pairs = zip(int8.estimates, fp16.estimates, strict=True)
    if not all(slow.total_ms >= fast.total_ms for slow, fast in pairs):
        return ""
    widened = sum(count for types, count in int8.types.items() if types == WIDENED)
    reason = f"; {widened} of its products read int8 and write float32" if widened else ""
    return (
        "int8 would be slower here, because its kernels read and write"
        f" {int8.activation_bytes / MEGABYTE:.1f} MB of activations instead of"
        f" {fp16.activation_bytes / MEGABYTE:.1f} MB, and there are {int8.kernel_count} instead of"
        f" {fp16.kernel_count}{reason}: use --precision fp16"
    )


def note_slower_int8(
    config: ExportConfig,
    manifest: Manifest,
    graph: onnx.ModelProto,
    batch: np.ndarray,
    progress: Progress,
) -> Manifest:
    """The manifest of an int8 bundle, with a note where fp16 would be faster.

    Args:
        config, batch, progress: as :func:`compile_candidates`.
        manifest: with the compiler's summary.
        graph: float32.
    """
    assert manifest.compiled is not None, "the engine was just built"
    other = compile_candidates(config, {"fp16": graph}, batch, progress)["fp16"]
    note = explain_slower_int8(manifest.compiled, other)
    notes = (note,) if note else ()
    return replace(manifest, compiled=replace(manifest.compiled, notes=notes))


def choose_by_compiler(
    config: ExportConfig,
    graphs: Mapping[str, onnx.ModelProto],
    batch: np.ndarray,
    progress: Progress,
) -> tuple[str, str]:
    """The precision that ``auto`` takes, by the kernels and bytes that the compiler makes of each; and why.

    Args:
        config, graphs, batch, progress: as :func:`compile_candidates`; ``graphs`` has fp16 and int8.
    """
    found = compile_candidates(config, graphs, batch, progress)
    slower = explain_slower_int8(found["int8"], found["fp16"])
    if slower:
        return "fp16", f"auto chose fp16 by the compiler's figures: {slower.partition(': use ')[0]}"
    return "int8", (
        "auto chose int8 by the compiler's figures: its kernels read and write"
        f" {found['int8'].activation_bytes / MEGABYTE:.1f} MB of activations instead of"
        f" {found['fp16'].activation_bytes / MEGABYTE:.1f} MB"
    )


def describe_plan(
    plan: PortablePlan,
    graph: onnx.ModelProto,
    compute: tuple[str, ...],
) -> EngineFacts:
    """What is known of an engine besides its kernels."""
    return EngineFacts(
        product=RTX.name,
        version=plan.version,
        engine_bytes=len(plan.plan),
        targets=tuple(f"{name[:-1]}.{name[-1]}" for name in compute),
        seconds=plan.seconds,
        blocks=name_blocks(graph),
        attentions=sum(node.op_type == ATTENTION for node in graph.graph.node),
    )
