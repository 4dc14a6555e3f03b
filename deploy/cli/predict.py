"""``cmt-predict``: classify images with a bundle."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from .. import report
from ..errors import InputError
from ..predictor import Predictor
from ..preprocessing import EXTENSIONS
from ..progress import Progress
from .console import add_runtime_flags, parser, run

MANY = 32
"""So many images are worth opening the bundle for several inferences at once."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``cmt-predict``."""
    return run(_main, build_parser().parse_args(argv))


def build_parser() -> argparse.ArgumentParser:
    """The flags of ``cmt-predict``."""
    p = parser(
        "cmt-predict",
        f"Classify images with a bundle; {MANY} images or more with several inferences at once.",
    )
    p.add_argument("bundle", type=Path)
    p.add_argument("images", type=Path, nargs="+", help="image files, or folders of them")
    p.add_argument("--topk", type=int, default=5, help="classes to print (default 5)")
    add_runtime_flags(p)
    return p


def _main(args: argparse.Namespace) -> int:
    if args.topk < 1:
        raise InputError(f"--topk {args.topk}", remedy="ask for 1 or more")
    paths = [file for path in args.images for file in _expand(path)]
    many = len(paths) >= MANY
    with Predictor.load(
        args.bundle, backend=args.backend, device=args.device, threads=args.threads, throughput=many
    ) as p:
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
    shown = (
        f for f in path.rglob("*") if not any(part.startswith(".") for part in f.relative_to(path).parts)
    )
    found = sorted(f for f in shown if f.suffix.lower() in EXTENSIONS and f.is_file())
    if not found:
        raise InputError("holds no images", where=path, remedy=f"supported: {' '.join(EXTENSIONS)}")
    return found
