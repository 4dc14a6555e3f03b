"""``cmt-export``: one command from a checkpoint to a verified bundle."""

from __future__ import annotations

import argparse
import contextlib
import gc
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from cmt_edge.deploy import report
from cmt_edge.deploy.bundle import plain
from cmt_edge.deploy.cli.console import parser, run
from cmt_edge.deploy.errors import RuntimeMissingError
from cmt_edge.deploy.measure.isa import ISAS
from cmt_edge.deploy.progress import Progress

EPILOG = """\
examples:
  cmt-export --model cmt_nano --precision int8 --data generated
  cmt-export --model cmt_xs --weights cmt_xs.pth --precision int8 --data photos/train --eval-data photos/test
  cmt-export --model cmt_xs --weights cmt_xs.pth --precision auto --data photos/train --eval-data photos/test
  cmt-export --model cmt_xs --weights cmt_xs.pth --format trt --half --no-build
  cmt-export --model cvt_13 --weights cvt_13.pth --head features
  cmt-export --model my_package:build_model --imgsz 224 --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5
  cmt-export --model cmt_s --weights random --format onnx --batch 0 --dry-run
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``cmt-export``."""
    p = parser("cmt-export", "Export a hybrid CNN-transformer classifier to a verified bundle.", EPILOG)
    keep: dict[str, Any] = {
        "default": argparse.SUPPRESS
    }  # flags not given leave the configuration file's value alone
    p.add_argument(
        "--model", help="model name, see --list-models; or MODULE:FACTORY of your own, or timm:NAME", **keep
    )
    p.add_argument("--list-models", action="store_true", help="print the models and exit")
    p.add_argument("--weights", help="pretrained (default), random, or a checkpoint file", **keep)
    p.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="take a checkpoint's averaged weights, or not (default: where it has them)",
        **keep,
    )
    p.add_argument("--num-classes", type=int, help="number of classes of the checkpoint", **keep)
    p.add_argument(
        "--head",
        help="logits (default), or features: the stage maps (strides 4 to 32) instead of classes",
        **keep,
    )
    p.add_argument("--imgsz", type=int, help="input height and width, pixels", **keep)
    p.add_argument(
        "--fresh-head",
        action="store_true",
        help="start a new classifier where the class count differs",
        **keep,
    )
    p.add_argument(
        "--resize-position-bias",
        action="store_true",
        help="interpolate a checkpoint of another resolution",
        **keep,
    )
    p.add_argument("--labels", help="text file with one class name a line", **keep)
    p.add_argument(
        "--format", help="openvino (default), onnx or trt (TensorRT; also: engine, tensorrt)", **keep
    )
    p.add_argument(
        "--precision",
        help=(
            "fp32 (default), fp16 (trt), bf16 (openvino), int8, or auto: measure them "
            "here and take the fastest that passes"
        ),
        **keep,
    )
    p.add_argument(
        "--int8",
        dest="precision",
        action="store_const",
        const="int8",
        help="same as --precision int8",
        **keep,
    )
    p.add_argument(
        "--half",
        dest="precision",
        action="store_const",
        const="fp16",
        help="same as --precision fp16",
        **keep,
    )
    p.add_argument(
        "--no-build",
        dest="build",
        action="store_false",
        help="trt: write the bundle without an engine; cmt-build finishes it on the device",
        **keep,
    )
    p.add_argument(
        "--workspace",
        type=float,
        metavar="GiB",
        help="trt: scratch memory of the builder (default: 40 %% of what is free)",
        **keep,
    )
    p.add_argument("--device", help="trt: number of the GPU (default 0)", **keep)
    p.add_argument("--batch", type=int, help="batch size of the graph (default 1), 0 for any", **keep)
    p.add_argument(
        "--data",
        help=(
            "calibration images (int8; fp16: for the ranges): folder, ARCHIVE.tar[/FOLDER], 'generated', or"
            " 'synthetic' (made from the model's batch norms, takes up to some minutes)"
        ),
        **keep,
    )
    p.add_argument(
        "--calib-size",
        type=int,
        help="number of calibration images (default 300, or all; synthetic: 64, above 128 pixels 32)",
        **keep,
    )
    p.add_argument(
        "--eval-data",
        help="labelled images to measure top-1 on: class folders, or ARCHIVE.tar[/FOLDER]",
        **keep,
    )
    p.add_argument("--eval-limit", type=int, help="use only so many of them", **keep)
    p.add_argument(
        "--by-order", action="store_true", help="match class folders to labels in sorted order", **keep
    )
    p.add_argument(
        "--max-drop", type=float, help="allowed loss of top-1, points (default 1.0; auto: 0.3)", **keep
    )
    p.add_argument(
        "--keep-float",
        metavar="GROUPS",
        help="int8: groups of operations that stay float, by commas (auto names them)",
        **keep,
    )
    p.add_argument(
        "--latency-budget", type=float, metavar="MS", help="auto: allowed median latency of one batch", **keep
    )
    p.add_argument(
        "--time-budget", type=float, metavar="S", help="auto: refine no further after so many seconds", **keep
    )
    p.add_argument(
        "--isa",
        help=(
            f"auto: limit the runtime to an older CPU's instructions while it is measured: {', '.join(ISAS)} "
            "(openvino)"
        ),
        **keep,
    )
    p.add_argument(
        "--atol", type=float, help="allowed golden logit difference (default: by precision)", **keep
    )
    p.add_argument("--mean", metavar="R,G,B", help="mean of the values 0..1 (default: the model's)", **keep)
    p.add_argument(
        "--std", metavar="R,G,B", help="standard deviation of the values 0..1 (default: the model's)", **keep
    )
    p.add_argument(
        "--crop-ratio",
        type=float,
        help="share of the short side kept by the centre crop, 0 for none (default: the model's)",
        **keep,
    )
    p.add_argument("--exif", help="apply (default) or ignore the orientation of photographs", **keep)
    p.add_argument("--threads", type=int, help="CPU threads for verification and measurement", **keep)
    p.add_argument(
        "--seed", type=int, help="seed of random weights and of the calibration choice (default 0)", **keep
    )
    p.add_argument(
        "--no-cache",
        dest="cache",
        action="store_false",
        help="do not reuse calibrated graphs, synthetic images and measurements",
        **keep,
    )
    p.add_argument(
        "-o", "--output", help="folder in which the bundle's folder is made (default: here)", **keep
    )
    p.add_argument("--config", type=Path, help="TOML file with the same settings; flags win")
    p.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything that can be checked, print the plan, write nothing",
    )
    return run(_main, p.parse_args(argv))


