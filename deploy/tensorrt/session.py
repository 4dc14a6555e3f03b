"""Engines of TensorRT 10.3 to 11 and of TensorRT for RTX on NVIDIA GPUs, built by ``cmt-build`` on the device
that runs them.

Precision is not chosen here: networks are strongly typed, so it stands in ``model.onnx``. Only names that
every version from 10.3 to 11.4 has are used; numbers of enumerations differ between versions and are never
stored. Each thread that runs gets an execution context of its own from a pool, with pinned buffers, a
non-default stream and a CUDA graph.
"""

from __future__ import annotations

import contextlib
import ctypes
import queue
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cmt_edge.startup import name_program

from ..backends.base import DeviceTimes, LoadOptions, Runtime, Session
from ..backends.described import GraphTensor, require_described
from ..bundle import Bundle
from ..bundle.sections import FLOAT32, ExecutedPrecision
from ..errors import InputError, RuntimeMissingError, StepError
from .bindings import Bindings, make_layer_times
from .cuda import TO_DEVICE, TO_HOST, Cuda, CudaError, open_cuda
from .engine import EngineTarget, read_engine, read_portable_engine, require_format
from .inspection import count_executed, read_layers
from .jit import CompiledKernels, KernelStore, find_store

FLOAT_BYTES = 4
"""Bytes of a float32 value."""
GPU_NUMBER = "[0-9]{1,4}"
"""The number of a GPU as users write it; ``str.isdigit`` takes signs that are no numbers."""
UNSERVED = "does not support this compute capability"
"""What TensorRT for RTX says of an engine where it serves no GPU of this kind, and none can be built: release
1.7 does so on an H200 (9.0)."""
UNKNOWN_TYPES = "due to dynamic shapes"
"""What the inspector writes for types it does not know."""


def parse_gpu_index(device: str | None) -> int:
    """``None``, ``"0"``, ``"gpu:0"`` or ``"cuda:0"`` -> 0; raises :class:`InputError`."""
    text = (device or "0").lower().removeprefix("cuda").removeprefix("gpu").removeprefix(":") or "0"
    if not re.fullmatch(GPU_NUMBER, text):
        raise InputError(
            f"TensorRT has no device {device!r}",
            remedy="give the number of a GPU: --device 0",
        )
    return int(text)


def find_engine_target(bindings: Bindings, device: str | None = None) -> tuple[Cuda, EngineTarget]:
    """The GPU and what an engine for it is keyed by; raises :class:`RuntimeMissingError`."""
    cuda = open_cuda()
    return cuda, EngineTarget.here(bindings.version, cuda, parse_gpu_index(device))


