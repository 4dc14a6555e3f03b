"""``cmt-predict``, ``cmt-verify``, ``cmt-bench``, ``cmt-build``: what runs on the device."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from . import report
from .benchmark import Protocol
from .benchmark import benchmark as run_benchmark
from .build import QUICK, TIME_LIMIT_S, building, finish
from .bundle import Bundle
from .console import Progress, add_runtime_flags, parser, run
from .engine import EngineOptions, trtexec
from .errors import InputError
from .files import write_atomic
from .images import ImageSet
from .parity import MAX_DROP
from .parity import verify as run_verify
from .predictor import Predictor
from .preprocess import EXTENSIONS

BENCH_IMAGES = 64
MANY = 32
"""So many images are worth opening the bundle for several inferences at once."""
MAX_TIME_LIMIT_S = 30 * 86400.0


def predict(argv: list[str] | None = None) -> int:
    """Entry point of ``cmt-predict``."""
    p = parser("cmt-predict", f"Classify images with a bundle; {MANY} images or more with several inferences at once.")
    p.add_argument("bundle", type=Path)
    p.add_argument("images", type=Path, nargs="+", help="image files, or folders of them")
    p.add_argument("--topk", type=int, default=5, help="classes to print (default 5)")
    add_runtime_flags(p)
    return run(_predict, p.parse_args(argv))


def _predict(args: argparse.Namespace) -> int:
    if args.topk < 1:
        raise InputError(f"--topk {args.topk}", remedy="ask for 1 or more")
    paths = [file for path in args.images for file in _expand(path)]
    many = len(paths) >= MANY
    with Predictor.load(args.bundle, backend=args.backend, device=args.device, threads=args.threads, throughput=many) as p:
        predictions = []
        progress = Progress(args.quiet or len(paths) < 20)
        for prediction in p.stream(paths):
            predictions.append(prediction)
            progress.count(len(predictions), len(paths))
        progress.finish()
    if args.json:
        print(report.to_json({"predictions": [report.prediction_json(q, args.topk) for q in predictions]}))
    else:
        print(report.predictions_text(predictions, args.topk))
    return 0


def _expand(path: Path) -> list[Path]:
    """``path``, or the images below it."""
    if not os.path.isdir(path):
        return [path]
    shown = (f for f in path.rglob("*") if not any(part.startswith(".") for part in f.relative_to(path).parts))
    found = sorted(f for f in shown if f.suffix.lower() in EXTENSIONS and f.is_file())
    if not found:
        raise InputError("holds no images", where=path, remedy=f"supported: {' '.join(EXTENSIONS)}")
    return found


def verify(argv: list[str] | None = None) -> int:
    """Entry point of ``cmt-verify``."""
    p = parser("cmt-verify", "Check a bundle: hashes and golden vectors always, top-1 against the reference with --data.")
    p.add_argument("bundle", type=Path)
    p.add_argument("--data", help="labelled images: a folder of class folders, or ARCHIVE.tar[/FOLDER]")
    p.add_argument("--by-order", action="store_true", help="match class folders to labels in sorted order, not by name")
    p.add_argument("--limit", type=int, help="use only so many images, evenly spread")
    p.add_argument("--max-drop", type=float, default=MAX_DROP, help=f"allowed loss of top-1, points (default {MAX_DROP})")
    p.add_argument("--atol", type=float, help="allowed golden logit difference (default: by precision)")
    p.add_argument("--reference", type=Path, help="compare with this bundle (say, the fp32 one) instead of PyTorch")
    p.add_argument("--weights", help="the checkpoint the bundle was made from, to rebuild the PyTorch reference")
    add_runtime_flags(p)
    return run(_verify, p.parse_args(argv))


def _verify(args: argparse.Namespace) -> int:
    bundle = Bundle.open(args.bundle)
    data = ImageSet(args.data) if args.data else None
    reference = _reference(bundle, args.reference, args.threads) if args.reference else None
    progress = Progress(args.quiet)
    result = run_verify(
        bundle, data=data, by_order=args.by_order, backend=args.backend, device=args.device, threads=args.threads,
        reference=reference, weights=args.weights, max_drop=args.max_drop, atol=args.atol, limit=args.limit,
        progress=progress.count,
    )  # fmt: skip
    progress.finish()
    print(report.to_json(result) if args.json else report.verification_text(result))
    if not result.passed and not args.json:
        print("the bundle is not the model within the allowed difference; see --max-drop and --atol, or calibrate on more "
              "images like those it will see", file=sys.stderr)  # fmt: skip
    return 0 if result.passed else 1


def _reference(bundle: Bundle, path: Path, threads: int | None) -> Predictor:
    """Another bundle of the same weights as the reference."""
    other = Bundle.open(path)
    if other.manifest.model["weights"]["sha256"] != bundle.manifest.model["weights"]["sha256"]:
        raise InputError(
            "was made from other weights, so it is no reference", where=path, remedy="export both from one checkpoint"
        )
    return Predictor.load(other, threads=threads)


def build(argv: list[str] | None = None) -> int:
    """Entry point of ``cmt-build``."""
    p = parser("cmt-build", "Finish a TensorRT bundle on the device that will run it: build the engine, verify it, measure it.")
    p.add_argument("bundle", type=Path)
    p.add_argument(
        "--workspace", type=float, metavar="GiB", help="scratch memory of the builder (default: 40 %% of what is free)"
    )
    p.add_argument(
        "--level", type=int, default=EngineOptions.level, help="optimization level, 0 (fast build) to 5 (default %(default)s)"
    )
    p.add_argument("--profile", default=",".join(map(str, EngineOptions.profile)), metavar="MIN,OPT,MAX",
                   help="batch sizes of a dynamic bundle (default %(default)s)")  # fmt: skip
    p.add_argument("--tf32", action="store_true", help="let float32 products round their inputs to TF32")
    p.add_argument(
        "--time-limit", type=float, default=TIME_LIMIT_S, metavar="S", help="stop the build after so long (default %(default)g)"
    )
    p.add_argument("--device", help="number of the GPU (default 0)")
    p.add_argument("--force", action="store_true", help="build even where the bundle's engine is still right")
    p.add_argument("--atol", type=float, help="allowed golden logit difference (default: by precision)")
    p.add_argument("--iters", type=int, default=QUICK.iters, help="least iterations to measure (default %(default)s)")
    p.add_argument("--seconds", type=float, default=QUICK.seconds, help="least seconds to measure (default %(default)s)")
    p.add_argument("--trtexec", action="store_true", help="print the equivalent trtexec command and exit")
    return run(_build, p.parse_args(argv))


def _build(args: argparse.Namespace) -> int:
    sizes = args.profile.split(",")
    if len(sizes) != 3 or not all(s.strip().isdigit() for s in sizes):
        raise InputError(f"--profile {args.profile}", remedy="give three batch sizes: --profile MIN,OPT,MAX")
    if not 0 < args.time_limit <= MAX_TIME_LIMIT_S or (args.atol is not None and not args.atol >= 0):
        raise InputError(
            "--time-limit must be above 0 and at most a month, --atol 0 or more", remedy="leave them out for the defaults"
        )
    low, typical, high = map(int, sizes)
    options = EngineOptions(args.workspace, args.level, (low, typical, high), args.tf32)
    options.check()
    bundle = Bundle.open(args.bundle)
    if args.trtexec:
        print(trtexec(bundle, options, args.device))
        return 0
    with building(bundle.path):
        result = finish(bundle, options, device=args.device, force=args.force, time_limit=args.time_limit, atol=args.atol,
                        protocol=_protocol(args.iters, args.seconds), progress=Progress(args.quiet))  # fmt: skip
        bundle = bundle.update(result.manifest, result.files, result.drop)
    print(report.to_json(result.report) if args.json else report.built_text(bundle, result.report))
    return 0


def _protocol(iters: int, seconds: float, warmup: int = Protocol.warmup_iters) -> Protocol:
    if iters < 1 or seconds < 0 or warmup < 1:
        raise InputError(
            "--iters and --warmup must be 1 or more, --seconds 0 or more", remedy="leave them out for the defaults"
        )
    return Protocol(iters, seconds, warmup)


def bench(argv: list[str] | None = None) -> int:
    """Entry point of ``cmt-bench``."""
    p = parser("cmt-bench", "Measure bundles side by side, interleaved; ratios refer to the first.")
    p.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    p.add_argument("--data", help="images for the end-to-end figure (default: the bundle's golden images)")
    p.add_argument("--iters", type=int, default=Protocol.iters, help="least iterations a variant (default %(default)s)")
    p.add_argument("--seconds", type=float, default=Protocol.seconds, help="least seconds a variant (default %(default)s)")
    p.add_argument("--warmup", type=int, default=Protocol.warmup_iters, help="least warm-up iterations (default %(default)s)")
    p.add_argument("--no-throughput", action="store_true", help="skip the many-requests figure")
    p.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables as Markdown")
    p.add_argument("--plot", type=Path, metavar="FILE", help="also draw the latencies (PNG or SVG; needs the extra 'report')")
    add_runtime_flags(p)
    return run(_bench, p.parse_args(argv))


def _bench(args: argparse.Namespace) -> int:
    protocol = _protocol(args.iters, args.seconds, args.warmup)
    if args.plot and args.plot.suffix not in (".png", ".svg"):
        raise InputError("plots are PNG or SVG", where=args.plot, remedy="name it .png or .svg")
    bundles = [Bundle.open(path) for path in args.bundles]
    images = []
    if args.data:
        source = ImageSet(args.data)
        images = [source.read(item) for item in source.items[:BENCH_IMAGES]]
    progress = Progress(args.quiet)
    result = run_benchmark(
        bundles, backend=args.backend, device=args.device, threads=args.threads, images=images,
        protocol=protocol, with_throughput=not args.no_throughput,
        progress=progress.share,
    )  # fmt: skip
    progress.finish()
    if args.markdown:
        write_atomic(args.markdown, (report.benchmark_text(result, markdown=True) + "\n").encode())
    if args.plot:
        report.latency_plot(result, args.plot)
    print(report.to_json(result) if args.json else report.benchmark_text(result))
    return 0
