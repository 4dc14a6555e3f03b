"""What a Jetson tells about its own state: the tools' texts and the sysfs trees, read without running
anything.

JetPack 6 and later are supported, because TensorRT 10.3 is; older devices end before anything here is asked.
The parsers of texts return ``None`` where the text is not that tool's output; the readers of trees leave out
what cannot be read. Neither raises. Formats: *NVIDIA Jetson Linux Developer Guide*, "Platform Power and
Performance"; what the guide leaves open is taken from outputs recorded on devices (``tests/data/jetson``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..measure.device import Clock, Clocks, CpuClock, EmcClock, PowerMode

ABSENT_C = -256
"""Degrees Celsius that a powered-down or absent temperature sensor reads."""
INPUT_RAILS = ("VIN", "VDD_IN")
"""Rails that measure all that flows in, the outermost first: developer kit (Thor), module."""
NESTED_RAILS = {"VDDQ_VDD2_1V8AO"}
"""Rails fed by another measured rail (this one by VIN_SYS_5V0 on AGX Orin); adding them would count them
twice."""
UNCONNECTED = "NC"
"""Label of a channel that measures nothing."""
LONGEST_LINE = 4096
"""Characters of the longest line that is read. No tool prints a longer one, and a number of more digits than
Python converts (4300) fits into none that is shorter."""
SMALL_FILE = 65536
"""Bytes that are read of a kernel's file at most."""

