"""``cmt-report``: what is known of bundles, as one HTML file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cmt_edge.startup import name_program

from ..bundle import Bundle
from ..files import write_output
from ..report import to_json
from ..report.html import (
    Conclusion,
    Subject,
    compare,
    conclude,
    make_bundle_page,
    make_comparison_page,
    make_conclusion_json,
    read_subject,
)
from .console import add_key_flag, make_parser, run_command
from .output import say
from .pages import require_page_target

PAGE = Path("report.html")
"""Where the page is written unless ``-o`` says otherwise."""
EXAMPLES = """\
examples:
  %(prog)s cmt_xs_int8_openvino
  %(prog)s cmt_xs_fp32_openvino cmt_xs_int8_openvino -o comparison.html
"""
"""What ``--help`` prints last."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``cmt-report``."""
    return run_command(_main, build_parser().parse_args(argv))


def build_parser() -> argparse.ArgumentParser:
    """The flags of ``cmt-report``."""
    p = make_parser(
        name_program("report"),
        "Write what bundles record as one HTML file: of one its report, of several a comparison. Nothing is"
        " measured.",
        EXAMPLES,
    )
    p.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    p.add_argument(
        "-o",
        "--output",
        type=Path,
        default=PAGE,
        metavar="FILE",
        help=f"the page (default {PAGE})",
    )
    add_key_flag(p)
    return p


def _main(args: argparse.Namespace) -> int:
    require_page_target(args.output)
    subjects = [read_subject(Bundle.open(path, key=args.key)) for path in args.bundles]
    page = make_bundle_page(subjects[0]) if len(subjects) == 1 else make_comparison_page(subjects)
    write_output(args.output, page.encode())
    found = [conclude(subject) for subject in subjects]
    verdict = found[0] if len(found) == 1 else compare(subjects, found, None)
    if args.json:
        say(to_json(_make_json(args.output, verdict, subjects, found)))
    else:
        say(f"{verdict.sentence}\nreport: {args.output}")
    return 0


def _make_json(
    page: Path,
    verdict: Conclusion,
    subjects: list[Subject],
    found: list[Conclusion],
) -> dict[str, Any]:
    """What ``--json`` prints; the figures themselves are in the page."""
    bundles = [
        {"bundle": subject.path, "conclusion": make_conclusion_json(one)}
        for subject, one in zip(subjects, found, strict=True)
    ]
    return {"page": str(page), "conclusion": make_conclusion_json(verdict), "bundles": bundles}
