"""The sections of a bundle's manifest, and the results of measurements that it records.

``docs/bundle.md`` describes every entry. ``manifest.json`` holds the keys in the order of the fields.
"""

from .calibration import CalibrationEntry, ImagesEntry, Island, ObservedEntry, SynthesisEntry, TypingEntry
from .engine import BuildOptions, EngineEntry, EngineKey
from .latency import LEAST_SHARE, ExecutedPrecision, LatencyEntry
from .model import FileEntry, Host, ModelEntry, RuntimeEntry, TensorEntry, WeightsEntry
from .values import (
    LOGITS,
    MAX_TOTAL,
    PROBABILITIES,
    SCORES,
    Count,
    Difference,
    Duration,
    OutputKind,
    Percent,
    Sha256,
    Share,
    Size,
)
from .verdict import Accuracy, Candidate, Sensitivity, Speed, Variant, VerdictEntry
from .verification import DataCheck, GoldenCheck, RanOn, VerificationEntry

__all__ = [
    "LEAST_SHARE",
    "LOGITS",
    "MAX_TOTAL",
    "PROBABILITIES",
    "SCORES",
    "Accuracy",
    "BuildOptions",
    "CalibrationEntry",
    "Candidate",
    "Count",
    "DataCheck",
    "Difference",
    "Duration",
    "EngineEntry",
    "EngineKey",
    "ExecutedPrecision",
    "FileEntry",
    "GoldenCheck",
    "Host",
    "ImagesEntry",
    "Island",
    "LatencyEntry",
    "ModelEntry",
    "ObservedEntry",
    "OutputKind",
    "Percent",
    "RanOn",
    "RuntimeEntry",
    "Sensitivity",
    "Sha256",
    "Share",
    "Size",
    "Speed",
    "SynthesisEntry",
    "TensorEntry",
    "TypingEntry",
    "Variant",
    "VerdictEntry",
    "VerificationEntry",
    "WeightsEntry",
]
