"""The only place that formats results: terminal tables, Markdown, JSON, plots."""

from .as_json import bundle_json, prediction_json, to_json
from .benchmark import benchmark_text, how_measured
from .bundle import bundle_text, weights_text
from .device import built_text, device_text
from .plot import latency_plot
from .prediction import prediction_text
from .tables import table
from .verdict import verdict_text
from .verification import verification_text

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
