"""The devices that ONNX Runtime serves beyond the CPU: what its execution providers are called, which
packages bring them, and the options that keep them from computing in another precision than the bundle's.

Sources: ONNX Runtime documentation, "Execution Providers"; ``tensorrt_rtx_provider_options.h`` and the code
of the packages named in :data:`PROVIDERS`; OpenVINO documentation, "Execution mode".
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import InputError, RuntimeMissingError

Settings = dict[str, str]
"""Options of a provider, as ONNX Runtime takes them."""

CPU = "CPU"
"""How results name the processor, which needs no provider of another package."""
NUMBERS = "[0-9]{1,4}"
"""Which units a provider of NVIDIA has: the numbers of GPUs."""


@dataclass(frozen=True)
class Place:
    """A device that a user asked for.

    Attributes:
        kind: a key of :data:`PROVIDERS`.
        unit: the number of the GPU, or OpenVINO's name of the device.
    """

    kind: str
    unit: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.unit}"

    @property
    def provider(self) -> Provider:
        """What serves it."""
        return PROVIDERS[self.kind]


@dataclass(frozen=True)
class Demand:
    """What the options of a provider depend on.

    Attributes:
        unit: as :class:`Place`.
        precision: of the bundle.
        threads: CPU threads of one inference, ``None`` for the provider's choice.
    """

    unit: str
    precision: str
    threads: int | None


@dataclass(frozen=True)
class Provider:
    """An execution provider.

    Attributes:
        name: ONNX Runtime's.
        units: regular expression of its devices.
        first: the device where none is named; empty where one must be.
        choices: what messages say of its devices.
        remedy: how the user gets it.
        make_settings: its options where it is part of the installed ``onnxruntime``.
        plugin: module of the package that brings it as a plug-in, empty for none.
        make_plugin_settings: its options as a plug-in.
        has_int8: whether it computes in int8; otherwise a quantized graph would run in float32.
        needs_cuda: whether it needs NVIDIA's libraries, which pip may have installed.
    """

    name: str
    units: str
    first: str
    choices: str
    remedy: str
    make_settings: Callable[[Demand], Settings]
    plugin: str = ""
    make_plugin_settings: Callable[[Demand], Settings] = lambda _: {}
    has_int8: bool = True
    needs_cuda: bool = False


def _make_cuda_settings(demand: Demand) -> Settings:
    """Float32 products stay float32: TF32 has 10 bits of mantissa."""
    return {"device_id": demand.unit, "use_tf32": "0"}


def _make_tensorrt_settings(demand: Demand) -> Settings:
    """Without these flags TensorRT has no kernels for half precision and int8. No engine is cached: it would
    be native code that nobody sealed."""
    return {
        "device_id": demand.unit,
        "trt_fp16_enable": "1" if demand.precision == "fp16" else "0",
        "trt_int8_enable": "1" if demand.precision == "int8" else "0",
        "trt_layer_norm_fp32_fallback": "1",
        "trt_engine_cache_enable": "0",
    }


def _make_rtx_settings(demand: Demand) -> Settings:
    return {"device_id": demand.unit}


def _make_openvino_settings(demand: Demand) -> Settings:
    """``ACCURACY`` keeps the precision of the graph; a GPU would compute float32 graphs in float16."""
    settings = {"device_type": demand.unit, "precision": "ACCURACY"}
    if demand.unit == CPU and demand.threads:
        settings["num_of_threads"] = str(demand.threads)
    return settings


def _make_openvino_plugin_settings(demand: Demand) -> Settings:
    """The same for the plug-in, which ignores the options above and takes OpenVINO's own properties."""
    properties: dict[str, object] = {"EXECUTION_MODE_HINT": "ACCURACY"}
    kind = demand.unit.split(".")[0]
    if kind == CPU and demand.threads:
        properties["INFERENCE_NUM_THREADS"] = demand.threads
    return {"load_config": json.dumps({kind: properties})}


PROVIDERS = {
    "cuda": Provider(
        name="CUDAExecutionProvider",
        units=NUMBERS,
        first="0",
        choices="cuda or cuda:NUMBER",
        remedy="replace onnxruntime by onnxruntime-gpu: pip uninstall onnxruntime, then pip install"
        ' "onnxruntime-gpu[cuda,cudnn]"',
        make_settings=_make_cuda_settings,
        has_int8=False,
        needs_cuda=True,
    ),
    "tensorrt": Provider(
        name="TensorrtExecutionProvider",
        units=NUMBERS,
        first="0",
        choices="tensorrt or tensorrt:NUMBER",
        remedy="replace onnxruntime by onnxruntime-gpu: pip uninstall onnxruntime, then pip install"
        ' "onnxruntime-gpu[cuda,cudnn]" and the release of TensorRT that it names',
        make_settings=_make_tensorrt_settings,
        needs_cuda=True,
    ),
    "rtx": Provider(
        name="NvTensorRTRTXExecutionProvider",
        units=NUMBERS,
        first="0",
        choices="rtx or rtx:NUMBER",
        remedy="pip install onnxruntime-ep-nv-tensorrt-rtx-cu12, or -cu13 for CUDA 13",
        make_settings=_make_rtx_settings,
        plugin="onnxruntime_ep_nv_tensorrt_rtx",
    ),
    "openvino": Provider(
        name="OpenVINOExecutionProvider",
        units=r"CPU|(GPU|NPU)(\.[0-9]{1,4})?",
        first="",
        choices="openvino:CPU, openvino:GPU, openvino:GPU.NUMBER or openvino:NPU",
        remedy="pip install onnxruntime-ep-openvino, which serves Intel's devices; or replace onnxruntime by"
        " onnxruntime-openvino",
        make_settings=_make_openvino_settings,
        plugin="onnxruntime_ep_openvino",
        make_plugin_settings=_make_openvino_plugin_settings,
    ),
}
"""Kind of device, as users name it -> what serves it."""


def parse_place(device: str | None) -> Place | None:
    """``"cuda"``, ``"cuda:1"``, ``"openvino:GPU"`` -> what was asked for; ``None`` and ``"CPU"`` -> ``None``.

    Raises :class:`RuntimeMissingError` for a device that no provider has.
    """
    if device is None or device.upper() == CPU:
        return None
    kind, _, unit = device.partition(":")
    provider = PROVIDERS.get(kind.lower())
    if provider is None:
        raise RuntimeMissingError(
            f"the ONNX Runtime backend has no device {device!r}",
            remedy="use --device CPU, or " + "; ".join(known.choices for known in PROVIDERS.values()),
        )
    unit = unit.upper() or provider.first
    if not re.fullmatch(provider.units, unit):
        raise RuntimeMissingError(
            f"{provider.name} has no device {device!r}",
            remedy=f"use --device {provider.choices}",
        )
    return Place(kind.lower(), unit)


def require_precision(place: Place, precision: str) -> None:
    """Raise :class:`InputError` where a provider would compute in another precision than the bundle's."""
    provider = place.provider
    if precision == "int8" and not provider.has_int8:
        raise InputError(
            f"{provider.name} has no int8 kernels, so it would compute this bundle in float32",
            remedy="use --device tensorrt or --device rtx, or export an fp32 or fp16 bundle",
        )
