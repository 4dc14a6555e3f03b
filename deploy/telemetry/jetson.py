"""What a Jetson tells about its own state: the tools' texts and the sysfs trees, read without running
anything.

The parsers of texts return ``None`` where the text is not that tool's output; the readers of trees leave out
what cannot be read. Neither raises. Formats: *NVIDIA Jetson Linux Developer Guide*, "Platform Power and
Performance" and "tegrastats Utility"; what the guide leaves open is taken from outputs recorded on devices
(``tests/data/jetson``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

ABSENT_C = -256
"""What a powered-down or absent temperature sensor reads."""
INPUT_RAILS = ("VIN", "VDD_IN", "POM_5V_IN")
"""Rails that measure all that flows in, the outermost first: developer kit (Thor), module, board (Nano)."""
NESTED_RAILS = {"VDDQ_VDD2_1V8AO"}
"""Rails fed by another measured rail (this one by VIN_SYS_5V0 on AGX Orin); adding them would count them
twice."""
UNCONNECTED = "NC"
LONGEST_LINE = 4096
"""Longer lines are no tool's; a number of more digits than Python converts (4300) fits into none that is
shorter."""

JETPACK = {
    "32.4.3": "4.4",
    "32.4.4": "4.4.1",
    "32.5.0": "4.5",
    "32.5.1": "4.5.1",
    "32.5.2": "4.5.1",
    "32.6.1": "4.6",
    "32.7.1": "4.6.1",
    "32.7.2": "4.6.2",
    "32.7.3": "4.6.3",
    "32.7.4": "4.6.4",
    "32.7.5": "4.6.5",
    "32.7.6": "4.6.6",
    "34.1.0": "5.0 DP",
    "34.1.1": "5.0.1 DP",
    "35.1.0": "5.0.2",
    "35.2.1": "5.1",
    "35.3.1": "5.1.1",
    "35.4.1": "5.1.2",
    "35.5.0": "5.1.3",
    "35.6.0": "5.1.4",
    "35.6.1": "5.1.5",
    "36.2.0": "6.0 DP",
    "36.3.0": "6.0",
    "36.4.0": "6.1",
    "36.4.3": "6.2",
    "36.4.4": "6.2.1",
    "36.5.0": "6.2.2",
    "38.2.0": "7.0",
    "38.2.1": "7.0",
    "38.4.0": "7.1",
    "39.2.0": "7.2",
    "39.2.1": "7.2.1",
}
"""L4T release -> JetPack (NVIDIA, "JetPack Archive" and the release notes of each JetPack)."""
JETPACK_MAJOR = {"32": "4.x", "34": "5.x", "35": "5.x", "36": "6.x", "38": "7.x", "39": "7.x"}
"""For releases that the table does not list: a guessed minor version could be wrong."""


@dataclass(frozen=True)
class PowerMode:
    """The active power mode, e.g. ``MAXN`` and 0; ``id`` and ``fan`` where ``nvpmodel`` prints them."""

    name: str
    id: int | None = None
    fan: str | None = None


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
    """All of ``jetson_clocks --show``.

    Attributes:
        soc, machine: e.g. ``"tegra234"`` and ``"NVIDIA Jetson AGX Orin Developer Kit"``.
        cpus: ``"cpu0"`` -> clock, in the order of the numbers.
        gpus: ``"GPU"`` -> clock; Thor has ``"gpu-gpc-0"`` (compute) and ``"gpu-nvd-0"`` (video).
        locked: whether no clock may move: every online core and every GPU has its minimum at its maximum, and
            so has the memory, or it is held at its maximum by the override. ``None`` where no clock was
            printed.
    """

    soc: str | None
    machine: str | None
    cpus: dict[str, CpuClock]
    gpus: dict[str, Clock]
    emc: EmcClock | None
    power_mode: str | None
    locked: bool | None


@dataclass(frozen=True)
class Core:
    """Load in percent and MHz of one core; ``None`` where it is off or not printed."""

    online: bool
    load_percent: int | None = None
    mhz: int | None = None


@dataclass(frozen=True)
class Engine:
    """Load in percent (``None`` where not printed) and MHz: none, one, or one for each cluster of a GPU."""

    load_percent: int | None = None
    mhz: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Tegrastats:
    """One line of ``tegrastats``; MB are 2**20 bytes, rails are in mW, ``None`` and empty is what the line
    lacks.

    Attributes:
        time: as printed, ``"MM-DD-YYYY HH:MM:SS"``.
        largest_free_block_mb, free_blocks: size of the largest free block of memory, and how many there are.
        emc, gpu: memory controller and GPU (GR3D).
        temperatures_c: sensor -> degrees Celsius, without absent sensors.
        rails_mw, average_rails_mw: rail -> now, and the mean since the tool started.
    """

    time: str | None
    ram_used_mb: int
    ram_total_mb: int
    largest_free_block_mb: float | None
    free_blocks: int | None
    swap_used_mb: int | None
    swap_total_mb: int | None
    cpus: list[Core]
    emc: Engine | None
    gpu: Engine | None
    temperatures_c: dict[str, float]
    rails_mw: dict[str, int]
    average_rails_mw: dict[str, int]


@dataclass(frozen=True)
class RailSensor:
    """A rail and the files it is read from: the product of their numbers times ``scale`` is watts."""

    name: str
    files: tuple[Path, ...]
    scale: float

    def watts(self) -> float:
        """The power now. Raises ``OSError`` or ``ValueError`` where a file is gone or holds no number."""
        product = self.scale
        for path in self.files:
            product *= int(read_bytes(path))
        return product


@dataclass(frozen=True)
class Module:
    """Model of the board, L4T release (``"36.4.3"``) and JetPack (``"6.2"``), each ``None`` where unknown."""

    model: str | None
    l4t: str | None
    jetpack: str | None


@dataclass(frozen=True)
class Memory:
    """MB of 2**20 bytes, as ``tegrastats``. CPU and GPU of a Jetson share this memory."""

    total_mb: int
    available_mb: int
    swap_total_mb: int
    swap_used_mb: int


# --- nvpmodel -------------------------------------------------------------------------------------

_MODE = re.compile(r"NV Power Mode:[ \t]*(\S.*)")
_FAN = re.compile(r"NV Fan Mode:[ \t]*(\w+)")
_ID = re.compile(r"^[ \t]*(\d{1,4})[ \t\r]*$", re.MULTILINE)


def parse_nvpmodel(text: str) -> PowerMode | None:
    """The answer of ``nvpmodel -q``, also with ``--verbose`` and with warnings and errors (``NVPM ...``) in
    between.

    Source: Jetson Linux Developer Guide, "Supported Modes and Power Efficiency".
    """
    mode = _MODE.search(text)
    if mode is None:
        return None
    number = _ID.search(text, mode.end())
    fan = _FAN.search(text)
    return PowerMode(mode[1].strip(), int(number[1]) if number else None, fan[1] if fan else None)


# --- jetson_clocks --------------------------------------------------------------------------------

_HEADER = re.compile(r"SOC family:(\S+)[ \t]+Machine:[ \t]*(.*)")
_FREQUENCIES = re.compile(r"MinFreq=(\d+) MaxFreq=(\d+) CurrentFreq=(\d+)(?: FreqOverride=(\d))?")
_CPU = re.compile(r"^\s*cpu(\d+):\s")
# "Gonvernor" is how releases up to L4T 28 spell it
_GOVERNOR = re.compile(r"Gon?vernor=(\S+)")
_GPU = re.compile(r"^\s*(GPU|gpu-\S+) ")


def parse_jetson_clocks(text: str) -> Clocks | None:
    """The answer of ``jetson_clocks --show``; frequencies in MHz (the tool prints kHz for cores and Hz for
    the rest).

    Source: Jetson Linux Developer Guide, "Maximizing Jetson Performance".
    """
    cpus: dict[int, CpuClock] = {}
    gpus: dict[str, Clock] = {}
    emc = None
    for line in text.splitlines():
        found = _FREQUENCIES.search(line[:LONGEST_LINE])
        if not found:
            continue
        low, high, now = (int(f) for f in found.groups()[:3])
        if cpu := _CPU.match(line):
            governor = _GOVERNOR.search(line)
            cpus[int(cpu[1])] = CpuClock(
                low / 1e3, high / 1e3, now / 1e3, "Online=0" not in line, governor[1] if governor else ""
            )
        elif gpu := _GPU.match(line):
            gpus[gpu[1]] = Clock(low / 1e6, high / 1e6, now / 1e6)
        elif line.lstrip().startswith("EMC "):
            emc = EmcClock(low / 1e6, high / 1e6, now / 1e6, None if found[4] is None else found[4] == "1")
    header, mode = _HEADER.search(text), _MODE.search(text)
    if not header and not cpus and not gpus:
        return None
    return Clocks(
        header[1] if header else None,
        (header[2].strip() or None) if header else None,
        {f"cpu{n}": cpus[n] for n in sorted(cpus)},
        gpus,
        emc,
        mode[1].strip() if mode else None,
        _locked([c for c in cpus.values() if c.online], gpus.values(), emc),
    )


def _locked(cores: Iterable[Clock], gpus: Iterable[Clock], emc: EmcClock | None) -> bool | None:
    """See :class:`Clocks`. The memory's minimum stays low up to JetPack 6 even when ``jetson_clocks`` holds
    its rate."""
    clocks = [*cores, *gpus]
    if not clocks and emc is None:
        return None
    fixed = all(c.min_mhz == c.max_mhz for c in clocks)
    held = (
        emc is None or emc.min_mhz == emc.max_mhz or (emc.override is True and emc.current_mhz == emc.max_mhz)
    )
    return fixed and held


# --- tegrastats -----------------------------------------------------------------------------------

_TIME = re.compile(r"^\s*(\d\d-\d\d-\d{4} \d\d:\d\d:\d\d)\s")
_RAM = re.compile(r"(?<!\S)RAM\s+(\d+)/(\d+)MB(?:\s+\(lfb (\d+)x(\d+)(MB|kB)\))?")
_SWAP = re.compile(r"(?<!\S)SWAP\s+(\d+)/(\d+)MB")
_CORES = re.compile(r"(?<!\S)(?:CPU|cpu)\s+\[([^\]]*)\](?:@(\d+))?")
_CORE = re.compile(r"(\d+)%(?:@(\d+))?")
_ENGINE = r"(?<!\S){name}(?:_FREQ)?\s+(?:(\d+)%)?(?:@(\d+|\[[\d,]*\]))?(?:off)?(?!\S)"
_EMC, _GR3D, _GR3D2 = (re.compile(_ENGINE.format(name=name)) for name in ("EMC", "GR3D", "GR3D2"))
_TEMPERATURE = re.compile(r"(?<!\S)([\w-]+)@(-?\d+(?:\.\d+)?)C(?=[/\s]|$)")
# now, or now/average, or now/average/maximum; without "mW" up to JetPack 4, where a lone number would be a
# frequency
_RAIL = re.compile(r"(?<!\S)([A-Za-z]\w*)\s+(\d+)(?:mW(?:/(\d+)(?:mW)?)?|/(\d+))(?:/\d+(?:mW)?)*(?!\S)")


def parse_tegrastats(line: str) -> Tegrastats | None:
    """One line of ``tegrastats``, of JetPack 3 to 7; unknown tokens are skipped.

    ``None`` where memory or the list of cores is missing: every release prints both.
    Source: Jetson Linux Developer Guide, "tegrastats Utility", "Reported Statistics".
    """
    ram, cores = _RAM.search(line), _CORES.search(line)
    if ram is None or cores is None or len(line) > LONGEST_LINE:
        return None
    time, swap = _TIME.match(line), _SWAP.search(line)
    rails = [r for r in _RAIL.finditer(line) if r[1] != UNCONNECTED]
    block = None if ram[4] is None else int(ram[4]) / (1 if ram[5] == "MB" else 1024)
    return Tegrastats(
        time=time[1] if time else None,
        ram_used_mb=int(ram[1]),
        ram_total_mb=int(ram[2]),
        largest_free_block_mb=block,
        free_blocks=None if ram[3] is None else int(ram[3]),
        swap_used_mb=int(swap[1]) if swap else None,
        swap_total_mb=int(swap[2]) if swap else None,
        cpus=_cores(cores[1], cores[2]),
        emc=_engine(_EMC.search(line)),
        gpu=_engine(_GR3D.search(line), _GR3D2.search(line)),
        temperatures_c={t[1]: float(t[2]) for t in _TEMPERATURE.finditer(line) if float(t[2]) != ABSENT_C},
        rails_mw={r[1]: int(r[2]) for r in rails},
        average_rails_mw={r[1]: int(r[3] or r[4]) for r in rails if r[3] or r[4]},
    )


def _cores(text: str, common: str | None) -> list[Core]:
    """``[1%@102,off,...]``, or ``[1%,off,...]@102`` in releases up to L4T 28."""
    cores = []
    for entry in filter(None, (e.strip() for e in text.split(","))):
        load = _CORE.fullmatch(entry)
        mhz = (load[2] or common) if load else None
        cores.append(Core(True, int(load[1]), int(mhz) if mhz else None) if load else Core(False))
    return cores


def _engine(first: re.Match[str] | None, second: re.Match[str] | None = None) -> Engine | None:
    """``99%@1377``, ``0%@[305,305]``, ``@[314,314,314]``, ``0%``; early Orin releases print the second
    cluster apart."""
    if first is None:
        return None
    mhz = [int(f) for part in (first, second) if part and part[2] for f in re.findall(r"\d+", part[2])]
    return Engine(int(first[1]) if first[1] else None, mhz)


# --- sysfs and procfs -----------------------------------------------------------------------------


def read_bytes(path: Path) -> bytes:
    """A small file of a kernel tree. Raises ``OSError``.

    Not ``Path.read_bytes``: Python's files end in a ``TypeError`` where a sensor answers "try again", as
    those of powered-down engines do.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        return os.read(handle, 65536)
    finally:
        os.close(handle)


