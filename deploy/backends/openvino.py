"""OpenVINO: the CPU runtime of choice on x86, and the one of Intel's GPUs and NPUs.

Precision is never left to the runtime's default, which is silently bfloat16 where the CPU has it: fp32
bundles force ``f32``; bf16 and fp16 bundles demand their type and refuse a device without it; int8 bundles
run what is not quantized in bfloat16 on a CPU and in float16 on other devices, and in float32 where those
lack it (:mod:`.openvino_devices`). :meth:`Session.executed` reports what was really executed.
"""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from ..bundle import ONNX, Bundle
from ..bundle.onnx_caps import ExcessiveGraph
from ..bundle.sections import FLOAT32, ExecutedPrecision
from ..cores import count_cores
from ..errors import BundleError, CmtEdgeError
from ..sealing import Result
from .base import WARM_UP_RUNS, Binding, LoadOptions, Runtime, Session, make_open_error, make_run_error
from .described import GraphTensor, require_described
from .openvino_cache import Job, can_keep, compile_once
from .openvino_core import open_core
from .openvino_devices import (
    CPU,
    HINTS,
    Device,
    find_device,
    list_execution_devices,
    read_device,
    require_device,
    require_precision,
)
from .openvino_graph import read
from .openvino_watched import add_results, run_all
from .overflow import LINEARS_NOTE, SATURATION_NOTE, multiplies_matrices_slowly, saturates_in_openvino
from .profile import NodeRun, Profile

PRECISION_OF_TYPE = {
    "f32": "fp32",
    "bf16": "bf16",
    "f16": "fp16",
    "i8": "int8",
    "u8": "int8",
}
"""OpenVINO's name of an element type -> the precision that reports name."""

TYPES = {"f32": FLOAT32}
"""OpenVINO's name of an element type -> the manifest's."""

CONVERSION_LAYERS = {"Reorder", "Convert", "FakeQuantize"}
"""Layers that only change the type or the memory layout of a tensor."""

SKIPPED = {
    "Parameter",
    "Input",
    "Result",
    "Output",
    "Const",
    "Constant",
}
"""Layers of an execution graph that compute nothing."""


PROFILED = ("runtimePrecision", "layerType", "originalLayersNames", "execOrder", "primitiveType")
"""Entries of a node of an execution graph that a profile reads."""

TITLE = f"openvino {ov.__version__.split('-')[0]}"
"""Name and version of the runtime."""


