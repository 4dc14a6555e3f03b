"""The models of the registry, marked by what they cost."""

from __future__ import annotations

import pytest

GIANT_MACS = 9e9
"""Models above this are tested on demand (``pytest -m giant``): their goldens and exports take minutes and
gigabytes."""


def marked_models(names=None):
    """Registry names for ``parametrize``; giant ones carry the marker ``giant``."""
    from cmt_edge.cmt import find_model, list_models

    names = list_models() if names is None else names
    return [
        pytest.param(n, marks=pytest.mark.giant) if (find_model(n).macs or 0) > GIANT_MACS else n
        for n in names
    ]
