"""``cmt-bench``: measure bundles side by side."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from cmt_edge.startup import name_program

from .. import report
from ..bundle import Bundle, require_outside_bundles
from ..errors import InputError
from ..escaping import escape
from ..files import require_writable, write_output
from ..images import ImageSet
from ..measure.benchmark import Benchmark, Measured
from ..measure.benchmark import benchmark as run_benchmark
from ..measure.child import measure_memory
from ..measure.loadgen import LoadGenOptions
from ..measure.timing import Protocol
from ..progress import Progress
from ..report.plot import require_matplotlib
from .console import add_key_flag, add_runtime_flags, make_parser, read_runtime_flags, run_command
from .loadgen import add_loadgen, add_loadgen_flags, read_loadgen_options
from .measuring import add_measuring_flags, read_protocol
from .output import find_width, say, say_folded
from .pages import add_page_flags, require_targets, wants_page, write_pages

BENCH_IMAGES = 64
"""Number of images of ``--data`` that are used, the first ones."""
PLOTS = (".png", ".svg")
"""Suffixes of ``--plot``."""

EXAMPLES = """\
examples:
  %(prog)s cmt_xs_fp32_openvino cmt_xs_int8_openvino
  %(prog)s cmt_xs_fp32_openvino cmt_xs_int8_openvino --threads 2 --plot latency.svg
  %(prog)s cmt_xs_int8_openvino --data photos --markdown bench.md
  %(prog)s cmt_xs_int8_openvino --loadgen SingleStream,Offline,Server
"""
"""What ``--help`` prints last."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``cmt-bench``."""
    return run_command(_main, build_parser().parse_args(argv))


def build_parser() -> argparse.ArgumentParser:
    """The flags of ``cmt-bench``."""
    p = make_parser(
        name_program("bench"),
        "Measure bundles side by side, interleaved; ratios refer to the first.",
        EXAMPLES,
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
    what.add_argument(
        "--memory",
        action="store_true",
        help="also measure the memory of a process of its own that opens each bundle",
    )
    add_measuring_flags(p, Protocol(), warmup=True)
    add_loadgen_flags(p)
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
    add_page_flags(output.add_argument)
    add_runtime_flags(p)
    add_key_flag(p)
    return p


def _main(args: argparse.Namespace) -> int:
    protocol = read_protocol(args)
    _check_targets(args)
    asked = read_loadgen_options(args)
    progress = Progress(args.quiet)
    with progress.shown("open the bundles"):
        bundles, result = _measure(args, protocol, asked, progress)
    _answer(args, bundles, result)
    return 0


def _measure(
    args: argparse.Namespace,
    protocol: Protocol,
    asked: LoadGenOptions | None,
    progress: Progress,
) -> tuple[list[Bundle], Benchmark]:
    bundles = [Bundle.open(path, key=args.key) for path in args.bundles]
    images = _read_images(args.data, progress) if args.data else []
    result = run_benchmark(
        bundles,
        **read_runtime_flags(args),
        images=images,
        protocol=protocol,
        with_throughput=not args.no_throughput,
        progress=progress.share,
    )
    if args.memory:
        progress.share("memory", 0.0)
        pairs = zip(bundles, result.results, strict=True)
        result = replace(result, results=[_add_memory(args, *pair) for pair in pairs])
    if asked:
        result = add_loadgen(args, asked, bundles, images, protocol, result, progress)
    return bundles, result


def _answer(args: argparse.Namespace, bundles: list[Bundle], result: Benchmark) -> None:
    """Print the figures, and write what was asked for."""
    if args.json:
        say(report.to_json(result))
    else:
        say_folded(report.describe_benchmark(result, width=find_width()))
    if args.markdown:
        text = escape(report.describe_benchmark(result, markdown=True))
        write_output(args.markdown, f"{text}\n".encode())
    if args.plot:
        report.draw_latency_plot(result, args.plot)
    if wants_page(args):
        _write_pages(args, bundles, result)


def _add_memory(args: argparse.Namespace, bundle: Bundle, measured: Measured) -> Measured:
    """The figures with the memory of a process of its own, where the system tells it."""
    memory = measure_memory(bundle, args.backend, args.device, args.threads)
    return replace(measured, memory=memory)


def _write_pages(args: argparse.Namespace, bundles: list[Bundle], result: Benchmark) -> None:
    """The report of one bundle with the new figures, or the comparison of several."""
    with_images = not args.no_thumbnails
    subjects = [
        report.read_subject(bundle, with_images).with_speed(result, place)
        for place, bundle in enumerate(bundles)
    ]
    if len(subjects) == 1:
        (subject,) = subjects
        page, figures = report.make_bundle_page(subject), report.make_bundle_figures(subject)
    else:
        page = report.make_comparison_page(subjects, result)
        figures = report.make_comparison_figures(subjects, result)
    write_pages(args, args.html, lambda: page, lambda: report.make_figures_file(figures))


def _check_targets(args: argparse.Namespace) -> None:
    """Raise :class:`InputError` before the long work for files that could not be written at its end, or that
    would break a bundle."""
    if args.plot and args.plot.suffix.lower() not in PLOTS:
        raise InputError(
            "plots are PNG or SVG",
            where=args.plot,
            remedy="name it .png or .svg",
        )
    if args.plot:
        require_matplotlib()
    require_targets(args, args.html)
    for target in filter(None, (args.markdown, args.plot)):
        require_outside_bundles(target)
        require_writable(target)


def _read_images(data: str, progress: Progress) -> list[bytes]:
    """The first images of a collection, encoded; labels do not matter here."""
    source = ImageSet(data, labelled=False)
    progress.tell(source.note)
    return [source.read(item) for item in source.items[:BENCH_IMAGES]]
