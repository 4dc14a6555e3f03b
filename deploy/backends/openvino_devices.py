"""Which device OpenVINO takes, and in which precision it computes there.

Precisions are judged by what the device itself tells (``OPTIMIZATION_CAPABILITIES``). A CPU that is asked for
float16 and lacks it silently computes in bfloat16, so a device is never asked for what it does not name, and
:func:`require_precision` asks afterwards what it chose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import openvino as ov

from ..errors import InputError, RuntimeMissingError

CPU = "CPU"
"""OpenVINO's name of the processor, which has no number and is the default."""
AUTO = "AUTO"
"""What a user writes who lets us choose the device; see :func:`choose_device`."""

HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
"""Our name of a floating-point precision -> OpenVINO's, for ``INFERENCE_PRECISION_HINT``."""
CHOSEN_TYPES = {"fp32": ov.Type.f32, "bf16": ov.Type.bf16, "fp16": ov.Type.f16}
"""Our name of a floating-point precision -> OpenVINO's type, for what a device chose."""
CAPABILITIES = {"fp32": "FP32", "bf16": "BF16", "fp16": "FP16", "int8": "INT8"}
"""Our name of a precision -> what a device that computes in it names."""
READABLE = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "int8"}
"""Our name of a precision -> what messages call it."""
PREFERRED = ("GPU", CPU)
"""Kinds of devices that ``AUTO`` takes, the best first. An NPU is taken only where it is named: its drivers
support few models."""


@dataclass(frozen=True)
class Device:
    """A device of this machine.

    Attributes:
        name: OpenVINO's, ``"CPU"`` or ``"GPU.1"``.
        capabilities: what it can do, in OpenVINO's words.
    """

    name: str
    capabilities: frozenset[str]

    @property
    def kind(self) -> str:
        """The name without its number."""
        return self.name.partition(".")[0]

    def computes_in(self, precision: str) -> bool:
        """Whether bundles of ``precision`` run here as asked."""
        return CAPABILITIES[precision] in self.capabilities

    def choose_float(self, precision: str) -> str:
        """The precision of what is not quantized in a bundle of ``precision``.

        Beside int8, a processor computes in bfloat16 and other devices in float16 where they can: float32
        would be several times slower there, and needless.
        """
        if precision != "int8":
            return precision
        low = "bf16" if self.kind == CPU else "fp16"
        return low if self.computes_in(low) else "fp32"


def find_device(core: ov.Core, asked: str | None, precision: str) -> Device:
    """The device that a bundle of ``precision`` runs on.

    Args:
        core: knows the devices.
        asked: ``"CPU"``, ``"GPU"``, ``"GPU.1"``, ``"NPU"`` or ``"AUTO"``, in any case; ``None`` is the CPU.
        precision: of the bundle.

    Raises:
        RuntimeMissingError: the machine has no such device, or it does not compute in that precision.
        InputError: OpenVINO has no such precision.
    """
    if precision not in CAPABILITIES:
        raise InputError(
            f"OpenVINO bundles have no precision {precision!r}",
            remedy="use fp32, fp16, bf16 or int8",
        )
    require_device(core, asked)
    name = (asked or CPU).upper()
    if name == AUTO:
        return choose_device(core, precision)
    device = read_device(core, name)
    if not device.computes_in(precision):
        raise _make_lacking_error(core, device, precision)
    return device


def choose_device(core: ov.Core, precision: str) -> Device:
    """The best device that computes in ``precision``: a GPU, otherwise the processor.

    OpenVINO's own ``AUTO`` begins on the processor while it compiles for another device, so that the first
    answers are other bits than the later ones; and it takes no precision for each device.

    Raises :class:`RuntimeMissingError` where no device computes in it.
    """
    devices = [read_device(core, name) for name in core.available_devices]
    for kind in PREFERRED:
        for device in devices:
            if device.kind == kind and device.computes_in(precision):
                return device
    usual = [device for device in devices if device.kind in PREFERRED]
    known = [name for name in CAPABILITIES if any(device.computes_in(name) for device in usual)]
    able = [device.name for device in devices if device.computes_in(precision)]
    raise RuntimeMissingError(
        f"no GPU and no processor here computes in {READABLE[precision]}",
        why=f"available: {', '.join(device.name for device in devices)}",
        remedy=_advise(precision, able, known),
    )