def read_text(path: Path) -> str | None:
    """The file without surrounding white space and NULs (the device tree's strings end in one); ``None`` if
    unreadable."""
    try:
        return read_bytes(path).decode("utf-8", "replace").strip("\0 \t\r\n")
    except OSError:
        return None


def is_jetson(root: Path) -> bool:
    """By the device tree's ``compatible``, or by L4T's release file where a container hides the tree."""
    compatible = read_text(root / "proc/device-tree/compatible") or ""
    return "nvidia,tegra" in compatible or _l4t(root) is not None


def read_module(root: Path) -> Module:
    """Model, L4T and JetPack. Sources: ``/proc/device-tree/model``, ``/etc/nv_tegra_release``,
    :data:`JETPACK`."""
    l4t = _l4t(root)
    jetpack = JETPACK.get(l4t) or JETPACK_MAJOR.get(l4t.split(".")[0]) if l4t else None
    return Module(read_text(root / "proc/device-tree/model") or None, l4t, jetpack)


def _l4t(root: Path) -> str | None:
    """``"36.4.3"`` of ``# R36 (release), REVISION: 4.3, ...``."""
    found = re.search(
        r"R(\d+) \(release\), REVISION: (\d+(?:\.\d+)*)", read_text(root / "etc/nv_tegra_release") or ""
    )
    return f"{found[1]}.{found[2]}" if found else None


