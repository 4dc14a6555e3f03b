"""State of an NVIDIA GPU of a PC or server, through NVML (the optional package ``nvidia-ml-py``, module
``pynvml``).

Not for a Jetson: NVML opens there, but answers "Not Supported" to power, clocks, memory and temperature.
Source of all functions and units: NVIDIA, *NVML API Reference Guide*, "Device Queries" and "System Queries".
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from ..errors import RuntimeMissingError
from ..measure.device import DGpu
from .tools import MW_PER_W

T = TypeVar("T")
"""The type of an answer."""

CLOCK_REASONS = {
    0x001: "idle",
    0x002: "application clocks",
    0x004: "software power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "hardware power brake",
    0x100: "display clock",
    0x200: "board limit",
    0x400: "reliability",
}
"""Bits of ``nvmlDeviceGetCurrentClocksEventReasons`` (NVML, "NvmlClocksEventReasons"; the last two are of old
drivers)."""


LOWEST_STATE = 15
"""The lowest performance state, P15; NVML answers 32 where it does not know."""


@contextmanager
def opened(index: int = 0) -> Iterator[tuple[Any, Any]]:
    """The module ``pynvml`` and the handle of one GPU; closes NVML at the end.

    Raises :class:`RuntimeMissingError` where the package, the driver or the GPU is missing.
    """
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError as exc:
        raise RuntimeMissingError("pynvml is not installed", remedy="pip install nvidia-ml-py") from exc
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as exc:
        raise RuntimeMissingError("no NVIDIA driver", why=exc) from exc
    try:
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
        except nvml.NVMLError as exc:
            raise RuntimeMissingError(f"no NVIDIA GPU {index}", why=exc) from exc
        yield nvml, handle
    finally:
        with suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def read_power_w(nvml: Any, handle: Any) -> float:
    """Board power in watts, which newer GPUs average over one second. Raises ``NVMLError``."""
    return float(nvml.nvmlDeviceGetPowerUsage(handle)) / MW_PER_W


def find_nvml_index(pci: str, default: int) -> int:
    """NVML's number of the GPU at a bus address; CUDA counts the fastest first and hides some. ``default``
    where NVML cannot be used."""
    try:
        with opened(default) as (nvml, _):
            return int(nvml.nvmlDeviceGetIndex(nvml.nvmlDeviceGetHandleByPciBusId(pci)))
    except Exception:  # whatever NVML lacks, the caller goes on with its own number
        return default


def read_dgpu(index: int = 0) -> tuple[DGpu | None, list[str]]:
    """The GPU's state, and a sentence for each thing that could not be read. Never raises."""
    try:
        with opened(index) as (nvml, handle):
            return _read(nvml, handle, index)
    except RuntimeMissingError as exc:
        parts = [f"dGPU: {exc.what}", exc.why, exc.remedy]
        return None, ["; ".join(filter(None, parts))]


def _read(
    nvml: Any,
    handle: Any,
    index: int,
) -> tuple[DGpu, list[str]]:
    """Ask for one thing after the other; the notes name those that the driver refuses."""
    asked = _Questions(nvml, index)
    ask = asked.ask
    core, memory = nvml.NVML_CLOCK_SM, nvml.NVML_CLOCK_MEM
    sensor = nvml.NVML_TEMPERATURE_GPU
    state = ask("performance state", lambda: nvml.nvmlDeviceGetPerformanceState(handle))
    gpu = DGpu(
        index=index,
        name=ask("name", lambda: _convert_to_text(nvml.nvmlDeviceGetName(handle))),
        power_limit_w=ask("power limit", lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / MW_PER_W),
        sm_mhz=ask("SM clock", lambda: nvml.nvmlDeviceGetClockInfo(handle, core)),
        sm_max_mhz=ask("highest SM clock", lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, core)),
        memory_mhz=ask("memory clock", lambda: nvml.nvmlDeviceGetClockInfo(handle, memory)),
        memory_max_mhz=ask("highest memory clock", lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, memory)),
        temperature_c=ask(
            "temperature",
            lambda: nvml.nvmlDeviceGetTemperatureV(handle, sensor),
            lambda: nvml.nvmlDeviceGetTemperature(handle, sensor),
        ),
        performance_state=None if state is None or state > LOWEST_STATE else f"P{state}",
        clock_reasons=ask(
            "clock reasons",
            lambda: list_clock_reasons(nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)),
            lambda: list_clock_reasons(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
        ),
    )
    return gpu, asked.notes


class _Questions:
    """Asks NVML, and notes what it does not answer."""

    def __init__(self, nvml: Any, index: int) -> None:
        self.notes: list[str] = []
        self._index = index
        # AttributeError: the package is older than the function
        self._refusals = (nvml.NVMLError, AttributeError)

    def ask(
        self,
        what: str,
        *calls: Callable[[], T],
    ) -> T | None:
        """The answer of the first call that has one; where none does, a note with the reason of the last."""
        reason: Exception | None = None
        for call in calls:
            try:
                return call()
            except self._refusals as exc:
                reason = exc
        self.notes.append(f"dGPU {self._index}, {what}: {reason}")
        return None


def list_clock_reasons(bits: int) -> list[str]:
    """Names of the set bits, lowest first; a bit without a name is given as a number."""
    ones = [1 << i for i in range(bits.bit_length()) if bits >> i & 1]
    return [CLOCK_REASONS.get(one, f"{one:#x}") for one in ones]


def _convert_to_text(value: str | bytes) -> str:
    """Packages before 11.5 answer in bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
