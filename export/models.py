"""``cmt-edge models``: the models that have a name."""

from __future__ import annotations

import argparse
from fnmatch import fnmatch
from importlib import import_module
from typing import TYPE_CHECKING, Any

from cmt_edge.deploy.cli.console import make_parser, run_command
from cmt_edge.deploy.cli.output import find_width, say, tell
from cmt_edge.deploy.errors import RuntimeMissingError, UnknownNameError
from cmt_edge.deploy.progress import Progress
from cmt_edge.startup import name_program

if TYPE_CHECKING:
    from cmt_edge.cmt import ModelSpec

EXAMPLES = """\
examples:
  %(prog)s
  %(prog)s cvt
  %(prog)s "cmt_*" --json
"""
"""What ``--help`` prints last."""

HEADER = ("model", "family", "size", "classes", "M params", "GMACs", "published top-1")
"""Heads of the table."""

ADVICE = "which one for a budget of milliseconds: docs/which-model.md"
"""What follows the table, on standard error."""

SHOWN_NAMES = 3
"""The largest number of close names that an error offers."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``cmt-edge models``."""
    return run_command(_main, build_parser().parse_args(argv))


def build_parser() -> argparse.ArgumentParser:
    """The flags of ``cmt-edge models``."""
    p = make_parser(
        name_program("models"),
        "List the models that have a name. Your own modules, timm's models and checkpoints of others need"
        " none (docs/families.md). docs/which-model.md says which one to take for a budget of milliseconds.",
        EXAMPLES,
    )
    p.add_argument(
        "name",
        nargs="?",
        default="*",
        help="only models whose name has this in it, in any case; * and ? stand for letters",
    )
    return p


def _main(args: argparse.Namespace) -> int:
    try:
        with Progress(args.quiet).shown("read the models"):
            import_module("cmt_edge.cmt")
        return show_models(args.json, args.name)
    except ModuleNotFoundError as exc:
        raise RuntimeMissingError(
            f"{exc.name} is not installed",
            remedy='pip install "cmt-edge[all]"',
        ) from exc


def show_models(as_json: bool, pattern: str = "*") -> int:
    """Print the models whose names fit ``pattern``; returns the exit code.

    Raises :class:`UnknownNameError` where there is none.
    """
    from difflib import get_close_matches

    from cmt_edge.cmt import find_model, list_models
    from cmt_edge.deploy import report

    names = list_models()
    found = [name for name in names if fnmatch(name, f"*{pattern.lower()}*")]
    if not found:
        close = get_close_matches(pattern.lower(), names, n=SHOWN_NAMES, cutoff=0.4)
        raise UnknownNameError("model", pattern, close, names)
    specs = [find_model(name) for name in found]
    if as_json:
        say(report.to_json([_describe_model(spec) for spec in specs]))
        return 0
    rows = [_format_model_row(spec) for spec in specs]
    say(report.format_table(HEADER, rows, width=find_width()))
    tell(ADVICE)
    return 0


def _describe_model(spec: ModelSpec) -> dict[str, Any]:
    """A model for ``--json``."""
    return {
        "name": spec.name,
        "img_size": spec.img_size,
        "classes": spec.num_classes,
        "params": spec.params,
        "macs": spec.macs,
        "top1": spec.top1,
    }


def _format_model_row(spec: ModelSpec) -> list[str]:
    """A row of the table."""
    return [
        spec.name,
        spec.family,
        str(spec.img_size),
        str(spec.num_classes),
        f"{spec.params / 1e6:.1f}" if spec.params else "-",
        f"{spec.macs / 1e9:.2f}" if spec.macs else "-",
        spec.top1 or "-",
    ]
