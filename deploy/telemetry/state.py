"""The state of the device beside a measurement, read once by :func:`read_state`.

What cannot be read becomes a note, never an exception: a latency without its clocks is still a latency.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from ..errors import InputError
from ..measure.device import DeviceState
from . import dgpu, jetson
from .tools import TIMEOUT_S, run_tool

T = TypeVar("T")
"""The type of an answer."""
RunTool = Callable[[Sequence[str]], "str | None"]
"""Runs a command and returns its standard output, ``None`` where it has no answer."""

QUOTED = 200
"""Characters of a tool's unexpected answer that a note quotes."""


def read_state(
    root: Path = Path("/"),
    run: RunTool = run_tool,
    gpu_index: int = 0,
) -> DeviceState:
    """The state now.

    Args:
        root: folder that holds ``proc``, ``sys`` and ``etc``.
        run: runs a command.
        gpu_index: which GPU NVML is asked for; a Jetson is not asked.

    Sources: as the functions of :mod:`cmt_edge.deploy.telemetry.jetson` and
    :mod:`cmt_edge.deploy.telemetry.dgpu`. Raises :class:`InputError` for a root that is no folder and a
    negative index.
    """
    root = Path(root)
    check(root, gpu_index)
    return _read_jetson(root, run) if jetson.is_jetson(root) else _read_other(root, gpu_index)


def check(root: Path, gpu_index: int) -> None:
    """Raises :class:`InputError` for a root that is no folder and a negative index."""
    if not root.is_dir():
        raise InputError("not a folder", where=root)
    if gpu_index < 0:
        raise InputError(f"no GPU has the index {gpu_index}", remedy="count from 0")


def _read_jetson(root: Path, run: RunTool) -> DeviceState:
    notes: list[str] = []
    module = jetson.read_module(root)
    if module.l4t is None:
        notes.append("L4T release: /etc/nv_tegra_release is missing, as in most containers")
    elif module.l4t not in jetson.JETPACK:
        notes.append(f"JetPack: the release of L4T {module.l4t} is not in the table")
    return DeviceState(
        kind="jetson",
        module=module.model,
        l4t=module.l4t,
        jetpack=module.jetpack,
        power_mode=_ask(
            ["nvpmodel", "-q"],
            run,
            jetson.parse_nvpmodel,
            notes,
        ),
        clocks=_ask(
            ["jetson_clocks", "--show"],
            run,
            jetson.parse_jetson_clocks,
            notes,
        ),
        temperatures_c=_read_temperatures(root, notes),
        notes=notes,
    )


def _read_other(root: Path, gpu_index: int) -> DeviceState:
    gpu, notes = dgpu.read_dgpu(gpu_index)
    return DeviceState(
        kind="dgpu" if gpu else "cpu",
        temperatures_c=_read_temperatures(root, notes),
        dgpu=gpu,
        notes=notes,
    )


def _read_temperatures(root: Path, notes: list[str]) -> dict[str, float]:
    zones = jetson.read_temperatures(root)
    if not zones:
        notes.append("temperatures: no thermal zone can be read in /sys/class/thermal")
    return zones


def _ask(
    command: list[str],
    run: RunTool,
    parse: Callable[[str], T | None],
    notes: list[str],
) -> T | None:
    """What ``parse`` makes of the tool's answer, or ``None`` and a note."""
    name = " ".join(command)
    text = run(command)
    if text is None:
        notes.append(f"{name}: not found, or no answer within {TIMEOUT_S:.0f} s")
        return None
    result = parse(text)
    if result is None:
        notes.append(_describe_refusal(name, text))
    return result


def _describe_refusal(name: str, text: str) -> str:
    """Why a tool's answer is of no use. As a user, ``jetson_clocks`` prints one line that says so, on
    whichever stream."""
    first = text.strip().split("\n")[0][:QUOTED]
    if "root" in first or (not first and name.startswith("jetson_clocks")):
        return f"{name} needs root: run it with sudo"
    return f"{name}: {first or 'empty answer'}"
