"""The flags that say how long to measure."""

from __future__ import annotations

import argparse

from ..measure.timing import Protocol
from .ranges import ITERATIONS, SECONDS


def add_measuring_flags(
    p: argparse.ArgumentParser,
    default: Protocol,
    *,
    warmup: bool = False,
) -> None:
    """``--iters``, ``--seconds`` and, with ``warmup``, ``--warmup``."""
    group = p.add_argument_group("how long is measured")
    group.add_argument(
        "--iters",
        type=ITERATIONS.parse_whole,
        default=default.iters,
        help="least iterations a variant (default %(default)s)",
    )
    group.add_argument(
        "--seconds",
        type=SECONDS.parse_number,
        default=default.seconds,
        help="least seconds a variant (default %(default)s)",
    )
    if warmup:
        group.add_argument(
            "--warmup",
            type=ITERATIONS.parse_whole,
            default=default.warmup_iters,
            help="least warm-up iterations (default %(default)s)",
        )


def read_protocol(args: argparse.Namespace) -> Protocol:
    """The protocol that the flags ask for."""
    warmup = getattr(args, "warmup", Protocol.warmup_iters)
    return Protocol(args.iters, args.seconds, warmup)
