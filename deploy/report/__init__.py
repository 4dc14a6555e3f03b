"""The only place that formats results: terminal tables, Markdown, JSON, plots."""

from .as_json import make_bundle_json, make_prediction_json, to_json
from .benchmark import describe_benchmark, describe_protocol
from .bundle import describe_bundle, describe_decoding, describe_weights
from .compiled import describe_compiled
from .device import describe_build, describe_device_report
from .plot import draw_latency_plot
from .prediction import describe_prediction
from .tables import format_differences, format_table
from .verdict import describe_verdict
from .verification import describe_verification

__all__ = [
    "describe_benchmark",
    "describe_build",
    "describe_bundle",
    "describe_compiled",
    "describe_decoding",
    "describe_device_report",
    "describe_prediction",
    "describe_protocol",
    "describe_verdict",
    "describe_verification",
    "describe_weights",
    "draw_latency_plot",
    "format_differences",
    "format_table",
    "make_bundle_json",
    "make_prediction_json",
    "to_json",
]
