"""Exports that take little time."""

from __future__ import annotations

import pytest

from cmt_edge.deploy.measure.benchmark import Protocol
from cmt_edge.export.steps import bundle
from helpers.exports import traced_once


@pytest.fixture(scope="module")
def quick_exports(traced):
    """Equal models are traced once a run, and the final measurement is short."""
    with traced_once(traced) as patch:
        quick = Protocol(iters=10, seconds=0.1, warmup_iters=2, warmup_seconds=0.1)
        patch.setattr(bundle, "EXPORT_PROTOCOL", quick)
        yield
