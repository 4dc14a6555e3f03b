"""``cmt-export``: one command from a checkpoint to a verified bundle.

What is heavy (PyTorch, ONNX) is imported once the arguments are read, so that ``--help`` is quick and a
missing package becomes a message."""

from __future__ import annotations

import argparse
import contextlib
import gc
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmt_edge.deploy.cli.console import make_parser, run_command
from cmt_edge.deploy.cli.output import find_width, say, say_folded, tell
from cmt_edge.deploy.errors import InputError, RuntimeMissingError
from cmt_edge.startup import name_program

from .first_look import take_first_look
from .models import show_models
from .options import add_flags, read_flags, read_mapping
from .settings import GROUPS, Settings

if TYPE_CHECKING:
    from cmt_edge.deploy import Bundle

    from .config import ExportConfig
    from .replaced import Replaced

EXAMPLES = """\
examples:
  %(prog)s --model cmt_nano --precision int8 --data generated
  %(prog)s --model cmt_xs --weights cmt_xs.pth --precision int8 --data photos/train --eval-data photos/test
  %(prog)s --model cmt_xs --weights cmt_xs.pth --precision auto --data photos/train --eval-data photos/test
  %(prog)s --model cmt_xs --weights cmt_xs.pth --format trt --half --no-build
  %(prog)s --model cvt_13 --weights cvt_13.pth --head features
  %(prog)s --model my_package:build_model --imgsz 224 --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5
  %(prog)s --model cmt_s --weights random --format onnx --batch 0 --dry-run
"""
"""What ``--help`` prints last."""
COLLECT_AFTER = (50_000, 20, 100)
"""Thresholds of Python's garbage collector during an export: objects made since the last collection of the
youngest, and collections of each generation before the next older one."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``cmt-export``."""
    return run_command(_main, build_parser().parse_args(argv))


def build_parser() -> argparse.ArgumentParser:
    """The flags of ``cmt-export``: those of :class:`~cmt_edge.export.settings.Settings`, and what is asked of
    the command itself."""
    p = make_parser(
        name_program("export"),
        "Export a hybrid CNN-transformer classifier to a verified bundle.",
        EXAMPLES,
    )
    p.add_argument(
        "--config",
        type=Path,
        help="TOML file with the same settings, as such or in a table [export]; flags win",
    )
    p.add_argument(
        "--list-models",
        action="store_true",
        help="print the models and exit (docs/which-model.md: which one for a budget of milliseconds)",
    )
    p.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything that can be checked, print the plan, write nothing",
    )
    add_flags(p, Settings, GROUPS)
    return p


def _main(args: argparse.Namespace) -> int:
    try:
        if args.list_models:
            return show_models(args.json)
        return _run_export(args)
    except ModuleNotFoundError as exc:
        raise RuntimeMissingError(
            f"{exc.name} is not installed",
            remedy='pip install "cmt-edge[all]"',
        ) from exc


def _run_export(args: argparse.Namespace) -> int:
    from cmt_edge.deploy import report
    from cmt_edge.deploy.progress import Progress

    progress = Progress(args.quiet)
    given, dry_run = _read_settings(args)
    take_first_look(given, args.config)
    with progress.step("load PyTorch"):
        import_module("torch")
    config = _make_config(given, args)
    with progress.step("load ONNX and the runtimes"):
        from . import pipeline
        from .plan import format_plan
        from .replaced import read_replaced

    if dry_run:
        plan = pipeline.make_plan(config)
        if args.json:
            say(report.to_json(plan))
        else:
            say_folded(format_plan(plan))
        return 0
    before = {target: read_replaced(target) for target in config.targets}
    with _rare_collections():
        bundle = pipeline.run(config, progress)
    _show_bundle(bundle, before.get(bundle.path), config, args.json)
    return 0


def _read_settings(args: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """What the flags and the settings file ask for; and whether only the plan is wanted."""
    from .config_file import read_config

    written = read_config(args.config) if args.config else {}
    dry_run = _take_dry_run(written, args.config) or args.dry_run
    settings = read_mapping(written, Settings, args.config)
    return settings | read_flags(args, Settings), dry_run


def _make_config(given: dict[str, Any], args: argparse.Namespace) -> ExportConfig:
    """The export that was asked for, checked; the checkpoint may say which model it is."""
    from .checkpoint_settings import find_settings_by_shapes
    from .config import ExportConfig

    by_shapes = find_settings_by_shapes(given)
    if by_shapes and not args.quiet:
        tell(f"model: {by_shapes['model']}, told by the shapes of the weights")
    config = ExportConfig.from_mapping(by_shapes | given, args.config)
    config.check()
    return config


def _show_bundle(
    bundle: Bundle,
    replaced: Replaced | None,
    config: ExportConfig,
    as_json: bool,
) -> None:
    """Print what was exported, and what it replaced."""
    from cmt_edge.deploy import report
    from cmt_edge.deploy.bundle.packed import locate_packed

    from .replaced import describe_replaced

    if as_json:
        packed = {"packed": str(locate_packed(bundle.path))} if config.pack else {}
        say(report.to_json(report.make_bundle_json(bundle) | {"replaced": replaced} | packed))
        return
    if replaced:
        say_folded(describe_replaced(replaced, bundle))
    say_folded(report.describe_bundle(bundle, config.verify_flags, find_width()))
    if config.pack:
        say_folded(f"also as one file: {locate_packed(bundle.path)}")


def _take_dry_run(settings: dict[str, Any], where: Path | None) -> bool:
    """What a settings file says of ``--dry-run``, which is no setting of the bundle and is removed; raises
    :class:`InputError` unless it is true or false."""
    spelled = {key: key.lstrip("-").replace("-", "_") for key in settings}
    keys = [key for key, name in spelled.items() if name == "dry_run"]
    values = [settings.pop(key) for key in keys]
    for value in values:
        if type(value) is not bool:
            raise InputError(
                f"dry-run = {value!r} should be bool",
                where=where,
                remedy="correct the file",
            )
    return any(values)


@contextlib.contextmanager
def _rare_collections() -> Iterator[None]:
    """Let Python look for garbage more rarely: among the many objects of torch, which live on, that took half
    a second of an export."""
    threshold = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(*COLLECT_AFTER)
    try:
        yield
    finally:
        gc.set_threshold(*threshold)
        gc.unfreeze()