JETPACK = {
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
JETPACK_MAJOR = {"36": "6.x", "38": "7.x", "39": "7.x"}
"""First number of an L4T release -> JetPack, for releases that :data:`JETPACK` does not list: a guessed minor
version could be wrong."""


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
class JetsonModule:
    """Model of the board, L4T release (``"36.4.3"``) and JetPack (``"6.2"``), each ``None`` where unknown."""

    model: str | None
    l4t: str | None
    jetpack: str | None


# --- nvpmodel -------------------------------------------------------------------------------------

MODE = re.compile(r"NV Power Mode:[ \t]*(\S.*)")
"""The line of ``nvpmodel`` that names the mode."""
MODE_ID = re.compile(r"^[ \t]*(\d{1,4})[ \t\r]*$", re.MULTILINE)
"""The line after it, a number alone."""


def parse_nvpmodel(text: str) -> PowerMode | None:
    """The answer of ``nvpmodel -q``, also with ``--verbose`` and with warnings and errors (``NVPM ...``) in
    between.

    Source: Jetson Linux Developer Guide, "Supported Modes and Power Efficiency".
    """
    mode = MODE.search(text)
    if mode is None:
        return None
    number = MODE_ID.search(text, mode.end())
    return PowerMode(mode[1].strip(), int(number[1]) if number else None)


# --- jetson_clocks --------------------------------------------------------------------------------

HEADER = re.compile(r"SOC family:\S+[ \t]+Machine:")
"""The first line of ``jetson_clocks --show``."""
FREQUENCIES = re.compile(r"MinFreq=(\d+) MaxFreq=(\d+) CurrentFreq=(\d+)(?: FreqOverride=(\d))?")
"""What every line of a clock holds."""
CPU = re.compile(r"^\s*cpu(\d+):\s")
"""The beginning of a core's line."""
GOVERNOR = re.compile(r"Governor=(\S+)")
"""A core's governor."""
GPU = re.compile(r"^\s*(GPU|gpu-\S+) ")
"""The beginning of a GPU's line."""
KHZ_PER_MHZ = 1e3
"""The tool prints the cores' frequencies in kHz."""
HZ_PER_MHZ = 1e6
"""The tool prints all other frequencies in Hz."""


def parse_jetson_clocks(text: str) -> Clocks | None:
    """The answer of ``jetson_clocks --show``; frequencies in MHz.

    Source: Jetson Linux Developer Guide, "Maximizing Jetson Performance".
    """
    cpus: dict[int, CpuClock] = {}
    gpus: dict[str, Clock] = {}
    emc = None
    for line in text.splitlines():
        found = FREQUENCIES.search(line[:LONGEST_LINE])
        if not found:
            continue
        if cpu := CPU.match(line):
            governor = GOVERNOR.search(line)
            name = governor[1] if governor else ""
            cpus[int(cpu[1])] = CpuClock(
                *_parse_mhz(found, KHZ_PER_MHZ),
                "Online=0" not in line,
                name,
            )
        elif gpu := GPU.match(line):
            gpus[gpu[1]] = Clock(*_parse_mhz(found, HZ_PER_MHZ))
        elif line.lstrip().startswith("EMC "):
            held = None if found[4] is None else found[4] == "1"
            emc = EmcClock(*_parse_mhz(found, HZ_PER_MHZ), held)
    if not HEADER.search(text) and not cpus and not gpus:
        return None
    online = [core for core in cpus.values() if core.online]
    return Clocks(
        cpus={f"cpu{number}": cpus[number] for number in sorted(cpus)},
        gpus=gpus,
        emc=emc,
        locked=_are_locked([*online, *gpus.values()], emc),
    )


def _parse_mhz(
    found: re.Match[str],
    divisor: float,
) -> tuple[float, float, float]:
    """Lowest, highest and present frequency of a line."""
    low, high, now = (int(found[i]) / divisor for i in (1, 2, 3))
    return low, high, now


def _are_locked(clocks: list[Clock], emc: EmcClock | None) -> bool | None:
    """See :class:`Clocks`. The memory's minimum stays low in JetPack 6 even when ``jetson_clocks`` holds its
    rate."""
    if not clocks and emc is None:
        return None
    fixed = all(clock.min_mhz == clock.max_mhz for clock in clocks)
    return fixed and (emc is None or _is_held(emc))


def _is_held(emc: EmcClock) -> bool:
    if emc.min_mhz == emc.max_mhz:
        return True
    return emc.override is True and emc.current_mhz == emc.max_mhz


# --- sysfs and procfs -----------------------------------------------------------------------------

MICRO = 1e-6
"""Watts in a microwatt, which is also a millivolt times a milliampere."""


def read_bytes(path: Path) -> bytes:
    """A small file of a kernel tree. Raises ``OSError``.

    Not ``Path.read_bytes``: Python's files end in a ``TypeError`` where a sensor answers "try again", as
    those of powered-down engines do.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        return os.read(handle, SMALL_FILE)
    finally:
        os.close(handle)


def read_device_text(path: Path) -> str | None:
    """The file without surrounding white space and NULs (the device tree's strings end in one); ``None`` if
    unreadable."""
    try:
        return read_bytes(path).decode("utf-8", "replace").strip("\0 \t\r\n")
    except OSError:
        return None


def is_jetson(root: Path) -> bool:
    """By the device tree's ``compatible``, or by L4T's release file where a container hides the tree."""
    compatible = read_device_text(root / "proc/device-tree/compatible") or ""
    return "nvidia,tegra" in compatible or _read_l4t(root) is not None


def read_module(root: Path) -> JetsonModule:
    """Model, L4T and JetPack. Sources: ``/proc/device-tree/model``, ``/etc/nv_tegra_release``,
    :data:`JETPACK`."""
    model = read_device_text(root / "proc/device-tree/model") or None
    l4t = _read_l4t(root)
    return JetsonModule(model, l4t, _find_jetpack(l4t) if l4t else None)


def _read_l4t(root: Path) -> str | None:
    """``"36.4.3"`` of ``# R36 (release), REVISION: 4.3, ...``."""
    text = read_device_text(root / "etc/nv_tegra_release") or ""
    found = re.search(r"R(\d+) \(release\), REVISION: (\d+(?:\.\d+)*)", text)
    return f"{found[1]}.{found[2]}" if found else None


def _find_jetpack(l4t: str) -> str | None:
    major = l4t.split(".", maxsplit=1)[0]
    return JETPACK.get(l4t) or JETPACK_MAJOR.get(major)


def find_rails(root: Path) -> list[RailSensor]:
    """The labelled channels of the board's power monitors.

    Sources: Jetson Linux Developer Guide, "Software-Based Power Consumption Modeling" (Orin: INA3221 in
    hwmon, mV and mA) and "System Power Measurement" (Thor: besides an INA238, whose unit is the microwatt by
    the kernel's ``Documentation/hwmon/ina238.rst``).
    """
    drivers = root / "sys/bus/i2c/drivers"
    rails: list[tuple[Path, tuple[Path, ...]]] = []
    for label in sorted(drivers.glob("ina3221/*/hwmon/hwmon*/in[123]_label")):
        channel = label.name[2]
        files = (
            label.with_name(f"in{channel}_input"),
            label.with_name(f"curr{channel}_input"),
        )
        rails.append((label, files))
    for label in sorted(drivers.glob("ina238/*/hwmon/hwmon*/label")):
        rails.append((label, (label.with_name("power1_input"),)))
    named = [(read_device_text(label), files) for label, files in rails]
    return [RailSensor(name, files, MICRO) for name, files in named if name and name != UNCONNECTED]


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
    folders = (root / "sys/class/thermal").glob("thermal_zone*")
    for zone in sorted(folders, key=lambda z: (len(z.name), z.name)):
        value = read_device_text(zone / "temp") or ""
        if not re.fullmatch(r"-?\d{1,9}", value) or int(value) == 1000 * ABSENT_C:
            continue
        name = read_device_text(zone / "type") or zone.name
        zones[name if name not in zones else f"{name} {zone.name}"] = int(value) / 1000
    return zones


def read_available_memory(root: Path) -> int | None:
    """Bytes of memory that the system would give to a program, ``None`` where it does not say.

    CPU and GPU of a Jetson share this memory. Source: ``/proc/meminfo`` (``proc(5)``), whose unit is 1024
    bytes.
    """
    text = read_device_text(root / "proc/meminfo") or ""
    found = re.search(r"^MemAvailable:\s+(\d{1,15}) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None
