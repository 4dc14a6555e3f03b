"""A small TensorRT bundle whose graph computes what the fake runtime does: its golden vectors hold."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

import cmt_edge.deploy.cli.build
from cmt_edge.deploy import Bundle
from cmt_edge.deploy.backends.fake import FakeSession
from cmt_edge.deploy.bundle import ONNX, PORTABLE_ENGINE
from cmt_edge.deploy.bundle.sections import CompiledEntry, TensorEntry, TypingEntry
from cmt_edge.deploy.progress import Progress
from cmt_edge.deploy.tensorrt.bindings import open_bindings
from cmt_edge.deploy.tensorrt.building import (
    PORTABLE_TIME_LIMIT_S,
    PortableOptions,
    PortablePlan,
    build_portable_plan,
)
from helpers.bundles import LABELS, SIZE, make_bundle


def forget_fakes() -> None:
    """Import TensorRT, CUDA and what opens them anew."""
    open_bindings.cache_clear()
    for name in [*sys.modules]:
        if name.split(".")[0] in ("tensorrt", "tensorrt_rtx", "cuda") or name in (
            "cmt_edge.deploy.tensorrt.trt",
            "cmt_edge.deploy.tensorrt.rtx",
        ):
            del sys.modules[name]


def tiny_graph(batch: int | str = 1, half: bool = True):
    """Means of the colour channels times a matrix, in float16 between float32 ends."""
    kind, dtype = (TensorProto.FLOAT16, np.float16) if half else (TensorProto.FLOAT, np.float32)
    matrix = numpy_helper.from_array(FakeSession(len(LABELS)).matrix.astype(dtype), "matrix")
    nodes = [
        helper.make_node("Cast", ["input"], ["x"], "cast_in", to=kind),
        helper.make_node("GlobalAveragePool", ["x"], ["mean"], "pool"),
        helper.make_node("Flatten", ["mean"], ["flat"], "flatten"),
        helper.make_node("MatMul", ["flat", "matrix"], ["y"], "head"),
        helper.make_node("Cast", ["y"], ["logits"], "cast_out", to=TensorProto.FLOAT),
    ]
    source = helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, SIZE, SIZE])
    target = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, len(LABELS)])
    graph = helper.make_graph(nodes, "tiny", [source], [target], [matrix])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def trt_bundle(
    target: Path,
    *,
    batch: int | str = 1,
    half: bool = True,
    format: str = "trt",
    **entries: Any,
) -> Bundle:
    """An unbuilt bundle of format ``trt`` or ``rtx``, with more ``entries`` and ``members``."""
    precision = "fp16" if half else "fp32"
    return make_bundle(
        target,
        members={ONNX: tiny_graph(batch, half).SerializeToString()} | entries.pop("members", {}),
        format=format,
        precision=precision,
        input=TensorEntry(name="input", shape=(batch, 3, SIZE, SIZE), dtype="float32"),
        outputs=(TensorEntry(name="logits", shape=(batch, len(LABELS)), dtype="float32"),),
        typing=TypingEntry(operations={precision: 2}, islands=(), observed=None),
        **entries,
    )


def make_rtx_bundle(target: Path) -> Bundle:
    """An unsigned bundle with an engine from another machine."""
    engine = {PORTABLE_ENGINE: make_plan()}
    return trt_bundle(target, format="rtx", members=engine, compiled=make_compiled())


def make_compiled(engine: str | None = PORTABLE_ENGINE) -> CompiledEntry:
    """What a manifest says of a portable engine."""
    return CompiledEntry(
        product="tensorrt_rtx",
        version="1.7.1.116",
        targets=(),
        seconds=3.0,
        engine=engine,
        engine_bytes=10,
        kernels={"kgen": 3},
        sync_nodes=0,
        fused=1,
        attention=0,
        conversions=0,
        types={},
        activation_bytes=10,
        weight_bytes=10,
        blocks=(),
        estimates=(),
        details=None,
    )


def make_plan() -> bytes:
    """An engine that the fake deserialises."""
    header = {"typed": True, "detailed": True, "profile": None}
    return b"FAKEPLAN" + json.dumps(header).encode() + b"\n" + tiny_graph().SerializeToString()


def build_portable(
    bundle: Bundle,
    *,
    time_limit: float = PORTABLE_TIME_LIMIT_S,
    **options: Any,
) -> PortablePlan:
    """The engine that TensorRT for RTX makes of a bundle's graph without a GPU."""
    manifest = bundle.manifest
    return build_portable_plan(
        bundle.file(ONNX),
        manifest.files[ONNX].sha256,
        manifest.input,
        PortableOptions(**options),
        time_limit=time_limit,
        progress=Progress(quiet=True),
    )


def build(bundle: Bundle, *flags: object) -> int:
    """The exit code of ``cmt-build`` with these flags."""
    forget_fakes()
    return cmt_edge.deploy.cli.build.main([str(bundle.path), *map(str, flags)])