class TensorRTSession(Session):
    """A deserialised engine with one float32 input and float32 outputs; ``outputs`` names them in the order
    of the graph."""

    def __init__(
        self,
        bindings: Bindings,
        plan: bytes,
        cuda: Cuda,
        index: int = 0,
        *,
        outputs: Sequence[str] = ("logits",),
        graphs: bool = True,
        throughput: bool = False,
        store: KernelStore | None = None,
    ) -> None:
        """``store``: where kernels that are compiled on opening are kept."""
        self.runtime = bindings.runtime
        self.parallelism = 2 if throughput else 1  # copies of one request overlap the other's computing
        self.graphs = graphs
        """Whether inferences are launched as CUDA graphs; turned off with a note in :attr:`notes` where that
        fails."""
        self.notes: list[str] = []
        self._bindings, self._cuda, self._index = bindings, cuda, index
        self._enter()
        self.device = cuda.gpu(index).name
        self._runtime: Any
        self._engine: Any
        self._runtime, self._engine = _deserialise(bindings, plan)
        self._input, self._outputs = self._find_names(outputs)
        self._most = self._find_largest_batch()
        self.compiled_kernels = None if store is None else CompiledKernels(self._engine, store)
        """What this process compiled or took over from an earlier one; ``None`` where nothing is kept."""
        self.is_from_cache = self.compiled_kernels is not None and self.compiled_kernels.is_from_cache
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self.workers: list[Worker] = []
        self._lock = threading.Lock()

    def _find_names(self, expected: Sequence[str]) -> tuple[str, list[str]]:
        engine, trt = self._engine, self._bindings.trt
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        outputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT]
        floats = all(engine.get_tensor_dtype(n) == trt.DataType.FLOAT for n in names)
        if len(inputs) != 1 or set(outputs) != set(expected) or not floats:
            raise StepError(
                f"the engine's inputs and outputs are {', '.join(names)}, not one float32 input and"
                f" {', '.join(expected)}",
                remedy=f"build it from a bundle of {name_program('export')} --format"
                f" {self._bindings.product.format}",
            )
        return inputs[0], list(expected)

    def tensors(self) -> tuple[list[GraphTensor], list[GraphTensor]]:
        """The input and the outputs, for comparing them with a manifest; all are float32."""
        return [self._describe_tensor(self._input)], [self._describe_tensor(name) for name in self._outputs]

    def _describe_tensor(self, name: str) -> GraphTensor:
        shape = (int(size) for size in self._engine.get_tensor_shape(name))
        return GraphTensor((name,), tuple(None if size < 0 else size for size in shape), FLOAT32)

    def _find_largest_batch(self) -> int:
        _least, _typical, most = self._engine.get_tensor_profile_shape(self._input, 0)
        return int(most[0])

    def run(self, batch: np.ndarray) -> list[np.ndarray]:
        if not len(batch):
            shapes = [tuple(self._engine.get_tensor_shape(name))[1:] for name in self._outputs]
            return [np.empty((0, *np.maximum(0, shape)), np.float32) for shape in shapes]
        with self._worker() as worker:
            is_first = not worker.shape
            parts = [worker.run(batch[i : i + self._most]) for i in range(0, len(batch), self._most)]
        if is_first and self.compiled_kernels is not None:
            self.compiled_kernels.keep()
        if len(parts) == 1:
            return parts[0]
        return [np.concatenate(output) for output in zip(*parts, strict=True)]

    def device_times(self, batch: np.ndarray, count: int) -> DeviceTimes:
        with self._worker() as worker:
            worker.run(batch)
            times = np.array([worker.timed(batch) for _ in range(count)]).reshape(count, 3)
        compute, with_copies, enqueue = times.T
        return DeviceTimes(compute, with_copies, enqueue)

    def executed(self, batch: np.ndarray, repeats: int = 10) -> ExecutedPrecision:
        return count_executed(read_layers(self.inspect()), self.time_layers(batch, repeats))

    def time_layers(self, batch: np.ndarray, repeats: int = 10) -> dict[str, float]:
        """Milliseconds of each layer by its name, summed over ``repeats`` inferences, by NVIDIA's profiler.

        A profiled inference runs without a CUDA graph and takes longer than others; compare its layers
        with each other only.
        """
        profiler = make_layer_times(self._bindings.trt)
        self._enter()
        worker = self._make_worker(graphs=False)
        try:
            worker.run(batch)
            worker.context.profiler = profiler
            for _ in range(repeats):
                worker.run(batch)
        finally:
            worker.close()
        return dict(profiler.milliseconds)

    def inspect(self) -> str:
        """The engine inspector's JSON; with a dynamic batch only a context with a shape knows the types."""
        inspector, trt = self._engine.create_engine_inspector(), self._bindings.trt
        text = str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
        if UNKNOWN_TYPES not in text:
            return text
        with self._worker() as worker:
            worker.set_shape(
                (
                    1,
                    *tuple(self._engine.get_tensor_shape(self._input))[1:],
                )
            )
            inspector.execution_context = worker.context
            return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))

    def close(self) -> None:
        self._enter()
        with self._lock:
            for worker in self.workers:
                worker.close()
            self.workers.clear()
        self._idle = queue.SimpleQueue()
        if self.compiled_kernels is not None:
            self.compiled_kernels.keep()
        self.compiled_kernels = None
        self._engine = self._runtime = None

    def _enter(self) -> None:
        """The current device is a property of each thread, and others may have changed it."""
        self._cuda.use(self._index)

    @contextlib.contextmanager
    def _worker(self) -> Iterator[Worker]:
        self._enter()
        try:
            worker = self._idle.get_nowait()
        except queue.Empty:
            with self._lock:
                worker = self._make_worker(self.graphs)
                self.workers.append(worker)
        try:
            yield worker
        finally:
            if worker.note:
                self.graphs, self.notes = (
                    False,
                    sorted({*self.notes, worker.note}),
                )
            self._idle.put(worker)

    def _make_worker(self, graphs: bool) -> Worker:
        compiled = self.compiled_kernels
        if compiled is None:
            context = self._engine.create_execution_context()
        else:
            context = self._engine.create_execution_context(compiled.config)
        if context is None:
            raise RuntimeMissingError(
                "the engine does not fit the free memory of the device",
                why="; ".join(self._bindings.words.errors),
                remedy="close other programs, or build with a smaller --workspace or --profile",
            )
        return Worker(context, self._cuda, self._input, self._outputs, graphs)


