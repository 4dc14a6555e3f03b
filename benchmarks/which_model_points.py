"""The figures of :mod:`which_model` as points: top-1 against milliseconds, and their front."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

PRECISIONS = ("fp32", "bf16", "int8")
"""What each model is measured in, where the processor computes in it."""
GPU = "RTX 4090"
"""The GPU of the estimate."""

Results = dict[str, Any]
"""The content of a JSON file: the figures of one machine."""


@dataclass(frozen=True)
class Point:
    """One model in one precision.

    Attributes:
        label: the model.
        is_ours: whether it is one of the registry.
        ms: milliseconds of one inference.
        top1: published, percent.
        extra_data: whether the weights of ``top1`` saw more than ImageNet-1k.
    """

    label: str
    is_ours: bool
    ms: float
    top1: float
    extra_data: bool = False


def find_front(points: Iterable[Point]) -> list[Point]:
    """The points that no other one beats by being faster and as accurate, or as fast and more accurate.

    The fastest comes first.
    """
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.ms, -p.top1)):
        if not front or point.top1 > front[-1].top1:
            front.append(point)
    return front


def find_best(points: Iterable[Point], budget: float) -> Point | None:
    """The most accurate point within ``budget`` milliseconds, of equal ones the faster; ``None`` where none
    is within it. Weights that saw more than ImageNet-1k do not compete."""
    within = [point for point in points if point.ms <= budget and not point.extra_data]
    return max(within, key=lambda p: (p.top1, -p.ms), default=None)


def list_precisions(results: Results) -> list[str]:
    """Those of :data:`PRECISIONS` that some model was measured in."""
    return [
        precision
        for precision in PRECISIONS
        if any("ms" in model["precisions"].get(precision, {}) for model in results["models"])
    ]


def list_points(results: Results, precision: str) -> list[Point]:
    """The models with a published top-1 that were measured in ``precision``."""
    return [
        _make_point(model, model["precisions"][precision]["ms"])
        for model in results["models"]
        if model["top1"] is not None and "ms" in model["precisions"].get(precision, {})
    ]


def list_estimates(results: Results) -> list[Point]:
    """The models with a published top-1 that NVIDIA's compiler built, with the estimate for :data:`GPU`."""
    return [
        _make_point(model, ms)
        for model in results["models"]
        if model["top1"] is not None and (ms := read_estimate(model)) is not None
    ]


def read_estimate(model: dict[str, Any]) -> float | None:
    """The roofline's milliseconds on :data:`GPU`, where the compiler built the model."""
    estimates = (model.get("rtx") or {}).get("estimates", ())
    return next((entry["total_ms"] for entry in estimates if entry["gpu"] == GPU), None)


def _make_point(model: dict[str, Any], ms: float) -> Point:
    return Point(model["label"], model["family"] != "yardstick", ms, model["top1"], model["extra_data"])
