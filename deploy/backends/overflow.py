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
from collections.abc import Collection
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


LIMITS = ("OV_CPU_MAX_ISA", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Environment variables by which OpenVINO does without newer instructions."""

NARROW_LIMITS = ("SSE41", "AVX", "AVX2")
"""Values of these variables that leave it neither VNNI nor AVX-512. A value that it does not know is none."""

WIDE_LIMITS = ("AVX512_MIC", "AVX512_MIC_4OPS", "AVX512_CORE")
"""Values that leave it AVX-512 without VNNI."""

AVX2_VNNI_LIMIT = "AVX2_VNNI"
"""The start of values that leave it the VNNI of AVX2, which is other instructions than that of AVX-512."""


def saturates_in_openvino() -> bool:
    """Whether sums of int8 products can saturate in OpenVINO on this processor, or under the limit that the
    environment sets for it."""
    return can_overflow() or _is_limited((*NARROW_LIMITS, *WIDE_LIMITS))


WIDE = {"avx512bw", "avx512dq", "avx512vl"}
"""Flags of processors with what OpenVINO needs for its int8 products of matrices, if they lack VNNI."""


def multiplies_matrices_slowly() -> bool:
    """Whether OpenVINO's int8 products of matrices take longer than float32 ones on this processor, or under
    the limit that the environment sets for it: x86 with neither VNNI nor AVX-512.

    Where the processor's flags cannot be read, this is not assumed: with VNNI, int8 gains much.
    """
    if _is_limited(NARROW_LIMITS):
        return True
    flags = read_flags()
    return can_overflow() and flags is not None and not flags >= WIDE


def _is_limited(values: Collection[str]) -> bool:
    """Whether the environment limits OpenVINO to one of ``values``, or to VNNI that the processor lacks."""
    if platform.machine() not in X86:
        return False
    flags = read_flags()
    lacks = flags is not None and "avx_vnni" not in flags
    limits = [os.environ.get(name, "").upper() for name in LIMITS]
    return any(limit in values or (lacks and limit.startswith(AVX2_VNNI_LIMIT)) for limit in limits)


SATURATION_NOTE = (
    "ran on a processor without VNNI, for which OpenVINO gets int8 weights that are rounded more coarsely, so"
    " that sums of products fit 16 bits: verify it with labelled images (--data) on such a processor"
)
"""What a user must know of an int8 model that ran there. It may be read elsewhere: manifests record it."""

LINEARS_NOTE = (
    "ran on a processor with neither VNNI nor AVX-512, where OpenVINO multiplies int8 matrices more slowly"
    " than float32: int8 linears, if it has any, computed in float32. Verify it on the device, too, if that"
    " has VNNI"
)
"""What a user must know of int8 linears there. It may be read elsewhere: manifests record it."""
