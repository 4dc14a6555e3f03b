"""The flags of a measurement."""

from __future__ import annotations

from ..errors import InputError
from ..measure.benchmark import Protocol


def protocol_of(iters: int, seconds: float, warmup: int = Protocol.warmup_iters) -> Protocol:
    if iters < 1 or seconds < 0 or warmup < 1:
        raise InputError(
            "--iters and --warmup must be 1 or more, --seconds 0 or more",
            remedy="leave them out for the defaults",
        )
    return Protocol(iters, seconds, warmup)
