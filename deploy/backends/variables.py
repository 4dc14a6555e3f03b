"""Environment variables that change what a runtime compiles, and so both speed and answers."""

from __future__ import annotations

import os

OPENVINO = ("ONEDNN_", "DNNL_", "OV_", "OPENVINO_", "TBB_")
"""Starts of the names of those that OpenVINO heeds."""
ONNX_RUNTIME = ("ORT_",)
"""Starts of the names of those that ONNX Runtime heeds."""


def read_variables(starts: tuple[str, ...] = OPENVINO) -> dict[str, str]:
    """Name -> value of those that are set."""
    return {name: value for name, value in os.environ.items() if name.startswith(starts)}
