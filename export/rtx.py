"""The steps of ``--format rtx``: TensorRT for RTX compiles the graph here, without a GPU, and its verdict
goes into the bundle."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import onnx

from cmt_edge.calib.groups import MODULE
from cmt_edge.deploy import Bundle
from cmt_edge.deploy.bundle import COMPILED, ONNX, PORTABLE_ENGINE, Manifest, make_plain
from cmt_edge.deploy.bundle.sections import BATCH, FLOAT32, CompiledDetails, CompiledEntry, TensorEntry
from cmt_edge.deploy.progress import Progress
from cmt_edge.deploy.tensorrt.bindings import RTX
from cmt_edge.deploy.tensorrt.building import PortablePlan, build_portable_plan
from cmt_edge.deploy.tensorrt.compiled import EngineFacts, describe_kernels, summarise_kernels
from cmt_edge.deploy.tensorrt.kernels import read_kernels

from .config import ExportConfig
from .to_onnx import INPUT, set_batch

ATTENTION = "Softmax"
"""The operation of which every attention of the models has one."""
GRAPH = "model.onnx"
"""Name of a graph that is compiled apart from a bundle."""


def add_portable_engine(
    config: ExportConfig,
    bundle: Bundle,
    graph: onnx.ModelProto,
    progress: Progress,
) -> tuple[Manifest, dict[str, bytes]]:
    """Compile the graph of a staged bundle ahead of time.

    Args:
        config: names the compute capabilities.
        bundle: staged, of format ``"rtx"``.
        graph: what ``model.onnx`` was written from; its nodes still carry the names of their modules.
        progress: draws the steps.

    Returns:
        The manifest with the compiler's summary in it, and the files that it names: the engine and the list
        of its kernels.

    Raises:
        StepError: the build failed; says what the compiler said.
    """
    with progress.step("build the engine"):
        plan = build_portable_plan(
            bundle.file(ONNX),
            bundle.manifest.files[ONNX].sha256,
            bundle.manifest.input,
            compute=tuple(f"SM{name}" for name in config.compute),
            workspace=config.workspace,
            progress=progress,
        )
    kernels, facts = read_kernels(plan.layers), describe_plan(plan, graph, config.compute)
    details = CompiledDetails(kernels=describe_kernels(kernels, facts.blocks))
    compiled = replace(summarise_kernels(kernels, facts, COMPILED), engine=PORTABLE_ENGINE)
    content = json.dumps(make_plain(details), ensure_ascii=False) + "\n"
    return replace(bundle.manifest, compiled=compiled), {
        PORTABLE_ENGINE: plan.plan,
        COMPILED: content.encode(),
    }


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
    source = TensorEntry(name=INPUT, shape=(batch or BATCH, 3, size, size), dtype=FLOAT32)
    with tempfile.TemporaryDirectory(prefix="cmt-edge-") as folder:
        path = Path(folder) / GRAPH
        path.write_bytes(content)
        plan = build_portable_plan(
            path,
            hashlib.sha256(content).hexdigest(),
            source,
            compute=tuple(f"SM{name}" for name in compute),
            aux_streams=aux_streams,
            progress=progress,
        )
    return summarise_kernels(read_kernels(plan.layers), describe_plan(plan, graph, compute))


def describe_plan(plan: PortablePlan, graph: onnx.ModelProto, compute: tuple[str, ...]) -> EngineFacts:
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


def name_blocks(graph: onnx.ModelProto) -> dict[str, str]:
    """Name of each operation -> the block of the model that it is in; operations without a module are left
    out."""
    found = {}
    for node in graph.graph.node:
        module = next((prop.value for prop in node.metadata_props if prop.key == MODULE), "")
        if module:
            found[node.name] = name_block(module)
    return found


def name_block(module: str) -> str:
    """The block that a module belongs to: its path up to the last number, ``stages.2.blocks.5`` of
    ``stages.2.blocks.5.ffn.expand``; of a path without numbers the first part."""
    parts = module.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else parts[0]
