"""Results as JSON objects, for machines."""

from __future__ import annotations

import json
from typing import Any

from ..bundle import Bundle, make_plain
from ..measure.parity import Verification
from ..prediction import Prediction


def to_json(result: object) -> str:
    """A dataclass, mapping or list as one line of JSON; of a :class:`Verification` what a manifest holds."""
    return json.dumps(make_plain(_record(result)), ensure_ascii=False)


def make_bundle_json(bundle: Bundle) -> dict[str, Any]:
    """What an export produced."""
    manifest = bundle.manifest
    content = {
        "bundle": str(bundle.path),
        "precision": manifest.precision,
        "format": manifest.format,
        "weights": manifest.model.weights,
        "verification": manifest.verification,
        "latency": manifest.latency,
        "calibration": manifest.calibration,
        "verdict": manifest.verdict,
        "bytes": manifest.size_bytes,
    }
    return dict(make_plain(content))


def make_prediction_json(prediction: Prediction, topk: int) -> dict[str, Any]:
    """``{"source", "top": [{"label", "probability"}, ...]}``."""
    best = prediction.top(topk)
    top = [{"label": label, "probability": round(p, 6)} for label, p in best]
    return {"source": prediction.source, "top": top}


def _record(result: object) -> object:
    """``result`` with verifications as they are recorded."""
    if isinstance(result, Verification):
        return result.entry()
    if isinstance(result, dict):
        return {key: _record(value) for key, value in result.items()}
    return result
