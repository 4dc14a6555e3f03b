"""A check-up as text, for a terminal and for a bug report."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from ..measure.checkup import Checkup, Fault, FormatState, Machine, RuntimeState
from ..measure.device import DeviceState
from .tables import format_table

WIDTH = 80
"""Characters of a line where nothing says how wide the page is."""
LABEL = 10
"""Characters that the name of a line takes."""
GIB = 2**30
"""Bytes of a GiB."""
NONE = "none"
"""What stands for a value that the machine lacks."""

X86 = {
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "AMX": ("amx_int8", "amx_bf16"),
    "bfloat16": ("avx512_bf16", "amx_bf16"),
    "AVX": ("avx2", "avx512f"),
}
"""What an x86 processor can do -> the flags of the instructions for it."""
WITHOUT = {
    "VNNI": "no: int8 gains less speed over float32 here than on newer processors, and without AVX-512 none"
    " in linears; measure here"
}
"""What the lack of an ability means, where it is more than slowness."""
ARM = {
    "int8": ("asimddp", "i8mm"),
    "bfloat16": ("bf16",),
    "vectors": ("asimd",),
}
"""The same for an Arm processor."""


def describe_checkup(found: Checkup, width: int | None = None) -> str:
    """The whole check-up; no line is longer than ``width``, 80 where that is ``None``."""
    width = width or WIDTH
    parts = [
        "\n".join(_describe_machine(found, width)),
        _format_runtimes(found.runtimes, width),
        _format_formats(found.formats, width),
        "\n".join(_list_faults(found, width)),
    ]
    return "\n\n".join(part for part in parts if part)


def _describe_machine(found: Checkup, width: int) -> list[str]:
    machine, host = found.machine, found.machine.host
    abilities = ARM if host.machine in {"aarch64", "arm64"} else X86
    packages = ", ".join(f"{name} {version}" for name, version in found.packages.items())
    named = {
        "cmt-edge": f"{found.version}, Python {host.python}, {host.system}",
        "cpu": f"{host.cpu}, {host.machine}",
        **{what: _describe_ability(host.flags, what, flags) for what, flags in abilities.items()},
        "cores": _describe_cores(machine),
        "memory": _describe_memory(machine),
        "power": _describe_power(machine),
        "device": _describe_device(machine.state),
        "packages": packages,
    }
    return [line for name, text in named.items() for line in _fold(name, text, width)]


def _fold(name: str, text: str, width: int) -> list[str]:
    """A named line, folded under itself."""
    return textwrap.wrap(
        f"{name:<{LABEL}}{text}",
        width,
        subsequent_indent=" " * LABEL,
        break_on_hyphens=False,
    )


def _describe_ability(flags: Iterable[str], what: str, wanted: Iterable[str]) -> str:
    found = ", ".join(flag for flag in wanted if flag in flags)
    return found or WITHOUT.get(what, "no")


def _describe_cores(machine: Machine) -> str:
    limits = machine.limits
    usable = len(limits.affinity) or limits.cores
    quota = NONE if limits.cpu_quota is None else f"{limits.cpu_quota:g} cores' worth of time"
    pinned = f" (numbers {_format_numbers(limits.affinity)})" if limits.affinity else ""
    return f"{usable} of {limits.cores} usable{pinned}; limit of the control group: {quota}"


def _format_numbers(numbers: Iterable[int]) -> str:
    """``0-3, 6`` of 0, 1, 2, 3, 6."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def _describe_memory(machine: Machine) -> str:
    limits = machine.limits
    sizes = [limits.memory, limits.memory_available, limits.memory_limit]
    whole, free, limit = ["unknown" if size is None else f"{size / GIB:.1f} GiB" for size in sizes]
    shown = NONE if limits.memory_limit is None else limit
    return f"{whole}, {free} available; limit of the control group: {shown}"


def _describe_power(machine: Machine) -> str:
    mode = machine.state.power_mode
    known = [
        f"mode {mode.name}" if mode else "",
        f"profile {machine.profile}" if machine.profile else "",
        f"governor {machine.host.governor}" if machine.host.governor else "",
        "on battery" if machine.on_battery else "",
    ]
    return ", ".join(filter(None, known)) or "the system does not tell"


def _describe_device(state: DeviceState) -> str:
    """A Jetson, an NVIDIA GPU, or why none was found."""
    if state.kind == "jetson":
        return f"{state.module}, L4T {state.l4t}, JetPack {state.jetpack}"
    if state.dgpu:
        limit = state.dgpu.power_limit_w
        return f"NVIDIA GPU {state.dgpu.name}" + (f", limit {limit:g} W" if limit else "")
    reason = next((note for note in state.notes if note.startswith("dGPU: ")), "dGPU: not found")
    return f"no NVIDIA GPU was found ({reason.removeprefix('dGPU: ')})"


def _format_runtimes(states: Iterable[RuntimeState], width: int) -> str:
    rows = []
    for state in states:
        version = (state.version or "").removeprefix(f"{state.name} ")
        devices = [(d.name, "no" if d.fault else ", ".join(d.precisions)) for d in state.devices]
        for device, precisions in devices or [("", "no")]:
            rows.append([state.name, version or "-", device or "-", precisions])
    return format_table(["runtime", "version", "--device", "computes in"], rows, width=width)


def _format_formats(states: Iterable[FormatState], width: int) -> str:
    rows = [
        [state.format, state.runtime, "yes" if state.is_served else "no", "yes" if state.can_export else "no"]
        for state in states
    ]
    return format_table(["--format", "runtime", "runs here", "export here"], rows, width=width)


def _list_faults(found: Checkup, width: int) -> list[str]:
    """What is missing, each thing once, with its remedy."""
    told: dict[Fault, list[str]] = {}
    for state in found.formats:
        for fault in state.faults:
            told.setdefault(fault, []).append(f"--format {state.format}")
    for runtime in found.runtimes:
        faults = [device.fault for device in runtime.devices if device.fault]
        for fault in faults + ([runtime.fault] if runtime.fault else []):
            told.setdefault(fault, [f"--backend {runtime.name}"])
    return [line for fault, whose in told.items() for line in _describe_fault(fault, whose, width)]


def _describe_fault(fault: Fault, whose: Iterable[str], width: int) -> list[str]:
    lines = textwrap.wrap(
        f"missing: {fault.what} ({', '.join(whose)})", width, subsequent_indent="    ", break_on_hyphens=False
    )
    for word, text in (("why", fault.why), ("remedy", fault.remedy)):
        if text:
            lines += textwrap.wrap(
                f"  {word}: {text}", width, subsequent_indent="    ", break_on_hyphens=False
            )
    return lines
