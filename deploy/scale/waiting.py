"""Waits until a cluster has free cores, and says so: workers that find none wait in silence, for ever."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import ClusterError

LIMIT_S = 600.0
"""Seconds to wait for free cores, unless told otherwise."""

SILENT_S = 5.0
"""Seconds after which a run that waits says so; a cluster that is not busy gives cores in less."""

LOOK_S = 1
"""Seconds between two looks for a signal and for the time; Ray counts whole ones."""


@dataclass(frozen=True)
class Waiting:
    """How long a run waits for free cores.

    Attributes:
        limit_s: seconds; 0 for a cluster that must have them at once.
        tell: called with a sentence once the wait is longer than :data:`SILENT_S`.
    """

    limit_s: float = LIMIT_S
    tell: Callable[[str], None] | None = None


def await_cores(ray: Any, cores: int, waiting: Waiting) -> None:
    """Wait until one node has ``cores`` free cores.

    Ray is asked for the cores themselves, because what is free now may be promised to others that wait
    longer, and because a cluster that grows by itself is made to grow. They are given back at once, for the
    workers: another program that asks in this moment may be faster, and is then waited for in silence.

    Raises:
        ClusterError: no node has had them within the limit.
    """
    group = ray.util.placement_group([{"CPU": cores}])
    try:
        _wait(ray, group, cores, waiting)
    finally:
        with contextlib.suppress(Exception):  # the cluster is gone
            ray.util.remove_placement_group(group)


def _wait(ray: Any, group: Any, cores: int, waiting: Waiting) -> None:
    begun, is_told = time.monotonic(), waiting.tell is None
    while not group.wait(LOOK_S):
        gc.collect()  # Ray Data leaves the workers of an earlier round in cycles, where they hold their cores
        passed = time.monotonic() - begun
        if passed >= waiting.limit_s:
            raise ClusterError(
                f"no node of the cluster had {format_cores(cores)} free within {waiting.limit_s:g} s",
                why=describe_cores(ray),
                remedy="wait for the end of what else runs there, give more seconds with --ray-wait, or fewer"
                " --threads",
            )
        if waiting.tell and not is_told and passed >= SILENT_S:
            is_told = True
            waiting.tell(
                f"waiting for {format_cores(cores)} free on one node, {waiting.limit_s:g} s at most"
                f" (--ray-wait): {describe_cores(ray)}"
            )


def list_cores(ray: Any) -> list[int]:
    """The number of cores of each node that lives; a node may offer none."""
    return [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]


def describe_cores(ray: Any) -> str:
    """How many cores the nodes have, and how many of all are free."""
    found = ", ".join(map(str, sorted(list_cores(ray), reverse=True)))
    free = int(ray.available_resources().get("CPU", 0))
    return f"cores of the cluster's nodes: {found}; free: {free}"


def format_cores(count: int) -> str:
    """A number of cores in words."""
    return "1 core" if count == 1 else f"{count} cores"
