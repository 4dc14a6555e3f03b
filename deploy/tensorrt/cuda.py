"""The few CUDA runtime calls that running an engine takes: memory, one stream, events, graphs.

Two ways to the same C functions are tried in this order: ``cuda-bindings`` (small wheels; 12.9 serves CUDA
12 drivers, 13 CUDA 13 drivers), then ``ctypes`` on the ``libcudart`` of the machine, for devices those wheels
do not fit. Neither PyTorch nor CuPy is needed. Addresses and handles are plain integers. Source: CUDA Runtime
API reference, "Memory Management", "Stream Management", "Event Management", "Graph Management".
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import CmtEdgeError, RuntimeMissingError

NON_BLOCKING = 1
"""``cudaStreamNonBlocking``: the stream does not wait for the default stream."""
TO_DEVICE, TO_HOST = 1, 2
"""``cudaMemcpyKind``."""
RELAXED = 2
"""``cudaStreamCaptureModeRelaxed``: other threads may allocate meanwhile."""
ATTRIBUTES = {
    "major": 75,
    "minor": 76,
    "integrated": 18,
    "processors": 16,
    "pci_domain": 50,
    "pci_bus": 33,
    "pci_device": 34,
}
"""What is asked of a device -> ``cudaDeviceAttr``."""
OUT_OF_MEMORY = 2
"""``cudaErrorMemoryAllocation``."""
NO_GPU = {
    0: "no device",
    100: "no device",
    35: "the driver is missing or older than this CUDA",
}
"""``cudaError`` -> why no GPU can be used, for what happens often."""
LIBRARIES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so")
"""Names under which the CUDA runtime is looked for, the newest first."""
NAME_BYTES = 256
"""Room for the name of a device."""


class CudaError(CmtEdgeError):
    """A CUDA call failed."""

    def __init__(self, call: str, code: int, text: str) -> None:
        self.code = code
        memory = "close other programs, use a smaller batch or more swap" if code == OUT_OF_MEMORY else None
        super().__init__(
            f"{call} failed with CUDA error {code}: {text}",
            remedy=memory,
        )


@dataclass(frozen=True)
class Gpu:
    """A device.

    Attributes:
        sm: compute capability, e.g. ``"8.7"``.
        processors: streaming multiprocessors; two modules of one name may differ in them.
        memory: bytes in all.
        integrated: shares the host's memory.
        pci: address on the bus, ``"0000:01:00.0"``; CUDA and NVML count devices differently.
    """

    index: int
    name: str
    sm: str
    processors: int
    memory: int
    integrated: bool
    pci: str


class Cuda:
    """CUDA runtime calls over ``call(name, *arguments) -> (error code, result)``."""

    def __init__(
        self,
        call: Callable[..., tuple[int, Any]],
        source: str,
        name_of: Callable[[int], str],
    ) -> None:
        self._raw, self._name_of = call, name_of
        self.source = source
        """What carries the calls, e.g. ``"cuda-bindings 13.0.3"``."""

    def call(self, name: str, *arguments: Any) -> Any:
        """The result of a CUDA function; raises :class:`CudaError`."""
        code, result = self._raw(name, *arguments)
        if code:
            raise CudaError(name, code, self.error_text(code))
        return result

    def attempt(self, name: str, *arguments: Any) -> tuple[int, Any]:
        """The error code of a CUDA function, 0 for none, and its result."""
        return self._raw(name, *arguments)

    def error_text(self, code: int) -> str:
        """CUDA's own words for an error code."""
        _, text = self.attempt("cudaGetErrorString", code)
        return text.decode() if isinstance(text, bytes) else str(text)

    def runtime_version(self) -> str:
        return _format_version(self.call("cudaRuntimeGetVersion"))

    def driver_version(self) -> str:
        """The highest CUDA version the driver serves."""
        return _format_version(self.call("cudaDriverGetVersion"))

    def gpu(self, index: int = 0) -> Gpu:
        """Make device ``index`` current and describe it; raises :class:`RuntimeMissingError` where it is not
        there."""
        count = int(self.call("cudaGetDeviceCount"))
        if not 0 <= index < count:
            raise RuntimeMissingError(
                f"there is no GPU {index}",
                why=f"{count} found",
                remedy="choose another with --device N",
            )
        self.call("cudaSetDevice", index)
        found = {
            name: int(self.call("cudaDeviceGetAttribute", number, index))
            for name, number in ATTRIBUTES.items()
        }
        return Gpu(
            index=index,
            name=self._name_of(index),
            sm="{major}.{minor}".format(**found),
            processors=found["processors"],
            memory=self.memory()[1],
            integrated=bool(found["integrated"]),
            pci="{pci_domain:04x}:{pci_bus:02x}:{pci_device:02x}.0".format(**found),
        )

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of device memory."""
        free, total = self.call("cudaMemGetInfo")
        return int(free), int(total)

    def use(self, index: int) -> None:
        """Make device ``index`` current in this thread."""
        self.call("cudaSetDevice", index)

    def device_memory(self, size: int) -> int:
        return int(self.call("cudaMalloc", size))

    def free_device_memory(self, address: int) -> None:
        self.call("cudaFree", address)

    def pinned_memory(self, size: int) -> int:
        """Host memory that the device copies from and to without a detour."""
        return int(self.call("cudaHostAlloc", size, 0))

    def free_pinned_memory(self, address: int) -> None:
        self.call("cudaFreeHost", address)

    def copy(
        self,
        target: int,
        source: int,
        size: int,
        kind: int,
        stream: int,
    ) -> None:
        """Start copying ``size`` bytes; ``kind`` is :data:`TO_DEVICE` or :data:`TO_HOST`."""
        self.call("cudaMemcpyAsync", target, source, size, kind, stream)

    def stream(self) -> int:
        return int(self.call("cudaStreamCreateWithFlags", NON_BLOCKING))

    def synchronize(self, stream: int) -> None:
        self.call("cudaStreamSynchronize", stream)

    def destroy_stream(self, stream: int) -> None:
        self.call("cudaStreamDestroy", stream)

    def event(self) -> int:
        return int(self.call("cudaEventCreate"))

    def record(self, event: int, stream: int) -> None:
        self.call("cudaEventRecord", event, stream)

    def elapsed_ms(self, start: int, end: int) -> float:
        """Milliseconds between two recorded events; waits for ``end``."""
        self.call("cudaEventSynchronize", end)
        return float(self.call("cudaEventElapsedTime", start, end))

    def destroy_event(self, event: int) -> None:
        self.call("cudaEventDestroy", event)

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        """An executable graph of what ``work`` enqueues on ``stream``; raises :class:`CudaError` where that
        cannot be captured."""
        self.call("cudaStreamBeginCapture", stream, RELAXED)
        try:
            work()
        except BaseException:
            self._abandon_capture(stream)
            raise
        try:
            graph = int(self.call("cudaStreamEndCapture", stream))
        except CudaError:
            self.attempt("cudaGetLastError")  # or the next call that asks reports this failure as its own
            raise
        try:
            return int(self.call("cudaGraphInstantiate", graph, 0))
        finally:
            self.call("cudaGraphDestroy", graph)

    def _abandon_capture(self, stream: int) -> None:
        code, graph = self.attempt("cudaStreamEndCapture", stream)
        if code == 0 and graph:
            self.attempt("cudaGraphDestroy", int(graph))
        self.attempt("cudaGetLastError")

    def launch(self, graph: int, stream: int) -> None:
        self.call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        self.call("cudaGraphExecDestroy", graph)


def open_cuda() -> Cuda:
    """CUDA through the first way that finds a driver.

    Raises:
        RuntimeMissingError: no way leads to a GPU; says what each lacked.
    """
    reasons = []
    for way in (open_bindings, open_library):
        try:
            cuda = way()
            code, count = cuda.attempt("cudaGetDeviceCount")
        except (ImportError, OSError, AttributeError) as exc:
            reasons.append(str(exc))
            continue
        if code == 0 and count:
            return cuda
        words = NO_GPU.get(code) or cuda.error_text(code)
        reasons.append(f"{cuda.source}: {words} (CUDA error {code})")
    raise RuntimeMissingError(
        "no NVIDIA GPU can be used here",
        why="; ".join(reasons),
        remedy=(
            'install the driver, and pip install "cmt-edge[tensorrt]" (CUDA 13) or "cmt-edge[tensorrt-cu12]"'
            " (CUDA 12)"
        ),
    )


def _format_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


# cuda-bindings: functions return (error, result, ...) and want enumerations where C has them


def open_bindings() -> Cuda:
    """CUDA through ``cuda-bindings``; raises ``ImportError`` where that is not installed."""
    import cuda.bindings
    from cuda.bindings import runtime

    enums = {
        "cudaMemcpyAsync": (3, runtime.cudaMemcpyKind),
        "cudaStreamBeginCapture": (1, runtime.cudaStreamCaptureMode),
        "cudaDeviceGetAttribute": (0, runtime.cudaDeviceAttr),
        "cudaGetErrorString": (0, runtime.cudaError_t),
    }

    def call(name: str, *arguments: Any) -> tuple[int, Any]:
        values = list(arguments)
        if name in enums:
            position, kind = enums[name]
            values[position] = kind(values[position])
        code, *results = getattr(runtime, name)(*values)
        return int(code), results[0] if len(results) == 1 else tuple(results)

    def name_of(index: int) -> str:
        _, properties = call("cudaGetDeviceProperties", index)
        return properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)

    return Cuda(call, f"cuda-bindings {cuda.bindings.__version__}", name_of)


# ctypes: C functions return the error and write results through leading pointers

_P, _I, _S, _U = (
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_size_t,
    ctypes.c_uint,
)
"""Short names of C types, for the table below."""
SIGNATURES: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "cudaRuntimeGetVersion": ((_I,), ()),
    "cudaDriverGetVersion": ((_I,), ()),
    "cudaGetDeviceCount": ((_I,), ()),
    "cudaSetDevice": ((), (_I,)),
    "cudaDeviceGetAttribute": ((_I,), (_I, _I)),
    "cudaMemGetInfo": ((_S, _S), ()),
    "cudaMalloc": ((_P,), (_S,)),
    "cudaFree": ((), (_P,)),
    "cudaHostAlloc": ((_P,), (_S, _U)),
    "cudaFreeHost": ((), (_P,)),
    "cudaMemcpyAsync": ((), (_P, _P, _S, _I, _P)),
    "cudaStreamCreateWithFlags": ((_P,), (_U,)),
    "cudaStreamSynchronize": ((), (_P,)),
    "cudaStreamDestroy": ((), (_P,)),
    "cudaEventCreate": ((_P,), ()),
    "cudaEventRecord": ((), (_P, _P)),
    "cudaEventSynchronize": ((), (_P,)),
    "cudaEventElapsedTime": ((ctypes.c_float,), (_P, _P)),
    "cudaEventDestroy": ((), (_P,)),
    "cudaStreamBeginCapture": ((), (_P, _I)),
    "cudaGraphInstantiate": ((_P,), (_P, ctypes.c_ulonglong)),
    "cudaGraphDestroy": ((), (_P,)),
    "cudaGraphLaunch": ((), (_P, _P)),
    "cudaGraphExecDestroy": ((), (_P,)),
    "cudaGetLastError": ((), ()),
}
"""Function -> the types of its results and of its arguments."""
RENAMED = {"cudaGraphInstantiate": "cudaGraphInstantiateWithFlags"}
"""Function -> the symbol of the library, where another one has these arguments in every CUDA."""


def open_library() -> Cuda:
    """CUDA through the ``libcudart`` of the machine; raises ``OSError`` where there is none."""
    library, found = _load(LIBRARIES)

    def call(name: str, *arguments: Any) -> tuple[int, Any]:
        if name == "cudaGetErrorString":
            function = library.cudaGetErrorString
            function.restype = ctypes.c_char_p
            return 0, function(arguments[0])
        if name == "cudaStreamEndCapture":  # the one function whose result does not come first
            graph = _P()
            code = int(library.cudaStreamEndCapture(_P(arguments[0]), ctypes.byref(graph)))
            return code, graph.value or 0
        results, kinds = SIGNATURES[name]
        slots = [kind() for kind in results]
        values = [kind(value) for kind, value in zip(kinds, arguments, strict=True)]
        symbol = RENAMED.get(name, name)
        function = getattr(library, symbol)
        code = int(function(*map(ctypes.byref, slots), *values))
        out = tuple(slot.value or 0 for slot in slots)
        return code, out[0] if len(out) == 1 else out

    return Cuda(call, f"ctypes {found}", _ask_driver_name)


def _load(names: tuple[str, ...]) -> tuple[ctypes.CDLL, str]:
    for name in names:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name), name
    if located := ctypes.util.find_library("cudart"):
        return ctypes.CDLL(located), located
    raise OSError(f"none of {', '.join(names)} found")


def _ask_driver_name(index: int) -> str:
    """Name of a device from the driver: the runtime's own struct of properties differs between versions."""
    driver = ctypes.CDLL("libcuda.so.1")
    device, text = (
        ctypes.c_int(),
        ctypes.create_string_buffer(NAME_BYTES),
    )
    driver.cuInit(0)
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(text, len(text), device)
    return text.value.decode(errors="replace")
