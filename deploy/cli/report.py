"""``cmt-report``: what is known of bundles, as one HTML file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cmt_edge.startup import name_program

from ..bundle import Bundle
from ..report import to_json
from ..report.html import (
    Conclusion,
    Reported,
    Subject,
    compare,
    conclude,
    conclude_fleet,
    describe_machine,
    make_bundle_figures,
    make_bundle_page,
    make_comparison_figures,
    make_comparison_page,
    make_conclusion_json,
    make_figures_file,
    make_fleet_figures,
    make_fleet_page,
    name_members,
    read_reported,
    read_subject,
    require_distinct,
    require_one_model,
)
from .console import add_key_flag, make_parser, run_command
from .output import say, say_folded
from .pages import add_content_flags, require_targets, write_pages

PAGE = Path("report.html")
"""Where the page is written unless ``-o`` says otherwise."""
EXAMPLES = """\
examples:
  %(prog)s cmt_xs_int8_openvino
  %(prog)s cmt_xs_fp32_openvino cmt_xs_int8_openvino -o comparison.html
  %(prog)s --merge orin.json server.json laptop.json -o fleet.html
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
        "--merge",
        action="store_true",
        help="one row a device: take pages, or figures as JSON, that other devices wrote (or bundles), all"
        " of the same weights",
    )
    p.add_argument(
        "-o",
        "--output",
        type=Path,
        default=PAGE,
        metavar="FILE",
        help=f"the page (default {PAGE})",
    )
    add_content_flags(p.add_argument)
    add_key_flag(p)
    return p


def _main(args: argparse.Namespace) -> int:
    require_targets(args, args.output)
    if args.merge:
        return _merge(args)
    with_images = not args.no_thumbnails
    subjects = [read_subject(Bundle.open(path, key=args.key), with_images) for path in args.bundles]
    if len(subjects) == 1:
        page, figures = make_bundle_page(subjects[0]), make_bundle_figures(subjects[0])
    else:
        page, figures = make_comparison_page(subjects), make_comparison_figures(subjects)
    write_pages(args, args.output, lambda: page, lambda: make_figures_file(figures))
    found = [conclude(subject) for subject in subjects]
    verdict = found[0] if len(found) == 1 else compare(subjects, found, None)
    _answer(args, verdict, _make_json(args.output, verdict, subjects, found))
    return 0


def _merge(args: argparse.Namespace) -> int:
    """The page of a fleet."""
    read = [member for path in args.bundles for member in read_reported(path, args.key)]
    require_one_model(read)
    require_distinct(read)
    members = name_members(read)
    write_pages(
        args,
        args.output,
        lambda: make_fleet_page(members),
        lambda: make_figures_file(make_fleet_figures(members)),
    )
    verdict = conclude_fleet(members)
    devices = [_make_device_json(member) for member in members]
    found = {"page": str(args.output), "conclusion": make_conclusion_json(verdict), "devices": devices}
    _answer(args, verdict, found)
    return 0


def _make_device_json(member: Reported) -> dict[str, Any]:
    subject = member.subject
    return {
        "device": member.device,
        "bundle": subject.name,
        "machine": describe_machine(subject),
        "p50_ms": subject.p50_ms,
        "drop": subject.data.drop if subject.data else None,
        "conclusion": make_conclusion_json(conclude(subject)),
    }


def _answer(args: argparse.Namespace, verdict: Conclusion, found: dict[str, Any]) -> None:
    if args.json:
        say(to_json(found))
    else:
        say_folded(f"{verdict.sentence}\nreport: {args.output}")


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
