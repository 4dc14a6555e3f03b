"""What the system allows this process: cores, affinity, control groups, memory; and its power profile.

Sources: Linux kernel documentation, "Control Group v2" (``cpu.max``, ``memory.max``), "CFS Bandwidth Control"
and "Memory Resource Controller" of version 1; ``/proc/meminfo`` (``proc(5)``); "Platform Profile Selection";
"Linux power supply class".
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..measure.checkup import Limits

UNLIMITED = 1 << 60
"""Bytes from which version 1 of control groups means no limit: it writes the largest number of pages."""


def read_limits(root: Path = Path("/")) -> Limits:
    """The limits of this process; ``root`` holds ``proc`` and ``sys``."""
    known = hasattr(os, "sched_getaffinity")
    return Limits(
        cores=os.cpu_count(),
        affinity=tuple(sorted(os.sched_getaffinity(0))) if known else (),
        cpu_quota=min(_iterate_quotas(root), default=None),
        memory=_read_memory(root, "MemTotal"),
        memory_available=_read_memory(root, "MemAvailable"),
        memory_limit=min(_iterate_memory_limits(root), default=None),
    )


def read_profile(root: Path = Path("/")) -> str | None:
    """The firmware's power profile."""
    return _read(root / "sys/firmware/acpi/platform_profile") or None


def is_on_battery(root: Path = Path("/")) -> bool | None:
    """Whether no mains supply is connected; ``None`` where there is none to ask."""
    supplies = sorted((root / "sys/class/power_supply").glob("*"))
    mains = [supply for supply in supplies if _read(supply / "type") == "Mains"]
    return all(_read(supply / "online") == "0" for supply in mains) if mains else None


def _iterate_quotas(root: Path) -> Iterator[float]:
    """Cores' worth of time, of each group that has a limit."""
    for folder in _iterate_groups(root, "cpu"):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        quota = quota or _read(folder / "cpu.cfs_quota_us")
        period = period or _read(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):
            yield int(quota) / int(period)


def _iterate_memory_limits(root: Path) -> Iterator[int]:
    """Bytes, of each group that has a limit."""
    for folder in _iterate_groups(root, "memory"):
        limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        if limit.isdigit() and int(limit) < UNLIMITED:
            yield int(limit)


def _iterate_groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the process's group and of those around it, of both versions. Inside a container the path
    may be one of the host, so the folders that exist are taken."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, group = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        parts = [part for part in group.split("/") if part not in {"", ".."}]
        for depth in range(len(parts), -1, -1):
            yield top.joinpath(*parts[:depth])


def _read_memory(root: Path, entry: str) -> int | None:
    """Bytes of an entry of ``/proc/meminfo``, whose unit is 1024 bytes."""
    found = re.search(rf"^{entry}:\s+(\d{{1,15}}) kB$", _read(root / "proc/meminfo"), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _read(path: Path) -> str:
    """The file's text without surrounding white space; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
