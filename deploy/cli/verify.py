"""``cmt-verify``: check a bundle against its reference."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cmt_edge.startup import name_program

from .. import report
from ..backends import LoadOptions
from ..bundle import Bundle, require_outside_bundles
from ..errors import InputError, WeightsError
from ..measure.answering import Answers, Labelled
from ..measure.flipped import MOST_SHOWN
from ..measure.labels import LabelledImages
from ..measure.layers import MOST_IMAGES, THRESHOLDS, compare_layers
from ..measure.parity import MAX_DROP, Verification
from ..measure.parity import verify as run_verify
from ..predictor import Predictor
from ..progress import Progress
from .cluster import add_cluster_flags, make_settings, require_cluster_flags
from .console import add_key_flag, add_runtime_flags, make_parser, read_runtime_flags, run_command
from .output import find_width, say, say_folded, tell
from .pages import add_page_flags, require_targets, wants_page, write_pages
from .ranges import DIFFERENCE, IMAGES, POINTS

DIFFERENCE_REMEDY = (
    "the bundle is not the model within the allowed difference; see --max-drop and --atol, or calibrate on"
    " more images like those it will see"
)
"""What standard error says after a failed check."""

NAMED_WEIGHTS = ("pretrained", "random")
"""What ``--weights`` takes in place of a file, as at the export."""

EXAMPLES = """\
examples:
  %(prog)s cmt_xs_int8_openvino
  %(prog)s cmt_xs_int8_openvino --data photos/test --max-drop 0.5
  %(prog)s cmt_xs_int8_openvino --data photos/test --reference cmt_xs_fp32_openvino
  %(prog)s cmt_xs_int8_openvino --layers --beside cmt_xs_bf16_openvino
  %(prog)s cmt_xs_int8_openvino --data s3://bucket/shards --ray --answers answers
"""
"""What ``--help`` prints last."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``cmt-verify``."""
    return run_command(_main, build_parser().parse_args(argv))


def build_parser() -> argparse.ArgumentParser:
    """The flags of ``cmt-verify``."""
    p = make_parser(
        name_program("verify"),
        "Check a bundle: hashes and golden vectors always, top-1 against the reference with --data.",
        EXAMPLES,
    )
    p.add_argument("bundle", type=Path)
    images = p.add_argument_group("labelled images")
    images.add_argument(
        "--data",
        help="class folders, ARCHIVE.tar[/FOLDER], tar shards, Parquet, or a URL of these",
    )
    images.add_argument(
        "--by-order",
        action="store_true",
        help="match class folders to labels in sorted order, not by name",
    )
    images.add_argument(
        "--limit",
        type=IMAGES.parse_whole,
        help="largest number of images to use, evenly spread",
    )
    _add_reference_flags(p)
    _add_layer_flags(p)
    add_cluster_flags(p)
    gates = p.add_argument_group("accuracy gates")
    gates.add_argument(
        "--max-drop",
        type=POINTS.parse_number,
        default=MAX_DROP,
        help=f"allowed loss of top-1, points (default {MAX_DROP})",
    )
    gates.add_argument(
        "--atol",
        type=DIFFERENCE.parse_number,
        help="allowed golden logit difference (default: by precision)",
    )
    add_page_flags(p.add_argument_group("output").add_argument)
    add_runtime_flags(p)
    add_key_flag(p)
    return p


def _add_reference_flags(p: argparse.ArgumentParser) -> None:
    reference = p.add_argument_group("reference")
    reference.add_argument(
        "--reference",
        type=Path,
        metavar="BUNDLE",
        help="compare with this bundle (say, the fp32 one) instead of PyTorch; --key and --trust-engine count"
        " for it too",
    )
    reference.add_argument(
        "--weights",
        type=_read_weights,
        help="the weights the bundle was made from, to rebuild the PyTorch reference: a checkpoint, or as at"
        " the export 'pretrained' (downloaded if need be) or 'random'",
    )
    reference.add_argument(
        "--reference-model",
        metavar="MODULE:FACTORY",
        help="your own model, where the bundle was made from one: code is imported only if you name it",
    )


def _read_weights(text: str) -> str:
    """A checkpoint's path as it is; a name in any case."""
    return text.lower() if text.lower() in NAMED_WEIGHTS else text


def _add_layer_flags(p: argparse.ArgumentParser) -> None:
    layers = p.add_argument_group("layer by layer")
    layers.add_argument(
        "--layers",
        action="store_true",
        help="compare the output of every block with PyTorch in float64, on the images of --data or the"
        f" golden ones, {MOST_IMAGES} at most, on OpenVINO and ONNX Runtime unless --backend names one",
    )
    layers.add_argument(
        "--beside",
        type=Path,
        nargs="+",
        default=[],
        metavar="BUNDLE",
        help="with --layers: further bundles of the same weights, say in other precisions",
    )
    limits = ", ".join(f"{precision} {limit:g}" for precision, limit in THRESHOLDS.items())
    layers.add_argument(
        "--layer-threshold",
        type=DIFFERENCE.parse_number,
        metavar="ERROR",
        help=f"with --layers: relative error beyond which a block is named (default: {limits})",
    )


def _main(args: argparse.Namespace) -> int:
    _require_weights(args.weights)
    require_targets(args, args.html)
    _require_layers(args)
    _require_cluster(args)
    progress = Progress(args.quiet)
    with progress.shown("open the bundle"):
        bundle, result = _check(args, progress)
    if wants_page(args):
        _write_pages(args, bundle, result)
    if args.json:
        say(report.to_json(result))
    else:
        say_folded(report.describe_verification(result, width=find_width()))
    if not result.passed and not args.json:
        tell(DIFFERENCE_REMEDY)
    return 0 if result.passed else 1


