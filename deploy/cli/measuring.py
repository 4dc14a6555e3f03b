"""The flags that say how long to measure."""

from __future__ import annotations

import argparse

from ..errors import InputError
from ..measure.benchmark import Protocol
from .console import finite


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
        type=int,
        default=default.iters,
        help="least iterations a variant (default %(default)s)",
    )
    group.add_argument(
        "--seconds",
        type=finite,
        default=default.seconds,
        help="least seconds a variant (default %(default)s)",
    )
    if warmup:
        group.add_argument(
            "--warmup",
            type=int,
            default=default.warmup_iters,
            help="least warm-up iterations (default %(default)s)",
        )


def protocol_of(args: argparse.Namespace) -> Protocol:
    """The protocol that the flags ask for; raises :class:`InputError` for impossible ones."""
    warmup = getattr(args, "warmup", Protocol.warmup_iters)
    if args.iters < 1 or args.seconds < 0 or warmup < 1:
        raise InputError(
            "--iters and --warmup must be 1 or more, --seconds 0 or more",
            remedy="leave them out for the defaults",
        )
    return Protocol(args.iters, args.seconds, warmup)
