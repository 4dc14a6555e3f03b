"""What a device tells of itself beside a measurement: state, clocks, temperatures, power.

:mod:`cmt_edge.deploy.telemetry` asks for it; what is not known is ``None`` or empty.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class PowerMode:
    """The active power mode, e.g. ``MAXN`` and 0; ``id`` where ``nvpmodel`` prints it."""

    name: str
    id: int | None = None


@dataclass(frozen=True)
class Clock:
    """Frequencies in MHz: the limits that are set, not those of the hardware, and the present value."""

    min_mhz: float
    max_mhz: float
    current_mhz: float


@dataclass(frozen=True)
class CpuClock(Clock):
    """One core; the frequencies of a core that is not online mean nothing."""

    online: bool
    governor: str


@dataclass(frozen=True)
class EmcClock(Clock):
    """The memory controller; ``override`` is true where its rate is held, ``None`` where the tool does not
    say."""

    override: bool | None = None


@dataclass(frozen=True)
class Clocks:
    """The clocks of ``jetson_clocks --show``.

    Attributes:
        cpus: ``"cpu0"`` -> clock, in the order of the numbers.
        gpus: ``"GPU"`` -> clock; Thor has ``"gpu-gpc-0"`` (compute) and ``"gpu-nvd-0"`` (video).
        locked: whether no clock may move: every online core and every GPU has its minimum at its maximum, and
            so has the memory, or it is held at its maximum by the override. ``None`` where no clock was
            printed.
    """

    cpus: dict[str, CpuClock]
    gpus: dict[str, Clock]
    emc: EmcClock | None
    locked: bool | None


@dataclass(frozen=True)
class DGpu:
    """One GPU, every figure ``None`` where the driver does not tell it.

    Attributes:
        power_limit_w: board power that is enforced, in watts.
        sm_mhz, memory_mhz: clocks now; ``..._max_mhz`` the highest they can be set to.
        performance_state: ``"P0"`` (highest) to ``"P15"``.
        clock_reasons: why the clocks are below their maximum, empty where nothing holds them.
    """

    index: int
    name: str | None
    power_limit_w: float | None
    sm_mhz: int | None
    sm_max_mhz: int | None
    memory_mhz: int | None
    memory_max_mhz: int | None
    temperature_c: int | None
    performance_state: str | None
    clock_reasons: list[str] | None


@dataclass(frozen=True)
class DeviceState:
    """What a latency report records of the device; empty and ``None`` is what it does not tell.

    Attributes:
        kind: ``"jetson"``, ``"dgpu"`` (any machine with an NVIDIA GPU that NVML reads) or ``"cpu"``.
        module, l4t, jetpack: of a Jetson, e.g. ``"NVIDIA Jetson AGX Orin Developer Kit"``, ``"36.4.3"``,
            ``"6.2"``.
        power_mode: of ``nvpmodel``.
        clocks: of ``jetson_clocks --show``, in MHz; ``clocks.locked`` tells whether they may move.
        temperatures_c: thermal zone -> degrees Celsius.
        dgpu: state of the GPU.
        notes: what could not be read, and why.
    """

    kind: str
    module: str | None = None
    l4t: str | None = None
    jetpack: str | None = None
    power_mode: PowerMode | None = None
    clocks: Clocks | None = None
    temperatures_c: dict[str, float] = field(default_factory=dict)
    dgpu: DGpu | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Power:
    """Mean of ``samples`` readings in watts; ``None`` without any."""

    watts: float | None
    samples: int


@dataclass(frozen=True)
class PowerReport:
    """Power of a measurement; ``source`` names the rails or the GPU (``None``: no sensor), ``interval_s``
    between samples."""

    source: str | None
    interval_s: float
    before: Power
    during: Power
    after: Power
    notes: list[str]
