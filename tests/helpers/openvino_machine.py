"""A stand-in for OpenVINO on a machine with other devices.

It tells their properties as the plugins do, and the CPU of this machine computes for them.

The real plugins need drivers and devices that no machine of the tests has. What they name is taken from
OpenVINO's documentation ("GPU Device", "NPU Device", property ``OPTIMIZATION_CAPABILITIES``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import openvino as ov

REAL_CORE = ov.Core
"""OpenVINO's own class."""
LAPTOP = {
    "CPU": ("FP32", "INT8", "BIN", "EXPORT_IMPORT"),
    "GPU": ("FP32", "BIN", "FP16", "INT8", "GPU_HW_MATMUL", "EXPORT_IMPORT"),
    "NPU": ("FP16", "INT8", "EXPORT_IMPORT"),
}
"""Name of a device -> what it can do: a processor without bfloat16, its GPU and its NPU."""
SERVER = {
    "CPU": ("BF16", "FP32", "INT8", "EXPORT_IMPORT"),
    "GPU.0": ("FP32", "BIN", "FP16", "INT8", "EXPORT_IMPORT"),
    "GPU.1": ("FP32", "BIN", "FP16", "INT8", "EXPORT_IMPORT"),
}
"""The same for a machine with two GPUs."""
TYPES = {"f32": ov.Type.f32, "bf16": ov.Type.bf16, "f16": ov.Type.f16}
"""OpenVINO's name of a type -> the type."""


class StandIn:
    """A compiled model of the CPU that tells what the device of the stand-in chose."""

    def __init__(self, compiled: ov.CompiledModel, properties: dict[str, Any]) -> None:
        self._compiled, self._properties = compiled, properties

    def get_property(self, name: str) -> Any:
        found = self._properties[name] if name in self._properties else self._compiled.get_property(name)
        if isinstance(found, Exception):
            raise found
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiled, name)


class Machine:
    """Stands for ``ov.Core``; every instance is the same machine.

    Attributes:
        devices: name of a device -> what it can do.
        chooses: a property -> what a compiled model tells of it in place of what was asked.
        driver: version of every driver.
        compiled, opened: device and settings of each model that was compiled, and of each kept one.
    """

    def __init__(self, devices: Mapping[str, tuple[str, ...]], **chooses: Any) -> None:
        self.devices, self.chooses = devices, chooses
        self.driver = "1.0"
        self.compiled: list[tuple[str, dict[str, Any]]] = []
        self.opened: list[tuple[str, dict[str, Any]]] = []

    def __call__(self) -> Machine:
        return self

    @property
    def available_devices(self) -> list[str]:
        return list(self.devices)

    def get_property(self, device: str, name: str) -> Any:
        known: dict[str, Any] = {"CACHING_PROPERTIES": {"DRIVER": "RO"}, "DRIVER": self.driver}
        known |= {
            "OPTIMIZATION_CAPABILITIES": list(self.devices[self._find(device)]),
            "FULL_DEVICE_NAME": device,
        }
        return known[name]

    def read_model(self, path: Any) -> ov.Model:
        return REAL_CORE().read_model(path)

    def compile_model(self, model: ov.Model, device: str, config: dict[str, Any]) -> StandIn:
        self.compiled.append((device, config))
        return self._wrap(REAL_CORE().compile_model(model, "CPU", self._lower(config)), device, config)

    def import_model(self, content: bytes, device: str, config: dict[str, Any]) -> StandIn:
        self.opened.append((device, config))
        return self._wrap(REAL_CORE().import_model(content, "CPU", self._lower(config)), device, config)

    def _find(self, device: str) -> str:
        """The device of a name: ``GPU`` is the first one, and ``GPU.0`` the only one."""
        if device in self.devices:
            return device
        return next(name for name in self.devices if name.partition(".")[0] == device.partition(".")[0])

    def _lower(self, config: dict[str, Any]) -> dict[str, Any]:
        return config | {"INFERENCE_PRECISION_HINT": "f32"}

    def _wrap(self, compiled: ov.CompiledModel, device: str, config: dict[str, Any]) -> StandIn:
        told = {
            "EXECUTION_DEVICES": [self._find(device)],
            "INFERENCE_PRECISION_HINT": TYPES[config["INFERENCE_PRECISION_HINT"]],
        }
        return StandIn(compiled, told | self.chooses)
