"""The models of the registry, marked by what they cost."""

from __future__ import annotations

import pytest

GIANT_MACS = 9e9
"""Models above this are tested on demand (``pytest -m giant``): their goldens and exports take minutes and
gigabytes."""

SHALLOW = {
    "cvt_13": {"depths": (1, 1, 2)},
    "convit_tiny": {"depth": 3, "local_depth": 2},
    "mvitv2_t": {"depths": (1, 1, 2, 1)},
    "xformer_reading": {"layers": (0, 1, 1, 1)},
}
"""Models with every kind of block of their family, and few of each: an export takes a third of the time."""


def make_shallow(name: str, img_size: int = 64):
    """A shallow model of :data:`SHALLOW` with random weights."""
    from cmt_edge.cmt import create_model

    return create_model(name, img_size=img_size, seed=0, **SHALLOW[name])


def marked_models(names=None):
    """Registry names for ``parametrize``; giant ones carry the marker ``giant``."""
    from cmt_edge.cmt import find_model, list_models

    names = list_models() if names is None else names
    return [
        pytest.param(n, marks=pytest.mark.giant) if (find_model(n).macs or 0) > GIANT_MACS else n
        for n in names
    ]
