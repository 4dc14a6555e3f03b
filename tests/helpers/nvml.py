"""A made-up NVML, with the figures of one card."""

from __future__ import annotations

from types import ModuleType


class NVMLError(Exception):
    """As of ``pynvml``: the message of a code."""


class FakeNvml(ModuleType):
    """The part of ``pynvml`` that is used, with the figures of one RTX card; ``broken`` names what raises."""

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, broken=(), power_mw=71_250, **replaced):
        super().__init__("pynvml")
        self.broken, self.opened, self.power_mw = set(broken), 0, power_mw
        answers = {
            "nvmlDeviceGetHandleByIndex": lambda index: f"gpu{index}",
            "nvmlDeviceGetName": lambda h: "NVIDIA GeForce RTX 4060",
            "nvmlDeviceGetPowerUsage": lambda h: self.power_mw,
            "nvmlDeviceGetEnforcedPowerLimit": lambda h: 115_000,
            "nvmlDeviceGetClockInfo": lambda h, kind: {1: 1830, 2: 8501}[kind],
            "nvmlDeviceGetMaxClockInfo": lambda h, kind: {1: 3105, 2: 8501}[kind],
            "nvmlDeviceGetTemperatureV": lambda h, sensor: 51,
            "nvmlDeviceGetTemperature": lambda h, sensor: 50,
            "nvmlDeviceGetPerformanceState": lambda h: 2,
            "nvmlDeviceGetCurrentClocksEventReasons": lambda h: 0x24,
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda h: 0x1,
        }
        for name, answer in {**answers, **replaced}.items():
            if answer is not None:
                setattr(self, name, self._guarded(name, answer))

    def _guarded(self, name, answer):
        def call(*args):
            if name in self.broken or not self.opened:
                raise NVMLError("Not Supported" if self.opened else "Uninitialized")
            return answer(*args)

        return call

    def nvmlInit(self):
        if "nvmlInit" in self.broken:
            raise NVMLError("NVML Shared Library Not Found")
        self.opened += 1

    def nvmlShutdown(self):
        self.opened -= 1
