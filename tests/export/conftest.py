"""Exports that take little time."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def brief(brief_measurements):
    """Bundles are measured for milliseconds."""
