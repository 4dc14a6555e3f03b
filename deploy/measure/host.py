"""What machine this is, as far as the platform tells: recorded beside every measurement."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

from ..bundle.sections import Host
from ..cores import count_cores

FLAGS = (
    "avx2",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
)
"""CPU flags that decide how fast a model runs, by their names in ``/proc/cpuinfo``."""
PACKAGES = (
    "cmt-edge",
    "numpy",
    "pillow",
    "openvino",
    "onnxruntime",
    "torch",
    "onnx",
    "onnxsim",
    "nncf",
    "tensorrt",
    "cuda-bindings",
)
"""Packages whose versions are recorded."""


def describe_host() -> Host:
    """CPU model and flags, cores, clocks, governor and temperature, where known."""
    info = _read_cpuinfo()
    listed = info.get("flags") or info.get("Features") or ""
    flags = set(listed.split())
    return Host(
        machine=platform.machine(),
        system=platform.platform(terse=True),
        python=platform.python_version(),
        cpu=info.get("model name") or platform.processor() or platform.machine(),
        flags=tuple(f for f in FLAGS if f in flags),
        cores=count_cores(),
        mhz=info.get("cpu MHz") or None,
        governor=_read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or None,
        temperature_mc=_read("/sys/class/thermal/thermal_zone0/temp") or None,
    )


def read_versions() -> dict[str, str]:
    """Installed versions of the packages that matter."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _read_cpuinfo() -> dict[str, str]:
    """The first processor's entry of ``/proc/cpuinfo``."""
    lines = (_read("/proc/cpuinfo") or "").split("\n\n")[0].splitlines()
    entries = [line.partition(":") for line in lines]
    return {name.strip(): value.strip() for name, _, value in entries}


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
