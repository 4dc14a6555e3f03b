"""``cmt-bench``: measure bundles side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import report
from ..bundle import Bundle, require_outside_bundles
from ..errors import InputError, OutputError
from ..files import write_atomic
from ..images import ImageSet
from ..measure.benchmark import Protocol
from ..measure.benchmark import benchmark as run_benchmark
from ..progress import Progress
from .console import add_key_flag, add_runtime_flags, parser, run, say
from .measuring import add_measuring_flags, protocol_of

BENCH_IMAGES = 64
"""Number of images of ``--data`` that are used, the first ones."""
PLOTS = (".png", ".svg")
"""Suffixes of ``--plot``."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``cmt-bench``."""
    return run(_main, build_parser().parse_args(argv))


def build_parser() -> argparse.ArgumentParser:
    """The flags of ``cmt-bench``."""
    p = parser(
        "cmt-bench",
        "Measure bundles side by side, interleaved; ratios refer to the first.",
    )
    p.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    what = p.add_argument_group("what is measured")
    what.add_argument(
        "--data",
        help="images for the end-to-end figure (default: the bundle's golden images)",
    )
    what.add_argument(
        "--no-throughput",
        action="store_true",
        help="skip the many-requests figure",
    )
    add_measuring_flags(p, Protocol(), warmup=True)
    output = p.add_argument_group("output")
    output.add_argument(
        "--markdown",
        type=Path,
        metavar="FILE",
        help="also write the tables as Markdown",
    )
    output.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="also draw the latencies (PNG or SVG; needs the extra 'report')",
    )
    add_runtime_flags(p)
    add_key_flag(p)
    return p


def _main(args: argparse.Namespace) -> int:
    protocol = protocol_of(args)
    _check_targets(args)
    bundles = [Bundle.open(path, key=args.key) for path in args.bundles]
    progress = Progress(args.quiet)
    result = run_benchmark(
        bundles,
        backend=args.backend,
        device=args.device,
        threads=args.threads,
        images=_images(args.data) if args.data else [],
        protocol=protocol,
        with_throughput=not args.no_throughput,
        progress=progress.share,
    )
    progress.finish()
    if args.markdown:
        write_atomic(
            args.markdown,
            (report.benchmark_text(result, markdown=True) + "\n").encode(),
        )
    if args.plot:
        report.latency_plot(result, args.plot)
    say(report.to_json(result) if args.json else report.benchmark_text(result))
    return 0


def _check_targets(args: argparse.Namespace) -> None:
    """Raise :class:`InputError` before the long work for files that could not be written at its end, or that
    would break a bundle."""
    if args.plot and args.plot.suffix.lower() not in PLOTS:
        raise InputError(
            "plots are PNG or SVG",
            where=args.plot,
            remedy="name it .png or .svg",
        )
    for target in filter(None, (args.markdown, args.plot)):
        require_outside_bundles(target)
        if not target.absolute().parent.is_dir() or target.is_dir():
            raise OutputError(
                "cannot write here",
                where=target,
                why="it is a folder" if target.is_dir() else "its folder does not exist",
                remedy="name a file in a folder that exists",
            )


def _images(data: str) -> list[bytes]:
    source = ImageSet(data)
    return [source.read(item) for item in source.items[:BENCH_IMAGES]]
