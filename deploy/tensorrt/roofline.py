"""An estimate of an engine's latency from the data sheets of GPUs. It is no measurement.

A kernel needs at least the time in which its bytes pass through the memory, or its operations through the
arithmetic units, whichever is longer (Williams, Waterman, Patterson: "Roofline", CACM 2009), and the time to
start it. The sum over the kernels is the estimate. It assumes that

* every kernel reaches the data sheet's bandwidth and peak,
* every activation and weight comes from the GPU's memory and goes back to it: nothing stays in the cache,
* kernels run one after the other, each started from a CUDA graph,
* there are no copies to or from the host.

Small kernels reach neither peak, so a real GPU is slower in those; large caches keep whole layers, so it is
faster in others. Use the estimate to compare two graphs on one GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..bundle.sections import EstimateEntry
from .kernels import Kernel, count_operations

LAUNCH_US = 2.0
"""Microseconds that are assumed for starting a kernel in a CUDA graph and for its first and last memory
accesses. NVIDIA's article "Getting Started with CUDA Graphs" (2019) measures 3.4 us for a kernel of a graph
whose work takes 2.9 us, on a V100; that work is itself little more than the latency of one pass through the
memory."""


@dataclass(frozen=True)
class Gpu:
    """What a data sheet says.

    Attributes:
        name: of the GPU.
        sm: its compute capability.
        bandwidth: of its memory, GB/s.
        fp32: peak of its ordinary units, TFLOPS.
        fp16: peak of its tensor cores on dense matrices with float32 sums, TFLOPS.
        int8: the same with int32 sums, TOPS.
        source: of the figures.
    """

    name: str
    sm: str
    bandwidth: float
    fp32: float
    fp16: float
    int8: float
    source: str


GPUS = (
    Gpu("T4", "7.5", 320, 8.1, 65, 130, "NVIDIA T4 data sheet"),
    Gpu("RTX 3090", "8.6", 936, 35.6, 71, 284, "NVIDIA Ampere GA102 white paper, appendix A"),
    Gpu("L4", "8.9", 300, 30.3, 121, 242, "NVIDIA L4 data sheet, half of the figures with sparsity"),
    Gpu("RTX 4090", "8.9", 1008, 82.6, 165.2, 660.6, "NVIDIA Ada white paper, appendix A"),
    Gpu(
        "H100",
        "9.0",
        3350,
        66.9,
        989.4,
        1978.9,
        "NVIDIA H100 data sheet (SXM), half of the figures with sparsity",
    ),
    Gpu("RTX 5090", "12.0", 1792, 104.8, 209.5, 838, "NVIDIA RTX Blackwell white paper, appendix A"),
)
"""GPUs that an estimate is made for."""
PORTABLE = ("8.0", "8.6", "8.9", "12.0")
"""Compute capabilities of the GPUs that a portable engine of TensorRT for RTX runs on; it runs on later ones,
too. Source: TensorRT for RTX documentation, "Support Matrix"."""


def choose_gpus(targets: Sequence[str]) -> tuple[Gpu, ...]:
    """The GPUs of :data:`GPUS` that run an engine for these compute capabilities.

    On another GPU the compiler makes other kernels, so that nothing is known of it. Where no GPU of the table
    has one of the capabilities, all are taken, because graphs can still be compared on them.
    """
    return tuple(gpu for gpu in GPUS if gpu.sm in targets) or GPUS


def estimate_latency(kernels: Sequence[Kernel], gpu: Gpu) -> EstimateEntry:
    """The least time of one inference on ``gpu`` by its data sheet; see the module for what it assumes."""
    memory = arithmetic = launch = 0.0
    for kernel in kernels:
        if kernel.is_sync:
            continue
        moving = (kernel.activation_bytes + kernel.weight_bytes) / (gpu.bandwidth * 1e6)
        computing = count_operations(kernel) / (_find_peak(kernel, gpu) * 1e9)
        if moving >= computing:
            memory += moving
        else:
            arithmetic += computing
        launch += LAUNCH_US / 1e3
    return EstimateEntry(
        gpu=gpu.name,
        total_ms=memory + arithmetic + launch,
        memory_ms=memory,
        arithmetic_ms=arithmetic,
        launch_ms=launch,
    )


def _find_peak(kernel: Kernel, gpu: Gpu) -> float:
    """Operations a second of what the kernel multiplies, in units of 10^12."""
    read = kernel.types.partition(" -> ")[0]
    if "int8" in read:
        return gpu.int8
    return gpu.fp16 if "fp16" in read or "bf16" in read else gpu.fp32
