"""The data that lies beside the checkout, in the shared folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from helpers.paths import ROOT

SHARED = Path(os.environ.get("CMT_EDGE_SHARED", ROOT.parent / "shared"))


def shared(name: str) -> Path:
    """A file or folder of the shared data; skips the test where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {name} of the shared data, set CMT_EDGE_SHARED to its folder")
    return path
