"""Measurements of milliseconds, for tests that are not about latencies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from cmt_edge.deploy.cli import measuring
from cmt_edge.deploy.measure.timing import Protocol


@dataclass(frozen=True)
class Brief(Protocol):
    """The protocol without its second of warm-up, which no flag sets, and without settling."""

    warmup_seconds: float = 0.01
    settle_seconds: float = 0.0


BRIEF_EXPORT = Protocol(iters=10, seconds=0.0, warmup_iters=2, warmup_seconds=0.0)
"""How long a finished bundle is measured."""


@contextmanager
def brief_commands() -> Iterator[None]:
    """Commands of this process that measure do not warm up for a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "Protocol", Brief)
        yield


@contextmanager
def brief_exports() -> Iterator[pytest.MonkeyPatch]:
    """Exports of this process measure their bundle by :data:`BRIEF_EXPORT`. Needs PyTorch."""
    from cmt_edge.export.steps import bundle

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle, "EXPORT_PROTOCOL", BRIEF_EXPORT)
        yield patch
