"""ONNX Runtime: serves ``model.onnx`` of every bundle, on every platform it has wheels for."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ..bundle import ONNX, Bundle
from ..bundle.sections import ExecutedPrecision
from ..errors import InputError, RuntimeMissingError
from .base import LoadOptions, Session

CONVERSIONS = {"QuantizeLinear", "DequantizeLinear", "Cast", "ReorderInput", "ReorderOutput"}
ERRORS_ONLY = 3


def check(device: str | None = None) -> str:
    """Name and version of the runtime; only the CPU is served."""
    if device is not None and device.upper() != "CPU":
        raise RuntimeMissingError(
            f"the ONNX Runtime backend has no device {device!r}", remedy="use --device CPU"
        )
    return f"onnxruntime {ort.__version__}"


def compile(onnx: Path, folder: Path) -> list[Path]:
    """Nothing to prepare: ONNX Runtime reads ``model.onnx`` itself."""
    return []


class OnnxRuntimeSession(Session):
    device = "CPU"

    def __init__(self, model: Path | bytes, options: LoadOptions) -> None:
        self._model = model if isinstance(model, bytes) else str(model)
        self.runtime = check(options.device)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._threads = options.threads or cores
        if options.throughput:  # one thread an inference, as many inferences as threads
            self.parallelism, self._threads = self._threads, 1
        self._session = self._open()
        self._input = self._session.get_inputs()[0].name

    def _open(self, profile_prefix: str | None = None) -> ort.InferenceSession:
        settings = ort.SessionOptions()
        settings.log_severity_level = ERRORS_ONLY
        settings.intra_op_num_threads = self._threads
        settings.inter_op_num_threads = 1
        if profile_prefix:
            settings.enable_profiling = True
            settings.profile_file_prefix = profile_prefix
        return ort.InferenceSession(self._model, settings, providers=["CPUExecutionProvider"])

    def run(self, batch: np.ndarray) -> list[np.ndarray]:
        return self._session.run(None, {self._input: batch})

    def executed(self, batch: np.ndarray, repeats: int = 10) -> ExecutedPrecision:
        with tempfile.TemporaryDirectory() as folder:
            session = self._open(str(Path(folder) / "profile"))
            for _ in range(repeats + 2):
                session.run(None, {self._input: batch})
            events = json.loads(Path(session.end_profiling()).read_text())
        return _summarise(events)

    def close(self) -> None:
        del self._session


def _summarise(events: list[dict[str, Any]]) -> ExecutedPrecision:
    """Kernels by the integer types they read; quantize and dequantize nodes are conversions."""
    share: Counter[str] = Counter()
    nodes: dict[str, str] = {}
    conversion = 0.0
    for event in events:
        args = event.get("args", {})
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        kind = args.get("op_name", "")
        types = {t for entry in args.get("input_type_shape", []) for t in entry}
        integer = kind not in CONVERSIONS and bool(types & {"int8", "uint8"})
        label = "int8" if integer else "fp16" if "float16" in types else "fp32"
        share[label] += event["dur"]
        nodes[event["name"]] = label
        conversion += event["dur"] if kind in CONVERSIONS else 0
    total = sum(share.values()) or 1
    return ExecutedPrecision(
        {k: v / total for k, v in share.items()},
        dict(Counter(nodes.values())),
        conversion / total,
        "ONNX Runtime profile",
    )


def load(bundle: Bundle, options: LoadOptions) -> Session:
    """Open ``model.onnx`` of a bundle; refuses bf16, for which ONNX Runtime has no CPU kernels."""
    if bundle.manifest.precision == "bf16":
        raise InputError(
            "ONNX Runtime has no bfloat16 kernels on the CPU, so this bundle cannot run as asked",
            where=bundle.path,
            remedy="open it with --backend openvino, or export an fp32 or int8 bundle",
        )
    return OnnxRuntimeSession(bundle.file(ONNX), options)