def find_rails(root: Path) -> list[RailSensor]:
    """The labelled channels of the board's power monitors.

    Sources: Jetson Linux Developer Guide, "Software-Based Power Consumption Modeling" (Orin and Xavier:
    INA3221 in hwmon, mV and mA; L4T 32: the same chip in iio, mW) and "System Power Measurement" (Thor:
    besides an INA238, whose unit is the microwatt by the kernel's ``Documentation/hwmon/ina238.rst``).
    """
    drivers = root / "sys/bus/i2c/drivers"
    sensors: list[tuple[Path, tuple[Path, ...], float]] = []
    for label in sorted(drivers.glob("ina3221/*/hwmon/hwmon*/in[123]_label")):
        channel = label.name[2]
        files = (label.with_name(f"in{channel}_input"), label.with_name(f"curr{channel}_input"))
        sensors.append((label, files, 1e-6))
    for label in sorted(drivers.glob("ina3221x/*/iio:device*/rail_name_[0-9]")):
        sensors.append((label, (label.with_name(f"in_power{label.name[-1]}_input"),), 1e-3))
    for label in sorted(drivers.glob("ina238/*/hwmon/hwmon*/label")):
        sensors.append((label, (label.with_name("power1_input"),), 1e-6))
    named = ((read_text(label), files, scale) for label, files, scale in sensors)
    return [RailSensor(name, files, scale) for name, files, scale in named if name and name != UNCONNECTED]