class OpenVINOSession(Session):
    """A compiled model; each concurrent inference has an infer request of its own."""

    def __init__(
        self,
        compiled: ov.CompiledModel,
        read_model: Callable[[], ov.Model],
        device: str,
        config: dict[str, Any],
        where: Path | None = None,
    ) -> None:
        """Wrap what OpenVINO compiled.

        Args:
            compiled: the model, compiled for ``device`` with ``config``.
            read_model: reads the model once more, for a profile of it.
            device: OpenVINO's name of the device that was asked for.
            config: OpenVINO's settings.
            where: the file that the model was read from, for messages.
        """
        self.compiled, self._read_model = compiled, read_model
        self._asked, self._config, self._where = device, config, where
        self.device = ", ".join(list_execution_devices(compiled))
        self.runtime = TITLE
        self.parallelism = int(self.compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
        self._idle: list[_Request] = []
        self._lock = threading.Lock()

    def run(self, batch: np.ndarray) -> list[np.ndarray]:
        request = self._take(batch.shape)
        try:
            # handing OpenVINO another array costs up to a tenth of a small model's inference
            np.copyto(request.batch, batch)
            return request.run()
        finally:
            self._idle.append(request)

    def bind(self, shape: tuple[int, ...]) -> Binding:
        request = self._make_request(shape)
        return Binding(request.batch, request.run)

    def _take(self, shape: tuple[int, ...]) -> _Request:
        """An idle request of that shape, or a new one."""
        with contextlib.suppress(IndexError):
            request = self._idle.pop()
            if request.batch.shape == shape:
                return request
        return self._make_request(shape)

    def _make_request(self, shape: tuple[int, ...]) -> _Request:
        with self._lock:
            return _Request(self.compiled.create_infer_request(), shape, self._where)

    def executed(self, batch: np.ndarray, repeats: int = 10) -> ExecutedPrecision:
        return self.profile(batch, repeats).summarise()

    def profile(self, batch: np.ndarray, repeats: int = 10) -> Profile:
        return _make_profile(*self.node_times(batch, repeats, PROFILED))

    def kernels(self, batch: np.ndarray) -> dict[str, float]:
        times, (names, kinds) = self.node_times(batch, 10, ("primitiveType", "layerType"))
        share: dict[str, float] = dict.fromkeys(names.values(), 0.0)
        for node, name in names.items():
            share[name] += 0.0 if kinds[node] in SKIPPED else times[node]
        total = sum(share.values()) or 1.0
        return {name: spent / total for name, spent in share.items() if spent}

    def node_times(
        self, batch: np.ndarray, repeats: int, entries: tuple[str, ...]
    ) -> tuple[dict[str, float], list[dict[str, str]]]:
        """Seconds by node of the execution graph, summed over ``repeats`` inferences; and for each of
        ``entries`` what the graph says about every node (``"layerType"``, for instance)."""
        profiled = {**self._config, "PERF_COUNT": True}
        compiled = open_core().compile_model(self._read_model(), self._asked, profiled)
        operations = compiled.get_runtime_model().get_ops()
        nodes = {node.get_friendly_name(): node.get_rt_info() for node in operations}
        times = _time_nodes(compiled.create_infer_request(), batch, repeats)
        return times, [{name: _read_entry(info, entry) for name, info in nodes.items()} for entry in entries]

    def close(self) -> None:
        self._idle = []
        del self.compiled


class WatchedSession(OpenVINOSession):
    """A session that gives tensors inside the model too, of any type."""

    def run(self, batch: np.ndarray) -> list[np.ndarray]:
        try:
            return run_all(self.compiled.create_infer_request(), batch)
        except Exception as exc:
            raise make_run_error(self._where, exc) from exc

    def bind(self, shape: tuple[int, ...]) -> Binding:
        return Session.bind(self, shape)


class _Request:
    """One infer request with an input and outputs of its own, for one thread at a time."""

    def __init__(self, request: ov.InferRequest, shape: tuple[int, ...], where: Path | None) -> None:
        self._request = request
        self._where = where
        self._outputs: list[np.ndarray] = []  # what the outputs are written to, once they are bound
        self._open: list[tuple[int, ov.Tensor]] = []  # bound outputs whose number of rows the graph decides
        self.batch = np.empty(shape, np.float32)
        request.set_input_tensor(ov.Tensor(self.batch, shared_memory=True))

    def run(self) -> list[np.ndarray]:
        """The outputs for ``batch``, as :meth:`Session.run`."""
        try:
            self._request.infer(share_outputs=True)
            outputs = [output.copy() for output in self._outputs] or self._take_outputs()
            for i, tensor in self._open:
                if tensor.data.shape != outputs[i].shape:  # of the array: reading OpenVINO's own is slow
                    outputs[i] = tensor.data.copy()
        except Exception as exc:
            raise make_run_error(self._where, exc) from exc
        return outputs

    def _take_outputs(self) -> list[np.ndarray]:
        """The outputs of the first inference. The later ones are written to arrays, since their shapes are
        known now: asking the request for them takes longer than copying them.

        A graph may decide a shape by the values of its input. An array keeps its shape then, so such an
        output is not bound; and where the number of rows is open, each inference's is compared.
        """
        ports, tensors = self._request.model_outputs, self._request.output_tensors
        outputs = [tensor.data.copy() for tensor in tensors]
        shapes = [list(port.get_partial_shape()) for port in ports]
        if not all(map(self._is_settled, shapes, outputs)):
            return outputs
        for i, output in enumerate(outputs):
            tensor = ov.Tensor(output, shared_memory=True)
            self._request.set_output_tensor(i, tensor)
            if shapes[i] and shapes[i][0].is_dynamic:
                self._open.append((i, tensor))
        self._outputs = outputs
        return [output.copy() for output in outputs]

    def _is_settled(self, shape: list[ov.Dimension], output: np.ndarray) -> bool:
        """Whether an output of the model has the shape that it has now for every batch of this size; it may
        leave open the number of rows, if that is the batch's."""
        is_batched = output.shape[:1] == self.batch.shape[:1]
        return all(size.is_static for size in shape[1:]) and (is_batched or all(s.is_static for s in shape))


def _read_entry(info: Any, entry: str) -> str:
    """What an execution graph says about a node; empty where the device's plugin does not say it."""
    return str(info[entry].astype(str)) if entry in info else ""


def _time_nodes(request: ov.InferRequest, batch: np.ndarray, repeats: int) -> dict[str, float]:
    """Seconds by node, summed over ``repeats`` inferences after the warm-up."""
    times: defaultdict[str, float] = defaultdict(float)
    for i in range(repeats + WARM_UP_RUNS):
        request.infer([batch])
        if i < WARM_UP_RUNS:
            continue
        for node in request.profiling_info:
            times[node.node_name] += node.real_time.total_seconds()
    return times


def _make_profile(times: dict[str, float], entries: list[dict[str, str]]) -> Profile:
    """The operations, from the seconds of every node and its entries named :data:`PROFILED`."""
    types, kinds, sources, places, kernels = entries
    nodes = tuple(
        NodeRun(
            name=name,
            kind=kinds[name],
            precision=_find_precision(element_type.lower(), kinds[name], kernels[name]),
            seconds=times.get(name, 0.0),
            is_conversion=kinds[name] in CONVERSION_LAYERS,
            sources=tuple(filter(None, sources[name].split(","))),
        )
        for name, element_type in sorted(types.items(), key=lambda item: int(places[item[0]] or 0))
        if kinds[name] not in SKIPPED
    )
    return Profile(nodes, "OpenVINO execution graph")


def _find_precision(element_type: str, kind: str, kernel: str) -> str:
    """The precision that an operation computes in, as reports name it.

    For a linear that reads floats and has int8 weights OpenVINO (2026.4) names the type of its weights; the
    name of its kernel ends in the type that it multiplies: ``brgemm_avx512_f32``.
    """
    if kind == "FullyConnected":
        multiplied = kernel.rpartition("_")[2].lower()
        element_type = multiplied if multiplied in PRECISION_OF_TYPE else element_type
    return PRECISION_OF_TYPE.get(element_type, element_type)


def has_bf16(device: str | None = None) -> bool:
    """Whether the runtime says that the device computes in bfloat16."""
    return read_device(open_core(), (device or CPU).upper()).computes_in("bf16")


def _read_tensor(port: Any) -> GraphTensor:
    """An input or output as OpenVINO tells it."""
    shape = tuple(size.get_length() if size.is_static else None for size in port.get_partial_shape())
    dtype = str(port.get_element_type().get_type_name())
    return GraphTensor(tuple(sorted(port.get_names())), shape, TYPES.get(dtype, dtype))


@contextlib.contextmanager
def _opening(path: Path) -> Iterator[None]:
    """Name the file that OpenVINO does not open, whatever it raised."""
    try:
        yield
    except CmtEdgeError:
        raise
    except Exception as exc:
        raise make_open_error(path, exc) from exc


class OpenVINO(Runtime):
    """Serves ONNX files, rewritten as in :mod:`.openvino_graph`, on any device that OpenVINO finds."""

    def check(self, device: str | None = None) -> str:
        require_device(open_core(), device)
        return TITLE

    def float_precision(self, precision: str, device: str | None = None) -> str:
        """``"fp32"``, ``"bf16"`` or ``"fp16"``; see :meth:`Runtime.float_precision`."""
        return find_device(open_core(), device, precision).choose_float(precision)

    def load(self, bundle: Bundle, options: LoadOptions) -> Session:
        """Open the ``model.onnx`` of a bundle.

        Raises :class:`BundleError` where it is another graph than the manifest describes.
        """
        core, precision = open_core(), bundle.manifest.precision
        device = find_device(core, options.device, precision)
        config = _make_config(device, precision, options)
        path = bundle.file(ONNX)
        with _opening(path):
            found = _compile(core, Job(bundle, device.name, config), options.cache)
        notes = require_precision(found.value, device, device.choose_float(precision))
        if precision == "int8" and device.kind == CPU:
            notes += _describe_int8(bundle)
        session = OpenVINOSession(
            found.value, lambda: _read_again(bundle, path, device.kind), device.name, config, path
        )
        session.is_from_cache, session.notes = found.is_kept, notes
        return session

    def open_watched(self, bundle: Bundle, options: LoadOptions, tensors: Sequence[str]) -> Session:
        """As :meth:`Runtime.open_watched`, see :mod:`.openvino_watched`."""
        core, precision = open_core(), bundle.manifest.precision
        device = find_device(core, options.device, precision)
        config = _make_config(device, precision, options)
        path, low = bundle.file(ONNX), device.choose_float(precision)
        with bundle.kept(), _opening(path):
            model = _read_modest(path, lambda graph: add_results(graph, bundle, tensors, low), device.kind)
            compiled = core.compile_model(model, device.name, config)
        return WatchedSession(
            compiled, lambda: _read_again(bundle, path, device.kind), device.name, config, path
        )


def _describe_int8(bundle: Bundle) -> Iterator[str]:
    """What becomes of int8 on this processor, where it lacks instructions for it."""
    if saturates_in_openvino() and not bundle.manifest.fits_16_bits:
        yield SATURATION_NOTE
    if multiplies_matrices_slowly():
        yield LINEARS_NOTE


def _make_config(device: Device, precision: str, options: LoadOptions) -> dict[str, Any]:
    """OpenVINO's settings for a bundle of ``precision``."""
    config: dict[str, Any] = {
        "PERFORMANCE_HINT": "THROUGHPUT" if options.throughput else "LATENCY",
        "INFERENCE_PRECISION_HINT": HINTS[device.choose_float(precision)],
    }
    if precision == "int8" and device.kind == CPU:
        # What reads floats, though its weights are int8, stays float: OpenVINO would round it by groups.
        config["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
    if options.threads and device.kind == CPU:  # others have no threads of ours
        config["INFERENCE_NUM_THREADS"] = options.threads
        # OpenVINO binds the threads to the first cores, and those of another process to the same ones.
        if options.threads < count_cores():
            config["ENABLE_CPU_PINNING"] = False
    return config


def _compile(core: ov.Core, job: Job, cache: bool) -> Result[ov.CompiledModel]:
    """The compiled model of a bundle, from the cache where it is there and wanted.

    Raises :class:`BundleError` where it is another graph than the manifest describes.
    """
    path = job.bundle.file(ONNX)

    def compile_anew() -> ov.CompiledModel:
        model = _read_modest(path, device=job.device)
        _require_described(job, model)
        return core.compile_model(model, job.device, dict(job.config))

    if not (cache and can_keep(core, job)):
        return Result(compile_anew(), is_kept=False)
    found = compile_once(core, job, compile_anew)
    _require_described(job, found.value)
    return found


def _require_described(job: Job, model: ov.Model | ov.CompiledModel) -> None:
    require_described(
        job.bundle,
        ONNX,
        [_read_tensor(port) for port in model.inputs],
        [_read_tensor(port) for port in model.outputs],
    )


def _read_modest(
    path: Path, prepare: Callable[[ov.Model], object] | None = None, device: str = CPU
) -> ov.Model:
    """The model in a file, see :func:`.openvino_graph.read`; raises :class:`BundleError` where it makes a
    tensor larger than it may."""
    try:
        return read(path, prepare, device)
    except ExcessiveGraph as exc:
        raise BundleError(
            f"{ONNX} asks for more than a graph may",
            where=path.parent,
            why=exc,
            remedy="copy the whole bundle again, or export it again",
        ) from exc


def open_as_float32(bundle: Bundle, threads: int | None = None) -> OpenVINOSession:
    """A bundle for another device on the processor, in float32, to look at its answers.

    Raises :class:`BundleError` where it is another graph than the manifest describes.
    """
    core, path = open_core(), bundle.file(ONNX)
    device = read_device(core, CPU)
    config = _make_config(device, "fp32", LoadOptions(threads=threads))
    job = Job(bundle, CPU, config)
    with _opening(path):
        compiled = _compile(core, job, cache=False).value
    session = OpenVINOSession(compiled, lambda: _read_again(bundle, path, CPU), CPU, config, path)
    session.runtime += ", float16 weights computed in float32"
    return session


def _read_again(bundle: Bundle, path: Path, device: str) -> ov.Model:
    """The model of a bundle that was opened before; raises :class:`BundleError` where it was replaced."""
    with bundle.kept(), _opening(path):
        return read(path, device=device)


RUNTIME = OpenVINO()
"""What the table of runtimes gives for ``"openvino"``."""
