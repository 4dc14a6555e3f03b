"""A CUDA device made of host memory, with the calls and return values of ``cuda.bindings.runtime``.

Streams run at once unless they are being captured. ``FAKE_GPUS`` is how many there are, ``FAKE_SM`` their
compute capability.
``FAKE_CUDA`` makes it fail: ``old_driver``, ``no_device``, ``no_memory``, ``no_capture``.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
import time
from collections.abc import Callable
from enum import IntEnum


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorStreamCaptureUnsupported = 900


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToHost = 0
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class cudaStreamCaptureMode(IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1
    cudaStreamCaptureModeRelaxed = 2


class cudaDeviceAttr(IntEnum):
    cudaDevAttrMultiProcessorCount = 16
    cudaDevAttrIntegrated = 18
    cudaDevAttrPciBusId = 33
    cudaDevAttrPciDeviceId = 34
    cudaDevAttrPciDomainId = 50
    cudaDevAttrComputeCapabilityMajor = 75
    cudaDevAttrComputeCapabilityMinor = 76


OK = cudaError_t.cudaSuccess
INVALID = cudaError_t.cudaErrorInvalidValue
_numbers = itertools.count(1)
memory: dict[int, ctypes.Array] = {}
streams: dict[int, list[Callable[[], None]] | None] = {}  # handle -> what a capture has recorded
events: dict[int, int] = {}
graphs: dict[int, list[Callable[[], None]]] = {}


def enqueue(stream: int, work: Callable[[], None]) -> None:
    """Run ``work``, or record it; what the fake TensorRT calls."""
    recording = streams[int(stream)]
    if recording is None:
        work()
    else:
        recording.append(work)


_here = threading.local()


def current() -> int:
    """The device of this thread."""
    return getattr(_here, "device", 0)


def _count() -> int:
    return int(os.environ.get("FAKE_GPUS", "1"))


def _mode() -> str:
    return os.environ.get("FAKE_CUDA", "")


def cudaGetDeviceCount():
    codes = {
        "old_driver": cudaError_t.cudaErrorInsufficientDriver,
        "no_device": cudaError_t.cudaErrorNoDevice,
    }
    return (codes[_mode()], None) if _mode() in codes else (OK, _count())


def cudaRuntimeGetVersion():
    return OK, 12060


def cudaDriverGetVersion():
    return OK, int(os.environ.get("FAKE_CUDA_DRIVER", "12060"))


def cudaSetDevice(device):
    _here.device = device
    return (OK if 0 <= device < _count() else INVALID,)


class _Properties:
    name = b"Fake Orin"


def cudaGetDeviceProperties(device):
    return OK, _Properties()


def cudaDeviceGetAttribute(attribute, device):
    major, minor = os.environ.get("FAKE_SM", "8.7").split(".")
    return OK, {75: int(major), 76: int(minor), 18: 1, 16: 8, 33: 1, 34: 0, 50: 0}[int(attribute)]


def cudaMemGetInfo():
    return OK, 4 << 30, 8 << 30


def cudaMalloc(size):
    if _mode() == "no_memory":
        return cudaError_t.cudaErrorMemoryAllocation, None
    buffer = ctypes.create_string_buffer(size)
    memory[ctypes.addressof(buffer)] = buffer
    return OK, ctypes.addressof(buffer)


def cudaFree(address):
    return (OK if memory.pop(address, None) is not None else INVALID,)


def cudaHostAlloc(size, flags):
    return cudaMalloc(size)


cudaFreeHost = cudaFree


def cudaMemcpyAsync(target, source, size, kind, stream):
    assert isinstance(kind, cudaMemcpyKind)
    enqueue(stream, lambda: ctypes.memmove(target, source, size))
    return (OK,)


def cudaStreamCreateWithFlags(flags):
    handle = next(_numbers)
    streams[handle] = None
    return OK, handle


def cudaStreamSynchronize(stream):
    return (OK if stream in streams else INVALID,)


def cudaStreamDestroy(stream):
    return (OK if streams.pop(stream, 0) != 0 else INVALID,)


def cudaEventCreate():
    handle = next(_numbers)
    events[handle] = 0
    return OK, handle


def cudaEventRecord(event, stream):
    events[event] = time.perf_counter_ns()
    return (OK,)


def cudaEventSynchronize(event):
    return (OK if events.get(event) else INVALID,)


def cudaEventElapsedTime(start, end):
    return OK, (events[end] - events[start]) / 1e6


def cudaEventDestroy(event):
    return (OK if events.pop(event, None) is not None else INVALID,)


def cudaStreamBeginCapture(stream, mode):
    assert isinstance(mode, cudaStreamCaptureMode)
    streams[stream] = []
    return (OK,)


def cudaStreamEndCapture(stream):
    recorded, streams[stream] = streams[stream], None
    if _mode() == "no_capture":
        return cudaError_t.cudaErrorStreamCaptureUnsupported, None
    handle = next(_numbers)
    graphs[handle] = list(recorded or [])
    return OK, handle


def cudaGraphInstantiate(graph, flags):
    handle = next(_numbers)
    graphs[handle] = graphs[graph]
    return OK, handle


def cudaGraphDestroy(graph):
    return (OK if graphs.pop(graph, None) is not None else INVALID,)


cudaGraphExecDestroy = cudaGraphDestroy


def cudaGraphLaunch(graph, stream):
    for work in graphs[graph]:
        enqueue(stream, work)
    return (OK,)


def cudaGetLastError():
    return (OK,)


def cudaGetErrorString(error):
    return OK, error.name.encode()
