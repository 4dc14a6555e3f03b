"""``cmt-build``: finish a TensorRT bundle on the device that will run it."""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import report
from ..bundle import Bundle
from ..errors import InputError
from ..progress import Progress
from ..tensorrt.build import QUICK, TIME_LIMIT_S, building, finish
from ..tensorrt.engine import EngineOptions, trtexec
from .console import parser, run
from .protocol import protocol_of

MAX_TIME_LIMIT_S = 30 * 86400.0


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``cmt-build``."""
    return run(_main, build_parser().parse_args(argv))


def build_parser() -> argparse.ArgumentParser:
    """The flags of ``cmt-build``."""
    p = parser(
        "cmt-build",
        "Finish a TensorRT bundle on the device that will run it: build the engine, verify it, measure it.",
    )
    p.add_argument("bundle", type=Path)
    p.add_argument(
        "--workspace",
        type=float,
        metavar="GiB",
        help="scratch memory of the builder (default: 40 %% of what is free)",
    )
    p.add_argument(
        "--level",
        type=int,
        default=EngineOptions.level,
        help="optimization level, 0 (fast build) to 5 (default %(default)s)",
    )
    p.add_argument(
        "--profile",
        default=",".join(map(str, EngineOptions.profile)),
        metavar="MIN,OPT,MAX",
        help="batch sizes of a dynamic bundle (default %(default)s)",
    )
    p.add_argument("--tf32", action="store_true", help="let float32 products round their inputs to TF32")
    p.add_argument(
        "--time-limit",
        type=float,
        default=TIME_LIMIT_S,
        metavar="S",
        help="stop the build after so long (default %(default)g)",
    )
    p.add_argument("--device", help="number of the GPU (default 0)")
    p.add_argument("--force", action="store_true", help="build even where the bundle's engine is still right")
    p.add_argument("--atol", type=float, help="allowed golden logit difference (default: by precision)")
    p.add_argument(
        "--iters", type=int, default=QUICK.iters, help="least iterations to measure (default %(default)s)"
    )
    p.add_argument(
        "--seconds", type=float, default=QUICK.seconds, help="least seconds to measure (default %(default)s)"
    )
    p.add_argument("--trtexec", action="store_true", help="print the equivalent trtexec command and exit")
    return p


def _main(args: argparse.Namespace) -> int:
    sizes = args.profile.split(",")
    if len(sizes) != 3 or not all(s.strip().isdigit() for s in sizes):
        raise InputError(f"--profile {args.profile}", remedy="give three batch sizes: --profile MIN,OPT,MAX")
    if not 0 < args.time_limit <= MAX_TIME_LIMIT_S or (args.atol is not None and not args.atol >= 0):
        raise InputError(
            "--time-limit must be above 0 and at most a month, --atol 0 or more",
            remedy="leave them out for the defaults",
        )
    low, typical, high = map(int, sizes)
    options = EngineOptions(args.workspace, args.level, (low, typical, high), args.tf32)
    options.check()
    bundle = Bundle.open(args.bundle)
    if args.trtexec:
        print(trtexec(bundle, options, args.device))
        return 0
    with building(bundle.path):
        result = finish(
            bundle,
            options,
            device=args.device,
            force=args.force,
            time_limit=args.time_limit,
            atol=args.atol,
            protocol=protocol_of(args.iters, args.seconds),
            progress=Progress(args.quiet),
        )
        bundle = bundle.update(result.manifest, result.files, result.drop)
    print(report.to_json(result.report) if args.json else report.built_text(bundle, result.report))
    return 0
