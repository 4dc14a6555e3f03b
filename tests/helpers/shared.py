"""The data that lies beside the checkout, in the shared folder. It is not part of the repository.

A test that needs a part of it asks :func:`shared` and is skipped where that part is absent.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from helpers.paths import ROOT

SHARED = Path(os.environ.get("CMT_EDGE_SHARED", ROOT.parent / "shared"))
"""The shared folder: the environment variable CMT_EDGE_SHARED, or ``shared`` beside the checkout."""

PARTS = {
    "golden": "state dicts, logits and figures of the official code",
    "weights/cmt_nano_cifar10.pt": "the cmt_nano that was trained on CIFAR-10, under the published keys",
    "data/cifar10.tar": "the CIFAR-10 archive",
    "trt/api_names.json": "the names that TensorRT's Python bindings have in all versions",
    "trt/with_bindings.sh": "a script that runs Python with TensorRT's real bindings but without a GPU",
}
"""Every part of the shared folder that a test uses, and what it holds; ``tests/README.md`` lists the same."""


def find_shared(name: str) -> Path | None:
    """A file or folder of the shared data, or ``None`` where it is absent.

    Raises :class:`KeyError` where :data:`PARTS` does not list ``name`` or a folder above it.
    """
    if not any(name == part or name.startswith(f"{part}/") for part in PARTS):
        raise KeyError(f"{name} is not in PARTS of {__name__}")
    path = SHARED / name
    return path if path.exists() else None


def shared(name: str) -> Path:
    """A file or folder of the shared data; the test is skipped where it is absent."""
    path = find_shared(name)
    if path is None:
        pytest.skip(f"needs {name} of the shared data; set CMT_EDGE_SHARED to its folder")
    return path