def _deserialise(bindings: Bindings, plan: bytes) -> tuple[Any, Any]:
    """A runtime and the engine in it.

    Raises:
        RuntimeMissingError: TensorRT for RTX does not serve the GPU of this machine.
        StepError: the engine is refused for another reason; says what TensorRT said.
    """
    bindings.words.clear()
    runtime = bindings.trt.Runtime(bindings.log)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is not None:
        return runtime, engine
    why, title = "; ".join(bindings.words.errors), bindings.product.title
    if UNSERVED in why:
        raise RuntimeMissingError(
            f"{title} does not serve this GPU",
            why=why,
            remedy=(
                "export with --format trt and build with TensorRT,"
                " or run this bundle with --backend onnxruntime --device cuda"
            ),
        )
    raise StepError(
        f"{title} refused the engine", why=why, remedy=f"build it again: {name_program('build')} --force"
    )


@dataclass
class Worker:
    """One execution context with its stream, buffers and CUDA graph; used by one thread at a time."""

    context: Any
    cuda: Cuda
    input: str
    outputs: list[str]
    graphs: bool
    note: str = ""
    shape: tuple[int, ...] = ()
    graph: int = 0
    held: list[tuple[Any, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stream = self.cuda.stream()
        self.events = [self.cuda.event() for _ in range(4)]

    def run(self, batch: np.ndarray) -> list[np.ndarray]:
        """Contiguous float32 ``(N, 3, H, W)`` -> a new float32 array for each output."""
        self._prepare(batch)
        self._copy_in()
        self._compute()
        self._copy_out()
        self.cuda.synchronize(self.stream)
        return [host.copy() for _, host in self.out]

    def timed(self, batch: np.ndarray) -> tuple[float, float, float]:
        """Milliseconds: computing on the device, with copies on the device, enqueueing on the host."""
        self._prepare(batch)
        cuda, (begin, start, end, done) = self.cuda, self.events
        cuda.record(begin, self.stream)
        self._copy_in()
        cuda.record(start, self.stream)
        before = time.perf_counter_ns()
        self._compute()
        enqueue = (time.perf_counter_ns() - before) / 1e6
        cuda.record(end, self.stream)
        self._copy_out()
        cuda.record(done, self.stream)
        return (
            cuda.elapsed_ms(start, end),
            cuda.elapsed_ms(begin, done),
            enqueue,
        )

    def _prepare(self, batch: np.ndarray) -> None:
        """Buffers and a graph for this shape, and the pixels in pinned memory."""
        if batch.shape != self.shape:
            self._reshape(batch.shape)
        self.host_in[...] = batch
        if self.graphs and not self.graph:
            self._capture()

    def _copy_in(self) -> None:
        self.cuda.copy(
            self.device_in,
            self.host_in.ctypes.data,
            self.host_in.nbytes,
            TO_DEVICE,
            self.stream,
        )

    def _copy_out(self) -> None:
        for device, host in self.out:
            self.cuda.copy(
                host.ctypes.data,
                device,
                host.nbytes,
                TO_HOST,
                self.stream,
            )

    def _compute(self) -> None:
        if self.graph:
            self.cuda.launch(self.graph, self.stream)
        else:
            self._enqueue()

    def _enqueue(self) -> None:
        if not self.context.execute_async_v3(self.stream):
            raise StepError(
                "TensorRT could not start the inference",
                remedy=f"build the engine again: {name_program('build')} --force",
            )

    def set_shape(self, shape: tuple[int, ...]) -> None:
        """Tell the context the input's shape; buffers and graph of another are given back."""
        self._release()
        if not self.context.set_input_shape(self.input, shape):
            raise InputError(
                f"the engine does not take an input of {shape}",
                remedy="build it with another --profile MIN,OPT,MAX",
            )

    def _reshape(self, shape: tuple[int, ...]) -> None:
        self.set_shape(shape)
        self.device_in, self.host_in = self._find_buffers(shape)
        self.out = [self._find_buffers(self._read_shape(name)) for name in self.outputs]
        addresses = [
            self.device_in,
            *(device for device, _ in self.out),
        ]
        for name, address in zip((self.input, *self.outputs), addresses, strict=True):
            if not self.context.set_tensor_address(name, address):
                raise StepError(
                    f"TensorRT refused the buffer of {name}",
                    remedy="report the model and the TensorRT version",
                )
        self.shape = shape

    def _read_shape(self, name: str) -> tuple[int, ...]:
        """The shape of an output for the input's shape; raises :class:`StepError` where it depends on the
        values too, since nobody knows then how much of a buffer belongs to an answer."""
        shape = tuple(int(size) for size in self.context.get_tensor_shape(name))
        if min(shape, default=0) < 0:
            raise StepError(
                f"the engine decides the shape of {name} by the values of its input",
                remedy="export the model with a fixed shape, then build it again",
            )
        return shape

    def _find_buffers(self, shape: tuple[int, ...]) -> tuple[int, np.ndarray]:
        """Device memory and a pinned host array of ``shape``, float32."""
        count = int(np.prod(shape))
        device = self.cuda.device_memory(count * FLOAT_BYTES)
        self.held.append((self.cuda.free_device_memory, device))
        pinned = self.cuda.pinned_memory(count * FLOAT_BYTES)
        self.held.append((self.cuda.free_pinned_memory, pinned))
        return device, np.ctypeslib.as_array((ctypes.c_float * count).from_address(pinned)).reshape(shape)

    def _capture(self) -> None:
        """Record the inference as a CUDA graph; without one where the engine cannot be captured."""
        self._enqueue()  # what TensorRT does at the first call only is not part of the graph
        self.cuda.synchronize(self.stream)
        try:
            self.graph = self.cuda.capture(self.stream, self._enqueue)
        except (CudaError, StepError) as exc:
            self.graphs, self.note = (
                False,
                f"no CUDA graph, each inference is enqueued: {exc.what}",
            )

    def _release(self) -> None:
        """Give back what belongs to one shape."""
        if self.graph:
            self.cuda.destroy_graph(self.graph)
        self.graph, self.shape = 0, ()
        while self.held:
            free, address = self.held.pop()
            free(address)

    def close(self) -> None:
        self._release()
        for event in self.events:
            self.cuda.destroy_event(event)
        self.cuda.destroy_stream(self.stream)
        self.context = None


class EngineRuntime(Runtime):
    """Opens the engine that ``cmt-build`` made on this device."""

    def __init__(self, bindings: Bindings) -> None:
        self.bindings = bindings

    def check(self, device: str | None = None) -> str:
        open_cuda().gpu(parse_gpu_index(device))
        return self.bindings.runtime

    def load(self, bundle: Bundle, options: LoadOptions) -> Session:
        """Open the engine of a bundle.

        Raises:
            RuntimeMissingError: the bundle has no engine for this device yet, or one from another machine;
                the remedy is ``cmt-build``.
            BundleError: the engine was changed; this is found out before it is deserialised. Or its input and
                outputs are not what the manifest says.
        """
        require_format(bundle, self.bindings.product)
        cuda, target = find_engine_target(self.bindings, options.device)
        file, plan = self._read_plan(bundle, target, options)
        session = TensorRTSession(
            self.bindings,
            plan,
            cuda,
            target.gpu.index,
            outputs=bundle.outputs,
            throughput=options.throughput,
            store=find_store(self.bindings.product, bundle, target, plan) if options.cache else None,
        )
        require_described(bundle, file, *session.tensors())
        return session

    def _read_plan(self, bundle: Bundle, target: EngineTarget, options: LoadOptions) -> tuple[str, bytes]:
        """Name and bytes of the engine that may be opened."""
        entry = bundle.manifest.engine
        compiled = bundle.manifest.compiled
        if entry is None and compiled is not None and compiled.engine is not None:
            return compiled.engine, read_portable_engine(bundle, options.trusted_engine)
        plan = read_engine(bundle, target)
        assert entry is not None, "read_engine found it"
        return entry.file, plan
