"""What ``cmt-edge doctor`` finds: the machine, the runtimes, and what each format lacks here.

:mod:`cmt_edge.deploy.doctor` asks for it and :mod:`cmt_edge.deploy.report` shows it; what is not known is
``None`` or empty.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..bundle.sections import Host
from .device import DeviceState


@dataclass(frozen=True)
class Fault:
    """Why something is not possible here, and what helps."""

    what: str
    why: str | None = None
    remedy: str | None = None


@dataclass(frozen=True)
class Limits:
    """What the system allows this process.

    Attributes:
        cores: of the machine.
        affinity: numbers of the cores that the process may run on.
        cpu_quota: cores' worth of time that its control groups allow; ``None`` for no limit.
        memory: bytes of the machine, and of them those that are available.
        memory_limit: bytes that its control groups allow; ``None`` for no limit.
    """

    cores: int | None
    affinity: tuple[int, ...]
    cpu_quota: float | None
    memory: int | None
    memory_available: int | None
    memory_limit: int | None


@dataclass(frozen=True)
class Machine:
    """The machine.

    Attributes:
        host: processor, its flags, system.
        limits: of this process.
        profile: the firmware's power profile, ``"performance"`` for instance.
        on_battery: whether no mains supply is connected.
        state: JetPack and power mode of a Jetson, or the state of an NVIDIA GPU.
    """

    host: Host
    limits: Limits
    profile: str | None
    on_battery: bool | None
    state: DeviceState


@dataclass(frozen=True)
class FoundDevice:
    """A device of a runtime.

    Attributes:
        name: what ``--device`` takes.
        title: its maker's name for it.
        precisions: those of bundles that it computes in as asked.
        fault: why it cannot be used; ``None`` where it can.
    """

    name: str
    title: str
    precisions: tuple[str, ...] = ()
    fault: Fault | None = None


@dataclass(frozen=True)
class RuntimeState:
    """A runtime.

    Attributes:
        name: what ``--backend`` takes.
        version: of it; ``None`` where it cannot be loaded.
        devices: the best first.
        fault: why it serves nothing here; ``None`` where one device can be used.
    """

    name: str
    version: str | None
    devices: tuple[FoundDevice, ...]
    fault: Fault | None


@dataclass(frozen=True)
class FormatState:
    """A bundle's format.

    Attributes:
        format: what ``--format`` takes.
        runtime: name of the runtime that serves it.
        is_served: whether bundles of it run here.
        can_export: whether they can be made here.
        faults: what is missing for either.
    """

    format: str
    runtime: str
    is_served: bool
    can_export: bool
    faults: tuple[Fault, ...]


@dataclass(frozen=True)
class Checkup:
    """All of it; ``packages`` gives installed versions by name."""

    version: str
    packages: dict[str, str]
    machine: Machine
    runtimes: tuple[RuntimeState, ...]
    formats: tuple[FormatState, ...]

    def list_unserved(self) -> list[str]:
        """Formats whose bundles do not run here."""
        return [state.format for state in self.formats if not state.is_served]
