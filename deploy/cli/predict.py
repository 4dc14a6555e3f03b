"""``cmt-predict``: classify images with a bundle."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..errors import InputError
from ..predictor import Prediction, Predictor
from ..preprocessing import EXTENSIONS
from ..progress import Progress
from .console import add_runtime_flags, parser, run

MANY = 32
"""So many images are worth opening the bundle for several inferences at once."""
SHOW_PROGRESS = 20
"""Fewer images show no progress: they are done before anybody could read it."""


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
    output = p.add_argument_group("output")
    output.add_argument("--topk", type=int, default=5, help="classes to print (default 5)")
    add_runtime_flags(p)
    return p


def _main(args: argparse.Namespace) -> int:
    from .. import report  # here, because the command should start without what measures

    if args.topk < 1:
        raise InputError(f"--topk {args.topk}", remedy="ask for 1 or more")
    paths = [file for path in args.images for file in _expand(path)]
    predictions = _predictions(args, paths)
    if args.json:
        found = [report.prediction_json(prediction, args.topk) for prediction in predictions]
        print(report.to_json({"predictions": found}))
    else:
        print(report.predictions_text(predictions, args.topk))
    return 0


def _predictions(args: argparse.Namespace, paths: list[Path]) -> list[Prediction]:
    predictions = []
    progress = Progress(args.quiet or len(paths) < SHOW_PROGRESS)
    with Predictor.load(
        args.bundle,
        backend=args.backend,
        device=args.device,
        threads=args.threads,
        throughput=len(paths) >= MANY,
    ) as predictor:
        for prediction in predictor.stream(paths):
            predictions.append(prediction)
            progress.count(len(predictions), len(paths))
        progress.finish()
    return predictions


def _expand(path: Path) -> list[Path]:
    """``path``, or the images below it."""
    if not os.path.isdir(path):
        return [path]
    shown = [file for file in path.rglob("*") if not _hidden(file.relative_to(path))]
    found = sorted(file for file in shown if file.suffix.lower() in EXTENSIONS and file.is_file())
    if not found:
        raise InputError("holds no images", where=path, remedy=f"supported: {' '.join(EXTENSIONS)}")
    return found


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
