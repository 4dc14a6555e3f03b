"""The only place that formats results: terminal tables, Markdown, JSON, plots."""

from .as_json import bundle_json, prediction_json, to_json
from .plot import latency_plot
from .text import (
    benchmark_text,
    built_text,
    bundle_text,
    device_text,
    how_measured,
    prediction_text,
    table,
    verdict_text,
    verification_text,
    weights_text,
)

__all__ = [
    "benchmark_text",
    "built_text",
    "bundle_json",
    "bundle_text",
    "device_text",
    "how_measured",
    "latency_plot",
    "prediction_json",
    "prediction_text",
    "table",
    "to_json",
    "verdict_text",
    "verification_text",
    "weights_text",
]
