"""What a process needs in memory that opens a bundle and answers one batch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..bundle.sections import Count

STATUS = Path("/proc/self/status")
"""Where Linux says what memory this process has."""
KIB = 1024
"""Bytes of the unit in that file, which it calls kB."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a process of its own that opened a bundle, compiled it anew and answered one batch.

    Attributes:
        peak: the most that it held.
        kept: what it held after the answer.
    """

    peak: Count
    kept: Count


def read_memory() -> Memory | None:
    """Of this process; ``None`` where the system does not tell."""
    try:
        text = STATUS.read_text()
    except OSError:
        return None
    found = dict(re.findall(r"^(VmHWM|VmRSS):\s+(\d+) kB$", text, re.MULTILINE))
    if len(found) < 2:
        return None
    return Memory(KIB * int(found["VmHWM"]), KIB * int(found["VmRSS"]))
