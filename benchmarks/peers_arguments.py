"""The command line of ``peers.py``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from common import add_protocol_arguments

from cmt_edge.deploy.measure.isa import ISAS


def parse_arguments(about: str, rows: Sequence[str]) -> argparse.Namespace:
    """The command line; ``about`` says what the command does, ``rows`` are the keys of all rows."""
    p = argparse.ArgumentParser(description=about, epilog="rows: " + ", ".join(rows))
    p.add_argument(
        "--models",
        nargs="+",
        default=["cmt_ti", "cmt_xs", "cmt_s"],
        help="any names of cmt-export --list-models",
    )
    add_protocol_arguments(p)
    p.add_argument(
        "--batch",
        type=int,
        default=1,
        help="batch size of the graphs of rows without an environment (default 1); 0 for graphs with any"
        " batch size, measured with one image",
    )
    p.add_argument(
        "--isa",
        choices=ISAS,
        help="limit OpenVINO to an older CPU's instructions; only rows that it runs without bfloat16",
    )
    p.add_argument("--only", nargs="+", choices=rows, metavar="ROW", help="measure these rows and the base")
    p.add_argument("--optional", action="store_true", help="measure the optional rows too")
    p.add_argument(
        "--environments",
        type=Path,
        help="keep the environments of optional rows in this folder, and use those that are complete "
        "(default: a temporary one)",
    )
    _add_outputs(p)
    _add_stages(p, rows)
    return p.parse_args()


def _add_outputs(p: argparse.ArgumentParser) -> None:
    """Where results and artefacts go."""
    p.add_argument(
        "--json", type=Path, help="write everything here; after each model, so that little is lost"
    )
    p.add_argument("--markdown", type=Path, help="write the tables here too")
    p.add_argument("--plot", type=Path, help="write the speed-ups here, as .png or .svg")
    p.add_argument(
        "--again",
        nargs="+",
        type=Path,
        metavar="JSON",
        help="measure nothing: write tables and plot of these earlier runs",
    )
    p.add_argument("--page", type=Path, help="put the tables of --again into this page, between comments")
    p.add_argument("--part", help="what the comments of the page call the tables")
    p.add_argument(
        "--folder", type=Path, help="keep artefacts and logs in this empty folder (default: a temporary one)"
    )
    p.add_argument("--latency-only", action="store_true", help="measure no throughput")
    p.add_argument("--reuse", action="store_true", help="use the artefacts that --folder already has")
    p.add_argument(
        "--build-only",
        action="store_true",
        help="make the artefacts in --folder and run each 20 times, but measure nothing: a later run with"
        " --reuse does",
    )


def _add_stages(p: argparse.ArgumentParser, rows: Sequence[str]) -> None:
    """Parts of the work: what the command runs in processes of their own, or a user leaves out."""
    p.add_argument("--model", help=argparse.SUPPRESS)
    p.add_argument(
        "--build", choices=rows, metavar="ROW", help="only make this row's artefact of --model in --folder"
    )
    p.add_argument("--run", choices=rows, metavar="ROW", help="only load it and run 20 inferences")
    p.add_argument("--serve", choices=rows, metavar="ROW", help=argparse.SUPPRESS)
