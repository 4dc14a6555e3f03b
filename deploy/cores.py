"""The processor's cores that this process may use."""

from __future__ import annotations

import os


def list_cores() -> list[int]:
    """Numbers of the cores, sorted; as many from 0 as there are where the system does not tell which."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def count_cores() -> int:
    """The number of cores, at least 1."""
    return len(list_cores())
