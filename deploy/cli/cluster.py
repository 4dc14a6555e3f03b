"""The flags of commands that may answer images on a cluster."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from ..progress import Progress
from .ranges import SECONDS, WORKERS

if TYPE_CHECKING:
    from ..scale.evaluation import Settings

LOCAL = "local"
"""What ``--ray`` without an address means: a cluster on this machine, which ends with the command."""


WAIT_S = 600.0
"""Seconds to wait for a cluster without free cores, unless told otherwise."""


def add_cluster_flags(p: argparse.ArgumentParser) -> None:
    """``--ray``, ``--answers``, ``--workers``, ``--ray-wait``."""
    cluster = p.add_argument_group("cluster")
    cluster.add_argument(
        "--ray",
        nargs="?",
        const=LOCAL,
        metavar="ADDRESS",
        help="answer the labelled images with Ray: on the cluster at ADDRESS (HOST:PORT, or auto inside it),"
        " or with one worker a core of this machine",
    )
    cluster.add_argument(
        "--answers",
        type=Path,
        metavar="DIR",
        help="with --ray: keep the answers here, as Parquet; a run that was interrupted goes on with them",
    )
    cluster.add_argument(
        "--workers",
        type=WORKERS.parse_whole,
        help="with --ray: largest number of workers, each with a loaded model (default: one a core)",
    )
    cluster.add_argument(
        "--ray-wait",
        type=SECONDS.parse_number,
        metavar="SECONDS",
        help=f"with --ray: how long to wait for a cluster that has no free cores (default {WAIT_S:g})",
    )


def require_cluster_flags(args: argparse.Namespace) -> None:
    """Raise :class:`InputError` for flags that mean nothing without ``--ray``."""
    given = {"--answers": args.answers, "--workers": args.workers, "--ray-wait": args.ray_wait}
    alone = [flag for flag, value in given.items() if value is not None]
    if alone and args.ray is None:
        raise InputError(f"{alone[0]} means nothing without --ray", remedy="add --ray")


def make_settings(args: argparse.Namespace, progress: Progress) -> Settings:
    """How the cluster answers."""
    from ..scale.evaluation import Settings

    return Settings(
        address=args.ray,
        answers=args.answers,
        workers=args.workers,
        backend=args.backend,
        device=args.device,
        threads=args.threads,
        weights=args.weights,
        trusted_model=args.reference_model,
        trusted_engine=args.trust_engine,
        atol=args.atol,
        progress=progress.share,
        note=progress.tell,
        wait_s=WAIT_S if args.ray_wait is None else args.ray_wait,
    )
