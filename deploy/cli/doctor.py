"""``cmt-edge doctor``: what is installed, what this machine can do, and what is missing."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence

from cmt_edge.startup import name_program

from .. import report
from ..backends import FORMAT_ALIASES, RUNTIME_OF_FORMAT
from ..doctor.checkup import check_up
from ..errors import RuntimeMissingError, UnknownNameError
from ..progress import Progress
from .console import make_parser, run_command
from .output import find_width, say, say_folded, tell

EXAMPLES = """\
examples:
  %(prog)s
  %(prog)s --format openvino
  %(prog)s --format trt,rtx --json
"""
"""What ``--help`` prints last."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``cmt-edge doctor``."""
    return run_command(_main, build_parser().parse_args(argv))


def build_parser() -> argparse.ArgumentParser:
    """The flags of ``cmt-edge doctor``."""
    p = make_parser(
        name_program("doctor"),
        "Say what is installed, what this machine can run, and what is missing, with a remedy for each. Put"
        " what it prints into a bug report.",
        EXAMPLES,
    )
    p.add_argument(
        "--format",
        action="append",
        metavar=f"{{{','.join(RUNTIME_OF_FORMAT)}}}",
        help="look only at what bundles of this format need, or of several, by commas; the exit code is 3 if"
        " one of them does not run here",
    )
    return p


def _main(args: argparse.Namespace) -> int:
    formats = _read_formats(args.format or [])
    found = check_up(formats or [*RUNTIME_OF_FORMAT], Progress(args.quiet).step)
    if args.json:
        say(report.to_json(found))
    else:
        say_folded(report.describe_checkup(found, find_width()))
    unserved = found.list_unserved() if formats else []
    if unserved:
        tell(f"error: bundles of --format {', '.join(unserved)} do not run here")
    return RuntimeMissingError.exit_code if unserved else 0


def _read_formats(asked: Sequence[str]) -> list[str]:
    """The formats that were named, each once.

    Raises :class:`UnknownNameError` for one that does not exist.
    """
    words = [word.strip().lower() for text in asked for word in text.split(",")]
    names = [FORMAT_ALIASES.get(word, word) for word in words if word]
    for name in names:
        if name not in RUNTIME_OF_FORMAT:
            close = difflib.get_close_matches(name, [*RUNTIME_OF_FORMAT, *FORMAT_ALIASES], n=2, cutoff=0.4)
            raise UnknownNameError("format", name, close, RUNTIME_OF_FORMAT)
    return list(dict.fromkeys(names))
