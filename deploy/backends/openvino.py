"""OpenVINO: the CPU runtime of choice on x86.

Precision is never left to the runtime's default (which is silently bfloat16 where the CPU has it): fp32
bundles force ``f32``, bf16 bundles demand ``bf16`` and refuse a CPU without it, int8 bundles run what is not
quantized in bfloat16 where the CPU has it and in float32 elsewhere, and :meth:`Session.executed` reports what
happened.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from ..bundle import ONNX, Bundle
from ..bundle.sections import ExecutedPrecision
from ..errors import InputError, RuntimeMissingError
from .base import Binding, LoadOptions, Session
from .openvino_graph import read

IR = "openvino.xml"
PRECISIONS = {"f32": "fp32", "bf16": "bf16", "f16": "fp16", "i8": "int8", "u8": "int8"}
CONVERSIONS = {"Reorder", "Convert", "FakeQuantize"}
SKIPPED = {"Parameter", "Input", "Result", "Output", "Const", "Constant"}


def check(device: str | None = None) -> str:
    """Name and version of the runtime; raises :class:`RuntimeMissingError` where ``device`` is not here."""
    name = (device or "CPU").upper()
    available = ov.Core().available_devices
    if name != "AUTO" and name.split(".")[0] not in {d.split(".")[0] for d in available}:
        raise RuntimeMissingError(
            f"OpenVINO has no device {device!r} here",
            why=f"available: {', '.join(available)}",
            remedy="choose one of these",
        )
    return f"openvino {ov.__version__.split('-')[0]}"


def has_bf16(device: str | None = None) -> bool:
    """Whether the runtime says that the device computes in bfloat16."""
    name = (device or "CPU").upper()
    return "BF16" in ov.Core().get_property(name, "OPTIMIZATION_CAPABILITIES")


def compile(onnx: Path, folder: Path) -> list[Path]:
    """Convert ``onnx`` to OpenVINO's IR in ``folder``, rewritten as in :mod:`.openvino_graph`; weights keep
    their types."""
    model = read(onnx)
    target = folder / IR
    try:
        ov.save_model(model, target, compress_to_fp16=False)
    except RuntimeError as exc:  # OpenVINO's only exception type, here for a full or read-only disk
        raise OSError(f"OpenVINO could not write {target.name}") from exc
    return [target, target.with_suffix(".bin")]


def float_precision(precision: str, device: str | None) -> str:
    """OpenVINO's inference precision for a bundle of ``precision``: ``"f32"`` or ``"bf16"``."""
    if precision == "fp32":
        return "f32"
    if precision == "int8":
        return "bf16" if has_bf16(device) else "f32"
    if precision == "bf16":
        if not has_bf16(device):
            raise RuntimeMissingError(
                "this processor has no bfloat16 instructions, so a bf16 bundle cannot run as asked",
                remedy="use --precision int8 or fp32 on this machine",
            )
        return "bf16"
    raise InputError(f"OpenVINO bundles have no precision {precision!r}", remedy="use fp32, bf16 or int8")


