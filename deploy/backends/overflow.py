"""Whether int8 products overflow on this processor.

Kernels for x86 without VNNI multiply unsigned by signed bytes and add two products in 16 bits, which saturate
where both are large. ONNX Runtime computes exactly there if it is told to, but more slowly.
"""

from __future__ import annotations

import functools
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