def _check(args: argparse.Namespace, progress: Progress) -> tuple[Bundle, Verification]:
    """Open the bundle, and do the checks that were asked for."""
    bundle = Bundle.open(args.bundle, key=args.key)
    data = _open_data(args)
    other = _open_reference(bundle, args) if args.reference else None
    progress.tell(_describe_signature(bundle, args.key))
    progress.tell(report.describe_slim(bundle.manifest.slim) if bundle.manifest.slim else "")
    progress.tell(data.note if data else "")
    result = run_verify(
        bundle,
        data=data,
        by_order=args.by_order,
        **read_runtime_flags(args),
        reference=_load_reference(other, args) if other and args.ray is None else None,
        weights=args.weights,
        trusted_model=args.reference_model,
        max_drop=args.max_drop,
        atol=args.atol,
        limit=args.limit,
        progress=progress.count,
        flipped_images=MOST_SHOWN if wants_page(args) and not args.no_thumbnails else 0,
        answer=_make_answerer(bundle, other, args, progress),
    )
    if args.layers:
        result = _add_layers(result, bundle, data, args, progress)
    return bundle, result


def _add_layers(
    result: Verification,
    bundle: Bundle,
    data: LabelledImages | None,
    args: argparse.Namespace,
    progress: Progress,
) -> Verification:
    """``result`` with the errors of the model's blocks; they fail no gate."""
    beside = [Bundle.open(path, key=args.key) for path in args.beside]
    found = compare_layers(
        [bundle, *beside],
        data=data,
        limit=args.limit,
        backend=args.backend,
        options=LoadOptions(
            device=args.device,
            threads=args.threads,
            weights=args.weights,
            trusted_model=args.reference_model,
            trusted_engine=args.trust_engine,
            cache=False,
        ),
        threshold=args.layer_threshold,
        progress=progress.count,
    )
    return replace(
        result,
        layers=found.errors,
        layer_runs=found.runs,
        notes=(*result.notes, *found.notes),
    )


def _write_pages(args: argparse.Namespace, bundle: Bundle, result: Verification) -> None:
    """The report of the bundle, with what was just found in place of what it records."""
    subject = report.read_subject(bundle, not args.no_thumbnails).with_check(
        result.entry(_recall_steps(bundle)), result.flipped
    )
    write_pages(
        args,
        args.html,
        lambda: report.make_bundle_page(subject),
        lambda: report.make_figures_file(report.make_bundle_figures(subject)),
    )


def _recall_steps(bundle: Bundle) -> dict[str, float] | None:
    """The export's own checks, which only its machine can repeat."""
    recorded = bundle.manifest.verification
    return recorded.steps if recorded else None


def _require_weights(weights: str | None) -> None:
    """Raise :class:`WeightsError` for a checkpoint that does not exist, also where no check would read it."""
    if weights is None or weights in NAMED_WEIGHTS or Path(weights).exists():
        return
    raise WeightsError(
        "no such checkpoint file",
        where=weights,
        remedy=f"check the path given to --weights, use {' or '.join(NAMED_WEIGHTS)}, or leave it out",
    )


def _require_layers(args: argparse.Namespace) -> None:
    """Raise :class:`InputError` for flags that mean nothing without ``--layers``."""
    given = [("--beside", args.beside), ("--layer-threshold", args.layer_threshold is not None)]
    alone = [flag for flag, is_given in given if is_given]
    if alone and not args.layers:
        raise InputError(f"{alone[0]} means nothing without --layers", remedy="add --layers")


def _describe_signature(bundle: Bundle, key: Path | None) -> str:
    """Whose signature a bundle bears, and whether it was checked; empty if it bears none."""
    signer = bundle.signed_by
    if signer is None:
        return ""
    if key is None:
        return f"signed with key {signer[:16]}, which was not checked: --key PUB"
    return f"signature checked: the holder of {key} made this bundle (key {signer[:16]})"


def _open_reference(bundle: Bundle, args: argparse.Namespace) -> Bundle:
    """Another bundle of the same weights as the reference; a key that was given counts for it too."""
    other = Bundle.open(args.reference, key=args.key)
    if other.manifest.model.weights.sha256 != bundle.manifest.model.weights.sha256:
        raise InputError(
            "was made from other weights, so it is no reference",
            where=args.reference,
            remedy="export both from one checkpoint",
        )
    return other


def _load_reference(other: Bundle, args: argparse.Namespace) -> Predictor:
    """The reference on this machine; trust that was given counts for it too."""
    return Predictor.load(other, threads=args.threads, trusted_engine=args.trust_engine, cache=False)


def _require_cluster(args: argparse.Namespace) -> None:
    """Raise :class:`InputError` for flags that do not go together with ``--ray``, or not without it."""
    require_cluster_flags(args)
    if args.ray is None:
        return
    if args.data is None:
        raise InputError("--ray means nothing without --data", remedy="add --data, or leave --ray out")
    if args.answers is not None:
        require_outside_bundles(args.answers / "answers")
    if args.layers:
        raise InputError("--layers runs on this machine only", remedy="leave --ray or --layers out")


def _open_data(args: argparse.Namespace) -> LabelledImages | None:
    """The labelled images, if there are any."""
    if args.data is None:
        return None
    from ..scale.sources import open_source

    return open_source(args.data)


def _make_answerer(
    bundle: Bundle, other: Bundle | None, args: argparse.Namespace, progress: Progress
) -> Callable[[Predictor, Labelled], Answers] | None:
    """What answers the images on a cluster, where one was asked for."""
    if args.ray is None:
        return None
    from ..scale.evaluation import make_answerer

    return make_answerer(bundle, other, make_settings(args, progress))