class OpenVINOSession(Session):
    def __init__(self, model: ov.Model, device: str, config: dict[str, Any]) -> None:
        self._model, self._config = model, config
        self.device = device
        self.runtime = check(device)
        self._compiled = ov.Core().compile_model(model, device, config)
        self.parallelism = int(self._compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
        self._idle: list[_Lane] = []
        self._lock = threading.Lock()

    def run(self, batch: np.ndarray) -> list[np.ndarray]:
        lane = self._lane(batch.shape)
        try:
            np.copyto(
                lane.batch, batch
            )  # handing OpenVINO another array costs up to a tenth of a small model's inference
            return lane.run()
        finally:
            self._idle.append(lane)

    def bind(self, shape: tuple[int, ...]) -> Binding:
        lane = self._new_lane(shape)
        return Binding(lane.batch, lane.run)

    def _lane(self, shape: tuple[int, ...]) -> _Lane:
        """An idle one, or a new one."""
        with contextlib.suppress(IndexError):
            lane = self._idle.pop()
            if lane.batch.shape == shape:
                return lane
        return self._new_lane(shape)

    def _new_lane(self, shape: tuple[int, ...]) -> _Lane:
        with self._lock:
            return _Lane(self._compiled.create_infer_request(), shape)

    def executed(self, batch: np.ndarray, repeats: int = 10) -> ExecutedPrecision:
        times, known = self._profile(batch, repeats, ("runtimePrecision", "layerType"))
        return _summarise(times, *known)

    def kernels(self, batch: np.ndarray) -> dict[str, float]:
        times, (names, kinds) = self._profile(batch, 10, ("primitiveType", "layerType"))
        share: dict[str, float] = dict.fromkeys(names.values(), 0.0)
        for node, name in names.items():
            share[name] += 0.0 if kinds[node] in SKIPPED else times[node]
        total = sum(share.values()) or 1.0
        return {name: spent / total for name, spent in share.items() if spent}

    def _profile(
        self, batch: np.ndarray, repeats: int, entries: tuple[str, ...]
    ) -> tuple[Counter[str], list[dict[str, str]]]:
        """Seconds by node of the execution graph, and for each of ``entries`` what the graph says about every
        node."""
        compiled = ov.Core().compile_model(self._model, self.device, {**self._config, "PERF_COUNT": True})
        nodes = {
            node.get_friendly_name(): node.get_rt_info() for node in compiled.get_runtime_model().get_ops()
        }
        request = compiled.create_infer_request()
        times: Counter[str] = Counter()
        for i in range(repeats + 2):
            request.infer([batch])
            for node in request.profiling_info if i >= 2 else ():
                times[node.node_name] += node.real_time.total_seconds()
        return times, [
            {name: str(info[entry].astype(str)) for name, info in nodes.items()} for entry in entries
        ]

    def close(self) -> None:
        self._idle = []
        del self._compiled


class _Lane:
    """One infer request with an input and outputs of its own, for one thread at a time."""

    def __init__(self, request: ov.InferRequest, shape: tuple[int, ...]) -> None:
        self._request = request
        self._outputs: list[np.ndarray] = []
        self.batch = np.empty(shape, np.float32)
        request.set_input_tensor(ov.Tensor(self.batch, shared_memory=True))

    def run(self) -> list[np.ndarray]:
        """The outputs for ``batch``, as :meth:`Session.run`."""
        self._request.infer(share_outputs=True)
        return [output.copy() for output in self._outputs or self._bind_outputs()]

    def _bind_outputs(self) -> list[np.ndarray]:
        """Have outputs written to arrays, now that their shapes are known: asking the request for them takes
        longer than copying them."""
        for i, given in enumerate(self._request.output_tensors):
            output = given.data.copy()
            self._request.set_output_tensor(i, ov.Tensor(output, shared_memory=True))
            self._outputs.append(output)
        return self._outputs


def _summarise(times: Counter[str], precisions: dict[str, str], kinds: dict[str, str]) -> ExecutedPrecision:
    share: Counter[str] = Counter()
    operations: Counter[str] = Counter()
    conversion = 0.0
    for name, precision in precisions.items():
        if kinds[name] in SKIPPED:
            continue
        label = PRECISIONS.get(precision.lower(), precision.lower())
        share[label] += times[name]
        operations[label] += 1
        conversion += times[name] if kinds[name] in CONVERSIONS else 0.0
    total = sum(share.values()) or 1.0
    return ExecutedPrecision(
        {k: v / total for k, v in share.items()},
        dict(operations),
        conversion / total,
        "OpenVINO execution graph",
    )


def load(bundle: Bundle, options: LoadOptions) -> Session:
    """Open the IR of a bundle, or its ``model.onnx`` where it has none."""
    device = (options.device or "CPU").upper()
    check(device)
    path = bundle.file(IR if IR in bundle.manifest.files else ONNX)
    config: dict[str, Any] = {
        "PERFORMANCE_HINT": "THROUGHPUT" if options.throughput else "LATENCY",
        "INFERENCE_PRECISION_HINT": float_precision(bundle.manifest.precision, device),
    }
    if options.threads:
        config["INFERENCE_NUM_THREADS"] = options.threads
    return OpenVINOSession(read(path), device, config)
