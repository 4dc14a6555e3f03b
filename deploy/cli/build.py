"""``cmt-build``: finish a TensorRT bundle on the device that will run it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from cmt_edge.startup import name_program

from .. import report
from ..backends.base import read_batch_limit
from ..bundle import Bundle
from ..errors import InputError
from ..progress import Progress
from ..tensorrt.build import DEVICE_PROTOCOL, exclusive, finish_bundle
from ..tensorrt.building import BUILD_TIME_LIMIT_S
from ..tensorrt.engine import EngineOptions, make_trtexec_command
from .console import add_key_flag, make_parser, run_command
from .measuring import add_measuring_flags, read_protocol
from .output import say, say_folded
from .ranges import DIFFERENCE, GIBIBYTES, SECONDS, SERVED_BATCHES, Range

LEVEL = Range(0, 5)
"""TensorRT's optimization levels."""
TIME_LIMIT = Range(0, SECONDS.most, above=True)
"""Seconds that ``--time-limit`` may allow."""

EXAMPLES = """\
examples:
  %(prog)s cmt_xs_fp16_trt
  %(prog)s cmt_xs_fp16_trt --workspace 2 --level 5 --force
  %(prog)s cmt_xs_fp16_trt --trtexec
"""
"""What ``--help`` prints last."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``cmt-build``."""
    return run_command(_main, build_parser().parse_args(argv))


def build_parser() -> argparse.ArgumentParser:
    """The flags of ``cmt-build``."""
    p = make_parser(
        name_program("build"),
        "Finish a TensorRT bundle on the device that will run it: build the engine, verify it, measure it.",
        EXAMPLES,
    )
    p.add_argument("bundle", type=Path)
    engine = p.add_argument_group("engine")
    _add_engine_flags(engine.add_argument)
    _add_build_flags(engine.add_argument)
    gates = p.add_argument_group("accuracy gates")
    gates.add_argument(
        "--atol",
        type=DIFFERENCE.parse_number,
        help="allowed golden logit difference (default: by precision)",
    )
    add_measuring_flags(p, DEVICE_PROTOCOL)
    add_key_flag(p)
    return p


def _add_engine_flags(add_flag: Callable[..., object]) -> None:
    """What an engine depends on."""
    add_flag(
        "--workspace",
        type=GIBIBYTES.parse_number,
        metavar="GiB",
        help="scratch memory of the builder (default: 40 %% of what is free)",
    )
    add_flag(
        "--level",
        type=LEVEL.parse_whole,
        default=EngineOptions.level,
        help="optimization level, 0 (fast build) to 5 (default %(default)s)",
    )
    add_flag(
        "--profile",
        default=",".join(map(str, EngineOptions.profile)),
        metavar="MIN,OPT,MAX",
        help="batch sizes of a dynamic bundle (default %(default)s)",
    )
    add_flag(
        "--tf32",
        action="store_true",
        help="let float32 products round their inputs to TF32",
    )


def _add_build_flags(add_flag: Callable[..., object]) -> None:
    """How it is built."""
    add_flag(
        "--time-limit",
        type=TIME_LIMIT.parse_number,
        default=BUILD_TIME_LIMIT_S,
        metavar="S",
        help="stop the build after so long (default %(default)g)",
    )
    add_flag("--device", help="number of the GPU (default 0)")
    add_flag(
        "--force",
        action="store_true",
        help="build even where the bundle's engine is still right",
    )
    add_flag(
        "--trtexec",
        action="store_true",
        help="print the equivalent trtexec command and exit",
    )


def _main(args: argparse.Namespace) -> int:
    options = _read_options(args)
    bundle = Bundle.open(args.bundle, key=args.key)
    _require_any_batch(bundle, options)
    if args.trtexec:
        say(make_trtexec_command(bundle, options, args.device))
        return 0
    with exclusive(bundle.path):
        result = finish_bundle(
            bundle,
            options,
            device=args.device,
            force=args.force,
            time_limit=args.time_limit,
            atol=args.atol,
            protocol=read_protocol(args),
            progress=Progress(args.quiet),
        )
        bundle = bundle.update(result.manifest, result.files, result.drop)
    if args.json:
        say(report.to_json(result.report))
    else:
        say_folded(report.describe_build(bundle, result.report))
    return 0


def _require_any_batch(bundle: Bundle, options: EngineOptions) -> None:
    """Raise :class:`InputError` for a profile of a bundle whose batch size is fixed."""
    size = read_batch_limit(bundle)
    if size and options.profile != EngineOptions.profile:
        raise InputError(
            f"--profile is for bundles of any batch size, and this one takes batches of {size}",
            where=bundle.path,
            remedy="leave --profile out, or export with --batch 0",
        )


def _read_profile(text: str) -> tuple[int, int, int]:
    """The batch sizes of ``--profile``."""
    try:
        least, typical, most = [SERVED_BATCHES.parse_whole(size) for size in text.split(",")]
    except (argparse.ArgumentTypeError, ValueError) as exc:
        raise InputError(
            f"--profile {text}",
            why=exc if isinstance(exc, argparse.ArgumentTypeError) else None,
            remedy="give three batch sizes: --profile MIN,OPT,MAX",
        ) from exc
    return least, typical, most


def _read_options(args: argparse.Namespace) -> EngineOptions:
    """What the flags ask for; raises :class:`InputError` for impossible ones."""
    profile = _read_profile(args.profile)
    options = EngineOptions(args.workspace, args.level, profile, args.tf32)
    options.check()
    return options
