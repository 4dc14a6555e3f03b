"""What calibrates cmt_nano."""

from __future__ import annotations

from cmt_edge.export import ExportConfig

SPEC = ExportConfig("cmt_nano").preprocess

IMAGES = 12
"""Number of calibration images."""
