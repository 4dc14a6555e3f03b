"""Two ways to prepare an image for a model."""

from __future__ import annotations

from cmt_edge.deploy import Preprocess

PLAIN = Preprocess(8, None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
"""Stretched to 8 pixels, values from 0 to 1."""
IMAGENET = Preprocess(32, 36, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Resized and cropped to 32 pixels, with the mean and deviation of ImageNet."""
