"""Whether int8 products overflow on this processor, and whether its products of int8 matrices are slow.

Kernels for x86 without VNNI multiply unsigned by signed bytes and add two products in 16 bits, which saturate
where both are large. ONNX Runtime computes exactly there if it is told to, but more slowly, so that graphs
made for it have weights whose sums fit; OpenVINO gets such weights there (:mod:`.openvino_pairs`). Without
AVX-512, its int8 products of matrices are slower than float32 ones, too (:mod:`.openvino_linears`).
"""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Sequence
from pathlib import Path

PROCESSORS = Path("/proc/cpuinfo")
"""Where Linux lists the processors with their flags."""

X86 = ("x86_64", "AMD64", "i386", "i686")
"""Names of the processors that have this problem."""

EXACT = {"avx512_vnni", "avx_vnni"}
"""Flags of processors that add the products in 32 bits."""


@functools.cache
def can_overflow() -> bool:
    """Whether sums of int8 products can overflow here; where the processor's flags cannot be read, it is
    assumed."""
    flags = read_flags()
    return platform.machine() in X86 and (flags is None or not EXACT & flags)


@functools.cache
def read_flags() -> frozenset[str] | None:
    """What Linux says that the processors can do; ``None`` where it cannot be read."""
    try:
        return frozenset(PROCESSORS.read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return None


LIMITS = ("OV_CPU_MAX_ISA", "ONEDNN_MAX_CPU_ISA")
"""Environment variables by which OpenVINO does without newer instructions."""

EXACT_LIMITS = ("VNNI", "BF16", "FP16", "AMX", "AVX10", "DEFAULT", "ALL")
"""Parts of the values of these variables that leave it instructions which add in 32 bits."""


def saturates_in_openvino() -> bool:
    """Whether sums of int8 products can saturate in OpenVINO on this processor, or under the limit that the
    environment sets for it."""
    return can_overflow() or (platform.machine() in X86 and _is_limited(EXACT_LIMITS))


WIDE = {"avx512bw", "avx512dq", "avx512vl"}
"""Flags of processors with what OpenVINO needs for its int8 products of matrices, if they lack VNNI."""

WIDE_LIMITS = (*EXACT_LIMITS, "AVX512")
"""Parts of the values of :data:`LIMITS` that leave OpenVINO these instructions."""


def multiplies_matrices_slowly() -> bool:
    """Whether OpenVINO's int8 products of matrices take longer than float32 ones on this processor, or under
    the limit that the environment sets for it: x86 with neither VNNI nor AVX-512.

    Where the processor's flags cannot be read, this is not assumed: with VNNI, int8 gains much.
    """
    flags = read_flags()
    if platform.machine() not in X86 or not saturates_in_openvino():
        return False
    return (flags is not None and not (EXACT & flags or flags >= WIDE)) or _is_limited(WIDE_LIMITS)


def _is_limited(parts: Sequence[str]) -> bool:
    """Whether the environment limits OpenVINO to instructions in whose name none of ``parts`` is."""
    values = [os.environ[name].upper() for name in LIMITS if os.environ.get(name)]
    return any(not any(part in value for part in parts) for value in values)


SATURATION_NOTE = (
    "ran on a processor without VNNI, for which OpenVINO gets int8 weights that are rounded more coarsely, so"
    " that sums of products fit 16 bits: verify it with labelled images (--data) on such a processor"
)
"""What a user must know of an int8 model that ran there. It may be read elsewhere: manifests record it."""

LINEARS_NOTE = (
    "ran on a processor with neither VNNI nor AVX-512, on which OpenVINO's int8 products of matrices are"
    " slower than float32: linears ran in float32, with their int8 weights"
)
"""What a user must know of int8 linears there."""