def _main(args: argparse.Namespace) -> int:
    try:
        return _export(args)
    except ModuleNotFoundError as exc:
        raise RuntimeMissingError(
            f"{exc.name} is not installed", remedy='pip install "cmt-edge[all]"'
        ) from exc


def _export(args: argparse.Namespace) -> int:
    from .config import ExportConfig, read_config  # heavy: torch is imported here, after --help

    if args.list_models:
        return _list_models(args.json)
    given = {f.name: getattr(args, f.name) for f in fields(ExportConfig) if hasattr(args, f.name)}
    settings = (read_config(args.config) if args.config else {}) | given
    config = ExportConfig.from_mapping(settings, args.config)
    config.check()
    from .pipeline import preflight
    from .pipeline import run as export

    if args.dry_run:
        preflight(config)
        plan = _plan(config)
        print(report.to_json(plan) if args.json else _plan_text(plan))
        return 0
    with _rare_collections():
        bundle = export(config, Progress(args.quiet))
    print(report.to_json(report.bundle_json(bundle)) if args.json else report.bundle_text(bundle))
    return 0


@contextlib.contextmanager
def _rare_collections() -> Iterator[None]:
    """Let Python look for garbage more rarely: among the many objects of torch, which live on, that took half
    a second of an export."""
    threshold = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*threshold)
        gc.unfreeze()


def _list_models(as_json: bool) -> int:
    from cmt_edge.cmt import list_models, model_spec

    specs = [model_spec(name) for name in list_models()]
    if as_json:
        print(
            report.to_json(
                [
                    {
                        "name": s.name,
                        "img_size": s.img_size,
                        "classes": s.num_classes,
                        "params": s.params,
                        "macs": s.macs,
                        "top1": s.top1,
                    }
                    for s in specs
                ]
            )
        )
        return 0
    rows = [
        [
            s.name,
            s.family,
            str(s.img_size),
            str(s.num_classes),
            f"{s.params / 1e6:.1f}" if s.params else "-",
            f"{s.macs / 1e9:.2f}" if s.macs else "-",
            s.top1 or "-",
        ]
        for s in specs
    ]
    print(report.table(["model", "family", "size", "classes", "M params", "GMACs", "published top-1"], rows))
    return 0


def _plan(config: Any) -> dict[str, Any]:
    from cmt_edge.calib import CalibrationSet
    from cmt_edge.calib.data import SYNTHETIC
    from cmt_edge.deploy.images import ImageSet

    from .config import FORMATS
    from .pipeline import synthetic_count

    steps = ["load the reference model", "fuse", "export to ONNX", "simplify"]
    plan: dict[str, Any] = {
        "bundle": str(config.target),
        "replaces": config.target.exists(),
        "weights": config.weights,
    }
    if config.data:
        quantizes = config.precision in ("int8", "auto")
        if config.data == SYNTHETIC:  # made from the model, which a plan does not load
            images = {"source": SYNTHETIC, "images": synthetic_count(config)}
            steps.insert(1, f"make {images['images']} synthetic images")
        else:
            chosen = CalibrationSet.choose(config.data, config.calib_size, config.preprocess, config.seed)
            images = plain(chosen.describe())
        plan["calibration" if quantizes else "ranges"] = images
        steps.append(f"{'calibrate on' if quantizes else 'observe'} {images['images']} images")
    if config.eval_data:
        labelled = ImageSet(config.eval_data)
        plan["evaluation"] = {
            "images": min(len(labelled), config.eval_limit or len(labelled)),
            "classes": len(labelled.classes),
        }
    if config.precision == "auto":
        plan["allowed"] = {
            "drop": config.allowed_drop,
            "latency_ms": config.latency_budget,
            "time_s": config.time_budget,
            "isa": config.isa,
        }
        plan["candidates"] = [*FORMATS[config.format], "int8 in part"]
        plan["bundle"] = " or ".join(map(str, config.targets))
        plan["replaces"] = any(target.exists() for target in config.targets)
        steps += [
            "measure the answers of every candidate",
            "rank the groups by their sensitivity to int8",
            "keep the worst float until the drop holds",
            "measure the latencies, interleaved",
            "choose",
        ]
    if config.format == "trt":
        steps += [
            "write the precision into the graph",
            *(["build the engine", "verify", "measure"] if config.build else ["verify"]),
        ]
    else:
        steps += [f"compile for {config.format}", "verify", "measure"]
    steps.append("write the bundle")
    return plan | {
        "input": [config.batch or "batch", 3, config.img_size, config.img_size],
        "classes": config.classes,
        "precision": config.precision,
        "format": config.format,
        "steps": steps,
    }


def _plan_text(plan: dict[str, Any]) -> str:
    lines = [
        f"{key:<12} {', '.join(map(str, value)) if key == 'steps' else value}" for key, value in plan.items()
    ]
    return "\n".join([*lines, "dry run: nothing was written"])
