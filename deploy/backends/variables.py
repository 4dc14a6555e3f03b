"""Environment variables that change what a runtime compiles, and so both speed and answers."""

from __future__ import annotations

import os

STARTS = ("ONEDNN_", "DNNL_", "OV_", "OPENVINO_", "TBB_", "ORT_")
"""Starts of their names."""


def read_variables() -> dict[str, str]:
    """Name -> value of those that are set."""
    return {name: value for name, value in os.environ.items() if name.startswith(STARTS)}
