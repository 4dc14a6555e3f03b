"""Whether int8 products overflow on this processor.

Kernels for x86 without VNNI multiply unsigned by signed bytes and add two products in 16 bits, which saturate
where both are large. ONNX Runtime computes exactly there if it is told to, but more slowly, so that graphs
made for it have weights whose sums fit; OpenVINO gets such weights there (:mod:`.openvino_pairs`).
"""

from __future__ import annotations

import functools
import os
import platform
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
    if platform.machine() not in X86:
        return False
    try:
        text = PROCESSORS.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    return not EXACT & set(text.split())


LIMITS = ("OV_CPU_MAX_ISA", "ONEDNN_MAX_CPU_ISA")
"""Environment variables by which OpenVINO does without newer instructions."""

EXACT_LIMITS = ("VNNI", "BF16", "FP16", "AMX", "AVX10", "DEFAULT", "ALL")
"""Parts of the values of these variables that leave it instructions which add in 32 bits."""


def saturates_in_openvino() -> bool:
    """Whether sums of int8 products can saturate in OpenVINO on this processor, or under the limit that the
    environment sets for it."""
    values = [os.environ[name].upper() for name in LIMITS if os.environ.get(name)]
    limited = any(not any(part in value for part in EXACT_LIMITS) for value in values)
    return can_overflow() or (limited and platform.machine() in X86)


SATURATION_NOTE = (
    "ran on a processor without VNNI, for which OpenVINO gets int8 weights that are rounded more coarsely, so"
    " that sums of products fit 16 bits: verify it with labelled images (--data) on such a processor"
)
"""What a user must know of an int8 model that ran there. It may be read elsewhere: manifests record it."""