def read_rails(root: Path) -> dict[str, float]:
    """Rail -> watts now, without those that cannot be read. Source: as :func:`find_rails`."""
    rails = {}
    for sensor in find_rails(root):
        try:
            rails[sensor.name] = sensor.watts()
        except (OSError, ValueError):
            continue
    return rails


def total_rails(names: Iterable[str]) -> list[str]:
    """The rails whose sum is the power of the whole: the input rail, or, where there is none, all that no
    other feeds.

    Source: Jetson Linux Developer Guide, "Software-Based Power Consumption Modeling", tables of rails.
    """
    names = list(names)
    inputs = [n for n in INPUT_RAILS if n in names]
    return inputs[:1] or [n for n in names if n not in NESTED_RAILS]


def read_temperatures(root: Path) -> dict[str, float]:
    """Thermal zone -> degrees Celsius, without those that are powered down. The second zone of a type carries
    its number.

    Source: Jetson Linux Developer Guide, "Thermal Management", "BSP-Specific Thermal Zones"; the unit is the
    millidegree.
    """
    zones: dict[str, float] = {}
    for zone in sorted(
        (root / "sys/class/thermal").glob("thermal_zone*"), key=lambda z: (len(z.name), z.name)
    ):
        value = read_text(zone / "temp") or ""
        if not re.fullmatch(r"-?\d{1,9}", value) or int(value) == 1000 * ABSENT_C:
            continue
        name = read_text(zone / "type") or zone.name
        zones[name if name not in zones else f"{name} {zone.name}"] = int(value) / 1000
    return zones


def memory(root: Path) -> Memory | None:
    """Total and available memory, and swap. Source: ``/proc/meminfo`` (``proc(5)``), in units of 1024
    bytes."""
    text = read_text(root / "proc/meminfo") or ""
    kb = {k: int(v) for k, v in re.findall(r"^(\w+):\s+(\d{1,15}) kB$", text, re.MULTILINE)}
    if "MemTotal" not in kb or "MemAvailable" not in kb:
        return None
    swap = kb.get("SwapTotal", 0)
    used = swap - kb.get("SwapFree", swap)
    return Memory(kb["MemTotal"] // 1024, kb["MemAvailable"] // 1024, swap // 1024, used // 1024)
