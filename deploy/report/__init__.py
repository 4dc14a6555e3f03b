"""The only place that formats results: terminal tables, Markdown, JSON, HTML, plots.

Each name below is imported when it is first used, so that a command loads only what it prints with.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .as_json import make_bundle_json, make_prediction_json, to_json
    from .benchmark import describe_benchmark, describe_protocol
    from .bundle import describe_bundle, describe_decoding, describe_slim, describe_weights
    from .checkup import describe_checkup
    from .compiled import describe_compiled
    from .device import describe_build, describe_device_report
    from .html import (
        make_bundle_figures,
        make_bundle_page,
        make_comparison_figures,
        make_comparison_page,
        make_figures_file,
        make_own_page,
        make_subject,
        read_subject,
    )
    from .layers import describe_layers
    from .plot import draw_latency_plot
    from .prediction import describe_prediction
    from .tables import format_differences, format_table
    from .verdict import describe_verdict
    from .verification import describe_verification

_HOMES = {
    "describe_benchmark": "benchmark",
    "describe_build": "device",
    "describe_bundle": "bundle",
    "describe_checkup": "checkup",
    "describe_compiled": "compiled",
    "describe_decoding": "bundle",
    "describe_device_report": "device",
    "describe_layers": "layers",
    "describe_prediction": "prediction",
    "describe_protocol": "benchmark",
    "describe_slim": "bundle",
    "describe_verdict": "verdict",
    "describe_verification": "verification",
    "describe_weights": "bundle",
    "draw_latency_plot": "plot",
    "format_differences": "tables",
    "format_table": "tables",
    "make_bundle_json": "as_json",
    "make_bundle_figures": "html",
    "make_bundle_page": "html",
    "make_own_page": "html",
    "make_comparison_figures": "html",
    "make_comparison_page": "html",
    "make_figures_file": "html",
    "make_prediction_json": "as_json",
    "make_subject": "html",
    "read_subject": "html",
    "to_json": "as_json",
}
"""Name -> the module that defines it."""

__all__ = [
    "describe_benchmark",
    "describe_build",
    "describe_bundle",
    "describe_checkup",
    "describe_compiled",
    "describe_decoding",
    "describe_device_report",
    "describe_layers",
    "describe_prediction",
    "describe_protocol",
    "describe_slim",
    "describe_verdict",
    "describe_verification",
    "describe_weights",
    "draw_latency_plot",
    "format_differences",
    "format_table",
    "make_bundle_figures",
    "make_bundle_json",
    "make_bundle_page",
    "make_comparison_figures",
    "make_comparison_page",
    "make_figures_file",
    "make_own_page",
    "make_prediction_json",
    "make_subject",
    "read_subject",
    "to_json",
]


def __getattr__(name: str) -> Any:
    """Import a name on its first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