def require_device(core: ov.Core, asked: str | None) -> None:
    """Raise :class:`RuntimeMissingError` unless this machine has the device; see :func:`find_device`.

    The processor is not looked for: asking for all devices loads the drivers of each.
    """
    name = (asked or CPU).upper()
    if name == CPU:
        return
    available = core.available_devices
    if not _is_offered(name, available):
        raise RuntimeMissingError(
            f"OpenVINO has no device {asked!r} here",
            why=f"available: {', '.join(available)}",
            remedy="choose one of these, or install the driver of the device",
        )


def read_device(core: ov.Core, name: str) -> Device:
    """A device that the machine has, with what it can do."""
    return Device(name, frozenset(core.get_property(name, "OPTIMIZATION_CAPABILITIES")))


def require_precision(compiled: ov.CompiledModel, device: Device, precision: str) -> list[str]:
    """Raise :class:`RuntimeMissingError` unless ``compiled`` computes on ``device``, and in ``precision``
    what is not quantized.

    The drivers may choose something else, and say so only when they are asked.

    Returns:
        What the driver does not tell, one sentence each.
    """
    _require_device(compiled, device)
    try:
        chosen = compiled.get_property("INFERENCE_PRECISION_HINT")
    except RuntimeError:
        return [f"{device.name} does not tell whether it computes in {READABLE[precision]}"]
    if chosen != CHOSEN_TYPES[precision]:
        raise RuntimeMissingError(
            f"OpenVINO does not compute in {READABLE[precision]} on {device.name} as asked",
            why=f"it chose {chosen.get_type_name()}",
            remedy="update the device's driver, or use --device CPU",
        )
    return []


def _require_device(compiled: ov.CompiledModel, device: Device) -> None:
    """See :func:`require_precision`: the device itself."""
    ran = list_execution_devices(compiled)
    if {_number(name) for name in ran} != {_number(device.name)}:
        raise RuntimeMissingError(
            f"OpenVINO does not run the model on {device.name} as asked",
            why=f"it chose {', '.join(ran)}",
            remedy="update the device's driver, or use --device CPU",
        )


def _number(name: str) -> str:
    """A device's name with its number; the first of its kind may have none."""
    return name if "." in name else f"{name}.0"


def list_execution_devices(compiled: ov.CompiledModel) -> list[str]:
    """The devices that really run a compiled model."""
    return [str(name) for name in compiled.get_property("EXECUTION_DEVICES")]


def _is_offered(name: str, available: Sequence[str]) -> bool:
    """Whether a device is there: by its kind, by its kind and number, or as our choice. The CPU has no
    number, and the only device of another kind has the number 0."""
    kinds = {known.partition(".")[0] for known in available}
    first = {f"{kind}.0" for kind in kinds - {CPU}}
    return name in {AUTO, *available, *kinds, *first}


def _make_lacking_error(core: ov.Core, device: Device, precision: str) -> RuntimeMissingError:
    """The error for a device that does not compute in ``precision``; it names those here that do."""
    others = [read_device(core, name) for name in core.available_devices if name != device.name]
    able = [other.name for other in others if other.computes_in(precision)]
    if device.kind == CPU:
        what = f"this processor has no {READABLE[precision]} instructions"
    else:
        what = f"{device.name} does not compute in {READABLE[precision]}"
    known = [name for name in CAPABILITIES if device.computes_in(name)]
    return RuntimeMissingError(
        f"{what}, so a bundle of {precision} cannot run as asked",
        why=f"it computes in {', '.join(known)}",
        remedy=_advise(precision, able, known),
    )


def _advise(precision: str, able: Sequence[str], known: Sequence[str]) -> str:
    """What to do about a device that lacks ``precision``: another device, or a precision that it has."""
    if able:
        return f"use --device {' or '.join(able)}"
    best = [name for name in ("int8", "fp16", "fp32") if name in known or not known]
    remedy = f"use --precision {' or '.join(best)} on this machine"
    return f"{remedy}, or --backend onnxruntime" if precision == "fp16" else remedy
